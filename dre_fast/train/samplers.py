"""Which slides and which of their tiles a step sees: functions of the seed, the epoch and the bank alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dre_fast.nn.bank import MemoryBank


@dataclass
class EpochPlan:
    """The visits of an epoch in order: ``slides`` int64 [S] (bank ids), ``tiles`` int64 [S, m] (-1 = unused slot)."""

    slides: Tensor
    tiles: Tensor


def epoch_order(slides: int, seed: int, epoch: int) -> Tensor:
    """Order of the slides in an epoch, int64 [slides]: a function of (seed, epoch) alone."""
    return torch.randperm(slides, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def plan_epoch(bank: MemoryBank, *, epoch: int, live: int, seed: int) -> EpochPlan:
    """Every slide once, in a random order; its live tiles are the next ``live`` positions of its permutation."""
    order = epoch_order(bank.num_slides, seed, epoch)
    tiles = bank.sample(order.to(bank.start.device), live, cycle=epoch, seed=seed).cpu()
    return EpochPlan(order, tiles)
