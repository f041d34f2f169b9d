"""Device functions that spread ragged bags evenly over programs, and the ordered sum that puts bags together again.

The M rows are cut into P equal ranges of R rows; the range ends and the bag ends together cut them into at most
P + B + 1 *segments*, one program each, so a single huge bag and thousands of small ones spread alike. A bag inside one
range is finished by its program; one that spans ranges leaves a partial sum per range (at most two a range: one that
came in over the range's start, one that goes out over its end), and ``reduce_kernel`` adds those in order. No atomics:
the result is the same bits every time.
"""

# Kernel arguments are Triton's own kinds of values, which annotations other than constexpr cannot name.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_segment(cu_ptr, N, B, P, R):
    """Segment of this program: (bag, first row, end row, row range). Empty ones have first >= end.

    Range starts {p * R} and bag starts {cu[b]} are merged in order, range starts first among equals; segment i begins
    at the i-th of them. Of the first i + 1, ``bag + 1`` are bag starts: found by bisection, one load a step. The rows
    from cu[B] on, which belong to no bag, are bag number B.
    """
    i = tl.program_id(0).to(tl.int64)
    low = tl.maximum(i + 1 - P, 0)
    high = tl.minimum(i + 1, B + 1)
    while low < high:
        middle = (low + high) // 2
        if (i - middle) * R <= tl.load(cu_ptr + middle).to(tl.int64):
            high = middle
        else:
            low = middle + 1
    bag = low - 1
    part = i - low
    safe = tl.maximum(bag, 0)
    first = tl.maximum(part * R, tl.load(cu_ptr + safe).to(tl.int64))
    end = (part + 1) * R
    if safe < B:
        end = tl.minimum(end, tl.load(cu_ptr + safe + 1).to(tl.int64))
    first = tl.maximum(first, 0)
    end = tl.where((bag >= 0) & (part >= 0), tl.minimum(end, N), 0)
    return safe, first, end, part


@triton.jit
def is_whole(cu_ptr, N, bag, first, end):
    """Whether the segment [first, end) is all of its bag; a piece of one goes to slot ``slot_of`` of the partials.

    Offsets are clamped as ``first`` and ``end`` are: a bag taken for a piece would be stored where there is no partial.
    """
    bag_first = tl.maximum(tl.load(cu_ptr + bag).to(tl.int64), 0)
    bag_end = tl.minimum(tl.load(cu_ptr + bag + 1).to(tl.int64), N)
    return (first == bag_first) & (end == bag_end)


@triton.jit
def slot_of(part, first, R):
    """Which of the partials, two a range, a piece of a bag is: the even one came in over the start of the range."""
    return part * 2 + (first > part * R).to(tl.int64)


@triton.jit(do_not_specialize=["N", "R"])
def reduce_kernel(cu_ptr, V_ptr, counts_ptr, partial_ptr, partial_counts_ptr, N, R, K: tl.constexpr, D: tl.constexpr,
                  BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """One bag: zeros if it is empty, the ordered sum of its partials if it spans row ranges, else nothing to do.

    Partials are [P, 2, K, D] and [P, 2, K]; the second dtype may be narrower than that of counts [B, K].
    """
    bag = tl.program_id(0).to(tl.int64)
    start = tl.maximum(tl.load(cu_ptr + bag).to(tl.int64), 0)
    end = tl.minimum(tl.load(cu_ptr + bag + 1).to(tl.int64), N)
    low = start // R
    high = tl.where(end > start, (end - 1) // R, low - 1)
    if high == low:
        return
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < K * D
    total = tl.zeros((BLOCK,), tl.float32)
    members = tl.zeros((BLOCK,), counts_ptr.dtype.element_ty)
    for p in range(low, high + 1, AT_ONCE):
        part = p + tl.arange(0, AT_ONCE)
        slot = part * 2 + ((part == low) & (start > low * R)).to(tl.int64)
        mask = (part <= high)[:, None] & inside[None, :]
        total += tl.sum(tl.load(partial_ptr + slot[:, None] * (K * D) + e[None, :], mask=mask, other=0.0), 0)
        counts = tl.load(partial_counts_ptr + slot[:, None] * K + e[None, :] // D, mask=mask, other=0)
        members += tl.sum(counts.to(counts_ptr.dtype.element_ty), 0)
    tl.store(V_ptr + bag * K * D + e, total, mask=inside)
    tl.store(counts_ptr + bag * K + e // D, members, mask=inside & (e % D == 0))
