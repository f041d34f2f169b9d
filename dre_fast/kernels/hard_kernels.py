"""The device code of hard residual encoding; ``hard_encode`` says what it computes and launches it.

A pointer that is None is absent, and what it would be for is not compiled:
index_ptr: int64 [N], rows of x (outside [0, X): skip); row_scale_ptr: fp32 [X] of 8-bit rows; row_codes_ptr: int16 [X].
N rows are read; x holds X of them.
"""

# Kernel arguments are Triton's own kinds of values, which annotations other than constexpr cannot name.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from dre_fast.kernels.rows import add_squares, halves, operand, scale_of, shifted, split_weight, unit_weight
from dre_fast.kernels.segments import find_segment, is_whole, slot_of

# Run-time values: a new number of rows or bags compiles nothing.
RUN_TIME = ["N", "X", "B", "P", "R"]


@triton.jit
def _mark_outside(codes_ptr, distances_ptr, first, end, ROWS: tl.constexpr):
    """Rows of no bag have code -1, distance 0."""
    r = tl.arange(0, ROWS)
    for done in range(0, (end - first).to(tl.int32), ROWS):
        rows = first + done + r
        tl.store(codes_ptr + rows, tl.full((ROWS,), -1, tl.int64), mask=rows < end)
        if distances_ptr is not None:
            tl.store(distances_ptr + rows, tl.zeros((ROWS,), tl.float32), mask=rows < end)


@triton.jit
def _store_sums(acc, counts, c_ptr, V_ptr, counts_ptr, partial_ptr, partial_counts_ptr, cu_ptr, bag, first, end, part, N, R, k0, d0,
                K: tl.constexpr, D: tl.constexpr, KT: tl.constexpr, DT: tl.constexpr, with_counts: tl.constexpr):  # fmt: skip
    """Turn sums of rows into sums of residuals; a whole bag goes to V, a piece of one to this range's partial."""
    k = k0 + tl.arange(0, KT)
    d = d0 + tl.arange(0, DT)
    inside = (k[:, None] < K) & (d[None, :] < D)
    place = k[:, None].to(tl.int64) * D + d[None, :]
    codewords = tl.load(c_ptr + place, mask=inside, other=0.0)
    residuals = acc - counts.to(tl.float32)[:, None] * codewords
    whole = is_whole(cu_ptr, N, bag, first, end)
    slot = slot_of(part, first, R)
    if whole:
        tl.store(V_ptr + bag * K * D + place, residuals, mask=inside)
    else:
        tl.store(partial_ptr + slot * K * D + place, residuals, mask=inside)
    if with_counts:
        if whole:
            tl.store(counts_ptr + bag * K + k, counts.to(tl.int64), mask=k < K)
        else:
            tl.store(partial_counts_ptr + slot * K + k, counts, mask=k < K)


@triton.jit
def prepare_kernel(c_ptr, parts_ptr, scale_ptr, half_ptr, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr,
                   PARTS: tl.constexpr, DB: tl.constexpr):  # fmt: skip
    """One codeword: its parts in the operands' dtype, the power of two that undoes their scaling, and ||c||^2 / 2.

    parts is [PARTS * KP, DP]; with two parts the rows interleave by eights (8 high, 8 low, ...), which puts the two
    scores of a codeword into one thread of a matrix-unit fragment. Padding: zero rows that never win (half = inf).
    ||c||^2 is that of the codeword the parts add up to, so that scores and distances are those of one point.
    """
    k = tl.program_id(0)
    d = tl.arange(0, DB)
    c = tl.load(c_ptr + k * D + d, mask=d < tl.where(k < K, D, 0), other=0.0)
    # Largest entry to [2^12, 2^13) for fp16: both parts stay normal numbers. Else to [2^-20, 2^-19): products with the
    # largest fp32 and bf16 rows stay finite. log2 may be off by one: harmless.
    TARGET: tl.constexpr = 12.0 if parts_ptr.dtype.element_ty == tl.float16 else -20.0
    largest = tl.max(tl.abs(c))
    exponent = tl.floor(tl.log2(tl.where(largest > 1e-30, largest, 1.0))) - TARGET
    scale = tl.exp2(exponent)
    scaled = c * tl.exp2(-exponent)
    high = scaled.to(parts_ptr.dtype.element_ty)
    kept = high.to(tl.float32)
    if PARTS == 2:
        low = (scaled - kept).to(parts_ptr.dtype.element_ty)
        kept += low.to(tl.float32)
        row = (k // 8) * 16 + k % 8
        tl.store(parts_ptr + row * DP + d, high, mask=d < DP)
        tl.store(parts_ptr + (row + 8) * DP + d, low, mask=d < DP)
    else:
        tl.store(parts_ptr + k * DP + d, high, mask=d < DP)
    kept *= scale
    tl.store(scale_ptr + k, scale)
    tl.store(half_ptr + k, tl.where(k < K, 0.5 * tl.sum(kept * kept), float("inf")))


@triton.jit
def _scores(products, scale, half, weight, PARTS: tl.constexpr, KT: tl.constexpr, ROWS: tl.constexpr):
    """[PARTS * KT, ROWS] products with the prepared codewords -> [KT, ROWS] scores x~.c - ||c||^2 / 2.

    A score that is not a number becomes -inf, so a row of NaN elects codeword 0 and padding is never elected.
    """
    if PARTS == 2:
        products = tl.reshape(tl.sum(tl.reshape(products, (KT // 8, 2, 8, ROWS)), 1), (KT, ROWS))
    scores = products * scale[:, None]
    if weight is not None:
        scores = scores * weight[None, :]
    scores = scores - half[:, None]
    return tl.where(scores == scores, scores, float("-inf"))


@triton.jit
def _distance(square, top):
    """||x~ - c||^2 = ||x~||^2 - 2 (x~.c - ||c||^2 / 2), not below 0; NaN stays."""
    distance = square - 2.0 * top
    return tl.where(distance < 0.0, 0.0, distance)


@triton.jit
def _add_weighted(high, low, x, acc):
    """acc + (high + low / 2^11) x. Not two products in a row into acc: Triton would give the two different layouts."""
    acc = tl.dot(high, x, acc)
    return acc + tl.dot(low, x) * 2.0**-11


@triton.jit(do_not_specialize=RUN_TIME)
def single_kernel(x_ptr, stride, index_ptr, row_scale_ptr, parts_ptr, scale_ptr, half_ptr, c_ptr, cu_ptr, V_ptr, counts_ptr, codes_ptr,
                  distances_ptr, partial_ptr, partial_counts_ptr, N, X, B, P, R, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr,
                  DT: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """Assign and add up in one read of the rows: the codebook stays in shared memory, the sums in registers."""
    bag, first, end, part = find_segment(cu_ptr, N, B, P, R)
    if first >= end:
        return
    if bag == B:
        _mark_outside(codes_ptr, distances_ptr, first, end, ROWS)
        return
    # scales below 16 go into fp16 as large as they can; those of e4m3 rows come times 2^8
    SHIFT: tl.constexpr = 16.0 if x_ptr.dtype.element_ty == tl.uint8 else 4096.0
    DP: tl.constexpr = DT * TILES
    k = tl.arange(0, KP)
    d = tl.arange(0, DT)
    scale = tl.load(scale_ptr + k)
    half = tl.load(half_ptr + k)
    code_rows = parts_ptr + tl.arange(0, PARTS * KP)[:, None] * DP + d[None, :]
    c0 = tl.load(code_rows)
    acc0 = tl.zeros((KP, DT), tl.float32)
    if TILES > 1:
        c1 = tl.load(code_rows + DT)
        acc1 = tl.zeros((KP, DT), tl.float32)
    if TILES > 2:
        c2 = tl.load(code_rows + 2 * DT)
        acc2 = tl.zeros((KP, DT), tl.float32)
    counts = tl.zeros((KP,), tl.int32)

    step = first * 0 + stride  # int64 before any product
    r = tl.arange(0, ROWS)
    rows = x_ptr + (first + r)[:, None] * step + d[None, :]
    left = (end - first).to(tl.int32)
    for done in tl.range(0, left, ROWS, num_stages=STAGES):
        inside = r + done < left
        live = inside
        if index_ptr is not None:
            row = tl.load(index_ptr + first + done + r, mask=inside, other=-1)
            live = (row >= 0) & (row < X)
            rows = x_ptr + row[:, None] * step + d[None, :]
        else:
            row = first + done + r
        # Each tile is used as soon as it is there: its registers are then free for the next.
        weight = None
        x0 = operand(tl.load(rows, mask=live[:, None] & (d[None, :] < D), other=0))
        if UNIT or distances_ptr is not None:
            total, large = add_squares(x0, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32))
        if not UNIT:
            products = tl.dot(c0, tl.trans(x0), input_precision="ieee")
        if TILES > 1:
            x1 = operand(tl.load(rows + DT, mask=live[:, None] & (d[None, :] + DT < D), other=0))
            if UNIT or distances_ptr is not None:
                total, large = add_squares(x1, total, large)
            if not UNIT:
                products = tl.dot(c1, tl.trans(x1), products, input_precision="ieee")
        if TILES > 2:
            x2 = operand(tl.load(rows + 2 * DT, mask=live[:, None] & (d[None, :] + 2 * DT < D), other=0))
            if UNIT or distances_ptr is not None:
                total, large = add_squares(x2, total, large)
            if not UNIT:
                products = tl.dot(c2, tl.trans(x2), products, input_precision="ieee")
        if row_scale_ptr is not None:
            weight = scale_of(row_scale_ptr, row, live, x_ptr)
        if UNIT:
            full, total = unit_weight(total, large, weight)
            power, weight = split_weight(full)
            x0 = shifted(x0, power)
            products = tl.dot(c0, tl.trans(x0))
            if TILES > 1:
                x1 = shifted(x1, power)
                products = tl.dot(c1, tl.trans(x1), products)
            if TILES > 2:
                x2 = shifted(x2, power)
                products = tl.dot(c2, tl.trans(x2), products)
        elif row_scale_ptr is not None and distances_ptr is not None:
            total = total * weight * weight

        scores = _scores(products, scale, half, weight, PARTS, KP, ROWS)
        if distances_ptr is not None:
            top, code = tl.max(scores, 0, return_indices=True)
            distance = tl.where(live, _distance(total, top), 0.0)
            tl.store(distances_ptr + first + done + r, distance, mask=inside)
        else:
            code = tl.argmax(scores, 0, tie_break_left=True)
        if index_ptr is not None:
            tl.store(codes_ptr + first + done + r, tl.where(live, code, -1).to(tl.int64), mask=inside)
        else:
            tl.store(codes_ptr + first + done + r, code.to(tl.int64), mask=live)
        member = tl.where(live, code, KP)[None, :] == k[:, None]
        counts += tl.sum(member.to(tl.int32), 1)
        if weight is not None:
            high, low = halves(weight if UNIT else weight * SHIFT, r)
            high = tl.where(member, high[None, :], 0.0)
            low = tl.where(member, low[None, :], 0.0)
            acc0 = _add_weighted(high, low, x0, acc0)
            if TILES > 1:
                acc1 = _add_weighted(high, low, x1, acc1)
            if TILES > 2:
                acc2 = _add_weighted(high, low, x2, acc2)
        else:
            ones = member.to(x0.dtype)
            acc0 = tl.dot(ones, x0, acc0, input_precision="ieee")
            if TILES > 1:
                acc1 = tl.dot(ones, x1, acc1, input_precision="ieee")
            if TILES > 2:
                acc2 = tl.dot(ones, x2, acc2, input_precision="ieee")
        if index_ptr is None:
            rows += ROWS * step

    FACTOR: tl.constexpr = 1.0 if UNIT or row_scale_ptr is None else 1.0 / SHIFT
    _store_sums(acc0 * FACTOR, counts, c_ptr, V_ptr, counts_ptr, partial_ptr, partial_counts_ptr, cu_ptr, bag, first, end, part, N, R,
                0, 0, K, D, KP, DT, True)  # fmt: skip
    if TILES > 1:
        _store_sums(acc1 * FACTOR, counts, c_ptr, V_ptr, counts_ptr, partial_ptr, partial_counts_ptr, cu_ptr, bag, first, end, part,
                    N, R, 0, DT, K, D, KP, DT, False)  # fmt: skip
    if TILES > 2:
        _store_sums(acc2 * FACTOR, counts, c_ptr, V_ptr, counts_ptr, partial_ptr, partial_counts_ptr, cu_ptr, bag, first, end, part,
                    N, R, 0, 2 * DT, K, D, KP, DT, False)  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def assign_kernel(x_ptr, stride, index_ptr, row_scale_ptr, row_codes_ptr, parts_ptr, scale_ptr, half_ptr, codes_ptr, distances_ptr, weights_ptr,
                  N, X, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr, KT: tl.constexpr, DT: tl.constexpr,
                  ROWS: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """First of two passes: the nearest codeword of ROWS rows, codewords taken KT at a time.

    With UNIT also the rows' weights (``rows.unit_weight``), fp32 [N]. With codes that are known it only finds what
    the second pass or the distances still need.
    """
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DT)
    inside = place < N
    live = inside
    row = place
    if index_ptr is not None:
        row = tl.load(index_ptr + place, mask=inside, other=-1)
        live = (row >= 0) & (row < X)
    if row_codes_ptr is not None:
        known = tl.load(row_codes_ptr + row, mask=live, other=-1).to(tl.int32)
        live = live & (known >= 0) & (known < K)
    rows = x_ptr + row[:, None] * stride + d[None, :]
    m = tl.arange(0, PARTS * KT)
    k = tl.arange(0, KT)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    code = tl.zeros((ROWS,), tl.int32)
    square = tl.zeros((ROWS,), tl.float32)
    weight = None
    if row_scale_ptr is not None:
        weight = scale_of(row_scale_ptr, row, live, x_ptr)
    for k0 in range(0, KP, KT):
        code_rows = parts_ptr + (PARTS * k0 + m)[:, None] * DP + d[None, :]
        products = tl.zeros((PARTS * KT, ROWS), tl.float32)
        if UNIT or distances_ptr is not None:
            total = tl.zeros((ROWS,), tl.float32)
            large = tl.zeros((ROWS,), tl.float32)
        for d0 in tl.range(0, DP, DT, num_stages=STAGES):
            c = tl.load(code_rows + d0)
            x = operand(tl.load(rows + d0, mask=live[:, None] & (d[None, :] + d0 < D), other=0))
            if UNIT or distances_ptr is not None:
                total, large = add_squares(x, total, large)
            products = tl.dot(c, tl.trans(x), products, input_precision="ieee")
        row_factor = weight
        if UNIT:
            full, square = unit_weight(total, large, weight)
            tl.store(weights_ptr + place, full, mask=inside)
            row_factor = full
            products = products * 2.0**-24
        elif distances_ptr is not None:
            square = total
            if weight is not None:
                square = square * weight * weight
        scores = _scores(
            products, tl.load(scale_ptr + k0 + k), tl.load(half_ptr + k0 + k), row_factor, PARTS, KT, ROWS
        )
        if row_codes_ptr is not None:
            best = tl.maximum(
                best, tl.max(tl.where(known[None, :] == (k0 + k)[:, None], scores, float("-inf")), 0)
            )
        else:
            top, winner = tl.max(scores, 0, return_indices=True)
            better = top > best  # strictly: an equal score further on loses to the lower k
            code = tl.where(better, winner + k0, code)
            best = tl.where(better, top, best)
    if row_codes_ptr is not None:
        code = known
    if distances_ptr is not None:
        tl.store(distances_ptr + place, tl.where(live, _distance(square, best), 0.0), mask=inside)
    tl.store(codes_ptr + place, tl.where(live, code, -1).to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def aggregate_kernel(x_ptr, stride, index_ptr, row_scale_ptr, row_codes_ptr, weights_ptr, c_ptr, cu_ptr, V_ptr, counts_ptr, codes_ptr,
                     distances_ptr, partial_ptr, partial_counts_ptr, N, X, B, P, R, K: tl.constexpr, D: tl.constexpr, KT: tl.constexpr,
                     DT: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Sums of the rows of one segment over a tile of KT codewords x DT features.

    The codes are those of the first pass, or row_codes; then codes is written here.
    """
    bag, first, end, part = find_segment(cu_ptr, N, B, P, R)
    if first >= end:
        return
    if bag == B:
        _mark_outside(codes_ptr, distances_ptr, first, end, ROWS)
        return
    # scales below 16 go into fp16 as large as they can; those of e4m3 rows come times 2^8
    SHIFT: tl.constexpr = 16.0 if x_ptr.dtype.element_ty == tl.uint8 else 4096.0
    d0 = tl.program_id(1) * DT
    k0 = tl.program_id(2) * KT
    k = k0 + tl.arange(0, KT)
    d = d0 + tl.arange(0, DT)
    r = tl.arange(0, ROWS)
    step = first * 0 + stride  # int64 before any product
    rows = x_ptr + (first + r)[:, None] * step + d[None, :]
    acc = tl.zeros((KT, DT), tl.float32)
    counts = tl.zeros((KT,), tl.int32)
    left = (end - first).to(tl.int32)
    for done in tl.range(0, left, ROWS, num_stages=STAGES):
        inside = r + done < left
        live = inside
        row = first + done + r
        if index_ptr is not None:
            row = tl.load(index_ptr + first + done + r, mask=inside, other=-1)
            live = (row >= 0) & (row < X)
            rows = x_ptr + row[:, None] * step + d[None, :]
        if row_codes_ptr is not None:
            code = tl.load(row_codes_ptr + row, mask=live, other=-1).to(tl.int32)
            live = live & (code >= 0) & (code < K)
            code = tl.where(live, code, -1)
            if d0 + k0 == 0:
                tl.store(codes_ptr + first + done + r, code.to(tl.int64), mask=inside)
        else:
            code = tl.load(codes_ptr + first + done + r, mask=live, other=-1).to(tl.int32)
        x = operand(tl.load(rows, mask=live[:, None] & (d[None, :] < D), other=0))
        member = code[None, :] == k[:, None]
        counts += tl.sum(member.to(tl.int32), 1)
        if weights_ptr is not None:
            full = tl.load(weights_ptr + first + done + r, mask=live, other=0.0)
            if x_ptr.dtype.element_ty == tl.float32:
                acc = tl.dot(
                    member.to(tl.float32),
                    x * 2.0**-24 * full[:, None],
                    acc,
                    input_precision="ieee",
                )
            else:
                power, weight = split_weight(full)
                x = shifted(x, power)
                high, low = halves(weight, r)
                acc = _add_weighted(
                    tl.where(member, high[None, :], 0.0), tl.where(member, low[None, :], 0.0), x, acc
                )
        elif row_scale_ptr is not None:
            high, low = halves(scale_of(row_scale_ptr, row, live, x_ptr) * SHIFT, r)
            acc = _add_weighted(
                tl.where(member, high[None, :], 0.0), tl.where(member, low[None, :], 0.0), x, acc
            )
        else:
            acc = tl.dot(member.to(x.dtype), x, acc, input_precision="ieee")
        if index_ptr is None:
            rows += ROWS * step
    FACTOR: tl.constexpr = 1.0 / SHIFT if row_scale_ptr is not None and weights_ptr is None else 1.0
    # Every tile over D counts the same members and stores the same numbers.
    _store_sums(acc * FACTOR, counts, c_ptr, V_ptr, counts_ptr, partial_ptr, partial_counts_ptr, cu_ptr, bag, first, end, part, N, R,
                k0, d0, K, D, KT, DT, True)  # fmt: skip
