"""Device code of soft residual encoding, forward; ``soft_encode`` says what it computes and launches it.

Scratch is [codewords, pitch] with one column a row of the chunk, so that a tile of codewords x rows is read and written
in runs. Tiles of rows start at multiples of their height, whatever the bags: only then do runs start where 16 bytes may
be loaded at a time. What lies in a tile but not in the bag is dropped after it was loaded.

A pointer that is None is absent, and what it would be for is not compiled. N rows are read, x holds X of them:
index_ptr: int64 [N], rows of x (outside [0, X): skip); row_scale_ptr: fp32 [X] of 8-bit rows.
"""

# Kernel arguments are Triton's own kinds of values, which annotations other than constexpr cannot name.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from dre_fast.kernels.rows import add_squares, operand, scale_of, shifted, split_weight, unit_weight
from dre_fast.kernels.segments import find_segment, is_whole, slot_of

# Run-time values: a new number of rows or bags compiles nothing.
RUN_TIME = ["N", "X", "B", "P", "R", "pitch"]
FP16_LOW = tl.constexpr(2048.0)


@triton.jit
def parts_kernel(p_ptr, c_ptr, add_ptr, parts_ptr, narrow_ptr, scale_ptr, extra_ptr, K: tl.constexpr, D: tl.constexpr,
                 KP: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, SQUARES: tl.constexpr, KB: tl.constexpr,
                 DB: tl.constexpr):  # fmt: skip
    """Rows p of [B, K, D] as operands of products: parts [B, PARTS * KP, DP], the power of two that undoes their scaling.

    Two parts interleave by eights (8 high, 8 low, ...), which puts both products of a codeword into one thread of a
    matrix-unit fragment. narrow [B, KP, DP] is one fp16 part of the same. extra [B, KP] is what goes with a product:
    ||p||^2 (SQUARES), or the value of ``add`` less p.c, of the p that the parts add up to. Padding is zero.
    One program prepares KB codewords.
    """
    bag = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * KB + tl.arange(0, KB)
    d = tl.arange(0, DB)
    at = k[:, None] * D + d[None, :]
    inside = (k < K)[:, None] & (d < D)[None, :]
    stored = (d < DP)[None, :]
    p = tl.load(p_ptr + bag * (K * D) + at, mask=inside, other=0.0).to(tl.float32)
    # Largest entry to [2^12, 2^13) for fp16: both parts stay normal numbers. Else to [2^-20, 2^-19): products with the
    # largest fp32 and bf16 rows stay finite. log2 may be off by one: harmless.
    TARGET: tl.constexpr = 12.0 if parts_ptr.dtype.element_ty == tl.float16 else -20.0
    largest = tl.max(tl.abs(p), 1)
    exponent = tl.floor(tl.log2(tl.where(largest > 1e-30, largest, 1.0))) - TARGET
    scale = tl.exp2(exponent)
    scaled = p * tl.exp2(-exponent)[:, None]
    high = scaled.to(parts_ptr.dtype.element_ty)
    kept = high.to(tl.float32)
    parts = parts_ptr + bag * (PARTS * KP * DP) + d[None, :]
    if PARTS == 2:
        low = (scaled - kept).to(parts_ptr.dtype.element_ty)
        kept += low.to(tl.float32)
        row = (k // 8) * 16 + k % 8
        tl.store(parts + row[:, None] * DP, high, mask=stored)
        tl.store(parts + (row + 8)[:, None] * DP, low, mask=stored)
    else:
        tl.store(parts + k[:, None] * DP, high, mask=stored)
    if narrow_ptr is not None:
        short = (scaled * tl.exp2(12.0 - TARGET)).to(tl.float16)
        tl.store(narrow_ptr + bag * (KP * DP) + k[:, None] * DP + d[None, :], short, mask=stored)
    kept *= scale[:, None]
    if SQUARES:
        extra = tl.sum(kept * kept, 1)
    else:
        extra = tl.zeros((KB,), tl.float32)
        if add_ptr is not None:
            extra += tl.load(add_ptr + bag * K + k, mask=k < K, other=0.0)
        if c_ptr is not None:
            extra -= tl.sum(kept * tl.load(c_ptr + at, mask=inside, other=0.0), 1)
    tl.store(scale_ptr + bag * KP + k, scale)
    tl.store(extra_ptr + bag * KP + k, extra)


@triton.jit
def sixteens(pitch):
    """The pitch, in a form from which the compiler sees that it is a multiple of 16: it then loads 16 bytes at a time."""
    return pitch // 16 * 16


@triton.jit
def scratch_at(k, place, pitch):
    """Where scratch of codewords k and rows ``place`` lies, [len(k), len(place)]: in 32 bits, a chunk's is that small."""
    return k[:, None] * sixteens(pitch) + place.to(tl.int32)[None, :]


@triton.jit
def store_columns(ptr, values, rows_known, inside, whole):
    """Store the columns of a tile of scratch that are ``inside``; the rest may be stored too where the tile is ``whole``.

    A mask that may change from column to column has every number stored by itself: it is for tiles of several bags.
    """
    if whole:
        tl.store(ptr, values, mask=rows_known[:, None])
    else:
        tl.store(ptr, values, mask=rows_known[:, None] & inside[None, :])


@triton.jit
def row_of(index_ptr, place, inside, X):
    """Row of x at each place, and whether it takes part."""
    if index_ptr is None:
        return place, inside
    else:
        row = tl.load(index_ptr + place, mask=inside, other=-1)
        return row, (row >= 0) & (row < X)


@triton.jit
def fp16_factor(x_ptr, UNIT: tl.constexpr):
    """What coefficients are multiplied by as fp16, so that they are as large as they can: times scales below 16, those
    of e4m3 rows being 2^8 as large, they stay below 2^16."""
    SMALL: tl.constexpr = x_ptr.dtype.element_ty == tl.uint8 and not UNIT
    return 16.0 if SMALL else 4096.0


@triton.jit
def is_all_of_tile(first, end, part, N, ROWS: tl.constexpr):
    """Whether the rows [first, end) of one bag are all there are in tile ``part``."""
    return (first <= part * ROWS) & ((end >= part * ROWS + ROWS) | (end == N))


@triton.jit
def add_parts(products, PARTS: tl.constexpr, KT: tl.constexpr, ROWS: tl.constexpr):
    """[PARTS * KT, ROWS] products with interleaved parts -> [KT, ROWS]."""
    if PARTS == 2:
        products = tl.reshape(tl.sum(tl.reshape(products, (KT // 8, 2, 8, ROWS)), 1), (KT, ROWS))
    return products


@triton.jit
def operand_and_weight(x, full, scale, UNIT: tl.constexpr):
    """Operand and weight [R] of rows in sums, coefficients being a * weight: x~ = weight * operand / factor of ``weighting``.

    8-bit and fp16 rows to be normalised take the power of two of their weight into the operand, for its range; bf16 and
    fp32 coefficients have room for all of it. A row of scale 0 has a weight of 1: its operand must be 0.
    """
    weight = None
    if UNIT:
        if x.dtype == tl.float16:
            power, weight = split_weight(full)
            x = shifted(x, power)
        else:
            weight = full * 2.0**-24
    elif scale is not None:
        weight = tl.where(scale == 0.0, 1.0, scale)
    return x, weight


@triton.jit(do_not_specialize=RUN_TIME)
def products_kernel(x_ptr, stride, index_ptr, row_scale_ptr, parts_ptr, scale_ptr, extra_ptr, grad_parts_ptr, grad_scale_ptr, cu_ptr,
                    z_ptr, e_ptr, weights_ptr, squares_ptr, N, X, B, P, R, pitch, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr,
                    DP: tl.constexpr, KT: tl.constexpr, DT: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
                    UNIT: tl.constexpr, DISTANCE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Products of a tile of rows with KT codewords (and with the gradient of their bag), over all of D.

    z [KP, pitch]: ||x~ - c_k||^2 (DISTANCE) or w_k.x~ + b_k. e [KP, pitch]: g_k.x~. Of the rows also their weight
    (``rows.unit_weight``; UNIT) and ||x~||^2, [pitch] each, where they are asked for.
    """
    r = tl.arange(0, ROWS)
    if grad_parts_ptr is not None:
        bag, first, end, part = find_segment(cu_ptr, N, B, P, R)  # R = ROWS: a tile of one bag
        if (first >= end) | (bag == B):
            return
        place = part * ROWS + r
        inside = (place >= first) & (place < end)
        whole = is_all_of_tile(first, end, part, N, ROWS)
    else:
        place = tl.program_id(0).to(tl.int64) * ROWS + r
        inside = place < N
        whole = True
    row, live = row_of(index_ptr, place, inside, X)
    d = tl.arange(0, DT)
    m = tl.arange(0, PARTS * KT)
    k0 = tl.program_id(1) * KT
    rows = x_ptr + row[:, None] * stride + d[None, :]
    places = (PARTS * k0 + m)[:, None] * DP + d[None, :]
    total = tl.zeros((ROWS,), tl.float32)
    large = tl.zeros((ROWS,), tl.float32)
    products = tl.zeros((PARTS * KT, ROWS), tl.float32)
    if grad_parts_ptr is not None:
        grads = grad_parts_ptr + bag * (PARTS * KP * DP)
        grad_products = tl.zeros((PARTS * KT, ROWS), tl.float32)
    for d0 in tl.range(0, DP, DT, num_stages=STAGES):
        c = tl.load(parts_ptr + places + d0)
        x = operand(tl.load(rows + d0, mask=live[:, None] & (d[None, :] + d0 < D), other=0))
        if UNIT or DISTANCE:
            total, large = add_squares(x, total, large)
        products = tl.dot(c, tl.trans(x), products, input_precision="ieee")
        if grad_parts_ptr is not None:
            g = tl.load(grads + places + d0)
            grad_products = tl.dot(g, tl.trans(x), grad_products, input_precision="ieee")

    factor = None
    square = total
    if row_scale_ptr is not None:
        factor = scale_of(row_scale_ptr, row, live, x_ptr)
        square = total * factor * factor
    if UNIT:
        full, square = unit_weight(total, large, factor)
        factor = full * 2.0**-24
        if weights_ptr is not None:  # noqa: SIM102 - a run-time condition may not reach an absent pointer
            if k0 == 0:
                tl.store(weights_ptr + place, full, mask=inside)
    if squares_ptr is not None:  # noqa: SIM102
        if k0 == 0:
            tl.store(squares_ptr + place, square, mask=inside)

    k = k0 + tl.arange(0, KT)
    to = scratch_at(k, place, pitch)
    z = add_parts(products, PARTS, KT, ROWS) * tl.load(scale_ptr + k)[:, None]
    if factor is not None:
        z = z * factor[None, :]
    extra = tl.load(extra_ptr + k)[:, None]
    if DISTANCE:
        z = (square[None, :] - 2.0 * z) + extra
    else:
        z = z + extra
    store_columns(z_ptr + to, z, k < K, inside, whole)
    if grad_parts_ptr is not None:
        e = add_parts(grad_products, PARTS, KT, ROWS) * tl.load(grad_scale_ptr + bag * KP + k)[:, None]
        if factor is not None:
            e = e * factor[None, :]
        store_columns(e_ptr + to, e, k < K, inside, whole)


@triton.jit
def softmax_of(z, slope_ptr, k, K: tl.constexpr):
    """Assignments [KP, R] from ``products_kernel``'s z: softmax over k of -s_k z, or of z without slopes. 0 in padding."""
    if slope_ptr is not None:
        z = -tl.load(slope_ptr + k, mask=k < K, other=0.0)[:, None] * z
    z = tl.where((k < K)[:, None], z, float("-inf"))
    e = tl.exp(z - tl.max(z, 0)[None, :])
    e = tl.where((k < K)[:, None], e, 0.0)
    return e / tl.sum(e, 0)[None, :]


@triton.jit(do_not_specialize=RUN_TIME)
def assign_kernel(x_ptr, index_ptr, row_scale_ptr, z_ptr, slope_ptr, weights_ptr, a_ptr, N, X, pitch, K: tl.constexpr,
                  KP: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Softmax of a tile of rows over all codewords, times the rows' weights, to a [KP, pitch] or, in two parts, [2, KP, pitch]."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = place < N
    row, live = row_of(index_ptr, place, inside, X)
    k = tl.arange(0, KP)
    at = scratch_at(k, place, pitch)
    # columns past the last row are there, and nobody reads what is stored in them
    a = softmax_of(tl.load(z_ptr + at, mask=(k < K)[:, None], other=0.0), slope_ptr, k, K)
    weight = None
    if UNIT:
        full = tl.load(weights_ptr + place, mask=inside, other=1.0)
        if a_ptr.dtype.element_ty == tl.float16:
            _, weight = split_weight(full)
        else:
            weight = full * 2.0**-24
    elif row_scale_ptr is not None:
        weight = scale_of(row_scale_ptr, row, live, x_ptr)
        weight = tl.where(weight == 0.0, 1.0, weight)
    if weight is not None:
        a = a * weight[None, :]
    if a_ptr.dtype.element_ty == tl.float16:
        a = a * fp16_factor(x_ptr, UNIT)
    a = tl.where(live[None, :], a, 0.0)
    high = a.to(a_ptr.dtype.element_ty)
    tl.store(a_ptr + at, high)
    if a_ptr.dtype.element_ty != tl.float32:
        low = a - high.to(tl.float32)
        if a_ptr.dtype.element_ty == tl.float16:
            # No smaller a number than high. Half a unit of it can be left over: odd places round that up and even ones
            # down, so that the errors of many equal weights do not add up.
            factor = tl.where((place & 1) == 1, FP16_LOW * (1.0 + 2.0**-14), FP16_LOW * (1.0 - 2.0**-14))
            low = low * factor[None, :]
        tl.store(a_ptr + KP * sixteens(pitch) + at, low.to(a_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=RUN_TIME)
def sums_kernel(x_ptr, stride, index_ptr, row_scale_ptr, a_ptr, weights_ptr, c_ptr, cu_ptr, V_ptr, mass_ptr, partial_ptr,
                partial_mass_ptr, N, X, B, P, R, pitch, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, KT: tl.constexpr,
                DT: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Adds sum_i a_ik (x~_i - c_k) of one segment, KT codewords x DT features, to V and sum_i a_ik to mass.

    The mass is that of the coefficients as they were rounded: what rounding does to a_ik then weighs x~_i - c_k, not x~_i.
    """
    LOW: tl.constexpr = 1.0 / FP16_LOW if a_ptr.dtype.element_ty == tl.float16 else 1.0
    bag, first, end, part = find_segment(cu_ptr, N, B, P, R)
    if (first >= end) | (bag == B):
        return
    d0 = tl.program_id(1) * DT
    k0 = tl.program_id(2) * KT
    k = k0 + tl.arange(0, KT)
    d = d0 + tl.arange(0, DT)
    r = tl.arange(0, ROWS)
    base = first // ROWS * ROWS
    step = first * 0 + stride  # int64 before any product
    coefficients = a_ptr + scratch_at(k, base + r, pitch)
    lower = KP * sixteens(pitch)
    acc = tl.zeros((KT, DT), tl.float32)
    mass = tl.zeros((KT,), tl.float32)
    for done in tl.range(0, (end - base).to(tl.int32), ROWS, num_stages=STAGES):
        place = base + done + r
        inside = (place >= first) & (place < end)
        row, live = row_of(index_ptr, place, inside, X)
        a = tl.where(live[None, :], tl.load(coefficients + done), 0.0)
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
        weighed = a.to(tl.float32)
        acc = tl.dot(a, x, acc, input_precision="ieee")
        if a_ptr.dtype.element_ty != tl.float32:
            low = tl.where(live[None, :], tl.load(coefficients + lower + done), 0.0)
            weighed += low.to(tl.float32) * LOW
            # not two products in a row into acc: Triton would give the two different layouts
            acc = acc + tl.dot(low, x) * LOW
        if weight is not None:
            weighed = weighed / weight[None, :]
        mass += tl.sum(weighed, 1)
    if a_ptr.dtype.element_ty == tl.float16:
        acc = acc * (1.0 / fp16_factor(x_ptr, UNIT))
        mass = mass * (1.0 / fp16_factor(x_ptr, UNIT))
    inside = (k[:, None] < K) & (d[None, :] < D)
    at = k[:, None].to(tl.int64) * D + d[None, :]
    residuals = acc - mass[:, None] * tl.load(c_ptr + at, mask=inside, other=0.0)
    if is_whole(cu_ptr, N, bag, first, end):
        V = V_ptr + bag * K * D + at
        tl.store(V, tl.load(V, mask=inside, other=0.0) + residuals, mask=inside)
        if d0 == 0:
            masses = mass_ptr + bag * K + k
            tl.store(masses, tl.load(masses, mask=k < K, other=0.0) + mass, mask=k < K)
    else:
        slot = slot_of(part, first, R)
        tl.store(partial_ptr + slot * K * D + at, residuals, mask=inside)
        if d0 == 0:
            tl.store(partial_mass_ptr + slot * K + k, mass, mask=k < K)


@triton.jit(do_not_specialize=RUN_TIME)
def gather_kernel(cu_ptr, V_ptr, mass_ptr, partial_ptr, partial_mass_ptr, N, R, K: tl.constexpr, D: tl.constexpr,
                  BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """Adds the partials of one bag that spans row ranges, in their order, to V and mass. Partials: [P, 2, K, D] and [P, 2, K]."""
    bag = tl.program_id(0).to(tl.int64)
    start = tl.maximum(tl.load(cu_ptr + bag).to(tl.int64), 0)
    end = tl.minimum(tl.load(cu_ptr + bag + 1).to(tl.int64), N)
    low = start // R
    high = (end - 1) // R
    if (end <= start) | (high == low):
        return
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < K * D
    total = tl.zeros((BLOCK,), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for p in range(low, high + 1, AT_ONCE):
        part = p + tl.arange(0, AT_ONCE)
        slot = part * 2 + ((part == low) & (start > low * R)).to(tl.int64)
        mask = (part <= high)[:, None] & inside[None, :]
        total += tl.sum(tl.load(partial_ptr + slot[:, None] * (K * D) + e[None, :], mask=mask, other=0.0), 0)
        mask = mask & (e % D == 0)[None, :]
        found = tl.load(partial_mass_ptr + slot[:, None] * K + e[None, :] // D, mask=mask, other=0.0)
        mass += tl.sum(found, 0)
    V = V_ptr + bag * K * D + e
    tl.store(V, tl.load(V, mask=inside, other=0.0) + total, mask=inside)
    first = inside & (e % D == 0)
    masses = mass_ptr + bag * K + e // D
    tl.store(masses, tl.load(masses, mask=first, other=0.0) + mass, mask=first)
