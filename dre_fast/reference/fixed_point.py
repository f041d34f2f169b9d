"""64-bit fixed point for the running sums of the memory bank.

Integer addition is associative: a sum kept up to date by differences has the same bits as one recomputed from
the rows, whatever the history of writes and the order of the additions (dre_fast's extension of DRE-SLCL).
"""

from __future__ import annotations

import torch
from torch import Tensor

FRACTION_BITS = 24
SCALE = float(1 << FRACTION_BITS)


def to_fixed(z: Tensor) -> Tensor:
    """round(z * 2^24) as int64, half to even; same shape as ``z``.

    ``z`` holds stored row values, |z| <= 1, in any floating dtype. The product is exact (a power of
    two), so the only rounding is the final one, by at most 2^-25. A sum of 2^38 rows still fits.
    """
    wide = z if z.dtype == torch.float64 else z.float()
    return torch.round(wide * SCALE).to(torch.int64)


def from_fixed(s: Tensor) -> Tensor:
    """``s`` int64 -> s * 2^-24 in float64, same shape; exact while |s| < 2^53 (2^29 unit values)."""
    return s.double() / SCALE


def accumulate_(
    sums: Tensor, counts: Tensor, slide: Tensor, code: Tensor, rows: Tensor, sign: int = 1
) -> None:
    """sums[slide_i, code_i] += sign * to_fixed(rows_i) and counts[slide_i, code_i] += sign, in place.

    Args:
        sums: int64 [S, K, D], contiguous; counts: int64 [S, K], contiguous.
        slide: int64 [n]; code: integer [n] in [0, K).
        rows: [n, D] stored (dequantised) rows.
        sign: +1 adds the rows, -1 takes them out.
    """
    k, d = sums.shape[1:]
    cell = slide * k + code.to(torch.int64)
    sums.view(-1, d).index_add_(0, cell, to_fixed(rows), alpha=sign)
    counts.view(-1).index_add_(0, cell, torch.ones_like(cell), alpha=sign)
