"""Fit a codebook to rows in memory or in a bank, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from dre_fast.ops import encode as ops
from dre_fast.progress import progress
from dre_fast.reference.kmeans import kmeans_plus_plus, nearest_distances, reseed_empty

CHUNK = 65536
_SAMPLE_PER_CODEWORD = 256  # k-means++ sees at most this many rows for each codeword
_CANDIDATES = 1024  # farthest rows kept to re-seed empty codewords from


class RowBank(Protocol):
    """Yields its rows as float chunks [n, D] of at most ``chunk`` rows, in the same order each time."""

    def iter_rows(self, chunk: int = CHUNK) -> Iterator[Tensor]: ...


def row_chunks(rows: Tensor | RowBank) -> Iterator[Tensor]:
    """fp32 chunks [n, D] of a tensor [N, D] or a bank, without gradient; empty ones are left out."""
    for part in rows.split(CHUNK) if isinstance(rows, Tensor) else rows.iter_rows(CHUNK):
        if len(part):
            yield part.detach().float()


def fit_codebook(
    rows_or_bank: Tensor | RowBank,
    codewords: int,
    *,
    init: str = "k-means++",
    iterations: int = 25,
    warm_start: Tensor | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> tuple[Tensor, float]:
    """Fit K codewords to rows by k-means: k-means++ start, then Lloyd steps.

    Rows pass through in chunks of 65,536 and are never copied whole. The k-means++ start looks at a seeded
    uniform sample of at most 256 rows a codeword (all rows when there are fewer); Lloyd steps see every row.
    A codeword left empty moves to the row farthest from all codewords, the same one on every run; with fewer
    distinct rows than codewords the ones left over stay where they are, unused.

    Args:
        rows_or_bank: [N, D], any float dtype, or a bank with ``iter_rows(chunk)`` such as
            :class:`~dre_fast.MemoryBank` (its written rows).
        codewords: K <= N.
        init: ``"k-means++"`` or ``"random"`` (K rows of the sample); not used with ``warm_start``.
        iterations: Lloyd steps at most; 0 returns the start.
        warm_start: [K, D] codebook to go on from. Codeword k stays codeword k, so codes and running sums keep
            their meaning while the features drift; only empty codewords jump.
        seed: seed of the sample and the start.
        tolerance: stop when the codewords together move, in squared distance, by at most this share of the
            rows' mean variance per dimension.

    Returns:
        Codebook fp32 [K, D] on the device of the rows, and inertia: sum_i min_k ||x_i - c_k||^2.

    Raises:
        ValueError: fewer rows than codewords, NaN or Inf in a row (named), a warm start of another shape,
            negative iterations, or an unknown init.

    Source: DRE-SLCL, arXiv 2511.05034 (k-means on bank rows); Arthur & Vassilvitskii 2007 (start); Lloyd
    1982.
    """
    if init not in ("k-means++", "random"):
        raise ValueError(f"fit_codebook: init must be 'k-means++' or 'random', got {init!r}")
    if codewords < 1:
        raise ValueError(f"fit_codebook: codewords must be at least 1, got {codewords}")
    if iterations < 0:
        raise ValueError(f"fit_codebook: iterations must be at least 0, got {iterations}")
    generator = torch.Generator().manual_seed(seed)
    sample, count, variance = _survey(rows_or_bank, _SAMPLE_PER_CODEWORD * codewords, generator)
    if count < codewords:
        raise ValueError(
            f"fit_codebook: {codewords} codewords need at least as many rows, got {count}; "
            "ask for fewer codewords or pass more rows"
        )
    if warm_start is not None:
        if warm_start.shape != (codewords, sample.shape[1]):
            raise ValueError(
                f"fit_codebook: warm_start must be {(codewords, sample.shape[1])}, "
                f"got {tuple(warm_start.shape)}"
            )
        if not torch.isfinite(warm_start).all():
            raise ValueError("fit_codebook: warm_start holds NaN or Inf")
        codebook = warm_start.detach().to(sample).clone()
    elif init == "random":
        codebook = sample[
            torch.randperm(len(sample), generator=generator)[:codewords].to(sample.device)
        ].clone()
    else:
        codebook = kmeans_plus_plus(sample, codewords, generator)
    for _ in progress(range(iterations), "k-means", unit="pass"):
        moved, counts = _lloyd_pass(rows_or_bank, codebook)
        if (counts == 0).any():
            moved = _reseed(rows_or_bank, moved, counts)
        shift = float((moved - codebook).square().sum())
        codebook = moved
        if shift <= tolerance * variance:
            break
    inertia = 0.0
    for part in row_chunks(rows_or_bank):
        inertia += float(nearest_distances(part, codebook).sum(dtype=torch.float64))
    return codebook, inertia


def _survey(rows: Tensor | RowBank, want: int, generator: torch.Generator) -> tuple[Tensor, int, float]:
    """One pass: a uniform sample of at most ``want`` rows, the number of rows, their variance per dimension.

    Raises:
        ValueError: a tensor that is not floating point [N, D], or NaN or Inf in a row (named).
    """
    if isinstance(rows, Tensor) and (rows.dim() != 2 or not rows.is_floating_point()):
        raise ValueError(
            f"fit_codebook: rows must be floating point [N, D], got {rows.dtype} {tuple(rows.shape)}"
        )
    count = 0
    keys, sample, total, squares = torch.empty(0, dtype=torch.float64), None, None, 0.0
    for part in row_chunks(rows):
        if not torch.isfinite(part).all():
            row = count + int((~torch.isfinite(part).all(dim=1)).nonzero()[0, 0])
            raise ValueError(f"fit_codebook: row {row} holds NaN or Inf; drop such rows first")
        # each row draws a key, the smallest keys stay: a uniform sample without knowing N beforehand
        drawn = torch.rand(len(part), generator=generator, dtype=torch.float64)
        small = drawn.argsort(stable=True)[:want].sort().values
        few = part[small.to(part.device)]
        keys, sample = torch.cat([keys, drawn[small]]), few if sample is None else torch.cat([sample, few])
        kept = keys.argsort(stable=True)[:want].sort().values
        keys, sample = keys[kept], sample[kept.to(sample.device)]
        count += len(part)
        summed = part.sum(dim=0, dtype=torch.float64)
        total = summed if total is None else total + summed
        squares += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
    if sample is None or total is None:
        raise ValueError("fit_codebook: there are no rows to fit")
    variance = (squares / count - float((total / count).square().sum())) / sample.shape[1]
    return sample, count, max(variance, 0.0)


def _lloyd_pass(rows: Tensor | RowBank, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Each codeword moves to the mean of its rows: one encode pass, residual sums added up in float64."""
    sums, counts = torch.zeros_like(codebook, dtype=torch.float64), None
    for part in row_chunks(rows):
        one_bag = torch.tensor([0, len(part)], device=part.device)
        residuals, members, *_ = ops.hard_encode(part, codebook, one_bag)
        sums += residuals[0]
        counts = members[0] if counts is None else counts + members[0]
    assert counts is not None
    return (codebook + sums / counts.clamp(min=1)[:, None]).float(), counts


def _reseed(rows: Tensor | RowBank, codebook: Tensor, counts: Tensor) -> Tensor:
    """Empty codewords onto the farthest rows, found in one pass."""
    far = far_distance = None
    for part in row_chunks(rows):
        distance = nearest_distances(part, codebook)
        if far is not None and far_distance is not None:
            part, distance = torch.cat([far, part]), torch.cat([far_distance, distance])
        # a stable sort: among equal distances the earlier row stays in front
        order = distance.argsort(descending=True, stable=True)[:_CANDIDATES]
        far, far_distance = part[order], distance[order]
    assert far is not None
    assert far_distance is not None
    return reseed_empty(codebook, counts, far, far_distance)
