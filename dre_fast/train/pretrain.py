"""Label-free warm-up of a tile encoder by instance discrimination, for encoders that come without weights."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dre_fast.data.files import write_tensors
from dre_fast.data.subset import Reader
from dre_fast.nn.loss import SlideReportLoss
from dre_fast.nn.tile_encoders import TileEncoder
from dre_fast.progress import progress
from dre_fast.train.augment import jitter_stain, turn_and_flip


def pretrain_encoder(
    encoder: TileEncoder,
    reader: Reader,
    *,
    steps: int,
    slides_per_step: int = 16,
    tiles_per_slide: int = 8,
    lr: float = 3e-3,
    stain: float = 0.25,
    seed: int = 0,
) -> list[float]:
    """Teach an encoder, in place, to tell tiles apart whatever their turn, crop and stain.

    Two views of each tile are positives of each other, all other tiles of the step negatives: symmetric InfoNCE behind
    a projection that is thrown away (SimCLR, Chen et al. 2020).

    Args:
        encoder: tile encoder; no label is used.
        reader: tiles of the training slides.
        steps: optimiser steps of ``slides_per_step * tiles_per_slide`` tiles, two views each.
        lr: peak AdamW rate, cosine schedule.
        stain: strength of the stain jitter.

    Returns:
        The loss of each step.
    """
    generator = torch.Generator().manual_seed(seed)
    projection = nn.Sequential(
        nn.Linear(encoder.dim, 2 * encoder.dim), nn.ReLU(), nn.Linear(2 * encoder.dim, 32)
    )
    contrast = SlideReportLoss(temperature=0.1)
    parameters = [*encoder.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    encoder.train()
    losses = []
    for step in progress(range(steps), "pretrain", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        picked = [
            (slide, torch.randint(reader.tiles_per_slide[slide], (tiles_per_slide,), generator=generator))
            for slide in torch.randint(len(reader), (slides_per_step,), generator=generator).tolist()
        ]
        tiles = torch.cat([reader.read(slide, ids) for slide, ids in picked])
        names = torch.cat(
            [(slide << 32) + ids for slide, ids in picked]
        )  # a tile drawn twice is no negative of itself
        views = torch.cat([_view(tiles, stain, generator) for _ in range(2)])
        first, second = projection(encoder(views)).chunk(2)
        loss = contrast(first, second, names)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _view(tiles: Tensor, stain: float, generator: torch.Generator) -> Tensor:
    """A random symmetry, stain and crop of each tile, float [m, 3, P, P] in [0, 1]; one crop box for the call."""
    images = jitter_stain(turn_and_flip(tiles, generator), stain, generator).float() / 255
    size = images.shape[-1]
    side = int(torch.randint(int(0.7 * size), size + 1, (1,), generator=generator))
    top, left = torch.randint(size - side + 1, (2,), generator=generator).tolist()
    return F.interpolate(
        images[..., top : top + side, left : left + side], size=(size, size), mode="bilinear"
    )


def save_encoder(encoder: nn.Module, path: str | Path) -> None:
    """Write an encoder's weights as safetensors, for ``model.encoder_weights``."""
    write_tensors(path, encoder.state_dict())
