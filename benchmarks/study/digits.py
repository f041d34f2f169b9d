"""Slides whose tiles are images of handwritten digits: bags with rare witnesses, and features from another task.

A slide is a grid of 16 x 16 tiles of 16 px, each one digit image of scikit-learn's set (8 x 8, 1,797 of them; Alpaydin
& Kaynak 1998), enlarged. A positive slide holds a few nines, a negative one none: about one tile in a hundred decides.
The encoder comes from telling 0..4 from 5..9, which leaves a nine near the other large digits.
Digit images of training, validation and test slides are disjoint.
"""

from __future__ import annotations

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

TILE, GRID, WITNESS = 16, 16, 9


def digit_images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All digits: uint8 [1797, 16, 16] and their classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.clip(digits.images * 16, 0, 255).astype(np.uint8)
    return np.kron(images, np.ones((1, 2, 2), dtype=np.uint8)), digits.target.astype(np.int64)


def split_digits(seed: int) -> dict[str, NDArray[np.int64]]:
    """Numbers of the digit images that each split may use."""
    order = np.random.default_rng(seed).permutation(1797)
    return {"train": order[:1000], "val": order[1000:1250], "test": order[1250:]}


def make_cohort(folder: Path, slides: dict[str, int], witnesses: int, seed: int) -> Path:
    """Slides as .npy files, their tile coordinates and cohort.csv (columns slide_id, path, split, witness)."""
    images, classes = digit_images()
    (folder / "slides").mkdir(parents=True)
    (folder / "tiles").mkdir()
    rows = ["slide_id,path,split,witness"]
    for split, numbers in split_digits(seed).items():
        rng = np.random.default_rng([seed, len(split)])
        nines = numbers[classes[numbers] == WITNESS]
        others = numbers[classes[numbers] != WITNESS]
        for i in range(slides[split]):
            positive = i % 2
            chosen = rng.choice(others, GRID * GRID)
            if positive:
                chosen[rng.choice(GRID * GRID, witnesses, replace=False)] = rng.choice(nines, witnesses)
            name = f"{split}-{i:03d}"
            path = folder / "slides" / f"{name}.npy"
            np.save(path, _mosaic(images[chosen]))
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
    """Teach an encoder to tell 0..4 from 5..9, on the training images; returns the last step's accuracy."""
    images, classes = digit_images()
    numbers = split_digits(seed)["train"]
    x = torch.from_numpy(images[numbers])[:, None].expand(-1, 3, -1, -1)
    y = torch.from_numpy((classes[numbers] >= 5).astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(encoder.dim, 2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.05)
    accuracy = 0.0
    for _ in range(steps):
        batch = torch.randint(len(x), (128,), generator=generator)
        logits = head(F.normalize(encoder(x[batch]), dim=1) * 8)
        loss = F.cross_entropy(logits, y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = float((logits.argmax(1) == y[batch]).float().mean())
    return accuracy
