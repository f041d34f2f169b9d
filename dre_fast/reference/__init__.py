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

__all__ = [
    "hard_assign",
    "hard_encode",
    "l2_normalize",
    "normalize_residuals",
    "residual_encode",
    "soft_assign",
    "soft_encode",
]
