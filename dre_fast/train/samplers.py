"""Which slides and which of their tiles a step sees: the rules, as functions of seed, epoch and sizes alone.

:mod:`dre_fast.train.planner` puts them together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dre_fast.ops.bank import tiles as bank_tiles


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
        return self.steps(number, number + 1)

    def steps(self, first: int, end: int) -> slice:
        """Visits of the steps from ``first`` to before ``end``, as far as there are steps."""
        return slice(sum(self.sizes[:first]), sum(self.sizes[:end]))


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


def scale_slots(sizes: Tensor, live: int, shares: Sequence[float] = ()) -> Tensor:
    """The live tiles of each slide dealt to its scales, in proportion to ``shares`` as far as there are tiles.

    One after the other, each to the scale with the fewest for its share (Adams's rule of apportionment, so that every
    scale with tiles has one before any has two); a scale that has no more tiles leaves its part to the others.

    Args:
        sizes: int64 [S, C], tiles of each slide at each scale.
        live: m, at least C.
        shares: positive weights of the scales; none: equal ones.

    Returns:
        int64 [S, C]; a slide's sum is min(m, its tiles).
    """
    weight = torch.tensor(shares or [1.0] * sizes.shape[1], dtype=torch.float64)
    slots = torch.zeros_like(sizes)
    slide = torch.arange(len(sizes))
    for _ in range(min(live, int(sizes.sum(1).max()) if len(sizes) else 0)):
        room = slots < sizes
        turn = torch.where(room, slots / weight, torch.inf).argmin(1)
        slots[slide, turn] += room.any(1).to(slots)
    return slots


def guided_slots(slots: Tensor, guided: float) -> Tensor:
    """How many of a slide's slots at each scale, int64 of any shape, are drawn by score: as many whole ones as fit."""
    return (slots.double() * guided + 1e-9).to(torch.int64)  # 0.29 * 100 is a little less than 29


def next_tiles(sizes: Tensor, keys: Tensor, slots: Tensor, beyond: int, *, visit: int, seed: int) -> Tensor:
    """The next tiles in the permutation of each bag, and those after them: :meth:`MemoryBank.sample` for any ``slots``.

    Args:
        sizes: int64 [B], tiles n of each bag. keys: int64 [B], which permutation.
        slots: int64 [B], tiles m a visit takes, at most n: within ceil(n/m) visits it takes each once.
        beyond: how many more to give.

    Returns:
        int64 [B, max(m) + beyond], distinct; those of the visit first, -1 where a bag has no more.
    """
    width = int(slots.max()) if len(slots) else 0
    found = sizes.new_full((len(sizes), width + beyond), -1)
    for m in slots[slots > 0].unique().tolist():
        there = slots == m
        found[there, : m + beyond] = bank_tiles(
            sizes[there], keys[there], 0, m + beyond, m, torch.full_like(sizes[there], visit), seed
        )
    return found


def draw(scores: Tensor, counts: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Draw candidates without replacement, each time with probability softmax(z / temperature) among those left.

    z are the scores less their mean, over their standard deviation, so that a temperature means the same for every
    slide. By the Gumbel-top-k trick (Kool, van Hoof, Welling, ICML 2019): the largest of z / temperature + G with G
    standard Gumbel.

    Args:
        scores: fp32 [B, c]; NaN where there is no candidate.
        counts: int64 [B], how many to draw, at most the candidates there are.
        uniform: float64 [B, c] in [0, 1), the randomness.

    Returns:
        int64 [B, max(counts)], columns of ``scores``; -1 behind the last one drawn.
    """
    there = ~scores.isnan()
    number = there.sum(1, keepdim=True).clamp(min=1)
    centred = scores.double() - torch.where(there, scores, 0.0).double().sum(1, keepdim=True) / number
    spread = (torch.where(there, centred, 0.0).square().sum(1, keepdim=True) / number).sqrt()
    z = centred / spread.clamp(min=torch.finfo(torch.float64).tiny)
    key = torch.where(there, z / temperature - torch.log(-torch.log(uniform)), -torch.inf)
    order = key.sort(dim=1, descending=True, stable=True).indices[:, : int(counts.max())]
    return torch.where(torch.arange(order.shape[1]) < counts[:, None], order, -1)


def packed(tiles: Tensor, width: int) -> Tensor:
    """Rows of tile ids with the unused slots (-1) behind the others, int64 [B, any] -> [B, width]."""
    order = (tiles < 0).to(torch.uint8).sort(dim=1, stable=True).indices
    return pad(tiles.gather(1, order), (0, max(0, width - tiles.shape[1])), value=-1)[:, :width]
