"""Registered operations of residual encoding, their autograd, and the choice of what runs them.

``hard_encode`` runs in Triton on CUDA tensors of fp32, fp16 and bf16 with at most 1,024 codewords and 2,048
features; everything else runs the reference, which defines the formulas: :mod:`dre_fast.reference.encode`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dre_fast.reference import encode as reference

NAMES = ("hard_encode", "hard_encode_backward", "soft_encode", "soft_encode_backward")

_lib = torch.library.Library("dre_fast", "FRAGMENT")
_lib.define("hard_encode(Tensor x, Tensor codebook, Tensor cu_seqlens) -> (Tensor, Tensor, Tensor)")
_lib.define("hard_encode_backward(Tensor grad, Tensor codes, Tensor cu_seqlens) -> Tensor")
_lib.define(
    "soft_encode(Tensor x, Tensor codebook, Tensor cu_seqlens, Tensor? scale, Tensor? weight, Tensor? bias)"
    " -> (Tensor, Tensor)"
)
_lib.define(
    "soft_encode_backward(Tensor grad, Tensor grad_mass, Tensor x, Tensor codebook, Tensor cu_seqlens,"
    " Tensor mass, Tensor? scale, Tensor? weight, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def backend(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """What runs an operation on tensors of a device and dtype: "Triton" (up to its largest K and D) or "reference".

    Raises:
        ValueError: no such operation.
    """
    if name not in NAMES:
        raise ValueError(f"no encoding operation is called {name!r}")
    on_cuda = torch.device(device).type == "cuda"
    if name == "hard_encode" and on_cuda and dtype != torch.float64:
        return "Triton"
    return "reference"


@torch.library.impl(_lib, "hard_encode", "CompositeExplicitAutograd")
def _hard_encode(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if backend("hard_encode", x.device, x.dtype) == "Triton":
        from dre_fast import kernels  # Triton is imported, and needed, only for CUDA tensors
        from dre_fast.kernels import config

        if config.covers(x.dtype, *codebook.shape):
            return kernels.hard_encode(x, codebook, cu_seqlens)
    return reference.hard_encode(x, codebook, cu_seqlens)


@torch.library.register_fake("dre_fast::hard_encode", lib=_lib)
def _hard_encode_fake(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bags, (words, dim) = cu_seqlens.shape[0] - 1, codebook.shape
    return (
        x.new_empty(bags, words, dim, dtype=reference.compute_dtype(x)),
        x.new_empty(bags, words, dtype=torch.int64),
        x.new_empty(x.shape[0], dtype=torch.int64),
    )


torch.library.impl(_lib, "hard_encode_backward", "CompositeExplicitAutograd")(reference.hard_encode_backward)


@torch.library.register_fake("dre_fast::hard_encode_backward", lib=_lib)
def _hard_encode_backward_fake(grad: Tensor, codes: Tensor, cu_seqlens: Tensor) -> Tensor:
    return grad.new_empty(codes.shape[0], grad.shape[2])


torch.library.impl(_lib, "soft_encode", "CompositeExplicitAutograd")(reference.soft_encode)


@torch.library.register_fake("dre_fast::soft_encode", lib=_lib)
def _soft_encode_fake(x: Tensor, codebook: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    bags, (words, dim), dtype = cu_seqlens.shape[0] - 1, codebook.shape, reference.compute_dtype(x)
    return x.new_empty(bags, words, dim, dtype=dtype), x.new_empty(bags, words, dtype=dtype)


torch.library.impl(_lib, "soft_encode_backward", "CompositeExplicitAutograd")(reference.soft_encode_backward)


@torch.library.register_fake("dre_fast::soft_encode_backward", lib=_lib)
def _soft_encode_backward_fake(
    grad: Tensor,
    grad_mass: Tensor,
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    mass: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, words = reference.compute_dtype(x), codebook.shape[0]
    return (
        x.new_empty(x.shape),
        x.new_empty(codebook.shape, dtype=dtype),
        x.new_empty(words if scale is not None else 0, dtype=dtype),
        x.new_empty(codebook.shape if weight is not None else (0,), dtype=dtype),
        x.new_empty(words if bias is not None else 0, dtype=dtype),
    )


_hard_op = torch.ops.dre_fast.hard_encode.default
_hard_backward_op = torch.ops.dre_fast.hard_encode_backward.default
_soft_op = torch.ops.dre_fast.soft_encode.default
_soft_backward_op = torch.ops.dre_fast.soft_encode_backward.default


_NO_VMAP = "residual encoding has no vmap rule: pass all bags in one call, as [B, N, D] or with cu_seqlens"


class _HardEncode(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _hard_op(x, codebook, cu_seqlens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        x, codebook, cu_seqlens = inputs
        _, counts, codes = output
        ctx.save_for_backward(counts, codes, cu_seqlens)
        ctx.dtypes = x.dtype, codebook.dtype
        ctx.mark_non_differentiable(counts, codes)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        raise NotImplementedError(_NO_VMAP)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None]:
        counts, codes, cu_seqlens = ctx.saved_tensors
        x_dtype, codebook_dtype = ctx.dtypes
        d_x = d_codebook = None
        if ctx.needs_input_grad[0]:
            d_x = _hard_backward_op(grad.to(x_dtype), codes, cu_seqlens)
        if ctx.needs_input_grad[1]:
            # the sum of x_i - c_k over n_bk rows moves by -n_bk with c_k
            d_codebook = -(counts[:, :, None] * grad).sum(dim=0).to(codebook_dtype)
        return d_x, d_codebook, None


class _SoftEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        codebook: Tensor,
        cu_seqlens: Tensor,
        scale: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return _soft_op(x, codebook, cu_seqlens, scale, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
        x, codebook, cu_seqlens, scale, weight, bias = inputs
        ctx.save_for_backward(x, codebook, cu_seqlens, output[1], scale, weight, bias)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        raise NotImplementedError(_NO_VMAP)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_mass: Tensor) -> tuple[Tensor | None, ...]:
        x, codebook, cu_seqlens, mass, scale, weight, bias = ctx.saved_tensors
        d_x, d_codebook, d_scale, d_weight, d_bias = _soft_backward_op(
            grad, grad_mass, x, codebook, cu_seqlens, mass, scale, weight, bias
        )
        return (
            d_x,
            d_codebook.to(codebook.dtype),
            None,
            None if scale is None else d_scale.to(scale.dtype),
            None if weight is None else d_weight.to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
        )


def hard_encode(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals V [B, K, D], counts int64 [B, K] and codes int64 [N] of ragged rows; differentiable once.

    Arguments and formula: :func:`dre_fast.reference.encode.hard_encode`. Codes carry no gradient: x gets the
    gradient of its codeword's residual, the codebook minus the count times it. The accumulation is fp32
    (float64 for float64) whatever autocast says.
    """
    return _HardEncode.apply(x, codebook, cu_seqlens)  # type: ignore[no-any-return]


def soft_encode(
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residuals V [B, K, D] and mass [B, K] under soft assignment of ragged rows; differentiable once.

    Arguments and formula: :func:`dre_fast.reference.encode.soft_encode`. The assignment is recomputed in the
    backward, a chunk of rows at a time, so nothing of size N x K is kept.
    """
    return _SoftEncode.apply(x, codebook, cu_seqlens, scale, weight, bias)  # type: ignore[no-any-return]
