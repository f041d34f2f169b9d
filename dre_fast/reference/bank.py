"""The memory bank's operations in plain torch: the specification of the C++ and CUDA kernels.

Storage, shared by every function here (S slides, R rows, D values a row, K codewords):

    payload  [R, Dp]   stored rows, Dp = D padded to 16 bytes with zeros
    scale    fp32 [R]  one a row for int8 and float8_e4m3fn, else fp32 [0]
    code     int16 [R] nearest codeword of the stored row, -1 = never written, or no codebook yet
    age      int32 [R] step of the last write, -1 = never written
    drift    fp32 [R]  1 - cos(row before, row after) at the last write, 0 at the first
    start    int64 [S] first row of a slide; tile t of slide s is row start[s] + t
    sums     int64 [S, K, D] fixed-point sum of the written rows of each codeword, counts int64 [S, K]
    codebook fp32 [K, D], K = 0 until there is one

Source: the memory bank of DRE-SLCL (arXiv 2511.05034); running sums, codes, age and drift are dre_fast's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dre_fast.reference.encode import hard_assign
from dre_fast.reference.fixed_point import accumulate_, from_fixed, to_fixed
from dre_fast.reference.quantize import dequantize, has_scale, quantize

NORM_EPS = 1e-12


def unit_rows(x: Tensor) -> Tensor:
    """f = x / max(||x||_2, 1e-12), [R, D] -> fp32 [R, D].

    In float64 and rounded to fp32 once: f_j = fp32(x_j / max(sqrt(sum_j x_j^2), eps)). So the order in
    which a kernel adds up the squares hardly ever shows in the result, and large finite inputs are safe.
    """
    x = x.double()
    return (x / x.norm(dim=1, keepdim=True).clamp(min=NORM_EPS)).float()


def drift_of(old: Tensor, new: Tensor) -> Tensor:
    """1 - <old, new> / sqrt(<old, old> <new, new>) of stored rows, fp32 [R], in [0, 2].

    In float64. Where one of the rows is all zeros the drift is 1, where both are it is 0.
    """
    old, new = old.double(), new.double()
    a, b = (old * old).sum(1), (new * new).sum(1)
    power = a * b
    drift = 1.0 - (old * new).sum(1) / torch.where(power > 0, power, 1.0).sqrt()
    drift = torch.where((a == 0) & (b == 0), 0.0, drift)
    return drift.clamp(0.0, 2.0).float()


def last_of_each(rows: Tensor, keep: Tensor) -> Tensor:
    """Indices i, ascending in rows[i], of the last occurrence of every value among the entries with keep[i].

    Args:
        rows: int64 [n], row numbers, all >= 0 where ``keep``.
        keep: bool [n].
    """
    index = keep.nonzero().squeeze(1)
    ordered, by_row = torch.sort(rows[index], stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return index[by_row[last]]


def assign_codes(stored: Tensor, codebook: Tensor) -> Tensor:
    """Nearest codeword of stored rows [R, D], int16 [R]: argmin_k ||z - c_k||^2, ties to the lowest k.

    -1 when K = 0. A function of row and codebook alone (see ``hard_assign``). A kernel may differ where
    codewords tie within round-off.
    """
    if codebook.shape[0] == 0:
        return torch.full((stored.shape[0],), -1, dtype=torch.int16, device=stored.device)
    return hard_assign(stored, codebook).to(torch.int16)


def write(
    payload: Tensor,
    scale: Tensor,
    code: Tensor,
    age: Tensor,
    drift: Tensor,
    sums: Tensor,
    counts: Tensor,
    codebook: Tensor,
    start: Tensor,
    rows_slide: Tensor,
    rows_tile: Tensor,
    features: Tensor,
    step: int,
) -> None:
    """Store ``features`` in the rows (rows_slide[i], rows_tile[i]); changes the first seven tensors in place.

    For every i that is not skipped, with row = start[slide] + tile (int64):

    1. f = unit_rows(features[i]): L2 norm in float64, eps 1e-12, one rounding to fp32.
    2. (q, s) = quantize(f): int8 scale max|f|/127, rounded half to even; e4m3 scale max|f|/448; else a cast.
    3. z = dequantize(q, s) in fp32: the stored row. Everything below uses z, never f.
    4. code_new = argmin_k ||z - c_k||^2 = argmax_k (z.c_k - ||c_k||^2 / 2), ties: lowest k; -1 if K = 0.
    5. If the row was written before (age >= 0): drift[row] = drift_of(z_old, z), else drift[row] = 0.
    6. If code[row] >= 0: sums[slide, code[row]] -= to_fixed(z_old), counts[slide, code[row]] -= 1.
       If code_new >= 0: sums[slide, code_new] += to_fixed(z), counts[slide, code_new] += 1.
       to_fixed(z) = int64(round_half_even(z * 2^24)), value by value.
    7. payload[row, :D] = q (the padding stays zero), scale[row] = s if there are scales, age[row] = step,
       code[row] = code_new.

    Skips: slide < 0 or tile < 0. Duplicates: when several i name one row, only the one with the largest i
    counts, as if the others had not been given (z_old is the row before the call). R = 0 does nothing.

    Given equal stored rows and codes, ``sums`` and ``counts`` have the same bits whatever backend wrote them.

    Args:
        payload .. start: see the module docstring. All contiguous, on one device.
        rows_slide, rows_tile: int64 [R].
        features: fp32 [R, D], finite, not normalised.
        step: int32 range, >= 0.

    Nothing is validated here: ids must lie inside the slides' slabs (``MemoryBank.write`` checks them).
    """
    dim = features.shape[1]
    rows = start[rows_slide.clamp(min=0)] + rows_tile if start.numel() else rows_tile
    chosen = last_of_each(rows, (rows_slide >= 0) & (rows_tile >= 0))
    row, slide = rows[chosen], rows_slide[chosen]

    stored, new_scale = quantize(unit_rows(features[chosen]), payload.dtype)
    new = dequantize(stored, new_scale)
    old = read(payload, scale, row, dim)
    new_code, old_code = assign_codes(new, codebook), code[row]

    drift[row] = torch.where(age[row] >= 0, drift_of(old, new), 0.0)
    if codebook.shape[0]:
        had = old_code >= 0
        accumulate_(sums, counts, slide[had], old_code[had], old[had], sign=-1)
        accumulate_(sums, counts, slide, new_code, new)
    payload[row, :dim] = stored
    if has_scale(payload.dtype):
        scale[row] = new_scale
    code[row] = new_code
    age[row] = step


def read(payload: Tensor, scale: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Stored rows by row number, dequantised: int64 [n] -> fp32 [n, dim]. Negative row numbers give zeros."""
    if payload.shape[0] == 0:
        return torch.zeros(rows.shape[0], dim, device=payload.device)
    safe = rows.clamp(min=0)
    values = dequantize(payload[safe, :dim], scale[safe] if has_scale(payload.dtype) else scale)
    return torch.where((rows >= 0)[:, None], values, 0.0)


def rest(
    payload: Tensor,
    scale: Tensor,
    code: Tensor,
    sums: Tensor,
    counts: Tensor,
    codebook: Tensor,
    start: Tensor,
    slides: Tensor,
    tiles: Tensor,
    accurate: bool = True,
) -> tuple[Tensor, Tensor]:
    """Residuals of every written row of each slide except ``tiles``, from the running sums: no cost in n_s.

        V_rest[b] = (S[s] - sum over live i of to_fixed(z_i) at their codes) 2^-24 - n_rest C
        n_rest[b] = n[s] - live counts

    Args:
        slides: int64 [B]; tiles: int64 [B, m], -1 = skipped, no tile twice for a slide. Tiles never written
            are not in S and so are not taken out.
        accurate: V_rest in float64; else it is rounded to fp32 once.

    Returns:
        V_rest float64 or fp32 [B, K, D], n_rest int64 [B, K].
    """
    k, dim = codebook.shape
    b, m = tiles.shape
    rows = torch.where(tiles >= 0, start[slides][:, None] + tiles, -1).reshape(-1)
    old_code = torch.where(rows >= 0, code[rows.clamp(min=0)], -1)
    coded = old_code >= 0
    old = to_fixed(read(payload, scale, torch.where(coded, rows, -1), dim))
    bag = torch.arange(b, device=tiles.device).repeat_interleave(m)
    cell = bag * k + old_code.clamp(min=0)
    # rows without a code carry zeros, so they can go to any cell
    out = sums[slides].reshape(b * k, dim).index_add(0, cell, old, alpha=-1).view(b, k, dim)
    n = counts[slides].reshape(-1).index_add(0, cell, coded.to(torch.int64), alpha=-1).view(b, k)
    V = from_fixed(out) - n[:, :, None] * codebook.double()
    return V if accurate else V.float(), n
