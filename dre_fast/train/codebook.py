"""The codebook of a run: k-means on the rows of the bank, wherever they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from dre_fast.codebook import fit_codebook
from dre_fast.nn.bank import MemoryBank
from dre_fast.train.distributed import Group

MOST_ROWS = 1 << 18  # that several processes send to the first one


def fit_on_bank(
    bank: MemoryBank, group: Group, codewords: int, *, iterations: int, warm: bool, seed: int
) -> tuple[Tensor, float]:
    """Fit a codebook to the rows of the banks of all processes; every process gets the same one.

    One process goes through all its rows where they lie. Several send theirs to the first one, at most 2^18 in all: of
    a slide as many as its share of all rows is, drawn by its permutation, less those that were never written. Below that
    the codebook is that of one process, but for the rounding of fp32 sums.

    Returns:
        Codebook fp32 [K, D] on the bank's device, and the inertia of the rows that were seen.

    Raises:
        ValueError: as :func:`dre_fast.fit_codebook`.
    """
    start = bank.codebook if warm else None
    if group.world == 1:
        return fit_codebook(bank, codewords, iterations=iterations, warm_start=start, seed=seed)
    rows = _rows_of_all(bank, group, seed)
    fitted = None
    if group.first:
        codebook, inertia = fit_codebook(rows, codewords, iterations=iterations, warm_start=start, seed=seed)
        fitted = codebook.cpu(), inertia
    codebook, inertia = group.from_first(fitted)  # type: ignore[misc]
    return codebook.to(bank.device), inertia


def _rows_of_all(bank: MemoryBank, group: Group, seed: int) -> Tensor:
    """Rows fp32 [N, D] in the order of the slides' numbers: all, or a share of each slide."""
    total = sum(group.everyones(int(bank.length.sum())))
    quota = bank.length.cpu()
    if total > MOST_ROWS:
        quota = (quota * (MOST_ROWS / total)).ceil().long()
    parts, names = [], []
    for slide, most in enumerate(quota.tolist()):
        there = torch.tensor([slide], device=bank.device)
        tiles = bank.sample(there, most, cycle=0, seed=seed)[0].sort().values
        tiles = tiles[bank.written(slide)[tiles]]  # a row that was never written is zeros, not a feature
        parts.append(bank.read(there.expand_as(tiles), tiles))
        names.append(bank.number[there].expand_as(tiles))
    own = torch.cat(parts) if parts else torch.zeros(0, bank.dim, device=bank.device)
    name = torch.cat(names) if names else bank.number
    order = group.rows(name).sort(stable=True).indices
    return group.rows(own)[order]
