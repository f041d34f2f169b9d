"""Which slides and which of their tiles a step sees: functions of the seed, the epoch and the bank alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dre_fast.nn.bank import MemoryBank


@dataclass
class EpochPlan:
    """The visits of an epoch in order: ``slides`` int64 [S] (bank ids), ``tiles`` int64 [S, m] (-1 = unused slot).

    ``sizes``: slides of each step, in all S. A process may have none in the last ones.
    """

    slides: Tensor
    tiles: Tensor
    sizes: list[int]

    def step(self, number: int) -> slice:
        """Visits of a step."""
        first = sum(self.sizes[:number])
        return slice(first, first + self.sizes[number])


def epoch_order(slides: int, seed: int, epoch: int, shard: int = 0) -> Tensor:
    """Order of the slides of a shard in an epoch, int64 [slides]: a function of (seed, epoch, shard) alone."""
    key = seed * 100_003 + epoch + (shard << 40)
    return torch.randperm(slides, generator=torch.Generator().manual_seed(key))


def steps_per_epoch(shard_sizes: list[int], per_shard: int) -> int:
    """Steps until the largest shard is through, at ``per_shard`` slides of each shard a step."""
    return max(math.ceil(size / per_shard) for size in shard_sizes)


def visits(
    shards: Mapping[int, Tensor], *, per_shard: int, steps: int, seed: int, epoch: int
) -> tuple[Tensor, list[int]]:
    """Every slide of some shards once: in each step the next ``per_shard`` slides of every shard.

    Args:
        shards: number of a shard -> its slides, int64 (bank ids).
        steps: of the epoch; shards that are through earlier have no slide in the last ones.

    Returns:
        Slides int64 [S] in order, and how many of them each step has.
    """
    orders = [slides[epoch_order(len(slides), seed, epoch, shard)] for shard, slides in shards.items()]
    parts = [
        torch.cat([order[step * per_shard : (step + 1) * per_shard] for order in orders])
        for step in range(steps)
    ]
    return torch.cat(parts), [len(part) for part in parts]


def plan_epoch(
    bank: MemoryBank,
    shards: Mapping[int, Tensor],
    *,
    per_shard: int,
    steps: int,
    epoch: int,
    live: int,
    seed: int,
) -> EpochPlan:
    """:func:`visits` with their live tiles: the next ``live`` positions of each slide's permutation."""
    slides, sizes = visits(shards, per_shard=per_shard, steps=steps, seed=seed, epoch=epoch)
    tiles = bank.sample(slides.to(bank.device), live, cycle=epoch, seed=seed).cpu()
    return EpochPlan(slides, tiles, sizes)
