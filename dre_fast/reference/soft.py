"""Soft assignment in plain torch: Deep-TEN and NetVLAD residuals and their gradients, a chunk of rows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from einops import einsum, reduce
from torch import Tensor
from torch.nn.functional import linear

from dre_fast.reference.rows import (
    RowSource,
    compute_dtype,
    full_precision,
    l2_normalize_backward,
)

# rows x features taken at once: with what is computed of them they stay in a second-level cache
_CHUNK_ENTRIES = 1 << 19


def squared_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """||x_i - c_k||^2 [N, K] in the form |x|^2 - 2 x.c + |c|^2, which needs no N x K x D."""
    square = reduce(codebook * codebook, "k d -> k", "sum")
    return torch.addmm(square, x, -2 * codebook.T) + reduce(x * x, "n d -> n 1", "sum")


def soft_assign(
    x: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Soft assignment A [N, K], rows summing to one.

    ``scale`` [K] > 0: a_ik = softmax_k(-s_k ||x_i - c_k||^2), Deep-TEN, Zhang et al. 2017, eq. 4.
    ``weight`` [K, D] (+ ``bias`` [K]): a_ik = softmax_k(w_k.x_i + b_k), NetVLAD, Arandjelovic et al. 2016,
    eq. 3.

    Returns fp32 (float64 for float64 x). Materialises N x K: :func:`soft_encode` calls it on bounded chunks.
    """
    dtype = compute_dtype(x)
    x, codebook = x.to(dtype), codebook.to(dtype)
    with full_precision(x):
        if scale is not None:
            return (-scale.to(dtype) * squared_distances(x, codebook)).softmax(dim=1)
        assert weight is not None
        return linear(x, weight.to(dtype), None if bias is None else bias.to(dtype)).softmax(dim=1)


def soft_encode(
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    row_scale: Tensor | None = None,
    unit: bool = False,
) -> tuple[Tensor, Tensor]:
    """Residual encoding with soft assignment: V_bk = sum_i a_ik (x_i - c_k), as A^T X - diag(sum_i A) C.

    Differentiable by autograd, but then A is kept; :func:`soft_encode_backward` recomputes it instead.

    Args:
        codebook: [K, D].
        scale, weight, bias: see :func:`soft_assign`.
        x, cu_seqlens, index, row_scale, unit: the rows, as in :func:`~dre_fast.reference.hard.hard_encode`.

    Returns:
        V [B, K, D] and mass sum_i a_ik [B, K], fp32 (float64 for float64 x).

    Source: Deep-TEN, Zhang et al. 2017, eq. 3; NetVLAD, Arandjelovic et al. 2016, eq. 4.
    """
    source, taken = _source(x, codebook, index, row_scale, unit)
    dtype, words = compute_dtype(x), codebook.shape[0]
    centre = codebook.to(dtype)
    sums, masses = [], []
    with full_precision(x):
        for start, stop in _bounds(cu_seqlens):
            total = torch.zeros(centre.shape, dtype=dtype, device=x.device)
            mass = torch.zeros(words, dtype=dtype, device=x.device)
            for rows in _chunks(start, stop, *centre.shape):
                block = source[rows]
                a = soft_assign(block, codebook, scale, weight, bias)
                if taken is not None:
                    a = torch.where(taken[rows, None], a, 0.0)
                total = torch.addmm(total, a.T, block)
                mass = mass + reduce(a, "n k -> k", "sum")
            sums.append(total - mass[:, None] * centre)
            masses.append(mass)
    if not sums:
        return centre.new_zeros(0, *centre.shape), centre.new_zeros(0, words)
    return torch.stack(sums), torch.stack(masses)


def soft_encode_backward(
    grad: Tensor,
    grad_mass: Tensor,
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    mass: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    row_scale: Tensor | None = None,
    unit: bool = False,
    rows: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`soft_encode`, with A recomputed a chunk at a time.

    Args:
        grad: gradient of V [B, K, D].
        grad_mass: gradient of the mass [B, K].
        mass: the mass returned by the forward.
        rows: whether the gradient of the rows is wanted.

    Returns:
        Gradients of the rows that were read [M, D] (dtype of x; fp32 for int8 and float8_e4m3fn rows), the
        codebook [K, D], scale [K], weight [K, D], bias [K]; those not wanted or not given are empty [0].
    """
    source, taken = _source(x, codebook, index, row_scale, unit)
    dtype, words = compute_dtype(x), codebook.shape[0]
    centre = codebook.to(dtype)
    grad, grad_mass = grad.to(dtype), grad_mass.to(dtype)
    row_dtype = x.dtype if row_scale is None else dtype
    d_rows = torch.zeros((len(source), centre.shape[1]) if rows else (0,), dtype=row_dtype, device=x.device)
    d_points, d_offset, d_scale = torch.zeros_like(centre), centre.new_zeros(words), centre.new_zeros(words)
    with full_precision(x):
        # V depends on C directly as -mass * C, whatever the assignment
        d_codebook = -einsum(mass.to(dtype), grad, "b k, b k d -> k d")
        s, w, b = (t if t is None else t.to(dtype) for t in (scale, weight, bias))
        # logits and distances are products with -2 C, or logits products with w
        points = w if s is None else -2 * centre
        assert points is not None
        square = b if s is None else reduce(centre * centre, "k d -> k", "sum")
        for bag, (start, stop) in enumerate(_bounds(cu_seqlens)):
            g = grad[bag]
            offset = grad_mass[bag] - einsum(g, centre, "k d, k d -> k")
            for part in _chunks(start, stop, *centre.shape):
                block = source[part]
                logit = linear(block, points, square)
                if s is not None:
                    distance = logit + reduce(block * block, "n d -> n 1", "sum")
                    logit = -s * distance
                a = logit.softmax(dim=1)
                if taken is not None:
                    a = torch.where(taken[part, None], a, 0.0)
                d_a = linear(block, g, offset)  # dL/da_ik = g_k.(x_i - c_k) + grad_mass_k
                d_logit = torch._softmax_backward_data(d_a, a, 1, dtype)  # a (d_a - sum_k a d_a)
                if s is not None:
                    d_scale -= reduce(d_logit * distance, "n k -> k", "sum")
                    d_logit *= -s  # from here on the gradient of the distance
                d_points.addmm_(d_logit.T, block)
                d_offset += reduce(d_logit, "n k -> k", "sum")
                if rows:
                    d_block = torch.addmm(a @ g, d_logit, points)
                    if s is not None:
                        d_block.addcmul_(block, reduce(d_logit, "n k -> n 1", "sum"), value=2)
                    if unit:
                        d_block = l2_normalize_backward(d_block, source.stored(part))
                    d_rows[part] = d_block
    if s is not None:
        d_codebook += 2 * (d_offset[:, None] * centre - d_points)
    return (
        d_rows,
        d_codebook,
        d_scale if scale is not None else centre.new_zeros(0),
        d_points if weight is not None else centre.new_zeros(0),
        d_offset if bias is not None else centre.new_zeros(0),
    )


def _chunks(start: int, stop: int, codewords: int, dim: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ENTRIES // max(codewords, dim))
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


def _source(
    x: Tensor, codebook: Tensor, index: Tensor | None, row_scale: Tensor | None, unit: bool
) -> tuple[RowSource, Tensor | None]:
    source = RowSource(x, codebook.shape[1], index, row_scale, unit)
    return source, source.taken()


def _bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    offsets = cu_seqlens.tolist()
    return list(itertools.pairwise(offsets))
