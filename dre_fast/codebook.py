"""Fit a codebook to rows in memory, in a bank or on disk, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dre_fast.codebook_rows import CHUNK, Chunk, again, bag_weights, chunks, in_units, row_chunks, survey
from dre_fast.codebook_start import INITS, start
from dre_fast.ops import encode as ops
from dre_fast.progress import progress
from dre_fast.reference.kmeans import reseed_empty
from dre_fast.reference.rows import add_rows
from dre_fast.reference.sampling import permute

__all__ = ["CHUNK", "bag_weights", "fit_codebook", "row_chunks"]

_SAMPLE_PER_CODEWORD = 256  # k-means++ sees at most this many rows for each codeword,
_SAMPLE = 65536  # and at most this many in all, unless there are more codewords than a sixteenth of it
_FARTHEST = 1024  # rows kept in a pass to re-seed empty codewords from


def fit_codebook(
    rows_or_bank: Any,
    codewords: int,
    *,
    init: str = "k-means++",
    iterations: int = 25,
    warm_start: Tensor | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
    weights: Tensor | None = None,
    batch_size: int | None = None,
    history: list[float] | None = None,
) -> tuple[Tensor, float]:
    """Fit K codewords to rows by k-means: a start, then Lloyd or mini-batch steps.

    Rows pass through in chunks of 65,536 in their own dtype and are never copied whole; each pass is one hard
    encoding. A codeword left empty moves to the row farthest from its codeword, the same one on every run; with fewer
    distinct rows than codewords the ones left over stay where they are, unused. The cut into chunks changes a
    codebook only by the rounding of fp32 sums.

    Args:
        rows_or_bank: a tensor [N, D] of any float dtype; a :class:`~dre_fast.MemoryBank` (its written rows, read as
            they are stored); any array [N, D] that slices, read a slice at a time (numpy, ``np.load(...,
            mmap_mode="r")``, an HDF5 or zarr dataset); or an object whose ``__iter__`` gives chunks [n, D], each time
            from the start.
        codewords: K <= N.
        init: ``"k-means++"`` on a seeded uniform sample (at most 256 rows a codeword and 65,536 in all, or 16 rows a
            codeword where that is more); ``"k-means||"`` over all rows, seven passes, better on many small clusters;
            ``"random"``: K rows. Not used with ``warm_start``.
        iterations: Lloyd steps, or mini-batches, at most; 0 returns the start.
        warm_start: [K, D] codebook to go on from. Codeword k stays codeword k, so codes and running sums keep
            their meaning while the features drift; only empty codewords jump.
        seed: seed of the sample, the start and the mini-batches.
        tolerance: stop Lloyd steps when the codewords together move, in squared distance, by at most this share of the
            rows' mean variance per dimension (of the sample).
        weights: [N], >= 0, how much each row counts, in the order the rows come; a row of weight 0 counts as absent.
            :func:`~dre_fast.codebook.bag_weights` makes every bag count equally.
        batch_size: rows of a mini-batch. Batches run through a seeded permutation of the rows, so all are seen once
            before any is seen again. Tensors and banks only, without weights; a bank's row numbers (8 bytes a row) are
            then held.
        history: receives the inertia before each Lloyd step (for mini-batches that of the batch times N / batch_size)
            and at the end.

    Returns:
        Codebook fp32 [K, D] on the device of the rows, and inertia: sum_i w_i min_k ||x_i - c_k||^2.

    Raises:
        ValueError: fewer rows than codewords, NaN or Inf in a row (named), a warm start or weights that do not fit,
            negative iterations, an unknown init, rows that can be gone through only once or differ between passes.

    Source: DRE-SLCL, arXiv 2511.05034 (k-means on bank rows); Arthur & Vassilvitskii 2007, Bahmani et al.
    2012 (starts); Lloyd 1982; Sculley 2010 (mini-batches).
    """
    if init not in INITS:
        raise ValueError(f"fit_codebook: init must be one of {', '.join(map(repr, INITS))}, got {init!r}")
    if not isinstance(codewords, int):
        raise ValueError(f"fit_codebook: codewords must be an int, got {type(codewords).__name__}")
    if codewords < 1:
        raise ValueError(f"fit_codebook: codewords must be at least 1, got {codewords}")
    if iterations < 0:
        raise ValueError(f"fit_codebook: iterations must be at least 0, got {iterations}")
    if batch_size is not None:
        _check_batches(rows_or_bank, batch_size, weights)
    want = min(_SAMPLE_PER_CODEWORD * codewords, max(_SAMPLE, 16 * codewords))
    weights, unit = (None, 1.0) if weights is None else in_units(weights)
    seen = survey(rows_or_bank, want, seed, weights)
    if len(seen.sample) < codewords:
        kind = "rows" if weights is None else "rows with a weight above 0"
        raise ValueError(
            f"fit_codebook: {codewords} codewords need at least as many {kind}, got {len(seen.sample)}; "
            "ask for fewer codewords or pass more rows"
        )
    if warm_start is None:
        codebook = start(rows_or_bank, seen, codewords, init, seed, weights)
    else:
        codebook = _checked_warm_start(warm_start, codewords, seen.sample)
    trace: list[float] = [] if history is None else history
    if batch_size is None:
        enough = tolerance * seen.variance
        codebook = _lloyd(rows_or_bank, seen.count, codebook, iterations, enough, weights, unit, trace)
    else:
        codebook = _mini_batches(rows_or_bank, codebook, iterations, batch_size, seed, seen.count, trace)
    inertia = torch.zeros((), dtype=torch.float64, device=codebook.device)
    for chunk in again(rows_or_bank, seen.count):
        distance = ops.nearest(chunk.x, chunk.index, chunk.row_scale, codebook)[1]
        each = _of(weights, chunk)
        inertia += distance.sum(dtype=torch.float64) if each is None else (distance.double() * each).sum()
    trace.append(unit * float(inertia))
    return codebook, trace[-1]


def _checked_warm_start(warm_start: Tensor, codewords: int, sample: Tensor) -> Tensor:
    if not isinstance(warm_start, Tensor):
        raise ValueError(f"fit_codebook: warm_start must be a tensor, got {type(warm_start).__name__}")
    if warm_start.shape != (codewords, sample.shape[1]):
        raise ValueError(
            f"fit_codebook: warm_start must be {(codewords, sample.shape[1])}, got {tuple(warm_start.shape)}"
        )
    if not torch.isfinite(warm_start).all():
        raise ValueError("fit_codebook: warm_start holds NaN or Inf")
    return warm_start.detach().to(sample).clone()


def _of(weights: Tensor | None, chunk: Chunk) -> Tensor | None:
    """Weights of a chunk's rows, float64 [n], where there are weights."""
    if weights is None:
        return None
    return weights[chunk.first : chunk.first + len(chunk)].to(chunk.x.device, torch.float64)


# ------------------------------------------------------------------------------------------------ Lloyd steps


def _lloyd(
    rows: Any,
    count: int,
    codebook: Tensor,
    iterations: int,
    enough: float,
    weights: Tensor | None,
    unit: float,
    trace: list[float],
) -> Tensor:
    """Steps until the codewords move by ``enough``. Weights are given, and inertia is not, in units of ``unit``."""
    for _ in progress(range(iterations), "k-means", unit="pass"):
        one = _Pass(codebook)
        for chunk in again(rows, count):
            one.add(chunk, _of(weights, chunk))
        trace.append(unit * float(one.inertia))
        moved = one.codebook()
        shift = float((moved - codebook).square().sum())
        codebook = moved
        if shift <= enough:
            break
    return codebook


class _Pass:
    """One pass over rows: residual sums, members, inertia, and the rows farthest from their codewords."""

    def __init__(self, start: Tensor) -> None:
        self.start = start
        self.sums = torch.zeros_like(start, dtype=torch.float64)
        self.members = torch.zeros(len(start), 1, dtype=torch.float64, device=start.device)
        self.inertia = torch.zeros((), dtype=torch.float64, device=start.device)
        self.far = start.new_zeros(0, start.shape[1])
        self.far_distance = start.new_zeros(0)

    def add(self, chunk: Chunk, weights: Tensor | None) -> None:
        residuals, members, codes, distance = ops.encode_one_bag(
            chunk.x, chunk.index, chunk.row_scale, self.start
        )
        if weights is None:
            self.sums += residuals
            self.members += members[:, None]
            self.inertia += distance.sum(dtype=torch.float64)
        else:
            # the op adds residuals up by known codes: here they are those of the rows, times their weights
            weighted = (chunk.values() - self.start[codes]).double() * weights[:, None]
            self.sums += ops.encode_known(weighted.float(), codes, len(self.start))
            add_rows(self.members, codes, weights[:, None])
            self.inertia += (distance.double() * weights).sum()
            # no codeword moves to a row that does not count
            distance = torch.where(weights > 0, distance, -1.0)
        self._keep_farthest(chunk, distance)

    def _keep_farthest(self, chunk: Chunk, distance: Tensor) -> None:
        """More rows than could be wanted; equal distances in the order of the rows."""
        full = len(self.far_distance) == _FARTHEST
        place = (distance > self.far_distance[-1] if full else distance >= 0).nonzero()[:, 0]
        if len(place) > _FARTHEST:
            place = place[distance[place].topk(_FARTHEST, sorted=False).indices.sort().values]
        far = torch.cat([self.far_distance, distance[place]])
        best = far.argsort(descending=True, stable=True)[:_FARTHEST]
        self.far_distance = far[best]
        self.far = torch.cat([self.far, chunk.values(place)])[best]

    def codebook(self) -> Tensor:
        """Each codeword at the mean of its rows; empty ones on the farthest rows."""
        full = self.members > 0
        # where() for the divisor: the weights of a codeword may be as small as they like
        moved = (self.start + self.sums / torch.where(full, self.members, 1.0)).float()
        if bool(full.all()):
            return moved
        # how far the rows are from where the others have moved, not from where they were
        distance = ops.nearest(self.far, None, None, moved[full[:, 0]])[1]
        return reseed_empty(moved, full[:, 0], self.far, distance)


# ----------------------------------------------------------------------------------------------- mini-batches


def _check_batches(rows: Any, batch_size: int, weights: Tensor | None) -> None:
    if batch_size < 1:
        raise ValueError(f"fit_codebook: batch_size must be at least 1, got {batch_size}")
    if weights is not None:
        raise ValueError("fit_codebook: mini-batches take no weights; leave batch_size out for Lloyd steps")
    if not isinstance(rows, Tensor) and not hasattr(rows, "iter_stored"):
        raise ValueError(
            "fit_codebook: mini-batches take rows in any order, so they need a tensor or a bank; leave batch_size "
            "out to go through a stream"
        )


def _mini_batches(
    rows: Any,
    codebook: Tensor,
    iterations: int,
    batch_size: int,
    seed: int,
    count: int,
    trace: list[float],
) -> Tensor:
    """c_k moves to the mean of all rows it was given so far: the learning rate of codeword k is 1 / its members."""
    members = torch.zeros(len(codebook), 1, dtype=torch.float64, device=codebook.device)
    batches = _batches(rows, batch_size, seed, count)
    given = 0
    for _ in progress(range(iterations), "k-means", unit="batch"):
        batch = next(batches)
        one = _Pass(codebook)
        one.add(batch, None)
        members += one.members
        given += len(batch)
        trace.append(float(one.inertia) * count / len(batch))
        codebook = (codebook + one.sums / members.clamp(min=1)).float()
        if given >= 10 * len(codebook) and not bool((members > 0).all()):
            full = members > 0
            after = _Pass(codebook[full[:, 0]])
            after.add(batch, None)
            codebook = reseed_empty(codebook, full[:, 0], after.far, after.far_distance)
            members = members + ~full  # a new place counts as one row, so that it can move on
    return codebook


def _batches(rows: Any, size: int, seed: int, count: int) -> Iterator[Chunk]:
    """Chunks of at most ``size`` rows in the order of a permutation, a new one for every turn through all rows."""
    if isinstance(rows, Tensor):
        x, numbers, row_scale, dim = next(chunks(rows, count)).x, None, None, rows.shape[1]
    else:
        stored = list(rows.iter_stored(CHUNK))
        (x, row_scale, _), dim = stored[0], rows.dim
        numbers = torch.cat([index for *_, index in stored])
    cycle = 0
    while True:
        for first in range(0, count, size):
            position = torch.arange(first, min(first + size, count), device=x.device)
            index = permute(position, count, seed, cycle, 0)
            yield Chunk(first, dim, x, index if numbers is None else numbers[index], row_scale)
        cycle += 1
