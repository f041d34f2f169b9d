"""Row formats of the memory bank: int8 and e4m3 with one scale a row, or plain bfloat16, float16, float32."""

from __future__ import annotations

import torch
from torch import Tensor

ROW_ALIGNMENT = 16  # bytes; a row is read by 16-byte loads

DTYPES: dict[str, torch.dtype] = {
    "int8": torch.int8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
# The largest value of the formats that carry a scale: a row's largest component maps to it.
_LARGEST: dict[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def row_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a row format given by name or as a dtype.

    Raises:
        ValueError: not one of int8, bfloat16, float16, float32, float8_e4m3fn.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"bank dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    return found


def has_scale(dtype: torch.dtype) -> bool:
    """True for the formats that keep one fp32 scale a row (int8, float8_e4m3fn)."""
    return dtype in _LARGEST


def padded_dim(dim: int, dtype: torch.dtype) -> int:
    """D rounded up so that a row fills whole 16-byte units."""
    unit = ROW_ALIGNMENT // dtype.itemsize
    return -(-dim // unit) * unit


def quantize(f: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows to their stored form.

        int8           scale = max|f| / 127, q = clamp(round_half_even(f / scale), -127, 127)
        float8_e4m3fn  scale = max|f| / 448, q = e4m3(clamp(f / scale, -448, 448)), round to nearest even
        the others     q = f in that dtype, round to nearest even

    Divisions are IEEE fp32. A row whose scale is 0 (all zeros) has q = 0.

    Args:
        f: fp32 [R, D], finite, |f| <= 1.
        dtype: one of :data:`DTYPES`.

    Returns:
        (q [R, D] in ``dtype``, scale fp32 [R], or fp32 [0] for the formats without a scale).
    """
    f = f.float()
    if dtype not in _LARGEST:
        return f.to(dtype), f.new_zeros(0)
    largest = _LARGEST[dtype]
    scale = f.abs().amax(dim=1) / largest if f.shape[1] else f.new_zeros(f.shape[0])
    zero = scale == 0
    ratio = f / torch.where(zero, 1.0, scale)[:, None]
    ratio = torch.where(zero[:, None], 0.0, ratio).clamp(-largest, largest)
    if dtype == torch.int8:
        ratio = torch.round(ratio)
    return ratio.to(dtype), scale


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Stored rows to the values they stand for: float(q) * scale in fp32, or float(q) without a scale.

    Args:
        q: [R, D] in one of :data:`DTYPES`.
        scale: fp32 [R] for int8 and float8_e4m3fn, fp32 [0] otherwise.

    Returns:
        fp32 [R, D].
    """
    values = q.float()
    return values * scale[:, None] if has_scale(q.dtype) else values
