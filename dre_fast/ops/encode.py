"""Registered operations of residual encoding, their autograd, and the choice of what runs them.

CUDA tensors run in Triton, CPU tensors in C++ where that was built; float64, sizes beyond the kernels' and
everything else runs the reference, which defines the formulas: :mod:`dre_fast.reference.hard` and ``.soft``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dre_fast.ops import native
from dre_fast.ops.once import differentiable_once
from dre_fast.reference import encode as reference
from dre_fast.reference.rows import add_rows

_PRODUCTS = 1 << 24  # counts times gradients formed at once: many bags would make another gradient of them
_CODES = torch.iinfo(torch.int16).max  # stored codes, -1 among them, are int16

NAMES = ("hard_encode", "hard_encode_backward", "soft_encode", "soft_encode_backward")

_lib = torch.library.Library("dre_fast", "FRAGMENT")
_lib.define(
    "hard_encode(Tensor x, Tensor codebook, Tensor cu_seqlens, Tensor? index=None, Tensor? row_scale=None, "
    "Tensor? row_codes=None, bool unit=False, bool distances=False) -> (Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "hard_encode_backward(Tensor grad, Tensor codes, Tensor cu_seqlens, Tensor? x=None, Tensor? index=None, "
    "bool unit=False) -> Tensor"
)
_lib.define(
    "soft_encode(Tensor x, Tensor codebook, Tensor cu_seqlens, Tensor? scale, Tensor? weight, Tensor? bias, "
    "Tensor? index=None, Tensor? row_scale=None, bool unit=False) -> (Tensor, Tensor)"
)
_lib.define(
    "soft_encode_backward(Tensor grad, Tensor grad_mass, Tensor x, Tensor codebook, Tensor cu_seqlens, "
    "Tensor mass, Tensor? scale, Tensor? weight, Tensor? bias, Tensor? index=None, Tensor? row_scale=None, "
    "bool unit=False, bool rows=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def backend(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """What runs an operation on rows of a device and dtype: "Triton" (up to its largest K and D), "C++" or "reference".

    Raises:
        ValueError: no such operation.
    """
    if name not in NAMES:
        raise ValueError(f"no encoding operation is called {name!r}")
    kind = torch.device(device).type
    if kind == "cuda" and dtype != torch.float64 and native.triton_available():
        return "Triton"
    if kind == "cpu" and dtype != torch.float64 and native.provides(name):
        return "C++"
    return "reference"


def _run(name: str, rows: Tensor, codewords: int, dim: int, *arguments: Any) -> Any:
    chosen = backend(name, rows.device, rows.dtype)
    if chosen == "C++":
        return getattr(torch.ops.dre_fast_native, name).default(*arguments)
    if chosen == "Triton":
        from dre_fast import kernels  # Triton is imported, and needed, only for CUDA tensors
        from dre_fast.kernels import config

        if config.covers(rows.dtype, codewords, dim):
            return getattr(kernels, name)(*arguments)
    return getattr(reference, name)(*arguments)


@torch.library.impl(_lib, "hard_encode", "CompositeExplicitAutograd")
def _hard_encode(
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    index: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_codes: Tensor | None = None,
    unit: bool = False,
    distances: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(  # type: ignore[no-any-return]
        "hard_encode",
        x,
        *codebook.shape,
        x,
        codebook,
        cu_seqlens,
        index,
        row_scale,
        row_codes,
        unit,
        distances,
    )


@torch.library.register_fake("dre_fast::hard_encode", lib=_lib)
def _hard_encode_fake(
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    index: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_codes: Tensor | None = None,
    unit: bool = False,
    distances: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bags, (words, dim), dtype = cu_seqlens.shape[0] - 1, codebook.shape, reference.compute_dtype(x)
    rows = (x if index is None else index).shape[0]
    return (
        x.new_empty(bags, words, dim, dtype=dtype),
        x.new_empty(bags, words, dtype=torch.int64),
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(rows if distances else 0, dtype=dtype),
    )


@torch.library.impl(_lib, "hard_encode_backward", "CompositeExplicitAutograd")
def _hard_encode_backward(
    grad: Tensor,
    codes: Tensor,
    cu_seqlens: Tensor,
    x: Tensor | None = None,
    index: Tensor | None = None,
    unit: bool = False,
) -> Tensor:
    return _run(  # type: ignore[no-any-return]
        "hard_encode_backward", grad, *grad.shape[1:], grad, codes, cu_seqlens, x, index, unit
    )


@torch.library.register_fake("dre_fast::hard_encode_backward", lib=_lib)
def _hard_encode_backward_fake(
    grad: Tensor,
    codes: Tensor,
    cu_seqlens: Tensor,
    x: Tensor | None = None,
    index: Tensor | None = None,
    unit: bool = False,
) -> Tensor:
    dtype = x.dtype if unit and x is not None else grad.dtype
    return grad.new_empty(codes.shape[0], grad.shape[2], dtype=dtype)


@torch.library.impl(_lib, "soft_encode", "CompositeExplicitAutograd")
def _soft_encode(
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None = None,
    row_scale: Tensor | None = None,
    unit: bool = False,
) -> tuple[Tensor, Tensor]:
    return _run(  # type: ignore[no-any-return]
        "soft_encode",
        x,
        *codebook.shape,
        x,
        codebook,
        cu_seqlens,
        scale,
        weight,
        bias,
        index,
        row_scale,
        unit,
    )


@torch.library.register_fake("dre_fast::soft_encode", lib=_lib)
def _soft_encode_fake(
    x: Tensor, codebook: Tensor, cu_seqlens: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    bags, (words, dim), dtype = cu_seqlens.shape[0] - 1, codebook.shape, reference.compute_dtype(x)
    return x.new_empty(bags, words, dim, dtype=dtype), x.new_empty(bags, words, dtype=dtype)


@torch.library.impl(_lib, "soft_encode_backward", "CompositeExplicitAutograd")
def _soft_encode_backward(
    grad: Tensor,
    grad_mass: Tensor,
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    mass: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None = None,
    row_scale: Tensor | None = None,
    unit: bool = False,
    rows: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _run(  # type: ignore[no-any-return]
        "soft_encode_backward",
        x,
        *codebook.shape,
        grad,
        grad_mass,
        x,
        codebook,
        cu_seqlens,
        mass,
        scale,
        weight,
        bias,
        index,
        row_scale,
        unit,
        rows,
    )


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
    index: Tensor | None = None,
    row_scale: Tensor | None = None,
    unit: bool = False,
    rows: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, (words, dim) = reference.compute_dtype(x), codebook.shape
    row_shape = ((x if index is None else index).shape[0], dim) if rows else (0,)
    return (
        x.new_empty(row_shape, dtype=x.dtype if row_scale is None else dtype),
        x.new_empty(codebook.shape, dtype=dtype),
        x.new_empty(words if scale is not None else 0, dtype=dtype),
        x.new_empty(codebook.shape if weight is not None else (0,), dtype=dtype),
        x.new_empty(words if bias is not None else 0, dtype=dtype),
    )


# Bound once: looking an overload up costs as much as the dispatch itself.
_hard_op = torch.ops.dre_fast.hard_encode.default
_hard_backward_op = torch.ops.dre_fast.hard_encode_backward.default
_soft_op = torch.ops.dre_fast.soft_encode.default
_soft_backward_op = torch.ops.dre_fast.soft_encode_backward.default


_NO_VMAP = "residual encoding has no vmap rule: pass all bags in one call, as [B, N, D] or with cu_seqlens"


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(*tensors: Tensor | None) -> None:
        return None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: None) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        raise NotImplementedError(_NO_VMAP)


def refuse_vmap(*tensors: Tensor | None) -> None:
    """Nothing, but under vmap.

    Raises:
        NotImplementedError: one of the tensors is what vmap sees of a batch.
    """
    with torch.no_grad():
        _Refuse.apply(*tensors)


def _rows_to_x(d_rows: Tensor, x: Tensor | None, index: Tensor | None, masked: bool) -> Tensor:
    """Gradients of the rows that were read, added up where a row of x was read more than once."""
    if index is None or masked:
        return d_rows
    assert x is not None
    d_x = torch.zeros(x.shape, dtype=reference.compute_dtype(x), device=x.device)
    if x.shape[0]:  # skipped rows carry zeros, so they may go anywhere
        add_rows(d_x, index.clamp(min=0), d_rows.to(d_x.dtype))
    return d_x.to(x.dtype)


class _HardEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        codebook: Tensor,
        cu_seqlens: Tensor,
        index: Tensor | None,
        unit: bool,
        distances: bool,
        masked: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _hard_op(x, codebook, cu_seqlens, index, None, None, unit, distances)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, codebook, cu_seqlens, index, ctx.unit, _, ctx.masked = inputs
        _, counts, codes, distances = output
        # the gradient of plain rows needs no rows: x may then be freed before the backward
        scattered = index is not None and not ctx.masked
        ctx.save_for_backward(x if ctx.unit or scattered else None, counts, codes, cu_seqlens, index)
        ctx.dtypes = x.dtype, codebook.dtype
        ctx.mark_non_differentiable(counts, codes, distances)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        raise NotImplementedError(_NO_VMAP)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, counts, codes, cu_seqlens, index = ctx.saved_tensors
        x_dtype, codebook_dtype = ctx.dtypes
        d_x = d_codebook = None
        if ctx.needs_input_grad[0]:
            rows = (x, index) if ctx.unit else (None, None)
            # What only moves is moved in the dtype of x. What is divided by a norm or added up first may lie outside.
            given = grad if ctx.unit or not (index is None or ctx.masked) else grad.to(x_dtype)
            d_rows = _hard_backward_op(given, codes, cu_seqlens, *rows, ctx.unit)
            d_x = _rows_to_x(d_rows, x, index, ctx.masked)
        if ctx.needs_input_grad[1]:
            # the sum of x_i - c_k over n_bk rows moves by -n_bk with c_k
            d_codebook = grad.new_zeros(grad.shape[1:])
            some = max(1, _PRODUCTS // max(1, d_codebook.numel()))
            for n, g in zip(counts.split(some), grad.split(some), strict=True):
                d_codebook -= (n[:, :, None] * g).sum(dim=0)
            d_codebook = d_codebook.to(codebook_dtype)
        return d_x, d_codebook, None, None, None, None, None


class _SoftEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        codebook: Tensor,
        cu_seqlens: Tensor,
        scale: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        index: Tensor | None,
        unit: bool,
        masked: bool,
    ) -> tuple[Tensor, Tensor]:
        return _soft_op(x, codebook, cu_seqlens, scale, weight, bias, index, None, unit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, codebook, cu_seqlens, scale, weight, bias, index, ctx.unit, ctx.masked = inputs
        ctx.save_for_backward(x, codebook, cu_seqlens, output[1], scale, weight, bias, index)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        raise NotImplementedError(_NO_VMAP)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, grad_mass: Tensor) -> tuple[Tensor | None, ...]:
        x, codebook, cu_seqlens, mass, scale, weight, bias, index = ctx.saved_tensors
        d_rows, d_codebook, d_scale, d_weight, d_bias = _soft_backward_op(
            grad,
            grad_mass,
            x,
            codebook,
            cu_seqlens,
            mass,
            scale,
            weight,
            bias,
            index,
            None,
            ctx.unit,
            ctx.needs_input_grad[0],
        )
        return (
            _rows_to_x(d_rows, x, index, ctx.masked) if ctx.needs_input_grad[0] else None,
            d_codebook.to(codebook.dtype),
            None,
            None if scale is None else d_scale.to(scale.dtype),
            None if weight is None else d_weight.to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def hard_encode(
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    index: Tensor | None = None,
    *,
    unit: bool = False,
    distances: bool = False,
    masked: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residuals V [B, K, D], counts int64 [B, K], codes int64 [M], distances [M] of rows; differentiable once.

    Arguments and formula: :func:`dre_fast.reference.hard.hard_encode`. Only V carries a gradient: x gets that
    of its codeword's residual, the codebook minus the count times it. The accumulation is fp32 (float64 for
    float64) whatever autocast says. ``masked`` promises that index[i] is i or -1 for all i: the gradient of
    the rows is then that of x, with nothing to add up.
    """
    return _HardEncode.apply(x, codebook, cu_seqlens, index, unit, distances, masked)  # type: ignore[no-any-return]


def soft_encode(
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    *,
    unit: bool = False,
    masked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Residuals V [B, K, D] and mass [B, K] under soft assignment of rows; differentiable once.

    Arguments and formula: :func:`dre_fast.reference.soft.soft_encode`. The assignment is recomputed in the
    backward, a chunk of rows at a time, so nothing of size N x K is kept. ``masked`` as in :func:`hard_encode`.
    """
    return _SoftEncode.apply(x, codebook, cu_seqlens, scale, weight, bias, index, unit, masked)  # type: ignore[no-any-return]


def encode_stored(
    payload: Tensor,
    row_scale: Tensor | None,
    row_codes: Tensor | None,
    index: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """V [B, K, D] and counts int64 [B, K] of stored rows of a bank, read where they lie, without gradient.

    Args:
        payload: [R, P >= D], ``row_scale`` fp32 [R] for int8 and float8_e4m3fn rows.
        row_codes: int16 [R], the rows' codewords (-1 = skip the row); None to find them.
        index: int64 [M], rows to read (-1 = skip); cu_seqlens int64 [B+1] their offsets.
    """
    residuals, counts, _, _ = _hard_op(
        payload, codebook, cu_seqlens, index, row_scale, row_codes, False, False
    )
    return residuals, counts


def assign_stored(payload: Tensor, row_scale: Tensor | None, index: Tensor, codebook: Tensor) -> Tensor:
    """Nearest codeword int16 [M] of the stored rows ``index`` int64 [M] (-1 = skip, code -1) of a bank.

    Arguments as in :func:`encode_stored`; K at most 32767.
    """
    one_bag = torch.arange(2, device=index.device) * index.shape[0]
    return _hard_op(payload, codebook, one_bag, index, row_scale)[2].to(torch.int16)


def encode_one_bag(
    x: Tensor, index: Tensor | None, row_scale: Tensor | None, codebook: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """V [K, D], counts [K], codes [M] and squared distances [M] of rows of one bag, without gradient."""
    count = (x if index is None else index).shape[0]
    one_bag = torch.arange(2, device=x.device) * count
    residuals, counts, codes, distances = _hard_op(x, codebook, one_bag, index, row_scale, None, False, True)
    return residuals[0], counts[0], codes, distances


def nearest(
    x: Tensor, index: Tensor | None, row_scale: Tensor | None, codebook: Tensor
) -> tuple[Tensor, Tensor]:
    """Nearest codeword int64 [M] of each row, and its squared distance [M], without gradient."""
    return encode_one_bag(x, index, row_scale, codebook)[2:]


def encode_known(x: Tensor, codes: Tensor, codewords: int) -> Tensor:
    """Sums [K, D] of the rows x [N, D] of each code: codes int64 [N] in [0, K)."""
    one_bag, sums = torch.arange(2, device=x.device) * x.shape[0], []
    for first in range(0, codewords, _CODES):
        words = min(codewords - first, _CODES)
        inside = (codes >= first) & (codes < first + words)
        known = torch.where(inside, codes - first, -1).to(torch.int16)
        sums.append(_hard_op(x, x.new_zeros(words, x.shape[1]), one_bag, None, None, known)[0][0])
    return torch.cat(sums)
