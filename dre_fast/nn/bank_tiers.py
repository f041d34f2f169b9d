"""Where the payload of a memory bank lies: on the device, in pinned host memory, or in a file."""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from dre_fast.nn import bank_checks as checks
from dre_fast.nn.bank_disk import FileRows
from dre_fast.nn.pinned import PinnedView
from dre_fast.reference.quantize import padded_dim

TIERS = ("device", "host", "file")
_CACHE = (64 << 20, 4 << 30)  # bytes: least and most for the slabs of a bank in a file, unless told otherwise


class Placement:
    """Makes and grows the payload of one bank in its tier.

    Args:
        tier: one of :data:`TIERS`. On the CPU "host" and "device" are one.
        dim, dtype: of a row.
        device: of the other tables and the kernels.
        folder: tier "file": where the file lies.
        cache: tier "file": bytes of memory for slabs.

    Raises:
        ValueError: an unknown tier, no folder for a file, or a folder or cache where there is none.
    """

    def __init__(
        self,
        tier: str,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        folder: str | os.PathLike[str] | None,
        cache: int | str | None,
    ) -> None:
        if tier not in TIERS:
            raise ValueError(f"MemoryBank: tier must be one of {', '.join((*TIERS, 'auto'))}, got {tier!r}")
        if tier == "file" and folder is None:
            raise ValueError("MemoryBank: tier='file' needs folder=, where the rows lie")
        if tier != "file" and (folder is not None or cache is not None):
            raise ValueError(
                f"MemoryBank: folder= and cache= are for tier='file' or 'auto', not for tier={tier!r}"
            )
        self.tier, self.dim, self.dtype, self.device = tier, dim, dtype, device
        self.folder = None if folder is None else Path(folder)
        self.cache = None if cache is None else to_bytes(cache)
        self.file: FileRows | None = None
        self._pinned: PinnedView | None = None

    def blank(self, rows: int) -> Tensor:
        """A payload of zeros, [rows, Dp], in place of any made before.

        Raises:
            ValueError: tier "file": less room in the folder than needed, with the numbers.
            OSError: tier "file": no such folder, no permission.
        """
        width = padded_dim(self.dim, self.dtype)
        size = rows * width * self.dtype.itemsize
        if self.folder is not None and self.tier == "file":
            self._check_disk(size, rows)
            cache = self._cache_bytes(size)
            made = FileRows(self.folder, rows, self.dim, self.dtype, cache, self.device)
            self.close()
            self.file = made
            return made.payload()
        if self.tier == "host" and self.device.type == "cuda" and size:
            memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
            self._pinned = PinnedView(memory, self.device)
            return self._pinned.tensor.view(self.dtype).view(rows, width)
        return torch.zeros(rows, width, dtype=self.dtype, device=self.device)

    def grow(self, payload: Tensor, rows: int) -> Tensor:
        """The same rows and zeros after them, [rows, Dp]. Raises as :meth:`blank`."""
        if self.file is not None:
            more = rows - payload.shape[0]
            self._check_disk(more * payload.shape[1] * self.dtype.itemsize, more)
            return self.file.resize(rows)
        before = self._pinned  # kept until its rows are copied
        grown = self.blank(rows)
        grown[: payload.shape[0]] = payload
        if before is not None:
            before.close()
        return grown

    def close(self) -> None:
        """Stop the threads of a bank in a file."""
        if self.file is not None:
            self.file.close()

    def _check_disk(self, size: int, rows: int) -> None:
        assert self.folder is not None
        if not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "MemoryBank: folder= names no folder", str(self.folder))
        free = shutil.disk_usage(self.folder).free
        if size > free:
            name = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"MemoryBank: {rows:,} rows x {self.dim} {name} need {checks.size_text(size)} of disk; "
                f"{checks.size_text(free)} free in {self.folder}. Use another folder"
                f"{'' if self.dtype.itemsize == 1 else ', or dtype=' + repr('int8')}"
            )

    def _cache_bytes(self, size: int) -> int:
        if self.cache is None:
            return min(max(size, _CACHE[0]), _CACHE[1])
        free = checks.free_bytes(torch.device("cpu"))
        if free is not None and self.cache > free:
            raise ValueError(
                f"MemoryBank: cache= of {checks.size_text(self.cache)}; {checks.size_text(free)} of memory are free"
            )
        return self.cache


def choose_tier(
    rows: int,
    dim: int,
    dtype: torch.dtype,
    slides: int,
    codewords: int,
    device: torch.device,
    budget: int | str | None,
    folder: str | os.PathLike[str] | None,
) -> str:
    """The first tier in which a bank fits: ``budget`` bytes of the device (default: what is free), host memory, file."""
    free = checks.free_bytes(device)
    limit = free if budget is None else to_bytes(budget)
    if limit is None or checks.table_bytes(rows, dim, dtype, slides, codewords) <= limit:
        return "device"
    host = checks.free_bytes(torch.device("cpu"))
    if device.type == "cuda" and (host is None or checks.payload_bytes(rows, dim, dtype) <= host):
        return "host"
    if folder is None:
        need = checks.size_text(checks.table_bytes(rows, dim, dtype, slides, codewords))
        where = "into host memory, nor " if device.type == "cuda" else ""
        raise ValueError(
            f"MemoryBank: {need} do not fit {where}into the {checks.size_text(limit)} that the bank may take on "
            f"{device}: give folder=, for rows in a file"
        )
    return "file"


def to_bytes(size: int | str) -> int:
    """Bytes of 1000, "500 MB", "8GB" or "1.5 TB" (powers of 1000).

    Raises:
        ValueError: anything else, or a size that is not positive.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)B?\s*", str(size))
    try:
        value = (
            int(float(found[1]) * 1000 ** " kMGT".index(found[2].replace("K", "k") or " ")) if found else 0
        )
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"a size in bytes such as 8000000, '500 MB' or '8GB' (powers of 1000), got {size!r}")
    return value
