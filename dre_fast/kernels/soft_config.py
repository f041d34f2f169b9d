"""Which tile sizes the soft encode kernels use: a frozen table per GPU architecture, nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from dre_fast.kernels import config
from dre_fast.kernels.config import Arch, Launch

# Entries of each fp32 scratch array [K, rows of a chunk]: 16 MB, which stays in the L2 cache with the rows it is about.
_SCRATCH = 1 << 22
_SOFTMAX = 8192  # entries of one program that takes a softmax: 32 registers an array
PITCH = 128  # scratch columns come in this many, the tallest tile of rows


@dataclass(frozen=True)
class SoftPlan:
    """How one (architecture, kind of rows, K, D) is encoded.

    operand: dtype of the products' factors. parts: pieces of it that an fp32 codeword is split into.
    dim, codewords: D and K rounded up to whole tiles. programs: row ranges per launch, fixed as results depend on it.
    chunk: rows handled at a time. softmax, gradient: rows of one program of the two kernels that see all codewords of a
    row: of the forward and of the backward, which holds twice as much of each.
    gradient_stages: pipeline of ``products`` in the backward, which multiplies the rows by two operands.
    products, sums, rows: tiles of the kernels named so; ``sums`` also of the sums over rows of the backward.
    """

    operand: torch.dtype
    parts: int
    dim: int
    codewords: int
    programs: int
    chunk: int
    softmax: int
    gradient: int
    gradient_stages: int
    products: Launch
    sums: Launch
    rows: Launch

    @property
    def narrow(self) -> torch.dtype:
        """Dtype of the factors of the rows' gradient: fp16 is finer than bf16, and these factors can be scaled."""
        return torch.float32 if self.operand == torch.float32 else torch.float16


def operand_dtype(rows: torch.dtype) -> torch.dtype:
    """What rows are as factors of products: 8-bit rows are fp16, which holds them exactly."""
    return rows if rows in config.DTYPES else torch.float16


@cache
def plan(arch: Arch, dtype: torch.dtype, codewords: int, dim: int) -> SoftPlan:
    """The frozen plan for rows of ``dtype`` [*, dim] against ``codewords`` codewords on ``arch``.

    Raises ValueError for what ``config.check`` refuses.
    """
    config.check(dtype, codewords, dim)
    operand = operand_dtype(dtype)
    if operand == torch.float32:
        padded = max(16, 1 << (codewords - 1).bit_length())
        width = min(max(16, 1 << (dim - 1).bit_length()), 64)
        tile = min(padded, 64)
        products = Launch(32, min(width, 32), tile, warps=8, stages=2)
        sums = Launch(32, width, tile, warps=8, stages=2)
        rows = Launch(32, width, min(padded, 32), warps=8, stages=2)
    else:
        padded = max(64, 1 << (codewords - 1).bit_length())
        # rows that do not start at 16 bytes are addressed element by element, and the addresses take registers
        width = 64 if dim % 16 else min(max(64, 1 << (dim - 1).bit_length()), 128)
        stages = 2 if arch.shared < 120_000 else 3
        products = Launch(64, 64, 64, warps=8, stages=stages)
        # and operands lie in registers where there is no wgmma
        narrow = dim % 16 != 0 and arch.capability in (80, 120)
        sums = Launch(32, width, 32 if narrow else 64, warps=8, stages=stages)
        # two tiles of codewords at least, so that one is copied while the other is multiplied
        rows = Launch(64, width, 64 if dim % 16 else 32, warps=8, stages=stages)
    return SoftPlan(
        operand,
        parts=1 if operand == torch.float32 else 2,
        dim=-(-dim // width) * width,
        codewords=padded,
        programs=arch.programs,
        chunk=_SCRATCH // padded,
        softmax=min(_SOFTMAX // padded, PITCH),
        gradient=min(_SOFTMAX // 2 // padded, PITCH),
        # Triton 3.6 cannot pipeline two products of rows that were converted, as 8-bit ones are, for sm_100
        gradient_stages=1 if dtype in config.SCALED_DTYPES and arch.capability == 100 else products.stages,
        products=products,
        sums=sums,
        rows=rows,
    )
