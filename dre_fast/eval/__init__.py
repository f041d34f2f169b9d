"""Judging and looking at trained models: metrics with intervals, heatmaps, curves, one HTML page."""
