"""Hard assignment in plain torch: nearest codewords, residuals, and their gradient."""

from __future__ import annotations

import math

import torch
from einops import rearrange, reduce
from torch import Tensor

from dre_fast.reference.layout import bag_of_row
from dre_fast.reference.rows import (
    RowSource,
    add_rows,
    chunks,
    compute_dtype,
    full_precision,
    l2_normalize_backward,
)


def hard_assign(x: Tensor, codebook: Tensor) -> Tensor:
    """Nearest codeword of each row, a_i = argmin_k ||x_i - c_k||^2, ties to the lowest k.

    Scores are a matrix product; where two lie closer than its rounding error the distances are formed again
    in float64 from the differences, and the lowest k wins where those are equal, as they are for duplicate
    codewords. The code of a row does not depend on the rows beside it.

    Args:
        x: [N, D], any float dtype.
        codebook: [K, D], K >= 1.

    Returns:
        int64 [N]. A row with NaN gets code 0.
    """
    words = codebook.to(compute_dtype(x))
    codes = x.new_zeros(x.shape[0], dtype=torch.int64)
    with torch.no_grad(), full_precision(x):
        half_square = reduce(words * words, "k d -> k", "sum") / 2
        for rows in chunks(0, x.shape[0], words.shape[0]):
            codes[rows] = _assign(x[rows].to(words.dtype), words, half_square)
    return codes


def _assign(block: Tensor, words: Tensor, half_square: Tensor) -> Tensor:
    scores = half_square - block @ words.T
    best, code = scores.min(dim=1)
    bound = _score_error(block, half_square)
    # a score that is not a number has no rivals: such a row keeps what min found, codeword 0
    rivals = scores <= (best + bound)[:, None]
    unclear = (rivals.sum(dim=1) > 1).nonzero()[:, 0]
    if len(unclear):
        code[unclear] = _exact_assign(block[unclear], words, rivals[unclear])
    return code


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
    for pairs in chunks(0, len(row), block.shape[1]):
        difference = block[row[pairs]].double() - words[k[pairs]].double()
        distance[row[pairs], k[pairs]] = reduce(difference * difference, "p d -> p", "sum")
    return distance.argmin(dim=1)


def hard_encode(
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    index: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_codes: Tensor | None = None,
    unit: bool = False,
    distances: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual encoding with hard assignment: V_bk = sum of x_i - c_k over rows i of bag b with code k.

    Differentiable by autograd in x and codebook (the codes are constants). Sums residuals rather than
    subtracting n c_k from a sum of rows, which cancels, and rounds once at the end. Deterministic.

    Args:
        x: rows [R, P] with P >= D, any float dtype; int8 or float8_e4m3fn with ``row_scale``.
        codebook: [K, D].
        cu_seqlens: int64 [B+1] offsets over the M rows that are read, non-decreasing from 0; rows past the
            last belong to no bag.
        index: int64 [M], rows of x to read (-1 = skip); without it all R rows in order.
        row_scale: fp32 [R], a factor for each row of x.
        row_codes: int16 [R], codewords that are known already (-1 = skip the row): none is computed then.
        unit: divide each row by its L2 norm (at least 1e-12) first.
        distances: also return the squared distance of each row to its codeword.

    Returns:
        V [B, K, D] fp32 (float64 for float64 x), counts int64 [B, K], codes int64 [M] (-1 for rows of no
        bag), distances [M] in the dtype of V without gradient (0 for rows of no bag; [0] unless asked for).

    Source: DRE-SLCL, arXiv 2511.05034 (residual encoding); VLAD, Jegou et al. 2010.
    """
    source = RowSource(x, codebook.shape[1], index, row_scale, unit)
    dtype, bags, (words, dim) = compute_dtype(x), cu_seqlens.shape[0] - 1, codebook.shape
    count = len(source)
    bag = bag_of_row(cu_seqlens, count)
    inside, taken = bag < bags, source.taken()
    if taken is not None:
        inside = inside & taken
    codes = torch.zeros_like(bag) if row_codes is None else source.per_row(row_codes).long()
    inside = inside & (codes >= 0)
    centre = codebook.to(dtype)
    half_square = reduce(centre * centre, "k d -> k", "sum").detach() / 2
    # rows of no bag go to one slot past the end, which is cut off again
    slot = torch.full_like(bag, bags * words)
    # float64, because rows are added one after the other: in fp32 a long bag would lose more than a GEMM does
    sums = torch.zeros(bags * words + 1, dim, dtype=torch.float64, device=x.device)
    squares = torch.zeros(count if distances else 0, dtype=dtype, device=x.device)
    for rows in chunks(0, count, words):
        block = source[rows]
        if row_codes is None:
            with torch.no_grad(), full_precision(x):
                codes[rows] = _assign(block, centre, half_square)
        residual = block - centre.index_select(0, codes[rows].clamp(min=0))
        place = torch.where(inside[rows], bag[rows] * words + codes[rows], bags * words)
        add_rows(sums, place, residual.double())
        slot[rows] = place
        if distances:
            square = reduce(residual.detach() ** 2, "n d -> n", "sum")
            squares[rows] = torch.where(inside[rows], square, 0.0)
    counts = torch.bincount(slot, minlength=bags * words + 1)
    residuals = rearrange(sums[:-1].to(dtype), "(b k) d -> b k d", k=words)
    codes = torch.where(inside, codes, -1)
    return residuals, rearrange(counts[:-1], "(b k) -> b k", k=words), codes, squares


def hard_encode_backward(
    grad: Tensor,
    codes: Tensor,
    cu_seqlens: Tensor,
    x: Tensor | None = None,
    index: Tensor | None = None,
    unit: bool = False,
) -> Tensor:
    """Gradient of V [B, K, D] -> of the rows that were read, [M, D] in the dtype of ``grad``; of x with ``unit``.

    Row i gets grad[bag_i, code_i], 0 if its code is -1; with ``unit`` (which needs x, and index where one was
    given) that is carried through the normalisation of the row.
    """
    bags, words, dim = grad.shape
    bag = bag_of_row(cu_seqlens, codes.shape[0])
    table = torch.cat([rearrange(grad, "b k d -> (b k) d"), grad.new_zeros(1, dim)])
    slot = torch.where((bag < bags) & (codes >= 0), bag * words + codes, bags * words)
    d_rows = table.index_select(0, slot)
    if unit:
        assert x is not None
        source, d_units = RowSource(x, dim, index), d_rows
        d_rows = d_units.new_empty(d_units.shape, dtype=x.dtype)
        for rows in chunks(0, codes.shape[0], dim):
            d_rows[rows] = l2_normalize_backward(d_units[rows], source.stored(rows)).to(x.dtype)
    return d_rows
