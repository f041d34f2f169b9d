"""The rows a codebook is fitted to, gone through a chunk at a time wherever they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dre_fast.reference.layout import bag_of_row
from dre_fast.reference.rows import RowSource
from dre_fast.reference.sampling import hashed_uniform

CHUNK = 65536
_READ_AS_IS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Chunk:
    """Rows number ``first`` and on, as the encode op reads them: ``x``, or ``x[index]`` times ``row_scale``."""

    first: int
    dim: int
    x: Tensor
    index: Tensor | None = None
    row_scale: Tensor | None = None

    def __len__(self) -> int:
        return (self.x if self.index is None else self.index).shape[0]

    def values(self, rows: Tensor | None = None) -> Tensor:
        """All rows, or those numbered ``rows`` int64 [n] within the chunk: fp32 [n, D]."""
        index = self.index
        if rows is not None:
            index = rows if index is None else index[rows]
        return RowSource(self.x, self.dim, index, self.row_scale)[:]


def chunks(rows: Any, size: int | None = None) -> Iterator[Chunk]:
    """Chunks of at most ``size`` (CHUNK) rows of what :func:`dre_fast.fit_codebook` takes, without gradient."""
    size = CHUNK if size is None else size
    if hasattr(rows, "iter_stored"):
        first = 0
        for payload, row_scale, index in rows.iter_stored(size):
            yield Chunk(first, rows.dim, payload, index, row_scale)
            first += index.shape[0]
        return
    first = 0
    for part in _parts(rows, size):
        if part.dim() != 2 or not part.is_floating_point():
            raise ValueError(
                f"fit_codebook: rows must be floating point [N, D], got {part.dtype} {tuple(part.shape)}"
            )
        for piece in part.detach().split(size):
            if len(piece):
                x = piece if piece.dtype in _READ_AS_IS else piece.float()
                yield Chunk(first, piece.shape[1], x)
                first += len(piece)


def again(rows: Any, count: int) -> Iterator[Chunk]:
    """The chunks of another pass over the same rows.

    Raises:
        ValueError: not ``count`` rows, as the first pass gave.
    """
    given = 0
    for chunk in chunks(rows):
        given += len(chunk)
        if given > count:
            break
        yield chunk
    if given != count:
        more = "more than " if given > count else ""
        raise ValueError(
            f"fit_codebook: rows gave {more}{min(given, count)} rows in another pass, {count} in the first; each pass "
            "must go through the same rows from the start"
        )


def _parts(rows: Any, size: int) -> Iterator[Tensor]:
    if isinstance(rows, Tensor):
        yield rows
    elif hasattr(rows, "iter_rows"):
        yield from rows.iter_rows(size)
    elif hasattr(rows, "shape") and hasattr(
        rows, "__getitem__"
    ):  # numpy, memmap, HDF5, zarr: read a slice at a time
        if len(rows.shape) != 2:
            raise ValueError(f"fit_codebook: rows must be floating point [N, D], got {tuple(rows.shape)}")
        for start in range(0, rows.shape[0], size):
            yield torch.tensor(rows[start : start + size])
    elif isinstance(rows, Iterator):
        raise ValueError(
            "fit_codebook: rows can be gone through only once; pass a list, or an object whose __iter__ starts again"
        )
    elif hasattr(rows, "__iter__") and not isinstance(rows, (str, bytes)):
        for part in rows:
            yield part if isinstance(part, Tensor) else torch.tensor(part)
    else:
        raise ValueError(
            f"fit_codebook: rows must be a tensor [N, D], a bank, an array that slices, or chunks [n, D]; got "
            f"{type(rows).__name__}"
        )


def row_chunks(rows: Any) -> Iterator[Tensor]:
    """The rows as fp32 chunks [n, D] of at most 65,536, without gradient."""
    for chunk in chunks(rows):
        yield chunk.values()


def bag_weights(cu_seqlens: Tensor) -> Tensor:
    """Weights by which every bag counts equally, whatever its size: fp32 [N], mean 1 over the rows.

    Args:
        cu_seqlens: int32 or int64 [B+1] row offsets, ascending from 0 to N.

    A row of bag b weighs N / (B' n_b), where B' counts the bags that are not empty.
    """
    lengths = cu_seqlens.diff()
    total = int(cu_seqlens[-1])
    bag = bag_of_row(cu_seqlens.to(torch.int64), total)
    return (total / (int((lengths > 0).sum()) * lengths.double()))[bag].float()


@dataclass(frozen=True)
class Survey:
    """What one pass finds: the number of rows, a uniform sample of those that have weight, fp32 [n, D], its weights."""

    count: int
    sample: Tensor
    weights: Tensor | None

    @property
    def variance(self) -> float:
        """Mean variance of a feature, estimated from the sample."""
        return float(self.sample.double().var(dim=0, correction=0).mean())


def survey(rows: Any, want: int, seed: int, weights: Tensor | None) -> Survey:
    """Count and check the rows, and keep a uniform sample of at most ``want`` that have weight, in one pass.

    Each row has a number from a hash of its position and the seed, and the smallest stay: the same sample
    however the rows are cut into chunks.

    Raises:
        ValueError: no rows, rows that are not floating point [n, D] of one D, NaN or Inf in a row (named), weights that
            do not fit.
    """
    count, dim = 0, 0
    keys, numbers = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    sample: Tensor | None = None
    finite: list[Tensor] = []
    for chunk in chunks(rows):
        if dim and chunk.dim != dim:
            raise ValueError(f"fit_codebook: row {count} has D={chunk.dim}, the rows before it D={dim}")
        dim = chunk.dim
        if chunk.row_scale is None and chunk.index is None:  # a bank checks what is written to it
            finite.append(chunk.x.sum(dtype=torch.float32))
        drawn = hashed_uniform(count, len(chunk), seed)
        if weights is not None:
            absent = weights[count : count + len(chunk)].cpu() == 0
            drawn[: len(absent)].masked_fill_(absent, 2.0)
        limit = float(keys.max()) if len(keys) == want else 1.0
        few = (drawn < limit).nonzero()[:, 0]
        few = few[drawn[few].argsort(stable=True)[:want]]
        new = chunk.values(few.to(chunk.x.device))
        keys, numbers = torch.cat([keys, drawn[few]]), torch.cat([numbers, few + count])
        sample = new if sample is None else torch.cat([sample, new])
        kept = keys.argsort(stable=True)[:want]
        keys, numbers, sample = keys[kept], numbers[kept], sample[kept.to(sample.device)]
        count += len(chunk)
    if sample is None:
        raise ValueError("fit_codebook: there are no rows to fit")
    if finite and not torch.isfinite(torch.stack(finite)).all():
        _raise_not_finite(rows)
    numbers, order = numbers.sort()  # in the order of the rows
    if weights is not None:
        if len(weights) != count:
            raise ValueError(f"fit_codebook: {len(weights)} weights for {count} rows; give one a row")
        weights = weights[numbers.to(weights.device)].to(sample.device, torch.float64)
    return Survey(count, sample[order.to(sample.device)], weights)


def _raise_not_finite(rows: Any) -> None:
    for chunk in chunks(rows):
        bad = ~torch.isfinite(chunk.x).all(dim=1)
        if bad.any():
            row = chunk.first + int(bad.nonzero()[0, 0])
            raise ValueError(f"fit_codebook: row {row} holds NaN or Inf; drop such rows first")


def in_units(weights: Tensor) -> tuple[Tensor, float]:
    """Weights in float64 as shares of the largest, so that no sum of them leaves the range of fp32, and the largest.

    Raises:
        ValueError: not a floating point tensor [N] of numbers >= 0 (the row is named), or all of them 0.
    """
    if not isinstance(weights, Tensor) or weights.dim() != 1 or not weights.is_floating_point():
        got = (
            f"{weights.dtype} {tuple(weights.shape)}"
            if isinstance(weights, Tensor)
            else type(weights).__name__
        )
        raise ValueError(f"fit_codebook: weights must be a floating point tensor [N], one a row, got {got}")
    wrong = ~(torch.isfinite(weights) & (weights >= 0))
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(f"fit_codebook: the weight of row {row} is {float(weights[row])}; weights are >= 0")
    if not weights.any():
        raise ValueError("fit_codebook: all weights are 0")
    unit = float(weights.max())
    return weights.double() / unit, unit
