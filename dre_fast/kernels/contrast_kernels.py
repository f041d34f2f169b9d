"""Device code of the loss between slides and all reports of a cohort; ``contrast_forward`` and ``contrast_backward``
say what it computes and launch it.

Slides come prepared: parts [PARTS, padded, TP], zero beyond B slides and T numbers. A pointer that is None is absent,
and what it would be for is not compiled: without ``bias_ptr`` the loss is InfoNCE, with it the sigmoid loss.
"""

# Kernel arguments are Triton's own kinds of values, which annotations other than constexpr cannot name.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# Run-time values: a new number of slides or reports compiles nothing. Of T only whether 16 divides it is looked at.
RUN_TIME = ["TP", "B", "M", "padded", "height", "pitch", "ranges"]


@triton.jit
def sixteens(n):
    """A multiple of 16, in a form from which the compiler sees that it is one: it then loads 16 bytes at a time."""
    return n // 16 * 16


@triton.jit
def _top(x):
    """The 8 leading bits of an fp32 number's mantissa, cut off: a bf16 number."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def store_parts(ptr, at, plane, x, mask, PARTS: tl.constexpr):
    """Store fp32 numbers as they are, or as three bf16 numbers that add up to them exactly, 8 bits of mantissa each."""
    if PARTS == 3:
        high = _top(x)
        rest = x - high
        middle = _top(rest)
        kind: tl.constexpr = ptr.dtype.element_ty
        tl.store(ptr + at, high.to(kind), mask=mask)
        tl.store(ptr + plane + at, middle.to(kind), mask=mask)
        tl.store(ptr + 2 * plane + at, (rest - middle).to(kind), mask=mask)
    else:
        tl.store(ptr + at, x, mask=mask)


@triton.jit
def add_product(acc, x, ptrs, plane, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x @ w^T, w [n, k] in parts at ``ptrs``.

    Matrix units add without rounding to nearest, which piles up over a long sum: what they add is a chunk's, and
    chunks are added outside. (tf32x3 does so by itself.)
    """
    if PARTS == 3:
        chunk = tl.dot(x, tl.trans(tl.load(ptrs + 2 * plane)))
        chunk = tl.dot(x, tl.trans(tl.load(ptrs + plane)), chunk)
        chunk = tl.dot(x, tl.trans(tl.load(ptrs)), chunk)
        return acc + chunk
    else:
        return tl.dot(x, tl.trans(tl.load(ptrs)), acc, input_precision=PRECISION)


@triton.jit
def cosines(reports_ptr, stride, place, inside, parts_ptr, s, padded, T, TP, S: tl.constexpr,
            R: tl.constexpr, DT: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Products [R, S] of a tile of reports with a tile of slides, over all of T."""
    d = tl.arange(0, DT)
    rows = reports_ptr + place[:, None] * stride + d[None, :]
    wide = sixteens(TP)
    slides = parts_ptr + s.to(tl.int64)[:, None] * wide + d[None, :]
    plane = tl.cast(padded, tl.int64) * wide
    acc = tl.zeros((R, S), tl.float32)
    for d0 in tl.range(0, T, DT, num_stages=STAGES):
        x = tl.load(rows + d0, mask=inside[:, None] & (d[None, :] + d0 < T), other=0.0)
        acc = add_product(acc, x, slides + d0, plane, PARTS, PRECISION)
    return acc


@triton.jit
def softplus(x):
    """log(1 + e^x) without overflow, and without loss where e^x is small.

    log(1 + e) = 2 artanh(e / (2 + e)), here with 0 <= e <= 1; its series to the 15th power is exact to 2^-29.
    """
    e = tl.exp(-tl.abs(x))
    u = e / (2.0 + e)
    v = u * u
    series = 1 / 13 + v * (1 / 15)
    series = 1 / 11 + v * series
    series = 1 / 9 + v * series
    series = 1 / 7 + v * series
    series = 1 / 5 + v * series
    series = 1 / 3 + v * series
    return tl.maximum(x, 0.0) + 2.0 * (u + u * v * series)


@triton.jit(do_not_specialize=RUN_TIME)
def slides_kernel(slides_ptr, parts_ptr, B, padded, T, TP, BLOCK: tl.constexpr,
                  PARTS: tl.constexpr):  # fmt: skip
    """BLOCK numbers of the slides [B, T] in parts (see ``store_parts``), with zeros where there are none."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(padded, tl.int64) * TP
    s = at // TP
    d = at % TP
    x = tl.load(slides_ptr + s * T + d, mask=(s < B) & (d < T), other=0.0)
    store_parts(parts_ptr, at, size, x, at < size, PARTS)


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(reports_ptr, stride, report_cases_ptr, parts_ptr, slide_cases_ptr, scale_ptr, bias_ptr, found_ptr, counts_ptr,
                   B, M, padded, height, T, TP, S: tl.constexpr, R: tl.constexpr, DT: tl.constexpr,
                   PARTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """A tile of slides against one range of ``height`` reports.

    InfoNCE: the largest logit, the sum of exp(logit - largest) and the sum of the positives' logits, found [ranges, 3,
    padded], and how many these are, counts [ranges, padded]. Sigmoid loss: its sum, found [ranges, 1, padded].
    """
    s = tl.program_id(0) * S + tl.arange(0, S)
    part = tl.program_id(1).to(tl.int64)
    start = part * (height // R * R)
    end = tl.minimum(start + height, M)
    slide_cases = tl.load(slide_cases_ptr + s, mask=s < B, other=0)
    scale = tl.load(scale_ptr)
    total = tl.zeros((S,), tl.float32)
    if bias_ptr is None:
        highest = tl.full((S,), float("-inf"), tl.float32)
        positive_sum = tl.zeros((S,), tl.float32)
        count = tl.zeros((S,), tl.int32)
    for done in range(0, (end - start).to(tl.int32), R):
        place = start + done + tl.arange(0, R)
        inside = place < end
        z = scale * cosines(
            reports_ptr, stride, place, inside, parts_ptr, s, padded, T, TP, S, R, DT, PARTS, PRECISION, STAGES
        )  # fmt: skip
        cases = tl.load(report_cases_ptr + place, mask=inside, other=0)
        same = inside[:, None] & (cases[:, None] == slide_cases[None, :])
        if bias_ptr is None:
            positive_sum += tl.sum(tl.where(same, z, 0.0), 0)
            count += tl.sum(same.to(tl.int32), 0)
            z = tl.where(inside[:, None], z, float("-inf"))
            higher = tl.maximum(highest, tl.max(z, 0))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher[None, :]), 0)
            highest = higher
        else:
            z += tl.load(bias_ptr)
            total += tl.sum(tl.where(inside[:, None], softplus(tl.where(same, -z, z)), 0.0), 0)
    if bias_ptr is None:
        found = found_ptr + part * (tl.cast(padded, tl.int64) * 3) + s
        tl.store(found, highest)
        tl.store(found + padded, total)
        tl.store(found + 2 * padded, positive_sum)
        tl.store(counts_ptr + part * padded + s, count)
    else:
        tl.store(found_ptr + part * padded + s, total)


@triton.jit(do_not_specialize=RUN_TIME)
def merge_kernel(found_ptr, counts_ptr, loss_ptr, lse_ptr, positives_ptr, B, padded, ranges, MOST: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """What the ranges (at most MOST) found of BLOCK slides, put together: loss [B] and, of InfoNCE, logsumexp, positives."""
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, MOST).to(tl.int64)[:, None]
    there = (part < ranges) & (s < B)[None, :]
    known = s < B
    if counts_ptr is not None:
        found = found_ptr + part * (tl.cast(padded, tl.int64) * 3) + s[None, :]
        highest = tl.load(found, mask=there, other=float("-inf"))
        top = tl.where(known, tl.max(highest, 0), 0.0)
        weight = tl.exp(highest - top[None, :])
        total = tl.sum(tl.load(found + padded, mask=there, other=0.0) * weight, 0)
        total = tl.where(known, total, 1.0)
        positive_sum = tl.sum(tl.load(found + 2 * padded, mask=there, other=0.0), 0)
        count = tl.load(counts_ptr + part * padded + s[None, :], mask=there, other=0)
        positives = tl.where(known, tl.sum(count.to(tl.int64), 0), 1)
        lse = top + tl.log(total)
        tl.store(loss_ptr + s, lse - positive_sum / positives.to(tl.float32), mask=known)
        tl.store(lse_ptr + s, lse, mask=known)
        tl.store(positives_ptr + s, positives, mask=known)
    else:
        found = found_ptr + part * padded + s[None, :]
        tl.store(loss_ptr + s, tl.sum(tl.load(found, mask=there, other=0.0), 0), mask=known)


@triton.jit(do_not_specialize=RUN_TIME)
def weights_kernel(reports_ptr, stride, report_cases_ptr, parts_ptr, slide_cases_ptr, scale_ptr, bias_ptr, grad_ptr, lse_ptr,
                   positives_ptr, weights_ptr, totals_ptr, B, M, padded, pitch, T, TP,
                   S: tl.constexpr, R: tl.constexpr, DT: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """Gradient w_ij of the logits of a tile of slides and one of reports, in parts: weights [PARTS, padded, pitch].

    Added to totals [tiles of reports, tiles of slides, 2]: the sums of w_ij x_i.r_j and of w_ij. Beyond the B slides and
    the M reports of the chunk weights are 0.
    """
    tile = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0) * S + tl.arange(0, S)
    place = tile * R + tl.arange(0, R)
    inside = place < M
    known = s < B
    cosine = cosines(
        reports_ptr, stride, place, inside, parts_ptr, s, padded, T, TP, S, R, DT, PARTS, PRECISION, STAGES
    )  # fmt: skip
    z = tl.load(scale_ptr) * cosine
    cases = tl.load(report_cases_ptr + place, mask=inside, other=0)
    slide_cases = tl.load(slide_cases_ptr + s, mask=known, other=0)
    share = (cases[:, None] == slide_cases[None, :]).to(tl.float32)
    if bias_ptr is None:
        positives = tl.load(positives_ptr + s, mask=known, other=1).to(tl.float32)
        # without a positive this is 0 times infinity, as 0 / 0 is in the formula
        share = share * (1.0 / positives)[None, :]
        pulled = tl.exp(z - tl.load(lse_ptr + s, mask=known, other=0.0)[None, :])
    else:
        pulled = 1.0 / (1.0 + tl.exp(-z - tl.load(bias_ptr)))
    grad = tl.load(grad_ptr + s, mask=known, other=0.0)
    w = tl.where(inside[:, None] & known[None, :], grad[None, :] * (pulled - share), 0.0)
    columns = sixteens(pitch)
    at = s.to(tl.int64)[:, None] * columns + place[None, :]
    store_parts(weights_ptr, at, tl.cast(padded, tl.int64) * columns, tl.trans(w), None, PARTS)
    totals = totals_ptr + (tile * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(totals, tl.load(totals) + tl.sum(tl.sum(w * cosine, 0), 0))
    if bias_ptr is not None:
        tl.store(totals + 1, tl.load(totals + 1) + tl.sum(tl.sum(w, 0), 0))


@triton.jit(do_not_specialize=RUN_TIME)
def sums_kernel(reports_ptr, stride, weights_ptr, out_ptr, M, padded, height, pitch, T, TP,
                S: tl.constexpr, R: tl.constexpr, DT: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
                STAGES: tl.constexpr):  # fmt: skip
    """Added to out [ranges, padded, TP]: sums of weighted reports over one range of the chunk, DT of T numbers."""
    d = tl.program_id(0) * DT + tl.arange(0, DT)
    s = tl.program_id(1) * S + tl.arange(0, S)
    part = tl.program_id(2).to(tl.int64)
    start = part * (height // R * R)
    end = tl.minimum(start + height, M)
    r = tl.arange(0, R)
    step = start * 0 + stride  # int64 before any product
    columns = sixteens(pitch)
    weights = weights_ptr + s.to(tl.int64)[:, None] * columns + (start + r)[None, :]
    plane = tl.cast(padded, tl.int64) * columns
    acc = tl.zeros((DT, S), tl.float32)
    for done in tl.range(0, (end - start).to(tl.int32), R, num_stages=STAGES):
        place = start + done + r
        wanted = (place < end)[:, None] & (d[None, :] < T)
        x = tl.load(reports_ptr + place[:, None] * step + d[None, :], mask=wanted, other=0.0)
        acc = add_product(acc, tl.trans(x), weights + done, plane, PARTS, PRECISION)
    out = out_ptr + (part * padded + s)[:, None] * sixteens(TP) + d[None, :]
    tl.store(out, tl.load(out) + tl.trans(acc))


@triton.jit(do_not_specialize=RUN_TIME)
def finish_kernel(sums_ptr, scale_ptr, out_ptr, out_stride, out_step, B, padded, ranges, T, TP, BLOCK: tl.constexpr,
                  AT_ONCE: tl.constexpr):  # fmt: skip
    """BLOCK numbers of the gradient of slides: the scale times sums [ranges, padded, TP], added in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(padded, tl.int64) * TP
    s = at // TP
    d = at % TP
    wanted = (s < B) & (d < T)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, ranges, AT_ONCE):
        part = (first + tl.arange(0, AT_ONCE)).to(tl.int64)
        there = (part < ranges)[:, None] & wanted[None, :]
        total += tl.sum(tl.load(sums_ptr + part[:, None] * size + at[None, :], mask=there, other=0.0), 0)
    tl.store(out_ptr + s * out_stride + d * out_step, total * tl.load(scale_ptr), mask=wanted)
