"""The numerics contract, in one place."""

from __future__ import annotations

import torch
from torch import Tensor


def within_error_rule(
    got: Tensor, plain: Tensor, exact: Tensor, atol: float = 1e-6, name: str = "result"
) -> None:
    """Assert err(got) <= 2 err(plain) + atol, both against ``exact`` in float64, and the same direction.

    Args:
        got: what a kernel computed.
        plain: the same from plain torch in the same dtype.
        exact: the same in float64.
        atol: absolute slack, in units of the result.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    if not exact.numel():
        return
    error, allowed = (got.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 2 * allowed + atol, f"{name}: error {error:.3e}, {allowed:.3e} in plain torch"
    if exact.norm() > 1e3 * atol:
        cosine = torch.nn.functional.cosine_similarity(got.double().flatten(), exact.flatten(), dim=0)
        assert cosine > 0.999, f"{name}: cosine {cosine:.6f}"
