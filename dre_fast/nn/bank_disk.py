"""A memory bank whose rows lie in a file: the slides of a step are in memory, the ones to come are on their way."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dre_fast.nn.bank_ring import SlabRing
from dre_fast.nn.bank_rows import ROW_TABLES, Rows
from dre_fast.nn.pinned import PinnedView
from dre_fast.ops import native
from dre_fast.reference.quantize import has_scale, padded_dim

_THREADS = 4  # reads under way at once: what a disk needs to be busy
_SMALL = ROW_TABLES[1:]  # always in memory, on the bank's device


class FileRows:
    """The payload of a bank in a nameless file of ``folder``, and a cache of slabs that kernels read and write.

    The other tables of a row are small (14 bytes) and stay where they are; the slabs in the cache have copies of
    them, so that every operation finds all tables of a row under one row number. With a CUDA device the cache is
    pinned host memory that kernels address over the bus.

    Args:
        folder: where the file lies. It has no name: it is gone with the process, whatever ends it.
        rows, dim, dtype: of the payload.
        cache_bytes: size of the cache.
        device: of the kernels and the small tables.

    Raises:
        RuntimeError: the pybind11 part of dre_fast is not built (says how to get it).
        OSError: no such folder, or no space in it.
        ValueError: a cache that holds no row.
    """

    def __init__(
        self,
        folder: Path,
        rows: int,
        dim: int,
        dtype: torch.dtype,
        cache_bytes: int,
        device: torch.device,
    ) -> None:
        missing = native.why_not("host")
        if missing:
            raise RuntimeError(f"MemoryBank: rows in a file need the compiled host part: {missing}")
        self.folder, self.dtype, self.device = folder, dtype, device
        width = padded_dim(dim, dtype)
        self.row_bytes = width * dtype.itemsize
        self._width = width
        cached = cache_bytes // self.row_bytes
        if cached < 1:
            raise ValueError(
                f"MemoryBank: a cache of {cache_bytes:,} bytes holds no row of {self.row_bytes} bytes"
            )
        host: Any = importlib.import_module("dre_fast._host")
        self._file = host.RowFile(str(folder), rows, self.row_bytes, cached, _THREADS)
        self.ring = SlabRing(self._file, cached)
        memory = torch.from_numpy(self._file.ring())
        self._pinned = PinnedView(memory, device) if device.type == "cuda" else None
        payload = (self._pinned.tensor if self._pinned else memory).view(dtype).view(cached, width)
        self._cached = Rows(
            payload,
            torch.zeros(cached if has_scale(dtype) else 0, device=device),
            torch.full((cached,), -1, dtype=torch.int16, device=device),
            torch.full((cached,), -1, dtype=torch.int32, device=device),
            torch.zeros(cached, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
        )

    def payload(self) -> Tensor:
        """The file as a tensor on the CPU, [rows, Dp]. Rows still in the cache are in it after :meth:`flush`."""
        if self._file.rows == 0:
            return torch.zeros(0, self._width, dtype=self.dtype)
        return torch.from_numpy(self._file.map()).view(self.dtype).view(-1, self._width)

    def resize(self, rows: int) -> Tensor:
        """Make room for ``rows`` rows, the new ones zeros; returns :meth:`payload`.

        Raises:
            OSError: no space in the folder.
        """
        self._file.resize(rows)
        return self.payload()[:rows]

    # ------------------------------------------------------------------ slides in memory

    @contextmanager
    def lease(self, slides: Tensor, bank: Rows, length: Tensor) -> Iterator[Rows]:
        """The rows of slides as tables in memory, on the bank's device, until the block ends.

        Args:
            slides: int64 [n], any order, repeated or negative ones allowed.
            bank: the bank's own tables.
            length: int64 [S].

        Raises:
            ValueError: the slides do not fit into the cache together.
            OSError: a read failed; names the slide.
        """
        wanted = torch.unique(slides[slides >= 0]).cpu()
        places = self._places(wanted, bank.start, length)
        with self.ring.lease(places, self._mark) as slabs:
            for slab in slabs:
                if slab.fresh:  # in stream order after every earlier write
                    for name in _SMALL:
                        table, own = getattr(self._cached, name), getattr(bank, name)
                        if own.shape[0]:
                            table[slab.first : slab.end] = own[slab.start : slab.start + slab.rows]
                    slab.fresh = False
            start = torch.zeros_like(bank.start)
            first = torch.tensor([slab.first for slab in slabs], dtype=torch.int64)
            start[wanted.to(start.device)] = first.to(start.device)
            cached = self._cached
            yield Rows(cached.payload, cached.scale, cached.code, cached.age, cached.drift, start)

    def wrote(self, slides: Tensor, tiles: Tensor, leased: Rows, bank: Rows) -> None:
        """After a write into leased rows: bring the bank's small tables up to date, note what the file lacks.

        Args:
            slides, tiles: int64 [n] as given to the write; negative ones were skipped.
        """
        kept = (slides >= 0) & (tiles >= 0)
        slides, tiles = slides[kept], tiles[kept]
        own, cached = bank.start[slides] + tiles, leased.start[slides] + tiles
        for name in _SMALL:
            if getattr(bank, name).shape[0]:
                getattr(bank, name)[own] = getattr(leased, name)[cached]
        numbers, changed = slides.cpu().numpy(), tiles.cpu().numpy()
        for slide in np.unique(numbers):
            self.ring.wrote(int(slide), changed[numbers == slide])

    def prefetch(self, slides: Tensor, start: Tensor, length: Tensor) -> int:
        """Read slides ahead, int64 [n], as far as there is room; returns how many from the front."""
        places = self._places(slides.cpu(), start, length)
        return self.ring.prefetch(places)

    def _places(self, slides: Tensor, start: Tensor, length: Tensor) -> list[tuple[int, int, int]]:
        """(slide, first row, rows) of slides, int64 [n]."""
        at = slides.to(start.device)
        return list(zip(slides.tolist(), start[at].tolist(), length[at].tolist()))

    def _mark(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None  # operations on the CPU are over when they return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def statistics(self) -> dict[str, float]:
        """See :meth:`dre_fast.MemoryBank.cache_statistics`."""
        return {**self.ring.statistics(), **self._file.statistics(), "row_bytes": self.row_bytes}

    def close(self) -> None:
        """Stop the threads; the file is gone with the last tensor that maps it."""
        self._file.close()
        if self._pinned is not None:
            self._pinned.close()

    def __deepcopy__(self, _: Any) -> FileRows:
        raise TypeError("MemoryBank: rows in a file cannot be copied; save the bank and load it again")

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("MemoryBank: rows in a file cannot be pickled; save the bank and load it again")
