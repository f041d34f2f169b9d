"""The contract of hard encode on one input, for the interpreted and for the compiled Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dre_fast.kernels import hard_encode
from dre_fast.reference.quantize import has_scale, quantize
from dre_fast.reference.rows import l2_normalize
from error_rule import within_error_rule


def make_bags(
    lengths: list[int], dim: int, codewords: int, dtype: torch.dtype, device: str, noise: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows around random unit codewords, the codebook, cu_seqlens."""
    codebook = normalize(torch.randn(codewords, dim), dim=1)
    nearest = torch.randint(codewords, (sum(lengths),))
    rows = normalize(codebook[nearest] + noise * torch.randn(sum(lengths), dim) / dim**0.5, dim=1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return rows.to(dtype).to(device), codebook.to(device), bounds.to(device)


def stored(
    rows: Tensor, dtype: torch.dtype, padding: int = 0, scaled_by: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """fp32 rows as a bank stores them, times ``scaled_by``: (rows [R, D + padding], row_scale); padding is not zero."""
    payload, scale = quantize(rows.cpu(), dtype)
    if has_scale(dtype):
        scale = scale * scaled_by
    else:
        payload = payload * scaled_by
    wide = torch.full((payload.shape[0], payload.shape[1] + padding), 77.0).to(dtype)
    wide[:, : payload.shape[1]] = payload
    return wide.to(rows.device), scale.to(rows.device) if has_scale(dtype) else None


def read_rows(
    x: Tensor, dim: int, index: Tensor | None, row_scale: Tensor | None, unit: bool, dtype: torch.dtype
) -> Tensor:
    """The rows that are encoded, [M, D] in ``dtype``; skipped rows are zeros."""
    rows = x[:, :dim].to(dtype)
    if row_scale is not None:
        rows = rows * row_scale[:, None].to(dtype)
    if unit:
        rows = l2_normalize(rows)
    if index is None:
        return rows
    taken = (index >= 0)[:, None]
    return torch.where(taken, rows[index.clamp(min=0)] if len(rows) else rows.new_zeros(len(index), dim), 0.0)


def given_codes(rows: Tensor, codebook: Tensor, cu_seqlens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """V and counts that follow from the codes, in the dtype of rows: what is left to check once codes are right."""
    bags, words = cu_seqlens.shape[0] - 1, codebook.shape[0]
    bag = torch.repeat_interleave(torch.arange(bags, device=rows.device), cu_seqlens.diff())
    member = (codes[: len(bag)] >= 0).nonzero()[:, 0]
    place = bag[member] * words + codes[member]
    residuals = rows[member] - codebook.to(rows.dtype)[codes[member]]
    V = rows.new_zeros(bags * words, rows.shape[1]).index_add_(0, place, residuals)
    return V.view(bags, words, -1), torch.bincount(place, minlength=bags * words).view(bags, words)


def score_bound(x_dtype: torch.dtype, rows: Tensor, codebook: Tensor) -> Tensor:
    """How far a score x.c - ||c||^2 / 2 of the kernels may lie from the exact one, [M], as documented."""
    parts = 2.0**-18 if x_dtype == torch.bfloat16 else 0.0 if x_dtype == torch.float32 else 2.0**-22
    size = rows.norm(dim=1) * codebook.norm(dim=1).max() + codebook.square().sum(1).max()
    return (parts + (rows.shape[1] + 2) * 2.0**-24) * size


def check(
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    index: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_codes: Tensor | None = None,
    unit: bool = False,
    distances: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole contract on one input; returns the kernel's V, counts, codes, distances."""
    arguments = (x, codebook, cu_seqlens, index, row_scale, row_codes, unit, distances)
    V, counts, codes, squares = hard_encode(*arguments)
    again = hard_encode(*arguments)
    for a, b in zip((V, counts, codes, squares), again, strict=True):
        assert torch.equal(a, b), "two runs differ"
    assert V.dtype == squares.dtype == torch.float32
    assert counts.dtype == codes.dtype == torch.int64

    dim = codebook.shape[1]
    rows, words = read_rows(x, dim, index, row_scale, unit, torch.float64), codebook.double()
    plain = read_rows(x, dim, index, row_scale, unit, torch.float32)
    inside = torch.arange(len(rows), device=x.device) < cu_seqlens[-1]
    if index is not None:
        inside &= index >= 0
    bound = score_bound(x.dtype, rows, words)
    if row_codes is not None:
        known = row_codes.long() if index is None else row_codes.long()[index.clamp(min=0)]
        assert torch.equal(codes, torch.where(inside, known, -1))
    else:
        assert torch.equal(codes >= 0, inside)
        # Nearest in float64, up to the rounding of an fp32 score (a difference of halved squared distances).
        scores = rows @ words.T - words.square().sum(1) / 2
        chosen = scores.gather(1, codes.clamp(min=0)[:, None])[:, 0]
        assert (scores.max(1).values - chosen <= 2 * bound)[inside].all()
        best, second = scores.topk(min(2, scores.shape[1]), dim=1).values[:, [0, -1]].unbind(1)
        clear = inside & (best - second > 2 * bound)
        assert torch.equal(codes[clear], scores.argmax(1)[clear])

    # Counts exactly, V by the error rule: at most twice the error of plain torch in fp32.
    expected, expected_counts = given_codes(rows, words, cu_seqlens, codes)
    assert torch.equal(counts, expected_counts)
    within_error_rule(V, given_codes(plain, codebook, cu_seqlens, codes)[0], expected, name="V")

    assert squares.shape == (len(rows) if distances else 0,)
    if distances:
        member = codes >= 0
        exact = (rows - words[codes.clamp(min=0)]).square().sum(1)
        allowed = 2 * bound + (dim + 2) * 2.0**-23 * rows.square().sum(1)
        assert (squares[~member] == 0).all()
        assert (squares >= 0).all()
        assert ((squares - exact).abs() <= allowed)[member].all()
    return V, counts, codes, squares
