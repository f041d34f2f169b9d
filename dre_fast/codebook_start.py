"""Where k-means starts: k-means++ on a sample, k-means|| over all rows, or rows drawn at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dre_fast.codebook_rows import Survey, again
from dre_fast.ops import encode as ops
from dre_fast.reference.kmeans import kmeans_plus_plus
from dre_fast.reference.rows import add_rows
from dre_fast.reference.sampling import hashed_uniform

INITS = ("k-means++", "k-means||", "random")
_ROUNDS = 5  # Bahmani et al. 2012, section 5: about five rounds with 2K candidates each do


def start(rows: Any, seen: Survey, codewords: int, init: str, seed: int, weights: Tensor | None) -> Tensor:
    """K codewords to begin with, fp32 [K, D]."""
    generator = torch.Generator().manual_seed(seed)
    if init == "random":
        return _draw(seen, codewords, generator)
    if init == "k-means++":
        return kmeans_plus_plus(seen.sample, codewords, generator, seen.weights)
    return _parallel(rows, seen, codewords, seed, generator, weights)


def _draw(seen: Survey, count: int, generator: torch.Generator) -> Tensor:
    """Distinct rows of the sample, by weight where there are weights."""
    if seen.weights is None:
        chosen = torch.randperm(len(seen.sample), generator=generator)[:count]
    else:
        chosen = seen.weights.cpu().multinomial(count, generator=generator)
    return seen.sample[chosen.to(seen.sample.device)].clone()


def _parallel(
    rows: Any, seen: Survey, codewords: int, seed: int, generator: torch.Generator, weights: Tensor | None
) -> Tensor:
    """k-means||: rounds that draw about 2K rows each by their squared distance, then k-means++ of what was drawn.

    Every drawn row weighs as many rows as are nearest to it. Draws come from a hash of the row's position, so
    they do not depend on the chunks. Keeps one fp32 distance a row.

    Source: Bahmani et al. 2012 ("Scalable k-means++"), algorithm 2.
    """
    candidates = new = _draw(seen, 1, generator)
    nearest = torch.full((seen.count,), torch.inf, device=candidates.device)
    for turn in range(_ROUNDS):
        cost = torch.zeros((), dtype=torch.float64)
        for chunk in again(rows, seen.count):
            known = nearest[chunk.first : chunk.first + len(chunk)]
            distance = ops.nearest(chunk.x, chunk.index, chunk.row_scale, new)[1]
            torch.minimum(distance.to(known), known, out=known)
            cost += _weighted(known, weights, chunk.first).sum().cpu()
        if float(cost) == 0.0:
            break  # every row is a candidate already
        drawn = []
        for chunk in again(rows, seen.count):
            known = nearest[chunk.first : chunk.first + len(chunk)]
            chance = 2 * codewords * _weighted(known, weights, chunk.first).cpu() / cost
            chosen = hashed_uniform(chunk.first, len(chunk), seed, turn + 1) < chance
            if chosen.any():
                drawn.append(chunk.values(chosen.nonzero()[:, 0].to(chunk.x.device)))
        if not drawn:
            continue
        new = torch.cat(drawn)
        candidates = torch.cat([candidates, new])
    if len(candidates) < codewords:  # few distinct rows, or few rows altogether
        candidates = torch.cat([candidates, _draw(seen, codewords - len(candidates), generator)])
    members = torch.zeros(len(candidates), 1, dtype=torch.float64, device=candidates.device)
    for chunk in again(rows, seen.count):
        codes = ops.nearest(chunk.x, chunk.index, chunk.row_scale, candidates)[0]
        each = _weighted(torch.ones_like(codes, dtype=torch.float64), weights, chunk.first)
        add_rows(members, codes, each[:, None])
    return kmeans_plus_plus(candidates, codewords, generator, members[:, 0])


def _weighted(values: Tensor, weights: Tensor | None, first: int) -> Tensor:
    values = values.double()
    if weights is None:
        return values
    return values * weights[first : first + len(values)].to(values)
