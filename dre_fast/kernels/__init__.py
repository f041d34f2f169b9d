"""Triton kernels and nothing else; `dre_fast.ops` decides when they run. Importing this needs triton."""

from dre_fast.kernels.contrast_backward import info_nce_rows_backward, siglip_rows_backward
from dre_fast.kernels.contrast_forward import info_nce_rows, siglip_rows
from dre_fast.kernels.hard_backward import hard_encode_backward
from dre_fast.kernels.hard_encode import hard_encode
from dre_fast.kernels.normalize import normalize_residuals, normalize_residuals_backward
from dre_fast.kernels.permute import bank_tiles
from dre_fast.kernels.soft_backward import soft_encode_backward
from dre_fast.kernels.soft_encode import soft_encode

__all__ = [
    "bank_tiles",
    "hard_encode",
    "hard_encode_backward",
    "info_nce_rows",
    "info_nce_rows_backward",
    "normalize_residuals",
    "normalize_residuals_backward",
    "siglip_rows",
    "siglip_rows_backward",
    "soft_encode",
    "soft_encode_backward",
]
