"""The registered normalisation of residuals, its autograd, and the choice of what runs it.

fp32 CUDA tensors run in Triton up to the kernels' largest K and D; everything else runs the reference, which defines the
formulas: :func:`dre_fast.reference.encode.normalize_residuals` and :mod:`dre_fast.reference.normalize`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dre_fast.ops import native
from dre_fast.ops.once import differentiable_once
from dre_fast.reference import encode as reference
from dre_fast.reference.normalize import normalize_residuals_backward as reference_backward

NAMES = ("normalize_residuals", "normalize_residuals_backward")

_lib = torch.library.Library("dre_fast", "FRAGMENT")
_lib.define(
    "normalize_residuals(Tensor V, bool intra, bool power, bool l2, float exponent, float eps) -> Tensor"
)
_lib.define(
    "normalize_residuals_backward(Tensor grad, Tensor V, bool intra, bool power, bool l2, float exponent, "
    "float eps) -> Tensor"
)


def backend(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """What runs an operation on residuals of a device and dtype: "Triton" (up to its largest K and D) or "reference".

    Raises:
        ValueError: no such operation.
    """
    if name not in NAMES:
        raise ValueError(f"no normalisation is called {name!r}")
    cuda = torch.device(device).type == "cuda"
    return "Triton" if cuda and dtype == torch.float32 and native.triton_available() else "reference"


def _covered(name: str, V: Tensor) -> bool:
    if backend(name, V.device, V.dtype) != "Triton":
        return False
    from dre_fast.kernels import config  # Triton is imported, and needed, only for CUDA tensors

    return config.covers(V.dtype, V.shape[1], V.shape[2])


@torch.library.impl(_lib, "normalize_residuals", "CompositeExplicitAutograd")
def _normalize(V: Tensor, intra: bool, power: bool, l2: bool, exponent: float, eps: float) -> Tensor:
    if _covered("normalize_residuals", V):
        from dre_fast import kernels

        return kernels.normalize_residuals(V, intra, power, l2, exponent, eps)
    wanted = zip(reference.NORMALIZATIONS, (intra, power, l2), strict=True)
    steps = [name for name, on in wanted if on]
    # an operation returns fresh memory, also where there is nothing to do
    return reference.normalize_residuals(V, steps, eps, exponent) if steps else _copy(V)


def _copy(V: Tensor) -> Tensor:
    return V.to(reference.compute_dtype(V), copy=True).contiguous()


@torch.library.register_fake("dre_fast::normalize_residuals", lib=_lib)
def _normalize_fake(V: Tensor, intra: bool, power: bool, l2: bool, exponent: float, eps: float) -> Tensor:
    return V.new_empty(V.shape, dtype=reference.compute_dtype(V))


@torch.library.impl(_lib, "normalize_residuals_backward", "CompositeExplicitAutograd")
def _normalize_backward(
    grad: Tensor, V: Tensor, intra: bool, power: bool, l2: bool, exponent: float, eps: float
) -> Tensor:
    if _covered("normalize_residuals_backward", V):
        from dre_fast import kernels

        return kernels.normalize_residuals_backward(grad, V, intra, power, l2, exponent, eps)
    return reference_backward(grad, V, intra, power, l2, exponent, eps).contiguous()


@torch.library.register_fake("dre_fast::normalize_residuals_backward", lib=_lib)
def _normalize_backward_fake(
    grad: Tensor, V: Tensor, intra: bool, power: bool, l2: bool, exponent: float, eps: float
) -> Tensor:
    return V.new_empty(V.shape, dtype=reference.compute_dtype(V))


# Bound once: looking an overload up costs as much as the dispatch itself.
_op = torch.ops.dre_fast.normalize_residuals.default
_backward_op = torch.ops.dre_fast.normalize_residuals_backward.default


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(V: Tensor, intra: bool, power: bool, l2: bool, exponent: float, eps: float) -> Tensor:
        return _op(V, intra, power, l2, exponent, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        V, *ctx.options = inputs
        ctx.save_for_backward(V)  # the backward recomputes the rest

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        raise NotImplementedError(
            "normalisation of residuals has no vmap rule: pass all bags in one call, as [B, K, D]"
        )

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (V,) = ctx.saved_tensors
        return _backward_op(grad, V, *ctx.options).to(V.dtype), None, None, None, None, None


def normalize_residuals(V: Tensor, steps: str | Sequence[str], power: float = 0.5) -> Tensor:
    """:func:`dre_fast.reference.encode.normalize_residuals` as one operation each way; differentiable once.

    Args:
        V: residuals [B, K, D], any float dtype.
        steps: of "intra", "power", "l2", in that order; () for none, which returns V itself (as fp32).
        power: exponent of "power", > 0. Norms at or below 1e-12 (empty codewords, empty bags) pass no gradient.

    Returns:
        [B, K, D], fp32 (float64 for float64 V).

    Raises:
        ValueError: unknown, repeated or wrongly ordered names; ``power`` not above 0 and finite.
    """
    names = reference.normalization_steps(steps)
    if not names:
        return V.to(reference.compute_dtype(V))
    chosen = [name in names for name in reference.NORMALIZATIONS]
    exponent = 0.5
    if "power" in names:
        if not 0 < power < math.inf:
            raise ValueError(f"normalize_residuals: power must be above 0 and finite, got {power}")
        exponent = power
    # literals where nothing was chosen: torch.compile traces twice over floats that are variables
    return _Normalize.apply(V, *chosen, exponent, 1e-12)  # type: ignore[no-any-return]
