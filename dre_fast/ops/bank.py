"""Registered operations of the memory bank, and the choice of what runs them.

All run in C++ on the CPU; ``bank_write``, ``bank_read`` and ``bank_rest`` in CUDA where that part was built,
``bank_tiles`` in Triton on CUDA tensors; without them the reference runs. Storage layout and formulas:
:mod:`dre_fast.reference.bank`, :mod:`dre_fast.reference.sampling`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dre_fast.ops import native
from dre_fast.reference import bank as reference
from dre_fast.reference import sampling

NAMES = ("bank_write", "bank_read", "bank_rest", "bank_tiles")

_lib = torch.library.Library("dre_fast", "FRAGMENT")
_lib.define(
    "bank_write(Tensor(a!) payload, Tensor(b!) scale, Tensor(c!) code, Tensor(d!) age, Tensor(e!) drift, "
    "Tensor(f!) sums, Tensor(g!) counts, Tensor codebook, Tensor start, Tensor rows_slide, Tensor rows_tile, "
    "Tensor features, SymInt step) -> ()"
)
_lib.define("bank_read(Tensor payload, Tensor scale, Tensor rows, SymInt dim) -> Tensor")
_lib.define(
    "bank_rest(Tensor payload, Tensor scale, Tensor code, Tensor sums, Tensor counts, Tensor codebook, "
    "Tensor start, Tensor slides, Tensor tiles, bool accurate) -> (Tensor, Tensor)"
)
_lib.define(
    "bank_tiles(Tensor lengths, Tensor slides, SymInt first, SymInt count, SymInt m, Tensor cycle, "
    "SymInt seed) -> Tensor"
)


def backend(name: str, device: torch.device | str = "cpu") -> str:
    """What runs an operation on a device: "C++", "CUDA", "Triton" or "reference".

    Args:
        name: one of :data:`NAMES`.
        device: where the bank lies.

    Raises:
        ValueError: no such operation.
    """
    if name not in NAMES:
        raise ValueError(f"no bank operation is called {name!r}")
    kind = torch.device(device).type
    if kind == "cpu" and native.provides(name):
        return "C++"
    if name != "bank_tiles" and kind == "cuda" and native.cuda_available():
        return "CUDA"
    if name == "bank_tiles" and kind == "cuda" and native.triton_available():
        return "Triton"
    return "reference"


@torch.library.impl(_lib, "bank_write", "CompositeExplicitAutograd")
def _write(payload: Tensor, *others: Any) -> None:
    if backend("bank_write", payload.device) == "reference":
        reference.write(payload, *others)
    else:
        torch.ops.dre_fast_native.bank_write.default(payload, *others)


@torch.library.register_fake("dre_fast::bank_write", lib=_lib)
def _write_fake(*_: Any) -> None:
    return None


@torch.library.impl(_lib, "bank_read", "CompositeExplicitAutograd")
def _read(payload: Tensor, scale: Tensor, rows: Tensor, dim: int) -> Tensor:
    if backend("bank_read", payload.device) == "reference":
        return reference.read(payload, scale, rows, dim)
    return torch.ops.dre_fast_native.bank_read.default(payload, scale, rows.contiguous(), dim)


@torch.library.register_fake("dre_fast::bank_read", lib=_lib)
def _read_fake(payload: Tensor, scale: Tensor, rows: Tensor, dim: int) -> Tensor:
    return payload.new_empty(rows.shape[0], dim, dtype=torch.float32)


@torch.library.impl(_lib, "bank_rest", "CompositeExplicitAutograd")
def _rest(payload: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    if backend("bank_rest", payload.device) == "reference":
        return reference.rest(payload, *others)
    *tables, slides, tiles, accurate = others
    return torch.ops.dre_fast_native.bank_rest.default(
        payload, *tables, slides.contiguous(), tiles.contiguous(), accurate
    )


@torch.library.register_fake("dre_fast::bank_rest", lib=_lib)
def _rest_fake(
    payload: Tensor,
    scale: Tensor,
    code: Tensor,
    sums: Tensor,
    counts: Tensor,
    codebook: Tensor,
    start: Tensor,
    slides: Tensor,
    tiles: Tensor,
    accurate: bool,
) -> tuple[Tensor, Tensor]:
    b, (k, d) = slides.shape[0], codebook.shape
    dtype = torch.float64 if accurate else torch.float32
    return payload.new_empty(b, k, d, dtype=dtype), payload.new_empty(b, k, dtype=torch.int64)


@torch.library.impl(_lib, "bank_tiles", "CompositeExplicitAutograd")
def _tiles_at(lengths: Tensor, slides: Tensor, *others: Any) -> Tensor:
    chosen = backend("bank_tiles", slides.device)
    if chosen == "C++":
        *numbers, cycle, seed = others
        return torch.ops.dre_fast_native.bank_tiles.default(
            lengths.contiguous(), slides.contiguous(), *numbers, cycle.contiguous(), seed
        )
    if chosen == "Triton":
        from dre_fast import kernels  # Triton is imported, and needed, only for CUDA tensors

        return kernels.bank_tiles(lengths, slides, *others)
    return sampling.tiles_at(lengths, slides, *others)


@torch.library.register_fake("dre_fast::bank_tiles", lib=_lib)
def _tiles_fake(
    lengths: Tensor, slides: Tensor, first: int, count: int, m: int, cycle: Tensor, seed: int
) -> Tensor:
    return lengths.new_empty(slides.shape[0], count)


# Bound once: looking an overload up costs as much as the dispatch itself.
write = torch.ops.dre_fast.bank_write.default
read = torch.ops.dre_fast.bank_read.default
rest = torch.ops.dre_fast.bank_rest.default
_tiles = torch.ops.dre_fast.bank_tiles.default


def tiles(
    lengths: Tensor, slides: Tensor, first: int, count: int, m: int, cycle: Tensor | int, seed: int
) -> Tensor:
    """:func:`dre_fast.reference.sampling.tiles_at` as a registered operation."""
    visit = cycle if isinstance(cycle, Tensor) else torch.full_like(slides, cycle)
    # the key takes the seed modulo 2^64; the operator's argument is a signed 64-bit integer
    signed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    return _tiles(lengths, slides, first, count, m, visit, signed)
