"""Training: one typed config, one readable loop."""
