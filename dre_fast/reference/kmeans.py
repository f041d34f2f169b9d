"""k-means for the codebook, in plain torch: start, one Lloyd step, and what happens to empty codewords."""

from __future__ import annotations

import math

import torch
from einops import reduce
from torch import Tensor

from dre_fast.reference.encode import full_precision, hard_assign, hard_encode, squared_distances


def kmeans_plus_plus(
    rows: Tensor, codewords: int, generator: torch.Generator, weights: Tensor | None = None
) -> Tensor:
    """k-means++ start: each codeword is a row drawn with probability proportional to its squared distance.

    Of 2 + ln K draws the one that lowers the inertia most is kept (the greedy form; Arthur & Vassilvitskii
    2007, section 7). Draws come from a CPU generator, so CPU and GPU choose alike.

    Args:
        rows: [N, D] with N >= codewords, fp32 or float64.
        codewords: K.
        generator: CPU generator.
        weights: [N], >= 0 and not all 0, how many rows each stands for (default: one).

    Returns:
        [K, D]: rows of the input. Rows repeat only when fewer than K distinct ones exist.
    """
    trials = 2 + int(math.log(codewords))
    if weights is None:
        weights = rows.new_ones(len(rows), dtype=torch.float64)
    weights = weights.to(rows.device, torch.float64)
    chosen = [int(_draw(weights, 1, generator))]
    with full_precision(rows):
        distance = squared_distances(rows, rows[chosen]).clamp(min=0)[:, 0]
        for _ in range(1, codewords):
            candidates = _draw(distance * weights, trials, generator)
            reach = squared_distances(rows, rows[candidates]).clamp(min=0)
            reach = torch.minimum(reach, distance[:, None])
            best = int((weights @ reach.double()).argmin())
            distance = reach[:, best]
            chosen.append(int(candidates[best]))
    return rows[chosen].clone()


def _draw(chances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Numbers drawn in proportion to ``chances`` [N], with replacement, int64 [count]."""
    # on the CPU in float64: a cumulative sum in another order would draw another row
    cumulative = chances.double().cpu().cumsum(0)
    draws = torch.rand(count, generator=generator, dtype=torch.float64) * cumulative[-1]
    drawn = torch.searchsorted(cumulative, draws, right=True)
    return drawn.clamp(max=len(chances) - 1).to(chances.device)


def lloyd_step(rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """One Lloyd step: each codeword moves to the mean of its rows; an empty one stays. It is one encode pass.

    Args:
        rows: [N, D].
        codebook: [K, D].

    Returns:
        Codebook [K, D] in the dtype of the computation, and counts int64 [K] of the assignment before the
        move.

    Source: Lloyd 1982; c_k + V_k / n_k, with V of the residual encoding.
    """
    one_bag = torch.tensor([0, len(rows)], device=rows.device)
    residuals, counts, *_ = hard_encode(rows, codebook, one_bag)
    return codebook + residuals[0] / counts[0].clamp(min=1)[:, None], counts[0]


def nearest_distances(rows: Tensor, codebook: Tensor) -> Tensor:
    """Squared distance of each row to its codeword, [N], from differences (no cancellation)."""
    difference = rows - codebook[hard_assign(rows, codebook)]
    return reduce(difference * difference, "n d -> n", "sum")


def reseed_empty(codebook: Tensor, counts: Tensor, rows: Tensor, distance: Tensor) -> Tensor:
    """Put each empty codeword on the row farthest from every codeword, one after the other.

    Args:
        codebook: [K, D].
        counts: int64 [K]; codewords with 0 move, in ascending k.
        rows: [N, D] candidate rows.
        distance: [N] squared distance of each to its nearest codeword; equal ones: the first row wins.

    Returns:
        [K, D]. When every row already lies on a codeword the empty ones stay where they are.
    """
    codebook, distance = codebook.clone(), distance.clone()
    for k in (counts == 0).nonzero()[:, 0].tolist():
        far = int(distance.argmax())
        if distance[far] <= (8 * torch.finfo(rows.dtype).eps) ** 2 * rows[far].square().sum():
            break  # what is left is rounding: every distinct row has its codeword
        codebook[k] = rows[far]
        difference = rows - rows[far]
        distance = torch.minimum(distance, reduce(difference * difference, "n d -> n", "sum"))
    return codebook


def fit_kmeans(
    rows: Tensor,
    codewords: int,
    *,
    iterations: int = 25,
    warm_start: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """k-means of rows held in one tensor; the specification of :func:`dre_fast.fit_codebook`.

    Args:
        rows: [N, D], N >= codewords, fp32 or float64.
        codewords: K.
        iterations: Lloyd steps.
        warm_start: [K, D] to start from instead of k-means++; codeword k stays codeword k.
        seed: seed of the start.

    Returns:
        Codebook [K, D] and inertia (0-d): sum_i min_k ||x_i - c_k||^2.
    """
    if warm_start is None:
        codebook = kmeans_plus_plus(rows, codewords, torch.Generator().manual_seed(seed))
    else:
        codebook = warm_start.to(rows)
    for _ in range(iterations):
        codebook, counts = lloyd_step(rows, codebook)
        if (counts == 0).any():
            codebook = reseed_empty(codebook, counts, rows, nearest_distances(rows, codebook))
    return codebook, nearest_distances(rows, codebook).sum()
