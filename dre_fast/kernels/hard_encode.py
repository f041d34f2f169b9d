"""Hard residual encoding of ragged bags in Triton: nearest codeword, then the sum of residuals per codeword.

    a_i = argmin_k ||x_i - c_k||^2 (ties: lowest k)        V_k = sum over rows i of the bag with a_i = k of (x_i - c_k)

DRE-SLCL, arXiv 2511.05034, residual encoding (VLAD). The argmin is taken as argmax of x.c_k - ||c_k||^2 / 2, and
V_k as (sum of member rows) - count * c_k, both as matrix products over tiles of rows.

Row ranges. The N rows are cut into P equal ranges; the range ends and the bag ends together cut them into at most
P + B + 1 *segments*, one program each, so a single huge bag and thousands of small ones spread alike. A bag inside one
range is finished by its program; one that spans ranges leaves a partial sum per range (at most two a range), and
``_reduce_kernel`` adds those in order. No atomics: the result is the same bits every time.

Exactness. fp32 rows are scored in fp32. fp16 and bf16 rows go through the matrix units against the codeword
scaled by a power of two and split into two parts of the row's dtype, accumulating in fp32: with bf16 rows the two
parts keep the codeword to 2^-18 of its size, with fp16 rows to 2^-22, below what summing D products in fp32 loses.
So a chosen codeword is nearest up to the rounding of an fp32 score, about (2^-18 + D 2^-24) ||x|| ||c||.

A row that holds NaN gets code 0 and makes its own bag's V NaN in all codewords; other bags are untouched.
"""

# Kernel arguments are Triton's own kinds of values, which annotations other than constexpr cannot name.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from dre_fast.kernels import config
from dre_fast.kernels.case import Case
from dre_fast.kernels.segments import find_segment, is_whole, reduce_kernel, slot_of

# Run-time values: a new number of rows or bags compiles nothing.
_RUN_TIME = ["N", "B", "P", "R"]


@triton.jit
def _mark_outside(codes_ptr, first, end, ROWS: tl.constexpr):
    """Rows of no bag have code -1."""
    r = tl.arange(0, ROWS)
    for done in range(0, (end - first).to(tl.int32), ROWS):
        rows = first + done + r
        tl.store(codes_ptr + rows, tl.full((ROWS,), -1, tl.int64), mask=rows < end)


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
def _prepare_kernel(c_ptr, parts_ptr, scale_ptr, half_ptr, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr,
                    PARTS: tl.constexpr, DB: tl.constexpr):  # fmt: skip
    """One codeword: its parts in the rows' dtype, the power of two that undoes their scaling, and ||c||^2 / 2.

    parts is [PARTS * KP, DP]; with two parts the rows interleave by eights (8 high, 8 low, ...), which puts the two
    scores of a codeword into one thread of a matrix-unit fragment. Padding: zero rows that never win (half = inf).
    """
    k = tl.program_id(0)
    d = tl.arange(0, DB)
    c = tl.load(c_ptr + k * D + d, mask=d < tl.where(k < K, D, 0), other=0.0)
    half = 0.5 * tl.sum(c * c)
    tl.store(half_ptr + k, tl.where(k < K, half, float("inf")))
    if PARTS == 1:
        tl.store(scale_ptr + k, 1.0)
        tl.store(parts_ptr + k * DP + d, c, mask=d < DP)
    else:
        # Largest entry to [2^12, 2^13): both parts stay normal numbers even in fp16. log2 may be off by one: harmless.
        largest = tl.max(tl.abs(c))
        exponent = tl.floor(tl.log2(tl.where(largest > 1e-30, largest, 1.0))) - 12.0
        scale = tl.exp2(exponent)
        scaled = c * tl.exp2(-exponent)
        high = scaled.to(parts_ptr.dtype.element_ty)
        low = (scaled - high.to(tl.float32)).to(parts_ptr.dtype.element_ty)
        row = (k // 8) * 16 + k % 8
        tl.store(scale_ptr + k, scale)
        tl.store(parts_ptr + row * DP + d, high, mask=d < DP)
        tl.store(parts_ptr + (row + 8) * DP + d, low, mask=d < DP)


@triton.jit
def _scores(products, scale, half, PARTS: tl.constexpr, KT: tl.constexpr, ROWS: tl.constexpr):
    """[PARTS * KT, ROWS] products with the prepared codewords -> [KT, ROWS] scores x.c - ||c||^2 / 2.

    A score that is not a number becomes -inf, so a row of NaN elects codeword 0 and padding is never elected.
    """
    if PARTS == 2:
        products = tl.reshape(tl.sum(tl.reshape(products, (KT // 8, 2, 8, ROWS)), 1), (KT, ROWS))
    scores = products * scale[:, None] - half[:, None]
    return tl.where(scores == scores, scores, float("-inf"))


@triton.jit(do_not_specialize=_RUN_TIME)
def _single_kernel(x_ptr, stride, parts_ptr, scale_ptr, half_ptr, c_ptr, cu_ptr, V_ptr, counts_ptr, codes_ptr, partial_ptr, partial_counts_ptr,
                   N, B, P, R, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, DT: tl.constexpr, TILES: tl.constexpr,
                   ROWS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Assign and add up in one read of the rows: the codebook stays in shared memory, the sums in registers."""
    bag, first, end, part = find_segment(cu_ptr, N, B, P, R)
    if first >= end:
        return
    if bag == B:
        _mark_outside(codes_ptr, first, end, ROWS)
        return
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
        live = r + done < left
        x0 = tl.load(rows, mask=live[:, None] & (d[None, :] < D), other=0.0)
        products = tl.dot(c0, tl.trans(x0), input_precision="ieee")
        if TILES > 1:
            x1 = tl.load(rows + DT, mask=live[:, None] & (d[None, :] + DT < D), other=0.0)
            products = tl.dot(c1, tl.trans(x1), products, input_precision="ieee")
        if TILES > 2:
            x2 = tl.load(rows + 2 * DT, mask=live[:, None] & (d[None, :] + 2 * DT < D), other=0.0)
            products = tl.dot(c2, tl.trans(x2), products, input_precision="ieee")
        code = tl.argmax(_scores(products, scale, half, PARTS, KP, ROWS), 0, tie_break_left=True)
        tl.store(codes_ptr + first + done + r, code.to(tl.int64), mask=live)
        member = tl.where(live, code, KP)[None, :] == k[:, None]
        counts += tl.sum(member.to(tl.int32), 1)
        weights = member.to(x0.dtype)
        acc0 = tl.dot(weights, x0, acc0, input_precision="ieee")
        if TILES > 1:
            acc1 = tl.dot(weights, x1, acc1, input_precision="ieee")
        if TILES > 2:
            acc2 = tl.dot(weights, x2, acc2, input_precision="ieee")
        rows += ROWS * step

    _store_sums(
        acc0,
        counts,
        c_ptr,
        V_ptr,
        counts_ptr,
        partial_ptr,
        partial_counts_ptr,
        cu_ptr,
        bag,
        first,
        end,
        part,
        N,
        R,
        0,
        0,
        K,
        D,
        KP,
        DT,
        True,
    )
    if TILES > 1:
        _store_sums(
            acc1,
            counts,
            c_ptr,
            V_ptr,
            counts_ptr,
            partial_ptr,
            partial_counts_ptr,
            cu_ptr,
            bag,
            first,
            end,
            part,
            N,
            R,
            0,
            DT,
            K,
            D,
            KP,
            DT,
            False,
        )
    if TILES > 2:
        _store_sums(
            acc2,
            counts,
            c_ptr,
            V_ptr,
            counts_ptr,
            partial_ptr,
            partial_counts_ptr,
            cu_ptr,
            bag,
            first,
            end,
            part,
            N,
            R,
            0,
            2 * DT,
            K,
            D,
            KP,
            DT,
            False,
        )


@triton.jit(do_not_specialize=_RUN_TIME)
def _assign_kernel(x_ptr, stride, parts_ptr, scale_ptr, half_ptr, codes_ptr, N, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr,
                   DP: tl.constexpr, KT: tl.constexpr, DT: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """First of two passes: the nearest codeword of ROWS rows, codewords taken KT at a time."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    r = tl.arange(0, ROWS)
    d = tl.arange(0, DT)
    live = start + r < N
    rows = x_ptr + (start + r)[:, None] * stride + d[None, :]
    m = tl.arange(0, PARTS * KT)
    k = tl.arange(0, KT)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    code = tl.zeros((ROWS,), tl.int32)
    for k0 in range(0, KP, KT):
        code_rows = parts_ptr + (PARTS * k0 + m)[:, None] * DP + d[None, :]
        products = tl.zeros((PARTS * KT, ROWS), tl.float32)
        for d0 in tl.range(0, DP, DT, num_stages=STAGES):
            c = tl.load(code_rows + d0)
            x = tl.load(rows + d0, mask=live[:, None] & (d[None, :] + d0 < D), other=0.0)
            products = tl.dot(c, tl.trans(x), products, input_precision="ieee")
        scores = _scores(products, tl.load(scale_ptr + k0 + k), tl.load(half_ptr + k0 + k), PARTS, KT, ROWS)
        top, winner = tl.max(scores, 0, return_indices=True)
        better = top > best  # strictly: an equal score further on loses to the lower k
        code = tl.where(better, winner + k0, code)
        best = tl.where(better, top, best)
    tl.store(codes_ptr + start + r, code.to(tl.int64), mask=live)


@triton.jit(do_not_specialize=_RUN_TIME)
def _aggregate_kernel(x_ptr, stride, c_ptr, cu_ptr, V_ptr, counts_ptr, codes_ptr, partial_ptr, partial_counts_ptr, N, B, P, R,
                      K: tl.constexpr, D: tl.constexpr, KT: tl.constexpr, DT: tl.constexpr, ROWS: tl.constexpr,
                      STAGES: tl.constexpr):  # fmt: skip
    """Second of two passes: sums of the rows of one segment over a tile of KT codewords x DT features."""
    bag, first, end, part = find_segment(cu_ptr, N, B, P, R)
    if first >= end:
        return
    if bag == B:
        _mark_outside(codes_ptr, first, end, ROWS)
        return
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
        live = r + done < left
        x = tl.load(rows, mask=live[:, None] & (d[None, :] < D), other=0.0)
        code = tl.load(codes_ptr + first + done + r, mask=live, other=-1).to(tl.int32)
        member = code[None, :] == k[:, None]
        counts += tl.sum(member.to(tl.int32), 1)
        acc = tl.dot(member.to(x.dtype), x, acc, input_precision="ieee")
        rows += ROWS * step
    # Every tile over D counts the same members and stores the same numbers.
    _store_sums(
        acc,
        counts,
        c_ptr,
        V_ptr,
        counts_ptr,
        partial_ptr,
        partial_counts_ptr,
        cu_ptr,
        bag,
        first,
        end,
        part,
        N,
        R,
        k0,
        d0,
        K,
        D,
        KT,
        DT,
        True,
    )


INTERPRETED = not isinstance(_single_kernel, triton.JITFunction)


def hard_encode(
    x: torch.Tensor, codebook: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """V, counts and codes of ragged bags against a codebook; forward only, deterministic, no host synchronisation.

    Args:
        x: [N, D] rows of all bags, fp32, fp16 or bf16; any row stride (a strided last dimension is copied first).
        codebook: [K, D] fp32 (other float dtypes are converted), 1 <= K <= 1024, 1 <= D <= 2048.
        cu_seqlens: int32 or int64 [B + 1], row offsets of the bags: from 0, never falling; rows past the last
            belong to no bag. Its values are not read on the host, so they are not checked; offsets are clamped to
            [0, N].

    Returns:
        V fp32 [B, K, D], sums of residuals; counts int64 [B, K]; codes int64 [N], -1 for rows of no bag.

    Raises:
        ValueError: wrong shape, dtype, device, or a GPU older than compute capability 8.0.

    Source: DRE-SLCL, arXiv 2511.05034, residual encoding; the steps are at the top of this file.
    """
    _check(x, codebook, cu_seqlens)
    rows, dim = x.shape
    bags, codewords = cu_seqlens.shape[0] - 1, codebook.shape[0]
    arch = config.INTERPRETER if INTERPRETED else config.arch_of(torch.cuda.get_device_capability(x.device))
    config.check(x.dtype, codewords, dim)
    V = x.new_empty((bags, codewords, dim), dtype=torch.float32)
    counts = x.new_empty((bags, codewords), dtype=torch.int64)
    codes = x.new_empty((rows,), dtype=torch.int64)
    if rows == 0 or bags == 0:
        return V.zero_(), counts.zero_(), codes.fill_(-1)
    if dim > 1 and x.stride(1) != 1:
        x = x.contiguous()
    if INTERPRETED and x.dtype == torch.bfloat16:  # the interpreter misreads bf16
        x = x.float()
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and dim % 16 == 0
    plan = config.plan(arch, x.dtype, codewords, dim, aligned)
    codebook = codebook.float().contiguous()
    with torch.cuda.device_of(x):
        _launch(x, codebook, cu_seqlens.contiguous(), plan, V, counts, codes)
    return V, counts, codes


def _check(x: torch.Tensor, codebook: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    if x.dim() != 2 or codebook.dim() != 2 or x.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"rows must be [N, D] and codebook [K, D] with the same D; got {list(x.shape)} and {list(codebook.shape)}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 [B + 1], not {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if not x.device == codebook.device == cu_seqlens.device:
        raise ValueError(
            f"rows, codebook and cu_seqlens must share a device; got {x.device}, {codebook.device}, {cu_seqlens.device}"
        )
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"the Triton kernels need a CUDA device, not {x.device} (TRITON_INTERPRET=1 interprets them)"
        )


def _launch(
    x: torch.Tensor,
    codebook: torch.Tensor,
    cu_seqlens: torch.Tensor,
    plan: config.Plan,
    V: torch.Tensor,
    counts: torch.Tensor,
    codes: torch.Tensor,
) -> None:
    """Prepare the codebook, one or two passes over the rows, then the ordered sum of partials."""
    bags, K, D = V.shape
    N = x.shape[0]
    parts = x.new_empty((plan.parts * plan.codewords, plan.dim))
    scale, half = (x.new_empty(plan.codewords, dtype=torch.float32) for _ in range(2))
    _prepare_kernel[(plan.codewords,)](
        codebook,
        parts,
        scale,
        half,
        K,
        D,
        plan.codewords,
        plan.dim,
        plan.parts,
        triton.next_power_of_2(plan.dim),
    )

    add_up = plan.single or plan.aggregate
    assert add_up is not None
    tiles = 1 if plan.single else (plan.dim // add_up.dim) * (plan.codewords // add_up.codewords)
    ranges = min(triton.cdiv(plan.programs, tiles), triton.cdiv(N, add_up.rows))
    height = triton.cdiv(triton.cdiv(N, ranges), add_up.rows) * add_up.rows
    partial = x.new_empty((ranges, 2, K, D) if ranges > 1 else (0,), dtype=torch.float32)
    partial_counts = x.new_empty((ranges, 2, K) if ranges > 1 else (0,), dtype=torch.int32)
    shape = (N, bags, ranges, height)

    if plan.single is not None:
        one = plan.single
        _single_kernel[(ranges + bags + 1,)](
            x, x.stride(0), parts, scale, half, codebook, cu_seqlens, V, counts, codes, partial, partial_counts,
            *shape, K, D, plan.codewords, one.dim, plan.dim // one.dim, one.rows, plan.parts, one.stages,
            num_warps=one.warps,
        )  # fmt: skip
    else:
        assert plan.assign is not None
        first, second = plan.assign, add_up
        _assign_kernel[(triton.cdiv(N, first.rows),)](
            x, x.stride(0), parts, scale, half, codes, N, K, D, plan.codewords, plan.dim,
            first.codewords, first.dim, first.rows, plan.parts, first.stages, num_warps=first.warps,
        )  # fmt: skip
        grid = (ranges + bags + 1, plan.dim // second.dim, plan.codewords // second.codewords)
        _aggregate_kernel[grid](
            x, x.stride(0), codebook, cu_seqlens, V, counts, codes, partial, partial_counts,
            *shape, K, D, second.codewords, second.dim, second.rows, second.stages, num_warps=second.warps,
        )  # fmt: skip
    block = 256
    reduce_kernel[(bags, triton.cdiv(K * D, block))](
        cu_seqlens, V, counts, partial, partial_counts, N, height, K, D, block, 16, num_warps=4
    )


# Every tile shape a plan can hold: one per kind of plan and dtype, sizes that fill the tiles and odd ones.
_SHAPES = (
    (torch.bfloat16, 64, 384),
    (torch.bfloat16, 64, 1024),
    (torch.bfloat16, 16, 64),
    (torch.bfloat16, 64, 128),
    (torch.bfloat16, 64, 192),
    (torch.bfloat16, 64, 256),
    (torch.bfloat16, 128, 64),
    (torch.bfloat16, 128, 128),
    (torch.bfloat16, 128, 192),
    (torch.bfloat16, 7, 33),
    (torch.bfloat16, 60, 127),
    (torch.bfloat16, 100, 150),
    (torch.bfloat16, 256, 64),
    (torch.bfloat16, 1024, 2048),
    (torch.bfloat16, 1000, 2047),
    (torch.float16, 64, 384),
    (torch.float16, 64, 1024),
    (torch.float32, 64, 384),
    (torch.float32, 5, 17),
    (torch.float32, 1024, 2048),
)
# The codebook preparation and the sum of partials hardly depend on the shape: these three show them.
_HELPER_SHAPES = {(64, 384), (7, 33), (1024, 2048)}
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def cases(arch: config.Arch) -> Iterator[Case]:
    """Every kernel of every plan on ``arch``, as the launcher launches them."""
    for dtype, codewords, dim in _SHAPES:
        plan = config.plan(arch, dtype, codewords, dim, dim % 16 == 0)
        for kernel, warps, constants in _launches(plan, codewords, dim):
            label = kernel.__name__.strip("_").removesuffix("_kernel")
            helper = label in ("prepare", "reduce")
            if helper and (dtype == torch.float16 or (codewords, dim) not in _HELPER_SHAPES):
                continue
            matrix = dtype != torch.float32 and not helper
            whole = matrix and dim % 16 == 0
            yield Case(
                arch.capability,
                kernel,
                label,
                _TYPES[dtype],
                codewords,
                dim,
                _types(kernel, _TYPES[dtype], constants),
                tuple(constants.items()),
                warps,
                arch.shared,
                "-" if helper else str(plan.passes_over_rows),
                matrix,
                wide=whole,
                asynchronous=whole and label != "single",
            )


def _launches(plan: config.Plan, K: int, D: int) -> Iterator[tuple[Any, int, dict[str, int]]]:
    """(kernel, warps, constexpr arguments) of each launch of ``plan``."""
    size = {"K": K, "D": D}
    padded = {**size, "KP": plan.codewords, "DP": plan.dim, "PARTS": plan.parts}
    yield _prepare_kernel, 4, {**padded, "DB": 1 << (plan.dim - 1).bit_length()}
    if plan.single is not None:
        one = plan.single
        tiles = {"KP": plan.codewords, "DT": one.dim, "TILES": plan.dim // one.dim, "ROWS": one.rows}
        yield _single_kernel, one.warps, {**size, **tiles, "PARTS": plan.parts, "STAGES": one.stages}
    if plan.assign is not None:
        first = plan.assign
        tiles = {"KT": first.codewords, "DT": first.dim, "ROWS": first.rows, "STAGES": first.stages}
        yield _assign_kernel, first.warps, {**padded, **tiles}
    if plan.aggregate is not None:
        second = plan.aggregate
        tiles = {"KT": second.codewords, "DT": second.dim, "ROWS": second.rows, "STAGES": second.stages}
        yield _aggregate_kernel, second.warps, {**size, **tiles}
    yield reduce_kernel, 4, {**size, "BLOCK": 256, "AT_ONCE": 16}


def _types(kernel: Any, dtype: str, constants: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    pointers = {"x_ptr": dtype, "parts_ptr": dtype, "cu_ptr": "i64", "counts_ptr": "i64", "codes_ptr": "i64"}
    pointers["partial_counts_ptr"] = "i32"
    names = [name for name in kernel.arg_names if name not in constants]
    return tuple((n, "*" + pointers.get(n, "fp32") if n.endswith("_ptr") else "i32") for n in names)
