"""Slides whose tiles show one shape each: bags with rare witnesses, and features from another task.

A slide is a grid of 22 x 22 tiles of 16 px. A tile shows a closed curve of 2 to 5 lobes, filled or as an outline, of any
turn, size, place, contrast and noise, so no two tiles are alike. A positive slide holds a few outlines of three lobes, a
negative one none: about one tile in a hundred decides. The encoder comes from telling the other seven kinds apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from dre_fast.data.coords import write_coords
from dre_fast.data.files import write_text_atomic
from dre_fast.data.slides import open_slide
from dre_fast.data.tiling import tile_slide
from dre_fast.nn.tile_encoders import TileEncoder

TILE, GRID = 16, 22
LOBES = (2, 3, 4, 5)
KINDS = 2 * len(LOBES)  # lobes, filled; then lobes, outline
WITNESS = len(LOBES) + LOBES.index(3)


def draw_tiles(kinds: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A grey tile of each kind, uint8 [n, TILE, TILE]: radius r (1 + cos(lobes angle) / 3) around a centre."""
    n = len(kinds)

    def draw(low: float, high: float) -> NDArray[np.float64]:
        return rng.uniform(low, high, (n, 1, 1))

    lobes = np.asarray(LOBES)[kinds % len(LOBES)][:, None, None]
    outline = (kinds >= len(LOBES))[:, None, None]
    middle = (TILE - 1) / 2
    y = np.arange(TILE)[None, :, None] - middle + draw(-0.7, 0.7)
    x = np.arange(TILE)[None, None, :] - middle + draw(-0.7, 0.7)
    edge = draw(4.2, 5.4) * (1 + np.cos(lobes * np.arctan2(y, x) + draw(0, 2 * np.pi)) / 3)
    inside = edge - np.hypot(x, y)  # px, positive within
    filled = 1 / (1 + np.exp(-2.5 * inside))
    ring = np.exp(-((inside / 0.9) ** 2))
    grey = draw(0.05, 0.2) + draw(0.55, 0.75) * np.where(outline, ring, filled)
    noisy = grey + rng.normal(0, 0.03, grey.shape)
    return (np.clip(noisy, 0, 1) * 255).astype(np.uint8)


def make_cohort(folder: Path, slides: Mapping[str, int], witnesses: int, seed: int) -> Path:
    """Slides as .npy files, their tile coordinates and cohort.csv (columns slide_id, path, split, witness)."""
    (folder / "slides").mkdir(parents=True)
    (folder / "tiles").mkdir()
    rows = ["slide_id,path,split,witness"]
    others = np.asarray([kind for kind in range(KINDS) if kind != WITNESS])
    for number, (split, count) in enumerate(slides.items()):
        rng = np.random.default_rng([seed, number])
        for i in range(count):
            positive = i % 2
            kinds = rng.choice(others, GRID * GRID)
            if positive:
                kinds[rng.choice(GRID * GRID, witnesses, replace=False)] = WITNESS
            name = f"{split}-{i:04d}"
            path = folder / "slides" / f"{name}.npy"
            np.save(path, _mosaic(draw_tiles(kinds, rng)))
            with open_slide(path, mpp=1.0) as slide:
                tiling = tile_slide(slide, tile_size=TILE, mpp=1.0, tissue="none", slide_id=name)
            write_coords(folder / "tiles" / f"{name}.h5", tiling)
            rows.append(f"{name},{path},{split},{positive}")
    write_text_atomic(folder / "cohort.csv", "\n".join(rows) + "\n")
    return folder / "cohort.csv"


def _mosaic(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Tiles uint8 [GRID^2, TILE, TILE] -> one image uint8 [GRID TILE, GRID TILE, 3]."""
    grid = tiles.reshape(GRID, GRID, TILE, TILE).transpose(0, 2, 1, 3).reshape(GRID * TILE, GRID * TILE)
    return np.repeat(grid[..., None], 3, axis=2)


def pretrain(encoder: TileEncoder, steps: int, seed: int) -> float:
    """Teach an encoder to tell all kinds apart but the witnesses, which it never sees; returns the last accuracy."""
    rng = np.random.default_rng([seed, 7])
    known = np.asarray([kind for kind in range(KINDS) if kind != WITNESS])
    head = nn.Linear(encoder.dim, len(known))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.05)
    accuracy = 0.0
    for _ in range(steps):
        target = rng.integers(len(known), size=128)
        images = torch.from_numpy(draw_tiles(known[target], rng))[:, None].expand(-1, 3, -1, -1)
        logits = head(F.normalize(encoder(images), dim=1) * 8)
        right = torch.from_numpy(target)
        loss = F.cross_entropy(logits, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = float((logits.argmax(1) == right).float().mean())
    return accuracy
