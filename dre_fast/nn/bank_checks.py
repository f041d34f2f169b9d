"""What the memory bank refuses, and how it says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dre_fast.reference.quantize import DTYPES, has_scale, padded_dim

MAX_CODEWORDS = 32767  # codes are int16, -1 means none

TABLES = (
    "payload",
    "scale",
    "code",
    "age",
    "drift",
    "start",
    "length",
    "slide_sums",
    "slide_counts",
    "codebook",
)
_TABLE_DTYPES = {
    "scale": torch.float32,
    "code": torch.int16,
    "age": torch.int32,
    "drift": torch.float32,
    "start": torch.int64,
    "length": torch.int64,
    "slide_sums": torch.int64,
    "slide_counts": torch.int64,
    "codebook": torch.float32,
}


def can_look() -> bool:
    """Whether checks may look at values: a graph that is being traced or captured cannot read them back."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def size_text(size: float) -> str:
    """Bytes for people: "61.0 GB", "2.5 MB", "31 bytes" (powers of 1000)."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size) >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{int(size)} bytes"


def table_bytes(rows: int, dim: int, dtype: torch.dtype, slides: int, codewords: int) -> int:
    """Bytes of all tables of a bank: rows with scale, code, age and drift; sums and counts of slides."""
    small = rows * (4 * has_scale(dtype) + 2 + 4 + 4)
    sums = slides * (16 + codewords * (dim + 1) * 8) + codewords * dim * 4
    return payload_bytes(rows, dim, dtype) + small + sums


def payload_bytes(rows: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of the stored rows alone."""
    return rows * padded_dim(dim, dtype) * dtype.itemsize


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device, for the CPU within the container's limit too; None where it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        # page cache counts as used there but gives way, so only the anonymous part is held against the limit
        anonymous = [
            int(line.split()[1])
            for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
            if line.startswith("anon ")
        ]
        limits.append(int(limit.read_text()) - (anonymous[0] if anonymous else int(used.read_text())))
    return min(limits) if limits else None


def check_fits(
    rows: int,
    dim: int,
    dtype: torch.dtype,
    slides: int,
    codewords: int,
    device: torch.device,
    *,
    holds: int = 0,
    tier: str = "device",
) -> None:
    """Refuse an allocation larger than the free memory, before it is tried.

    Args:
        holds: bytes of these tables that are there already and given back afterwards.
        tier: where the payload lies: with "host" it counts against the host's memory, with "file" not here.

    Raises:
        ValueError: with the numbers, and what to change.
    """
    need = table_bytes(rows, dim, dtype, slides, codewords)
    payload = payload_bytes(rows, dim, dtype)
    if device.type == "cpu" and tier == "host":
        tier = "device"
    smaller = "" if dtype.itemsize == 1 else "dtype='int8', "
    fewer = f"{smaller}fewer slides or codewords, another device"
    all_tables = (need - holds, device, "", f"{fewer} or tier ('host', 'file')")
    small = (need - payload - holds, device, " for all but the rows", fewer)
    needs = [all_tables] if tier == "device" else [small]
    if tier == "host":
        needs.append((payload, torch.device("cpu"), " for the rows", f"{smaller}or tier='file'"))
    for size, where, what, instead in needs:
        free = free_bytes(where)
        if free is None or size <= free:
            continue
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"MemoryBank: {rows:,} rows x {dim} {name}, with sums of {slides:,} slides x {codewords} words, needs "
            f"{size_text(size)}{what}; {size_text(free)} free on {where}. Use {instead}"
        )


def check_slides(length: Tensor, slides: Tensor) -> None:
    """Refuse ids that no slide has. slides int64 [B].

    Raises:
        ValueError: naming the first such slide.
    """
    known = length.shape[0]
    bad = (slides < 0) | (slides >= known)
    if known:
        bad |= length[slides.clamp(0, known - 1)] == 0
    if bool(bad.any()):
        slide = int(slides[bad][0])
        raise ValueError(f"MemoryBank: no slide {slide}{_slide_hint(length, slide)}")


def check_rows(length: Tensor, slides: Tensor, tiles: Tensor, features: Tensor | None = None) -> None:
    """Refuse (slide, tile) pairs outside the bank and features that are not finite; -1 in an id is a skip.

    One host synchronisation when all is well.

    Args:
        slides, tiles: int64 [R]; features: [R, D] on any device, or None.

    Raises:
        ValueError: naming slide and tile.
    """
    skip = (slides == -1) | (tiles == -1)
    known = length.shape[0]
    bad_slide = ~skip & ((slides < 0) | (slides >= known))
    n = length[slides.clamp(0, known - 1)] if known else torch.zeros_like(slides)
    bad_slide |= ~skip & (n == 0)
    bad_tile = ~skip & ~bad_slide & ((tiles < 0) | (tiles >= n))
    bad = bad_slide | bad_tile
    if features is None:
        wrong = bad.any()
    else:  # one pass over the features; NaN shows in both ends
        wrong = bad.any() | ~_all_finite(features).to(skip.device)
    if not bool(wrong):
        return
    if features is not None:
        bad = bad | (~skip & ~torch.isfinite(features).all(dim=1).to(skip.device))
    if not bool(bad.any()):  # only skipped rows are not finite
        return
    i = int(bad.nonzero()[0, 0])
    slide, tile = int(slides[i]), int(tiles[i])
    if bool(bad_slide[i]):
        raise ValueError(
            f"MemoryBank: slide {slide}, tile {tile}: no slide {slide}{_slide_hint(length, slide)}"
        )
    if bool(bad_tile[i]):
        raise ValueError(
            f"MemoryBank: slide {slide}, tile {tile}: the slide has {int(n[i])} tiles, 0..{int(n[i]) - 1} "
            "(-1 skips a row)"
        )
    raise ValueError(
        f"MemoryBank: slide {slide}, tile {tile}: feature is not finite (NaN or Inf); the bank is unchanged. "
        f"{int(bad.sum())} of {bad.numel()} rows are like this. Look at the tile, or lower the encoder's rate"
    )


def _all_finite(x: Tensor) -> Tensor:
    if x.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=x.device)
    low, high = torch.aminmax(x)
    return torch.isfinite(low) & torch.isfinite(high)


def check_distinct(slides: Tensor, tiles: Tensor) -> None:
    """Refuse a tile given twice for one slide of a batch. slides int64 [B], tiles int64 [B, m], -1 is a skip.

    Raises:
        ValueError: naming slide and tile.
    """
    ordered = tiles.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        i, j = twice.nonzero()[0].tolist()
        raise ValueError(
            f"MemoryBank: slide {int(slides[i])}, tile {int(ordered[i, j])} is live twice; "
            "give every live tile of a slide once"
        )


def check_codebook(codebook: Tensor, dim: int) -> Tensor:
    """A codebook [K, D] as detached fp32.

    Raises:
        ValueError: wrong shape, K not in 1..32767, or a codeword that is not finite.
    """
    if not isinstance(codebook, Tensor):
        raise ValueError(
            f"MemoryBank: codebook must be a tensor [K, {dim}], got {type(codebook).__name__} "
            "(fit_codebook returns the codebook and its inertia)"
        )
    if codebook.ndim != 2 or codebook.shape[1] != dim:
        raise ValueError(f"MemoryBank: codebook must be [K, {dim}], got {list(codebook.shape)}")
    if not 1 <= codebook.shape[0] <= MAX_CODEWORDS:
        raise ValueError(f"MemoryBank: 1 to {MAX_CODEWORDS} codewords, got {codebook.shape[0]}")
    codebook = codebook.detach().float()
    finite = torch.isfinite(codebook).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(f"MemoryBank: codeword {int((~finite).nonzero()[0, 0])} is not finite")
    return codebook


def table_problem(tables: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a set of bank tables from a file or a state dict, or None when they fit together."""
    missing = [name for name in TABLES if name not in tables]
    if missing:
        return f"missing {', '.join(missing)}"
    payload, codebook, start, length = (tables[k] for k in ("payload", "codebook", "start", "length"))
    if payload.ndim != 2 or payload.dtype not in DTYPES.values():
        return f"payload is {payload.dtype} {list(payload.shape)}, not rows in one of {', '.join(DTYPES)}"
    if codebook.ndim != 2 or start.ndim != 1:
        return (
            f"codebook {list(codebook.shape)} or start {list(start.shape)} has the wrong number of dimensions"
        )
    if not bool(torch.isfinite(codebook).all()):
        return "the codebook holds NaN or Inf"
    rows, (k, dim), s = payload.shape[0], codebook.shape, start.shape[0]
    if payload.shape[1] != padded_dim(dim, payload.dtype):
        return f"payload rows of {payload.shape[1]} values do not hold {dim} values padded to 16 bytes"
    shapes = {
        "scale": (rows if has_scale(payload.dtype) else 0,),
        "code": (rows,),
        "age": (rows,),
        "drift": (rows,),
        "length": (s,),
        "slide_sums": (s, k, dim),
        "slide_counts": (s, k),
    }
    for name, dtype in _TABLE_DTYPES.items():
        table = tables[name]
        if table.dtype != dtype or tuple(table.shape) != shapes.get(name, tuple(table.shape)):
            expected = list(shapes.get(name, table.shape))
            return f"{name} is {table.dtype} {list(table.shape)}, expected {dtype} {expected}"
    if s:
        first, order = torch.sort(torch.where(length > 0, start, 0), stable=True)
        end = first + length[order]
        used = length[order] > 0
        first, end = first[used], end[used]
        if bool((length < 0).any()) or bool((first < 0).any()) or bool((end > rows).any()):
            return f"the rows of a slide lie outside the {rows} rows"
        if bool((end[:-1] > first[1:]).any()):
            return "the rows of two slides overlap"
    code, written = tables["code"], tables["age"] >= 0
    if bool(((code < -1) | (code >= k)).any()):
        return f"codes outside -1..{k - 1}"
    if k and bool(((code >= 0) != written).any()):
        return "rows with a code and written rows are not the same"
    return None


def _slide_hint(length: Tensor, slide: int) -> str:
    if 0 <= slide < length.shape[0]:
        return ", it was removed"
    if not length.shape[0]:
        return ", the bank has no slides"
    return f", ids are 0..{length.shape[0] - 1}"
