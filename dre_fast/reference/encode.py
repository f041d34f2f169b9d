"""Residual encoding in plain torch: the specification every backend is judged against.

float64 in gives float64 throughout; every other dtype is computed and returned in fp32. Nothing here
materialises N x K x D, and N x K only for a bounded chunk of rows, so this also runs where no kernel does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from dre_fast.reference.hard import hard_assign, hard_encode, hard_encode_backward
from dre_fast.reference.layout import as_ragged
from dre_fast.reference.rows import compute_dtype, full_precision, l2_normalize
from dre_fast.reference.soft import soft_assign, soft_encode, soft_encode_backward, squared_distances

__all__ = [
    "NORMALIZATIONS",
    "compute_dtype",
    "full_precision",
    "hard_assign",
    "hard_encode",
    "hard_encode_backward",
    "l2_normalize",
    "normalization_steps",
    "normalize_residuals",
    "residual_encode",
    "signed_power",
    "soft_assign",
    "soft_encode",
    "soft_encode_backward",
    "squared_distances",
]

NORMALIZATIONS = ("intra", "power", "l2")


def signed_power(x: Tensor, power: float = 0.5, eps: float = 1e-12) -> Tensor:
    """sign(x) |x|^power elementwise; zero where |x| <= eps (infinite slope at 0)."""
    usable = x.abs() > eps
    return torch.where(usable, x.sign() * torch.where(usable, x.abs(), 1.0) ** power, 0.0)


def normalization_steps(normalize: str | Sequence[str]) -> tuple[str, ...]:
    """Check names and order of normalisations: intra, power, l2 in that order; () or "none".

    Raises:
        ValueError: unknown, repeated or wrongly ordered names.
    """
    steps = (normalize,) if isinstance(normalize, str) else tuple(normalize)
    if steps == ("none",):
        return ()
    unknown = [name for name in steps if name not in NORMALIZATIONS]
    if unknown:
        raise ValueError(f"normalize: unknown {unknown[0]!r}; choose from {', '.join(NORMALIZATIONS)}")
    if list(steps) != sorted(set(steps), key=NORMALIZATIONS.index):
        raise ValueError(f"normalize: order is intra, power, l2, each at most once; got {steps}")
    return steps


def normalize_residuals(
    residuals: Tensor, normalize: str | Sequence[str], eps: float = 1e-12, power: float = 0.5
) -> Tensor:
    """Normalise V: L2 of each codeword ("intra"), signed power ("power"), L2 of all K*D entries ("l2").

    Args:
        residuals: V [B, K, D], any float dtype.
        normalize: names, applied in the order intra, power, l2; () for none.
        eps: norms at or below it (empty codewords, empty bags) give zero output growth and zero gradient.
        power: exponent of "power".

    Returns:
        [B, K, D], fp32 (float64 for float64 input).

    Raises:
        ValueError: unknown, repeated or wrongly ordered names.

    Source: intra-normalisation, Arandjelovic & Zisserman 2013 ("All about VLAD"); power normalisation,
    Perronnin et al. 2010; both with global L2 in NetVLAD, Arandjelovic et al. 2016, section 3.1, and
    DRE-SLCL, arXiv 2511.05034.
    """
    out = residuals.to(compute_dtype(residuals))
    for step in normalization_steps(normalize):
        if step == "intra":
            out = l2_normalize(out, eps)
        elif step == "power":
            out = signed_power(out, power, eps)
        else:
            codewords = out.shape[-2]
            out = rearrange(out, "... k d -> ... (k d)")
            out = rearrange(l2_normalize(out, eps), "... (k d) -> ... k d", k=codewords)
    return out


def residual_encode(
    x: Tensor,
    codebook: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    assignment: str = "hard",
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    normalize: str | Sequence[str] = (),
    normalize_rows: bool = False,
    return_counts: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The plain-torch form of :func:`dre_fast.residual_encode`: same arguments, same results.

    It checks shapes and dtypes, not values: a row with NaN spreads, where the public function names it.
    """
    rows, offsets, taken = as_ragged(x, cu_seqlens, mask, index)
    if assignment == "hard":
        residuals, counts, *_ = hard_encode(rows, codebook, offsets, taken, unit=normalize_rows)
    elif assignment == "soft":
        residuals, counts = soft_encode(
            rows, codebook, offsets, scale, weight, bias, taken, unit=normalize_rows
        )
    else:
        raise ValueError(f"residual_encode: assignment must be 'hard' or 'soft', got {assignment!r}")
    residuals = normalize_residuals(residuals, normalize)
    return (residuals, counts) if return_counts else residuals
