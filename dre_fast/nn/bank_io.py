"""The memory bank's file: safetensors, written in pieces, so no second copy of the rows is in memory.

Its metadata hold a CRC-32 of every table, which reading compares before anything is taken over.
"""

from __future__ import annotations

import json
import math
import os
import platform
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dre_fast.nn.bank_checks import table_problem

FORMAT = "dre_fast.memory_bank"
VERSION = "1"
_PIECE = 1 << 24  # bytes copied at a time
_MAX_HEADER = 1 << 20
_CODES: dict[str, torch.dtype] = {
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
_NAMES = {dtype: code for code, dtype in _CODES.items()}


def write_tables(
    path: str | os.PathLike[str], tables: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tables as one safetensors file: all of it, or nothing and the old file stays.

    Raises:
        OSError: disk full, no permission ...; names the file. The temporary file is removed; one that a killed
            process left is removed by the next save.
    """
    # wide items first: then every table starts at a multiple of its item size
    names = sorted(tables, key=lambda name: (-tables[name].dtype.itemsize, name))
    about = {"format": FORMAT, "version": VERSION, **metadata}
    header: dict[str, object] = {"__metadata__": about}
    offset = 0
    for name in names:
        table = tables[name]
        end = offset + table.numel() * table.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[table.dtype],
            "shape": list(table.shape),
            "data_offsets": [offset, end],
        }
        offset = end

    def head(sums: Mapping[str, int]) -> bytes:
        """The same length for any sums: it stands before the data, whose sums are known after them."""
        about["crc32"] = " ".join(f"{name}={sums.get(name, 0):08x}" for name in names)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(final)
    temporary = final.with_name(f".{final.name}.{_host()}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            file.write(head({}))
            sums = {}
            for name in names:
                raw = tables[name].detach().contiguous().view(-1).view(torch.uint8)
                sums[name] = 0
                for piece in raw.split(_PIECE):
                    data = memoryview(piece.cpu().numpy())
                    sums[name] = zlib.crc32(data, sums[name])
                    file.write(data)
            file.seek(0)
            file.write(head(sums))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
        _sync_folder(final.parent)
    except OSError as error:
        raise OSError(error.errno, f"{final}: the memory bank was not saved: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk too: what is there after a power cut is the old file or the new one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host() -> str:
    return "".join(c if c.isalnum() else "-" for c in platform.node()) or "host"


def _remove_stale(final: Path) -> None:
    """Delete what killed processes of this host left of earlier saves of this file."""
    for left in final.parent.glob(f".{final.name}.{_host()}.*-*"):
        number = left.name.rpartition(".")[2].partition("-")[0]
        if number.isdigit() and not _alive(int(number)):
            left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_tables(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map the tables of a bank file into memory, with its metadata; rows are read when they are touched.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a bank file, of a newer version, cut short, with bytes that changed since they were saved, or
            with tables that do not fit together.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= _MAX_HEADER:
            raise ValueError(f"{path}: not a memory bank saved by dre_fast (no safetensors header)")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = dict(header.pop("__metadata__", {}))
        entries = {name: _entry(entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a memory bank saved by dre_fast, or cut short (header: {error})"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: a safetensors file, but not a memory bank saved by dre_fast")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path}: memory bank of format {metadata.get('version')}; this dre_fast reads format {VERSION}"
        )
    need = 8 + length + max((end for _, _, _, end in entries.values()), default=0)
    if size != need:
        raise ValueError(f"{path}: cut short or damaged: {size} bytes, its header says {need}")

    # files of earlier releases have no sums
    sums = dict(entry.split("=") for entry in metadata.get("crc32", "").split())
    data = (
        np.memmap(path, dtype=np.uint8, mode="c", offset=8 + length)
        if size > 8 + length
        else np.zeros(0, np.uint8)
    )
    tables = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: damaged: {name} {shape} {dtype} does not fill {end - begin} bytes")
        raw = torch.from_numpy(data[begin:end]) if end > begin else torch.zeros(0, dtype=torch.uint8)
        tables[name] = raw.view(dtype).view(shape)
        expected = sums.get(name)
        if expected is not None and _crc32(raw) != int(expected, 16):
            raise ValueError(f"{path}: damaged: the bytes of {name} are not those that were saved (CRC-32)")
    problem = table_problem(tables)
    if problem:
        raise ValueError(f"{path}: damaged memory bank: {problem}")
    return tables, metadata


def _crc32(raw: Tensor) -> int:
    found = 0
    for piece in raw.split(_PIECE):
        found = zlib.crc32(memoryview(piece.numpy()), found)
    return found


def _entry(entry: Mapping[str, object]) -> tuple[torch.dtype, list[int], int, int]:
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if code not in _CODES:
        raise ValueError(f"unknown dtype {code!r}")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise ValueError("a table without shape and offsets")
    begin, end = (int(x) for x in offsets)
    if not 0 <= begin <= end or any(int(x) < 0 for x in shape):
        raise ValueError("a table with impossible offsets")
    return _CODES[str(code)], [int(x) for x in shape], begin, end
