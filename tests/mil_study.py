"""A small study of bags: the label of a slide is decided by three of its tiles."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

DIM, TILES, MARKED = 16, 40, 3


def write_bag(folder: Path, name: str, features: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file["features"] = features
        file["coords"] = np.stack([np.arange(len(features)) * 256, np.zeros(len(features), int)], 1)
    return folder / f"{name}.h5"


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_study(root: Path, cases: int = 48, first: int = 0, seed: int = 0) -> list[dict[str, object]]:
    """``features/`` and ``labels.csv`` under ``root``; every third case has two slides.

    Columns: case_id, slide_id, label (tumor or normal, by three tiles), gene (1 where tumor, some missing),
    chance (drawn), months and dead (tumor dies early).
    """
    kinds = np.random.default_rng(7).normal(size=(4, DIM)).astype(np.float32)
    mark = np.random.default_rng(8).normal(size=DIM).astype(np.float32)
    rng = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    for number in range(first, first + cases):
        tumor = number % 2
        months = float(rng.uniform(1, 9) if tumor else rng.uniform(20, 60))
        for slide in range(2 if number % 3 == 0 else 1):
            n = int(rng.integers(TILES // 2, TILES))
            x = kinds[rng.integers(4, size=n)] + 0.5 * rng.normal(size=(n, DIM)).astype(np.float32)
            x[:MARKED] += 4 * mark * (1 if tumor else -1)
            name = f"P{number:03d}-{slide}"
            write_bag(root / "features", name, x[rng.permutation(n)])
            rows.append(
                {
                    "case_id": f"P{number:03d}",
                    "slide_id": name,
                    "label": ("normal", "tumor")[tumor],
                    "gene": "" if number % 5 == 0 else tumor,
                    "chance": int(rng.integers(2)),
                    "months": round(months, 1),
                    "dead": int(tumor or number % 4 == 0),
                }
            )
    write_table(root / "labels.csv", rows)
    return rows
