"""Rows of arrays in files: the file is opened for each read, and only the rows asked for are read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Rows between two wanted ones that are read along rather than left out by another read.
_GAP = 32
_DTYPES = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float32}
_TORCH_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class BagError(ValueError):
    """A bag cannot be found, read or written. The message names the file and says what to do."""


@dataclass(frozen=True)
class ArrayFile:
    """An array in a file, known by its shape and dtype until rows of it are read. Picklable; holds no file open.

    Attributes:
        path: of the file, for messages.
        open: gives a context in which the array can be sliced: a tensor, numpy array, HDF5 or zarr dataset.
        shape: (n, D).
        dtype: of the tensors that are read.
        squeeze: the array is [1, n, D].
        none: nothing is stored, as TRIDENT does for a slide without tiles: n = 0.
    """

    path: Path
    open: Callable[[], contextlib.AbstractContextManager[Any]]
    shape: tuple[int, int]
    dtype: torch.dtype
    squeeze: bool = False
    none: bool = False

    def read(self, rows: range | Tensor) -> Tensor:
        """Rows [m, D], in the order given and copied out of the file.

        Args:
            rows: of 0 .. n-1, a range or int64 [m].
        """
        if len(rows) == 0 or self.none:
            return torch.zeros(0, self.shape[1], dtype=self.dtype)
        with self.open() as array:
            if isinstance(rows, range) and rows.step == 1:
                return self._span(array, rows.start, rows.stop)
            index = torch.arange(rows.start, rows.stop, rows.step) if isinstance(rows, range) else rows
            if isinstance(array, (Tensor, np.ndarray)):
                whole = array[0] if self.squeeze else array
                return self._tensor(whole[index if isinstance(whole, Tensor) else index.numpy()])
            # HDF5 and zarr read one span well and many single rows badly
            ascending, place = index.unique(return_inverse=True)
            cuts = (ascending.diff() > _GAP).nonzero()[:, 0] + 1
            parts = []
            for part in ascending.tensor_split(cuts.tolist()):
                first = int(part[0])
                parts.append(self._span(array, first, int(part[-1]) + 1)[part - first])
            return torch.cat(parts)[place]

    def _span(self, array: Any, start: int, stop: int) -> Tensor:
        return self._tensor(array[0, start:stop] if self.squeeze else array[start:stop])

    def _tensor(self, block: Any) -> Tensor:
        if isinstance(block, Tensor):
            return block.detach().to(self.dtype, copy=True).contiguous()
        block = np.asarray(block)
        native = block.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(block, dtype=native, order="C")).to(self.dtype)


def feature_array(
    path: Path, name: str, shape: Sequence[int], dtype: Any, open_array: Callable[[], Any]
) -> ArrayFile:
    """The features of a bag, [n, D] or [1, n, D].

    Args:
        name: what they are called in messages.
        dtype: of torch or numpy.

    Raises:
        BagError: another rank, no columns, or not float16, bfloat16, float32 or float64.
    """
    shape = tuple(int(size) for size in shape)
    read_as: torch.dtype | None
    if isinstance(dtype, torch.dtype):
        read_as = torch.float32 if dtype == torch.float64 else dtype
    else:
        read_as = _DTYPES.get(np.dtype(dtype).str[1:])
    if read_as is None or read_as not in _TORCH_DTYPES:
        raise BagError(
            f"{path}: {name} must be float16, bfloat16, float32 or float64, they are "
            f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        )
    if shape == (0,):
        return ArrayFile(path, open_array, (0, 0), read_as, none=True)
    squeeze = len(shape) == 3 and shape[0] == 1
    if len(shape) == 1:
        raise BagError(
            f"{path}: {name} is one vector of {shape[0]} numbers: a slide embedding, not a bag of tiles [n, D]"
        )
    if len(shape) != 2 and not squeeze:
        raise BagError(f"{path}: {name} must be [n, D], or [1, n, D], they are {list(shape)}")
    rows, dim = shape[-2:]
    if dim == 0:
        raise BagError(f"{path}: {name} have no columns, they are {list(shape)}")
    return ArrayFile(path, open_array, (rows, dim), read_as, squeeze)


def wanted_rows(where: str, rows: Any, count: int) -> range | Tensor:
    """What ``rows`` selects of ``count`` rows: a range, or int64 [m] with numbers in 0 .. count-1.

    Args:
        where: the beginning of messages.
        rows: None (all), a slice, int64 [m], bool [count], or an array or list like these.

    Raises:
        IndexError: a row that is not there.
        TypeError: something else.
    """
    if rows is None:
        return range(count)
    if isinstance(rows, slice):
        return range(*rows.indices(count))
    if not isinstance(rows, Tensor):
        if not isinstance(rows, (np.ndarray, list, tuple)):
            raise TypeError(
                f"{where}: rows must be a slice or a tensor of row numbers, got {type(rows).__name__}"
            )
        rows = torch.as_tensor(rows)
    rows = rows.detach().cpu()
    if rows.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if rows.dim() != 1 or rows.is_floating_point() or rows.is_complex():
        raise TypeError(
            f"{where}: rows must be a slice, int [m] or bool [n], got {rows.dtype} {list(rows.shape)}"
        )
    if rows.dtype == torch.bool:
        if len(rows) != count:
            raise IndexError(f"{where}: a mask of {len(rows)} for {count} tiles")
        return rows.nonzero()[:, 0]
    rows = rows.to(torch.int64)
    outside = (rows < 0) | (rows >= count)
    if bool(outside.any()):
        raise IndexError(f"{where}: no tile {int(rows[outside][0])}, it has {count}, numbered from 0")
    return rows


def check_finite(where: str, rows: Tensor, numbers: range | Tensor) -> None:
    """Raises BagError for the first of ``rows`` [m, D] with NaN or Inf, named by its number."""
    if len(rows) == 0 or bool(torch.isfinite(rows.sum(dtype=torch.float32))):
        return
    bad = ~torch.isfinite(rows)
    tiles = bad.any(dim=1).nonzero()[:, 0]
    if len(tiles) == 0:  # finite rows whose sum is not
        return
    first = int(tiles[0])
    column = int(bad[first].nonzero()[0, 0])
    raise BagError(
        f"{where}: tile {int(numbers[first])} holds {float(rows[first, column])} in column {column} "
        f"({len(tiles)} of the {len(rows)} tiles read are not finite); extract its features again (float16 overflows "
        "above 65,504), or leave those tiles out"
    )


def spans(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover 0 .. count-1 in order."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
