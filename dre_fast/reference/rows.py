"""The rows an encoding reads: a dense tensor, chosen rows of it, or stored rows of a bank; one chunk at a time.

Row i of the M that are encoded is row r = index[i] of x (r = i without an index), as

    x~_i = x[r, :D] * row_scale[r],    with ``unit`` divided by max(||x~_i||_2, 1e-12).

Index -1 skips: such a row belongs to no bag.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor

_CHUNK_SCORES = 1 << 19  # rows x codewords scored at once: 2 MB of fp32, which stays in cache
_PIECE = 1 << 12  # torch shares out sums of 2^15 values and more
NORM_EPS = 1e-12


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for everything else (narrower rows are upcast a chunk at a time)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast does not turn the matrix products into half precision."""
    return torch.autocast(x.device.type, enabled=False)


def chunks(start: int, stop: int, width: int) -> Iterator[slice]:
    """Slices of [start, stop) that hold a bounded number of rows times ``width``."""
    step = max(1, _CHUNK_SCORES // max(width, 1))
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


def sum_last(x: Tensor) -> Tensor:
    """Sums over the last dimension, [..., D] -> [..., 1].

    torch lets threads share one long sum, whose bits then depend on how many there are; those of pieces do not.
    """
    if x.shape[-1] > _PIECE:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % _PIECE))
        x = reduce(x, "... (piece d) -> ... piece", "sum", d=_PIECE)
    return reduce(x, "... d -> ... 1", "sum")


def l2_normalize(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """x / max(||x||_2, eps) over the last dimension, in fp32 (float64 for float64 input).

    Args:
        x: [..., D], any float dtype. Rows of large finite values are safe: they are divided by their largest
            entry before anything is squared.
        eps: smallest norm divided by. At or below it the gradient is zero, so that no 1/eps reaches
            the encoder.

    Returns:
        [..., D], fp32 or float64.
    """
    x = x.to(compute_dtype(x))
    if x.shape[-1]:
        x = x / reduce(x.detach().abs(), "... d -> ... 1", "max").clamp(min=1.0)
    square = sum_last(x * x)
    usable = square > eps * eps
    # where() on both sides of the root: the branch not taken must not produce inf * 0 in the backward
    norm = torch.where(usable, square, 1.0).sqrt()
    return torch.where(usable, x / norm, x.detach() / eps)


def l2_normalize_backward(grad: Tensor, x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Gradient of :func:`l2_normalize`: (g - (g.u) u) / ||x|| with u = x / ||x||; 0 where ||x|| <= eps."""
    x, grad = x.to(compute_dtype(x)), grad.to(compute_dtype(x))
    largest = reduce(x.abs(), "... d -> ... 1", "max").clamp(min=1.0)
    norm = sum_last((x / largest).square()).sqrt()
    usable = norm > eps
    norm = torch.where(usable, norm, 1.0)
    u = x / largest / norm
    along = sum_last(grad * u)
    return torch.where(usable, (grad - along * u) / norm / largest, 0.0)


@dataclass(frozen=True)
class RowSource:
    """Rows behind one interface; ``source[a:b]`` are rows a to b as [n, D] in the dtype of the computation.

    x: [R, P], P >= dim: any float dtype, or int8 / float8_e4m3fn with ``row_scale`` fp32 [R].
    index: int64 [M], rows of x in the order they are read; -1 = skip, read as zeros.
    """

    x: Tensor
    dim: int
    index: Tensor | None = None
    row_scale: Tensor | None = None
    unit: bool = False

    def __len__(self) -> int:
        return self.x.shape[0] if self.index is None else self.index.shape[0]

    def stored(self, rows: slice) -> Tensor:
        """Rows before any normalisation, [n, D]."""
        dtype = compute_dtype(self.x)
        if self.index is None:
            block = self.x[rows, : self.dim].to(dtype)
            return block if self.row_scale is None else block * self.row_scale[rows, None]
        index = self.index[rows]
        if self.x.shape[0] == 0:  # nothing to take from: every entry is -1
            return torch.zeros(index.shape[0], self.dim, dtype=dtype, device=self.x.device)
        safe = index.clamp(min=0)
        block = self.x[:, : self.dim].index_select(0, safe).to(dtype)
        if self.row_scale is not None:
            block = block * self.row_scale.index_select(0, safe)[:, None]
        return torch.where((index >= 0)[:, None], block, 0.0)

    def __getitem__(self, rows: slice) -> Tensor:
        block = self.stored(rows)
        return l2_normalize(block) if self.unit else block

    def taken(self) -> Tensor | None:
        """Which rows are not skipped, bool [M]; None when all are read."""
        return None if self.index is None else self.index >= 0

    def per_row(self, values: Tensor) -> Tensor:
        """One number a stored row, [R] -> [M] in reading order, -1 for skipped rows."""
        if self.index is None:
            return values
        if values.shape[0] == 0:
            return torch.full_like(self.index, -1)
        return torch.where(self.index >= 0, values.index_select(0, self.index.clamp(min=0)).long(), -1)


def add_rows(sums: Tensor, place: Tensor, rows: Tensor) -> None:
    """sums[place[i]] += rows[i], in place and the same on every run."""
    if rows.is_cuda:  # index_add is atomic there, index_put sorts
        sums.index_put_((place,), rows, accumulate=True)
    else:
        sums.index_add_(0, place, rows)
