"""Bags of every odd size, a fitted ResidualMIL, and its logits on them: what every adapter is held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dre_fast import ResidualMIL

DIM, CODEWORDS, CLASSES = 12, 5, 3
LENGTHS = (30, 0, 1, 3, 50)  # without tiles, one tile, fewer than codewords
ASSIGNMENTS = ["hard", "soft", "netvlad"]


def some_bags(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, DIM, generator=generator) + 1).to(dtype) for n in LENGTHS]


def fitted(assignment: str = "hard", classes: int = CLASSES, **options: Any) -> ResidualMIL:
    torch.manual_seed(0)
    model = ResidualMIL(DIM, classes, CODEWORDS, assignment, width=32, **options)
    model.fit_codebook(some_bags())
    return model.eval()


def plain_logits(model: ResidualMIL) -> Tensor:
    """[bags, C], each bag by itself."""
    with torch.no_grad():
        return torch.cat([model(bag) for bag in some_bags()])


def ragged(bags: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(bags), torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)


def padded(bags: list[Tensor], filler: float = float("nan")) -> tuple[Tensor, Tensor]:
    """Bags filled up to one length, and a mask bool [B, N], True = valid."""
    x = torch.full((len(bags), max(map(len, bags)), DIM), filler)
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    for number, bag in enumerate(bags):
        x[number, : len(bag)], mask[number, : len(bag)] = bag, True
    return x, mask
