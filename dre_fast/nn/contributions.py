"""What each tile adds to a scalar of the slide, to first order."""

from __future__ import annotations

import torch
from torch import Tensor


def contributions(gradient: Tensor, rows: Tensor, codebook: Tensor, assigned: Tensor) -> Tensor:
    """First-order contribution of each tile to a scalar: sum_k a_ik <d scalar / d V_k, x_i - c_k>.

    V_k is the sum of a_ik (x_i - c_k) over the tiles (DRE-SLCL, arXiv 2511.05034, residual encoding; Deep-TEN,
    Zhang et al. 2017, eq. 3), so the contributions of a slide sum to <gradient, V>, the first-order term of the scalar
    at V.

    Args:
        gradient: float [K, D], d scalar / d V. rows: float [N, D], tile features as they were encoded.
        codebook: float [K, D].
        assigned: int64 [N], the codeword of each tile (a_ik = 1 for it), -1 = none, contribution 0; or float [N, K],
            the weights a_ik of soft assignment.

    Returns:
        [N], in the dtype of `rows`, at least float32.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if gradient.shape != codebook.shape or rows.ndim != 2 or rows.shape[1:] != codebook.shape[1:]:
        raise ValueError(
            f"need gradient [K, D], rows [N, D] and codebook [K, D], got {list(gradient.shape)}, "
            f"{list(rows.shape)} and {list(codebook.shape)}"
        )
    soft = assigned.is_floating_point()
    if assigned.shape != ((len(rows), len(codebook)) if soft else (len(rows),)):
        raise ValueError(
            f"codes must be [{len(rows)}] for {len(rows)} tiles, or weights [{len(rows)}, {len(codebook)}], got "
            f"{list(assigned.shape)}"
        )
    dtype = torch.promote_types(rows.dtype, torch.float32)
    g, c = gradient.to(dtype), codebook.to(dtype)
    # <g_k, x - c_k> = (x G^T)_k - <g_k, c_k>: one product instead of a gathered [N, D] copy of the gradient.
    products = rows.to(dtype) @ g.T - (g * c).sum(1)
    if soft:
        return (assigned.to(dtype) * products).sum(1)
    value = products.gather(1, assigned.clamp(min=0)[:, None])[:, 0]
    return torch.where(assigned >= 0, value, 0.0)
