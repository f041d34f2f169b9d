"""Backward of the normalisation of residuals in plain torch, in closed form; the forward is in ``encode``.

With y = V_k / ||V_k|| (intra), z = sign(y) |y|^p (power) and out = z / ||z|| (l2), from the outside in:

    l2      dz = (g - (g.u) u) / ||z||,  u = z / ||z|| over all K D entries
    power   dy = p |y|^(p-1) dz
    intra   dV_k = (dy_k - (dy_k.y_k) y_k) / ||V_k||

Each step that was not taken passes its gradient on; norms at or below eps, and entries at or below eps before the
power, pass none.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from dre_fast.reference.encode import signed_power
from dre_fast.reference.rows import compute_dtype, l2_normalize, l2_normalize_backward


def normalize_residuals_backward(
    grad: Tensor, V: Tensor, intra: bool, power: bool, l2: bool, exponent: float, eps: float
) -> Tensor:
    """Gradient of V from that of ``normalize_residuals(V)``; formulas at the top of this file.

    Args:
        grad: [B, K, D], gradient of the result.
        V: [B, K, D], the residuals before normalisation, any float dtype.
        intra: whether each codeword was divided by its norm.
        power: whether the signed power was taken.
        l2: whether each bag was divided by its norm.
        exponent: p.
        eps: as in the forward.

    Returns:
        [B, K, D], fp32 (float64 for float64 V).

    Source: the formulas of :func:`dre_fast.reference.encode.normalize_residuals`, differentiated.
    """
    V = V.to(compute_dtype(V))
    grad = grad.to(V.dtype)
    y = l2_normalize(V, eps) if intra else V
    if l2:
        z = signed_power(y, exponent, eps) if power else y
        g, z = (rearrange(t, "b k d -> b (k d)") for t in (grad, z))
        grad = rearrange(l2_normalize_backward(g, z, eps), "b (k d) -> b k d", k=V.shape[1])
    if power:
        usable = y.abs() > eps
        slope = exponent * torch.where(usable, y.abs(), 1.0) ** (exponent - 1)
        grad = torch.where(usable, grad * slope, 0.0)
    return l2_normalize_backward(grad, V, eps) if intra else grad.clone()
