"""Device code of the backward of soft residual encoding; ``soft_backward`` says what it computes and launches it.

Scratch and absent pointers are as in ``soft_kernels``, whose products these kernels start from. Kernels that need the
gradient of a row's bag take tiles of R rows that lie in one bag: the segments of ranges of R rows.
"""

# Kernel arguments are Triton's own kinds of values, which annotations other than constexpr cannot name.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from dre_fast.kernels.rows import operand, scale_of
from dre_fast.kernels.segments import find_segment
from dre_fast.kernels.soft_kernels import (
    RUN_TIME,
    is_all_of_tile,
    operand_and_weight,
    row_of,
    scratch_at,
    sixteens,
    softmax_of,
    store_columns,
)

# fp16 coefficients are scaled to below 2^13, which keeps those that matter normal
FP16_EXPONENT = tl.constexpr(12.0)


@triton.jit
def _power_of_two(largest):
    """The power of two that takes ``largest`` to [2^12, 2^13) when divided by; 1 for what is next to zero, or NaN."""
    return tl.exp2(tl.floor(tl.log2(tl.where(largest > 1e-30, largest, 1.0))) - FP16_EXPONENT)


@triton.jit(do_not_specialize=RUN_TIME)
def logits_backward_kernel(x_ptr, index_ptr, row_scale_ptr, cu_ptr, z_ptr, e_ptr, slope_ptr, scale_ptr, extra_ptr, grad_scale_ptr,
                           grad_extra_ptr, squares_ptr, a_ptr, b_ptr, factors_ptr, peaks_ptr, N, X, B, P, R, pitch,
                           K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
                           NARROW: tl.constexpr):  # fmt: skip
    """Gradient of the logits, d_ik = a_ik (e_ik - sum_l a_il e_il) with e_ik = dL/da_ik, over e [KP, pitch], in place.

    With a_ptr also what the gradient of the rows is made of, in its coefficients' dtype, [KP, pitch] each: a_ik, and
    b_ik = d_ik times 2 s_k (Deep-TEN), both over the power of two factors[0, i] and with the scaling of the prepared
    gradient and codewords, which is ``NARROW`` times that of their parts. The gradient of row i is then
    factors[0, i] (sum_k a_ik g_k + b_ik p_k) + factors[1, i] x~_i.
    peaks [pitch]: the largest |d_ik| of a row times its weight.
    """
    bag, first, end, part = find_segment(cu_ptr, N, B, P, R)
    if (first >= end) | (bag == B):
        return
    place = part * ROWS + tl.arange(0, ROWS)  # R = ROWS: a tile of one bag
    inside = (place >= first) & (place < end)
    k = tl.arange(0, KP)
    at = scratch_at(k, place, pitch)
    # columns of other bags are loaded with the rest, and left alone
    whole = is_all_of_tile(first, end, part, N, ROWS)
    z = tl.load(z_ptr + at, mask=(k < K)[:, None], other=0.0)
    a = softmax_of(z, slope_ptr, k, K)
    e = tl.load(e_ptr + at, mask=(k < K)[:, None], other=0.0)
    d = e + tl.load(grad_extra_ptr + bag * KP + k)[:, None]
    d = a * (d - tl.sum(a * d, 0)[None, :])
    store_columns(e_ptr + at, d, k < K, inside, whole)

    row, live = row_of(index_ptr, place, inside, X)
    scale = None
    if row_scale_ptr is not None:
        scale = scale_of(row_scale_ptr, row, live, x_ptr)
    if peaks_ptr is not None:
        # of a unit row the power of two goes into the operand, the rest is below 2
        peak = tl.max(tl.abs(d), 0)
        if scale is not None and not UNIT:
            peak = peak * scale
        tl.store(peaks_ptr + place, peak, mask=live)
    if a_ptr is not None:
        along = tl.zeros((ROWS,), tl.float32)
        if UNIT or slope_ptr is not None:
            square = tl.load(squares_ptr + place, mask=inside, other=0.0)
        b = d
        extra = tl.load(extra_ptr + k)[:, None]
        if slope_ptr is not None:
            slope = tl.load(slope_ptr + k, mask=k < K, other=0.0)[:, None]
            b = 2.0 * slope * d
            along -= tl.sum(b, 0)
            product = 0.5 * (square[None, :] + extra - z)
        else:
            product = z - extra
        if UNIT:
            # the part along u of what has been found so far: the normalisation lets none of it through
            along -= tl.sum(a * e + b * product, 0) + along * square
        a = a * (tl.load(grad_scale_ptr + bag * KP + k) * NARROW)[:, None]
        b = b * (tl.load(scale_ptr + k) * NARROW)[:, None]
        if a_ptr.dtype.element_ty == tl.float16:
            power = _power_of_two(tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0)))
            a = a / power[None, :]
            b = b / power[None, :]
            tl.store(factors_ptr + place, power, mask=inside)
        else:
            tl.store(factors_ptr + place, tl.full((ROWS,), 1.0, tl.float32), mask=inside)
        tl.store(factors_ptr + pitch + place, along, mask=inside)
        store_columns(a_ptr + at, a.to(a_ptr.dtype.element_ty), k < KP, inside, whole)
        store_columns(b_ptr + at, b.to(b_ptr.dtype.element_ty), k < KP, inside, whole)


@triton.jit(do_not_specialize=RUN_TIME)
def rows_kernel(x_ptr, stride, index_ptr, row_scale_ptr, cu_ptr, a_ptr, b_ptr, grad_ptr, p_ptr, factors_ptr, weights_ptr, squares_ptr,
                out_ptr, N, X, B, P, R, pitch, D: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr, KT: tl.constexpr,
                DT: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, DISTANCE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Gradient of a tile of rows of one bag, DT features of it: see ``logits_backward_kernel``. Zero for rows of no bag."""
    bag, first, end, part = find_segment(cu_ptr, N, B, P, R)
    if first >= end:
        return
    place = part * ROWS + tl.arange(0, ROWS)  # R = ROWS: a tile of one bag
    inside = (place >= first) & (place < end)
    d = tl.program_id(1) * DT + tl.arange(0, DT)
    out = out_ptr + place[:, None] * D + d[None, :]
    wanted = inside[:, None] & (d[None, :] < D)
    if bag == B:
        tl.store(out, tl.zeros((ROWS, DT), out_ptr.dtype.element_ty), mask=wanted)
        return
    row, live = row_of(index_ptr, place, inside, X)
    k = tl.arange(0, KT)
    at = tl.trans(scratch_at(k, place, pitch))
    wide = sixteens(pitch)
    grads = grad_ptr + bag * (KP * DP) + k[:, None] * DP + d[None, :]
    points = p_ptr + k[:, None] * DP + d[None, :]
    acc = tl.zeros((ROWS, DT), tl.float32)
    for k0 in tl.range(0, KP, KT, num_stages=STAGES):
        a = tl.load(a_ptr + at + k0 * wide)
        acc = tl.dot(a, tl.load(grads + k0 * DP), acc, input_precision="ieee")
    for k0 in tl.range(0, KP, KT, num_stages=STAGES):
        b = tl.load(b_ptr + at + k0 * wide)
        acc = tl.dot(b, tl.load(points + k0 * DP), acc, input_precision="ieee")
    acc = acc * tl.load(factors_ptr + place, mask=live, other=0.0)[:, None]
    if DISTANCE or UNIT:
        read = live[:, None] & (d[None, :] < D)
        x = tl.load(x_ptr + row[:, None] * stride + d[None, :], mask=read, other=0)
        x = operand(x).to(tl.float32)
        along = tl.load(factors_ptr + pitch + place, mask=live, other=0.0)
        scale = None
        if row_scale_ptr is not None:
            scale = scale_of(row_scale_ptr, row, live, x_ptr)
        if UNIT:
            full = tl.load(weights_ptr + place, mask=live, other=0.0)
            acc += x * (full * 2.0**-24)[:, None] * along[:, None]
            if scale is not None:
                full = full / tl.where(scale == 0.0, 1.0, scale)
            usable = tl.load(squares_ptr + place, mask=live, other=0.0) == 1.0
            acc = acc * (full * 2.0**-24)[:, None]
            acc = tl.where(usable[:, None], acc, 0.0)
        else:
            if scale is not None:
                along = along * scale
            acc += x * along[:, None]
    # what was read of rows that are skipped is nothing
    acc = tl.where(live[:, None], acc, 0.0)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=RUN_TIME)
def parameters_kernel(x_ptr, stride, index_ptr, row_scale_ptr, cu_ptr, d_ptr, z_ptr, weights_ptr, peak_ptr, out_ptr, totals_ptr,
                      N, X, B, P, R, pitch, K: tl.constexpr, D: tl.constexpr, KT: tl.constexpr, DT: tl.constexpr,
                      ROWS: tl.constexpr, UNIT: tl.constexpr, DISTANCE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Sums over one range of R rows of all bags, of d_ik x~_i: out [P, K, D]; of d_ik and d_ik z_ik: totals [P, 2, K].

    Of 16-bit rows d_ik is taken in two parts; with DISTANCE its sums are those of the parts, as in ``sums_kernel``.
    """
    part = tl.program_id(0).to(tl.int64)
    base = part * (R // ROWS * ROWS)  # R, seen to be a multiple of ROWS
    end = tl.minimum(tl.minimum(base + R, N), tl.load(cu_ptr + B).to(tl.int64))
    d0 = tl.program_id(1) * DT
    k0 = tl.program_id(2) * KT
    k = k0 + tl.arange(0, KT)
    d = d0 + tl.arange(0, DT)
    r = tl.arange(0, ROWS)
    step = base * 0 + stride  # int64 before any product
    at = scratch_at(k, base + r, pitch)
    acc = tl.zeros((KT, DT), tl.float32)
    sums = tl.zeros((KT,), tl.float32)
    slopes = tl.zeros((KT,), tl.float32)
    once = k < tl.where(d0 == 0, K, 0)  # by one of the tiles over D
    power = 1.0
    if peak_ptr is not None:
        power = _power_of_two(tl.load(peak_ptr))
    for done in tl.range(0, tl.maximum(end - base, 0).to(tl.int32), ROWS, num_stages=STAGES):
        place = base + done + r
        inside = place < end
        row, live = row_of(index_ptr, place, inside, X)
        given = tl.where(live[None, :] & (k[:, None] < K), tl.load(d_ptr + at + done), 0.0)
        if DISTANCE:
            z = tl.load(z_ptr + at + done, mask=live[None, :] & once[:, None], other=0.0)
            slopes += tl.sum(given * z, 1)
        full = None
        scale = None
        taken = live
        if UNIT:
            full = tl.load(weights_ptr + place, mask=live, other=1.0)
        elif row_scale_ptr is not None:
            scale = scale_of(row_scale_ptr, row, live, x_ptr)
            taken = scale != 0.0
        wanted = taken[:, None] & (d[None, :] < D)
        x = operand(tl.load(x_ptr + row[:, None] * step + d[None, :], mask=wanted, other=0))
        weight = None
        if UNIT or row_scale_ptr is not None:
            x, weight = operand_and_weight(x, full, scale, UNIT)
        factor = tl.zeros((ROWS,), tl.float32) + 1.0 / power
        if weight is not None:
            factor = factor * weight
        # rows of scale 0 add nothing to acc, and their coefficients are not scaled: they may overflow
        weighed = tl.where(taken[None, :], given * factor[None, :], 0.0)
        high = weighed.to(x.dtype)
        acc = tl.dot(high, x, acc, input_precision="ieee")
        if x.dtype != tl.float32:
            LOW: tl.constexpr = 2048.0 if x.dtype == tl.float16 else 1.0
            kept = high.to(tl.float32)
            low = ((weighed - kept) * LOW).to(x.dtype)
            acc = acc + tl.dot(low, x) * (1.0 / LOW)
            if DISTANCE:
                seen = (kept + low.to(tl.float32) * (1.0 / LOW)) / factor[None, :]
                given = tl.where(taken[None, :], seen, given)
        sums += tl.sum(given, 1)
    inside = (k[:, None] < K) & (d[None, :] < D)
    tl.store(out_ptr + (part * K + k[:, None]) * D + d[None, :], acc * power, mask=inside)
    if d0 == 0:
        totals = totals_ptr + part * (2 * K) + k
        tl.store(totals, sums, mask=k < K)
        tl.store(totals + K, slopes, mask=k < K)


@triton.jit(do_not_specialize=["P"])
def add_kernel(to_ptr, from_ptr, P, SIZE: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """to [SIZE] += from [P, SIZE], in order."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < SIZE
    total = tl.load(to_ptr + e, mask=inside, other=0.0)
    for p in range(0, P, AT_ONCE):
        part = (p + tl.arange(0, AT_ONCE)).to(tl.int64)
        mask = (part < P)[:, None] & inside[None, :]
        total += tl.sum(tl.load(from_ptr + part[:, None] * SIZE + e[None, :], mask=mask, other=0.0), 0)
    tl.store(to_ptr + e, total, mask=inside)


@triton.jit(do_not_specialize=["B"])
def codebook_kernel(grad_ptr, mass_ptr, sums_ptr, totals_ptr, slope_ptr, c_ptr, out_ptr, B, K: tl.constexpr, D: tl.constexpr,
                    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """Gradient of the codebook: -sum_b mass_bk g_bk, and with slopes 2 s_k (sum_i d_ik x~_i - c_k sum_i d_ik)."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < K * D
    k = e // D
    total = tl.zeros((BLOCK,), tl.float32)
    for b in range(0, B, AT_ONCE):
        bag = (b + tl.arange(0, AT_ONCE)).to(tl.int64)[:, None]
        mask = (bag < B) & inside[None, :]
        grad = tl.load(grad_ptr + bag * (K * D) + e[None, :], mask=mask, other=0.0).to(tl.float32)
        total -= tl.sum(grad * tl.load(mass_ptr + bag * K + k[None, :], mask=mask, other=0.0), 0)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + k, mask=inside, other=0.0)
        c = tl.load(c_ptr + e, mask=inside, other=0.0)
        sums = tl.load(sums_ptr + e, mask=inside, other=0.0)
        total += 2.0 * slope * (sums - c * tl.load(totals_ptr + k, mask=inside, other=0.0))
    tl.store(out_ptr + e, total, mask=inside)
