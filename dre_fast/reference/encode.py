"""Residual encoding in plain torch: the specification every backend is judged against.

float64 in gives float64 throughout; every other dtype is computed and returned in fp32. Nothing here
materialises N x K x D, and N x K only for a bounded chunk of rows, so this is also the CPU backend.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from dre_fast.reference.layout import as_ragged, bag_of_row

NORMALIZATIONS = ("intra", "power", "l2")
_CHUNK_SCORES = 1 << 19  # rows x codewords scored at once: 2 MB of fp32, which stays in cache


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for everything else (fp16 and bf16 are upcast a chunk at a time)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast does not turn the matrix products into half precision."""
    return torch.autocast(x.device.type, enabled=False)


def _chunks(start: int, stop: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK_SCORES // max(width, 1))
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


# ---------------------------------------------------------------------------------------------- normalisation


def l2_normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """x / max(||x||_2, eps) over the last dimension, in fp32 (float64 for float64 input).

    Args:
        x: [..., D], any float dtype. Rows of large finite values are safe: they are divided by their largest
            entry before anything is squared.
        eps: smallest norm divided by. At or below it the gradient is zero, so that no 1/eps reaches
            the encoder.

    Returns:
        [..., D], fp32 or float64.
    """
    x = x.to(compute_dtype(x))
    if x.shape[-1]:
        x = x / reduce(x.detach().abs(), "... d -> ... 1", "max").clamp(min=1.0)
    square = reduce(x * x, "... d -> ... 1", "sum")
    usable = square > eps * eps
    # where() on both sides of the root: the branch not taken must not produce inf * 0 in the backward
    norm = torch.where(usable, square, 1.0).sqrt()
    return torch.where(usable, x / norm, x.detach() / eps)


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


# -------------------------------------------------------------------------------------------- hard assignment


def hard_assign(x: Tensor, codebook: Tensor) -> Tensor:
    """Nearest codeword of each row, a_i = argmin_k ||x_i - c_k||^2, ties to the lowest k.

    Scores are a matrix product; where two lie closer than its rounding error the distances are formed again
    in float64 from the differences. So exact ties and duplicate codewords give the lowest k, and the code of
    a row does not depend on the rows beside it.

    Args:
        x: [N, D], any float dtype.
        codebook: [K, D], K >= 1.

    Returns:
        int64 [N]. A row with NaN gets code 0.
    """
    dtype = compute_dtype(x)
    with torch.no_grad(), full_precision(x):
        words = codebook.to(dtype)
        half_square = reduce(words * words, "k d -> k", "sum") / 2
        codes = x.new_zeros(x.shape[0], dtype=torch.int64)
        for rows in _chunks(0, x.shape[0], words.shape[0]):
            block = x[rows].to(dtype)
            scores = half_square - block @ words.T
            best, code = scores.min(dim=1)
            bound = _score_error(block, half_square)
            rivals = scores <= (best + bound)[:, None]
            unclear = (rivals.sum(dim=1) > 1).nonzero()[:, 0]
            if len(unclear):
                code[unclear] = _exact_assign(block[unclear], words, rivals[unclear])
            codes[rows] = code
    return codes


def _score_error(block: Tensor, half_square: Tensor) -> Tensor:
    """How far rounding can part two scores of a row, [n]: 2 (D+2) eps (|x||c| + |c|^2/2)."""
    eps = torch.finfo(block.dtype).eps
    if block.dtype == torch.float32 and _reduced_products(block):
        eps = 2.0**-8
    reach = half_square.max()
    norm = torch.linalg.vector_norm(block, dim=1)
    return 2 * (block.shape[1] + 2) * eps * (norm * (2 * reach).sqrt() + reach)


def _reduced_products(x: Tensor) -> bool:
    """Whether fp32 matrix products may be taken in TF32 or bf16, by the older settings of torch or the newer."""
    backend = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    # torch.get_float32_matmul_precision() raises once a program has used the newer setting, which this is
    return backend.matmul.fp32_precision not in ("none", "ieee")


def _exact_assign(block: Tensor, words: Tensor, candidates: Tensor) -> Tensor:
    """argmin over the candidate codewords (bool [n, K]) of float64 distances formed from differences."""
    distance = torch.full(candidates.shape, math.inf, dtype=torch.float64, device=block.device)
    row, k = candidates.nonzero(as_tuple=True)
    for pairs in _chunks(0, len(row), block.shape[1]):
        difference = block[row[pairs]].double() - words[k[pairs]].double()
        distance[row[pairs], k[pairs]] = reduce(difference * difference, "p d -> p", "sum")
    return distance.argmin(dim=1)


def hard_encode(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Residual encoding with hard assignment: V_bk = sum of x_i - c_k over rows i of bag b with code k.

    Differentiable by autograd in x and codebook (the codes are constants). Sums residuals rather than
    subtracting n c_k from a sum of rows, which cancels, and rounds once at the end. Deterministic.

    Args:
        x: rows [N, D], any float dtype.
        codebook: [K, D].
        cu_seqlens: int64 [B+1] row offsets, non-decreasing from 0; rows past the last belong to no bag.

    Returns:
        V [B, K, D] fp32 (float64 for float64 x), counts int64 [B, K], codes int64 [N] (-1 for rows of no
        bag).

    Source: DRE-SLCL, arXiv 2511.05034 (residual encoding); VLAD, Jegou et al. 2010.
    """
    dtype, bags, (words, dim) = compute_dtype(x), cu_seqlens.shape[0] - 1, codebook.shape
    codes = hard_assign(x, codebook)
    bag = bag_of_row(cu_seqlens, x.shape[0])
    codes = torch.where(bag < bags, codes, -1)
    # rows of no bag go to one slot past the end, which is cut off again
    slot = torch.where(bag < bags, bag * words + codes, bags * words)
    centre = codebook.to(dtype)
    # float64, because rows are added one after the other: in fp32 a long bag would lose more than a GEMM does
    sums = torch.zeros(bags * words + 1, dim, dtype=torch.float64, device=x.device)
    for rows in _chunks(0, x.shape[0], words):
        residual = x[rows].to(dtype) - centre.index_select(0, codes[rows].clamp(min=0))
        _add_rows(sums, slot[rows], residual.double())
    counts = torch.bincount(slot, minlength=bags * words + 1)
    residuals = rearrange(sums[:-1].to(dtype), "(b k) d -> b k d", k=words)
    return residuals, rearrange(counts[:-1], "(b k) -> b k", k=words), codes


def _add_rows(sums: Tensor, slot: Tensor, rows: Tensor) -> None:
    if rows.is_cuda:  # index_add is atomic there, index_put sorts: same sum on every run
        sums.index_put_((slot,), rows, accumulate=True)
    else:
        sums.index_add_(0, slot, rows)


def hard_encode_backward(grad: Tensor, codes: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Gradient of V [B, K, D] -> of the rows [N, D]: row i gets grad[bag_i, code_i], 0 if in no bag."""
    bags, words, dim = grad.shape
    bag = bag_of_row(cu_seqlens, codes.shape[0])
    table = torch.cat([rearrange(grad, "b k d -> (b k) d"), grad.new_zeros(1, dim)])
    return table.index_select(0, torch.where(bag < bags, bag * words + codes, bags * words))


# -------------------------------------------------------------------------------------------- soft assignment


def squared_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """||x_i - c_k||^2 [N, K] in the form |x|^2 - 2 x.c + |c|^2, which needs no N x K x D."""
    square = reduce(x * x, "n d -> n 1", "sum")
    return square - 2 * x @ codebook.T + reduce(codebook * codebook, "k d -> k", "sum")


def _logits(
    x: Tensor, codebook: Tensor, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    if scale is not None:
        return -scale * squared_distances(x, codebook)
    assert weight is not None
    product = x @ weight.T
    return product if bias is None else product + bias


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
    with full_precision(x):
        parameters = [t if t is None else t.to(dtype) for t in (scale, weight, bias)]
        return _logits(x.to(dtype), codebook.to(dtype), *parameters).softmax(dim=1)


def soft_encode(
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual encoding with soft assignment: V_bk = sum_i a_ik (x_i - c_k), as A^T X - diag(sum_i A) C.

    Differentiable by autograd, but then A is kept; :func:`soft_encode_backward` recomputes it instead.

    Args:
        x: rows [N, D], any float dtype.
        codebook: [K, D].
        cu_seqlens: int64 [B+1] row offsets; rows past the last belong to no bag.
        scale, weight, bias: see :func:`soft_assign`.

    Returns:
        V [B, K, D] and mass sum_i a_ik [B, K], fp32 (float64 for float64 x).

    Source: Deep-TEN, Zhang et al. 2017, eq. 3; NetVLAD, Arandjelovic et al. 2016, eq. 4.
    """
    dtype, words = compute_dtype(x), codebook.shape[0]
    centre = codebook.to(dtype)
    sums, masses = [], []
    with full_precision(x):
        for start, stop in _bounds(cu_seqlens):
            total = torch.zeros(centre.shape, dtype=dtype, device=x.device)
            mass = torch.zeros(words, dtype=dtype, device=x.device)
            for rows in _chunks(start, stop, words):
                a = soft_assign(x[rows], codebook, scale, weight, bias)
                total = total + einsum(a, x[rows].to(dtype), "n k, n d -> k d")
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`soft_encode`, with A recomputed a chunk at a time.

    Args:
        grad: gradient of V [B, K, D].
        grad_mass: gradient of the mass [B, K].
        mass: the mass returned by the forward.

    Returns:
        Gradients of x [N, D] (dtype of x), codebook [K, D], scale [K], weight [K, D], bias [K]; those of
        parameters that were not given are empty [0].
    """
    dtype, words = compute_dtype(x), codebook.shape[0]
    centre = codebook.to(dtype)
    grad, grad_mass = grad.to(dtype), grad_mass.to(dtype)
    # V depends on C directly as -mass * C, whatever the assignment
    d_codebook = -einsum(mass.to(dtype), grad, "b k, b k d -> k d")
    d_x = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    d_scale = centre.new_zeros(words if scale is not None else 0)
    d_weight = centre.new_zeros(centre.shape if weight is not None else (0,))
    d_bias = centre.new_zeros(words if bias is not None else 0)
    with full_precision(x):
        s, w, b = (t if t is None else t.to(dtype) for t in (scale, weight, bias))
        for bag, (start, stop) in enumerate(_bounds(cu_seqlens)):
            g = grad[bag]
            offset = grad_mass[bag] - einsum(g, centre, "k d, k d -> k")
            for rows in _chunks(start, stop, words):
                block = x[rows].to(dtype)
                a = _logits(block, centre, s, w, b).softmax(dim=1)
                d_a = block @ g.T + offset  # dL/da_ik = g_k.(x_i - c_k) + grad_mass_k
                d_logit = a * (d_a - reduce(a * d_a, "n k -> n 1", "sum"))
                d_block = a @ g
                if s is not None:
                    d_distance = -s * d_logit
                    d_scale -= reduce(d_logit * squared_distances(block, centre), "n k -> k", "sum")
                    d_block += 2 * (reduce(d_distance, "n k -> n 1", "sum") * block - d_distance @ centre)
                    d_codebook += 2 * (
                        reduce(d_distance, "n k -> k 1", "sum") * centre - d_distance.T @ block
                    )
                else:
                    assert w is not None
                    d_weight += d_logit.T @ block
                    d_block += d_logit @ w
                    if b is not None:
                        d_bias += reduce(d_logit, "n k -> k", "sum")
                d_x[rows] = d_block.to(x.dtype)
    return d_x, d_codebook, d_scale, d_weight, d_bias


def _bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    offsets = cu_seqlens.tolist()
    return list(itertools.pairwise(offsets))


# ------------------------------------------------------------------------------------------------ public form


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
    return_counts: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The plain-torch form of :func:`dre_fast.residual_encode`: same arguments, same results.

    It checks shapes and dtypes, not values: a row with NaN spreads, where the public function names it.
    """
    rows, offsets = as_ragged(x, cu_seqlens, mask, index)
    if assignment == "hard":
        residuals, counts, _ = hard_encode(rows, codebook, offsets)
    elif assignment == "soft":
        residuals, counts = soft_encode(rows, codebook, offsets, scale, weight, bias)
    else:
        raise ValueError(f"residual_encode: assignment must be 'hard' or 'soft', got {assignment!r}")
    residuals = normalize_residuals(residuals, normalize)
    return (residuals, counts) if return_counts else residuals
