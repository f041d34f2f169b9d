"""The whole method in plain torch: the specification in code, and the backend where none is faster."""

from dre_fast.reference.encode import (
    hard_assign,
    hard_encode,
    l2_normalize,
    normalize_residuals,
    residual_encode,
    soft_assign,
    soft_encode,
)
from dre_fast.reference.kmeans import fit_kmeans
from dre_fast.reference.loss import info_nce, siglip

__all__ = [
    "fit_kmeans",
    "hard_assign",
    "hard_encode",
    "info_nce",
    "l2_normalize",
    "normalize_residuals",
    "residual_encode",
    "siglip",
    "soft_assign",
    "soft_encode",
]
