"""Hard residual encoding of ragged bags in Triton: nearest codeword, then the sum of residuals per codeword.

    a_i = argmin_k ||x~_i - c_k||^2 (ties: lowest k)        V_k = sum over rows i of the bag with a_i = k of (x~_i - c_k)

DRE-SLCL, arXiv 2511.05034, residual encoding (VLAD). The argmin is taken as argmax of x~.c_k - ||c_k||^2 / 2, and
V_k as (sum of member rows) - count * c_k, both as matrix products over tiles of rows. Bags are spread over programs by
``segments``; stored, chosen and normalised rows become operands in ``rows``; the kernels are in ``hard_kernels``.

Exactness. fp32 rows are scored in fp32. The others go through the matrix units as they are (8-bit rows as fp16, which
holds them) against the codeword scaled by a power of two and split into two parts of the operand's dtype, accumulating
in fp32: two bf16 parts keep the codeword to 2^-18 of its size, two fp16 parts to 2^-22, below what summing D products
in fp32 loses. So a chosen codeword is nearest up to the rounding of an fp32 score, about (2^-18 + D 2^-24) ||x~|| ||c||;
a distance, ||x~||^2 - 2 score, errs by twice that. Weights of rows (scales, 1 / norm) enter sums as two fp16 parts, to
2^-23 of the weight; a scale is shifted by 2^12 for that, so scales must be below 16, and what is lost of a small one
is below 2^-37.

A row that holds NaN gets code 0 and makes its own bag's V NaN in all codewords; other bags are untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton

from dre_fast.kernels import config
from dre_fast.kernels.case import Case
from dre_fast.kernels.hard_kernels import aggregate_kernel, assign_kernel, prepare_kernel, single_kernel
from dre_fast.kernels.inputs import check_inputs, check_per_row
from dre_fast.kernels.segments import reduce_kernel

INTERPRETED = not isinstance(single_kernel, triton.JITFunction)
_REDUCE = {"BLOCK": 256, "AT_ONCE": 16}


def hard_encode(
    x: torch.Tensor,
    codebook: torch.Tensor,
    cu_seqlens: torch.Tensor,
    index: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    row_codes: torch.Tensor | None = None,
    unit: bool = False,
    distances: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """V, counts, codes and distances of ragged bags against a codebook; forward only, deterministic, no host synchronisation.

    M rows are read: row i is row r = index[i] of x (r = i without an index), times row_scale[r] if there is one, and
    divided by max(its L2 norm, 1e-12) if ``unit``.

    Args:
        x: [R, P] rows, P >= D: fp32, fp16 or bf16; int8 or float8_e4m3fn with ``row_scale``. Any row stride (a strided
            last dimension is copied first). Columns from D on are not read.
        codebook: [K, D] fp32 (other float dtypes are converted), 1 <= K <= 1024, 1 <= D <= 2048.
        cu_seqlens: int32 or int64 [B + 1], offsets of the bags over the M rows: from 0, never falling; rows past the last
            belong to no bag. Its values are not read on the host, so they are not checked; offsets are clamped to
            [0, M].
        index: int64 [M], rows of x to read; -1 (and all else outside [0, R), which is not followed) skips.
        row_scale: fp32 [R], from 0 to below 16.
        row_codes: int16 [R], codewords of the stored rows; -1 (and all else outside [0, K)) skips the row. No
            assignment is computed then.
        unit: normalise the rows.
        distances: return ||x~_i - c||^2 to the chosen codeword.

    Returns:
        V fp32 [B, K, D], sums of residuals; counts int64 [B, K]; codes int64 [M], -1 for skipped rows and rows of no bag;
        distances fp32 [M], not negative, 0 where the code is -1; [0] unless asked for.

    Raises:
        ValueError: wrong shape, dtype, device, or a GPU older than compute capability 8.0.

    Source: DRE-SLCL, arXiv 2511.05034, residual encoding; the steps are at the top of this file.
    """
    check_inputs(x, codebook, cu_seqlens, index, row_scale, (row_codes,), INTERPRETED)
    check_per_row("row_codes", row_codes, x, torch.int16)
    (codewords, dim), bags = codebook.shape, cu_seqlens.shape[0] - 1
    rows = x.shape[0] if index is None else index.shape[0]
    arch = config.INTERPRETER if INTERPRETED else config.arch_of(torch.cuda.get_device_capability(x.device))
    config.check(x.dtype, codewords, dim)
    V = x.new_empty((bags, codewords, dim), dtype=torch.float32)
    counts = x.new_empty((bags, codewords), dtype=torch.int64)
    codes = x.new_empty((rows,), dtype=torch.int64)
    squares = x.new_empty((rows if distances else 0,), dtype=torch.float32)
    if rows == 0 or bags == 0:
        return V.zero_(), counts.zero_(), codes.fill_(-1), squares.zero_()
    if x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous()
    if INTERPRETED and x.dtype == torch.bfloat16:  # the interpreter misreads bf16
        x = x.float()
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and dim % 16 == 0
    plan = config.plan(arch, x.dtype, codewords, dim, aligned, unit, distances, row_codes is not None)
    if x.dtype == torch.float8_e4m3fn:
        x = x.view(torch.uint8)
    index, row_scale, row_codes = (
        None if t is None else t.contiguous() for t in (index, row_scale, row_codes)
    )
    with torch.cuda.device_of(x):
        _launch(x, codebook.float().contiguous(), cu_seqlens.contiguous(), index, row_scale, row_codes, unit, plan,
                V, counts, codes, squares if distances else None)  # fmt: skip
    return V, counts, codes, squares


def _parts_dtype(rows: torch.dtype, unit: bool, plan: config.Plan) -> torch.dtype:
    """The dtype of the operands that are scored, which the codebook's parts share."""
    if rows in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        return torch.float16
    # one pass scores normalised rows as the operands they are added up as
    return torch.float16 if rows == torch.bfloat16 and unit and plan.single is not None else rows


def _launch(
    x: torch.Tensor,
    codebook: torch.Tensor,
    cu_seqlens: torch.Tensor,
    index: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    row_codes: torch.Tensor | None,
    unit: bool,
    plan: config.Plan,
    V: torch.Tensor,
    counts: torch.Tensor,
    codes: torch.Tensor,
    distances: torch.Tensor | None,
) -> None:
    """Prepare the codebook, one or two passes over the rows, then the ordered sum of partials."""
    bags, K, D = V.shape
    N, stored = codes.shape[0], x.shape[0]
    constants = _constants(plan, K, D, unit)
    if plan.single is not None or plan.assign is not None:
        parts = codebook.new_empty(
            (plan.parts * plan.codewords, plan.dim), dtype=_parts_dtype(x.dtype, unit, plan)
        )
        scale, half = (codebook.new_empty(plan.codewords) for _ in range(2))
        prepare_kernel[(plan.codewords,)](codebook, parts, scale, half, **constants["prepare"])

    add_up = plan.single or plan.aggregate
    assert add_up is not None
    tiles = 1 if plan.single else (plan.dim // add_up.dim) * (plan.codewords // add_up.codewords)
    ranges = min(triton.cdiv(plan.programs, tiles), triton.cdiv(N, add_up.rows))
    height = triton.cdiv(triton.cdiv(N, ranges), add_up.rows) * add_up.rows
    partial = codebook.new_empty((ranges, 2, K, D) if ranges > 1 else (0,))
    partial_counts = codebook.new_empty((ranges, 2, K) if ranges > 1 else (0,), dtype=torch.int32)
    segments = ranges + bags + 1
    sizes = (N, stored, bags, ranges, height)

    if plan.single is not None:
        single_kernel[(segments,)](
            x, x.stride(0), index, row_scale, parts, scale, half, codebook, cu_seqlens, V, counts, codes, distances,
            partial, partial_counts, *sizes, **constants["single"], num_warps=plan.single.warps,
        )  # fmt: skip
    else:
        weights = codebook.new_empty(N) if unit else None
        if plan.assign is not None:
            assign_kernel[(triton.cdiv(N, plan.assign.rows),)](
                x, x.stride(0), index, row_scale, row_codes, parts, scale, half, codes, distances, weights, N, stored,
                **constants["assign"], num_warps=plan.assign.warps,
            )  # fmt: skip
        grid = (segments, plan.dim // add_up.dim, plan.codewords // add_up.codewords)
        aggregate_kernel[grid](
            x, x.stride(0), index, row_scale, row_codes, weights, codebook, cu_seqlens, V, counts, codes, distances,
            partial, partial_counts, *sizes, **constants["aggregate"], num_warps=add_up.warps,
        )  # fmt: skip
    reduce_kernel[(bags, triton.cdiv(K * D, _REDUCE["BLOCK"]))](
        cu_seqlens, V, counts, partial, partial_counts, N, height, **constants["reduce"]
    )


def _constants(plan: config.Plan, K: int, D: int, unit: bool) -> dict[str, dict[str, Any]]:
    """The constexpr arguments of each kernel ``plan`` launches."""
    size = {"K": K, "D": D}
    padded = {**size, "KP": plan.codewords, "DP": plan.dim, "PARTS": plan.parts}
    found: dict[str, dict[str, Any]] = {"reduce": {**size, **_REDUCE}}
    if plan.single or plan.assign:
        found["prepare"] = {**padded, "DB": 1 << (plan.dim - 1).bit_length()}
    if one := plan.single:
        tiles = {"KP": plan.codewords, "DT": one.dim, "TILES": plan.dim // one.dim, "ROWS": one.rows}
        found["single"] = {**size, **tiles, "PARTS": plan.parts, "UNIT": unit, "STAGES": one.stages}
    for name, launch in (("assign", plan.assign), ("aggregate", plan.aggregate)):
        if launch is not None:
            tiles = {
                "KT": launch.codewords,
                "DT": launch.dim,
                "ROWS": launch.rows,
                "STAGES": launch.stages,
            }
            found[name] = {**(padded if name == "assign" else size), **tiles}
    if plan.assign:
        found["assign"]["UNIT"] = unit
    return found


_KERNELS = {
    "prepare": prepare_kernel,
    "single": single_kernel,
    "assign": assign_kernel,
    "aggregate": aggregate_kernel,
    "reduce": reduce_kernel,
}
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.float8_e4m3fn: "u8",
}


# Rows, K, D and what is asked of them: every tile shape a plan can hold, sizes that fill the tiles and odd ones; of the
# kinds of rows, those that are used together.
_bf16, _fp16, _fp32, _int8, _e4m3 = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int8,
    torch.float8_e4m3fn,
)
_SHAPES: tuple[tuple[torch.dtype, int, int, str], ...] = (
    (_bf16, 64, 384, ""),
    (_bf16, 64, 1024, ""),
    (_bf16, 16, 64, ""),
    (_bf16, 64, 128, ""),
    (_bf16, 64, 256, ""),
    (_bf16, 128, 128, ""),
    (_bf16, 128, 192, ""),
    (_bf16, 7, 33, ""),
    (_bf16, 60, 127, ""),
    (_bf16, 1024, 2048, ""),
    (_bf16, 1000, 2047, ""),
    (_bf16, 64, 384, "index"),
    (_bf16, 64, 384, "index distances"),
    (_bf16, 64, 384, "index unit"),
    (_bf16, 64, 256, "index unit distances"),
    (_bf16, 128, 128, "index unit"),
    (_bf16, 64, 1024, "index unit distances"),
    (_bf16, 64, 1024, "index codes"),
    (_bf16, 60, 127, "index unit distances"),
    (_bf16, 1000, 2047, "index unit distances"),
    (_fp16, 64, 384, ""),
    (_fp16, 64, 1024, ""),
    (_fp16, 64, 384, "index codes unit distances"),
    (_int8, 64, 384, "index codes"),
    (_int8, 64, 384, "index"),
    (_int8, 64, 256, "index distances"),
    (_int8, 64, 1024, "index distances"),
    (_int8, 7, 33, "index distances"),
    (_int8, 1000, 2047, "index unit distances"),
    (_e4m3, 64, 384, "index codes"),
    (_e4m3, 64, 128, "index distances"),
    (_fp32, 64, 384, ""),
    (_fp32, 64, 384, "index unit distances"),
    (_fp32, 5, 17, "index unit distances"),
    (_fp32, 1024, 2048, ""),
)
# The codebook preparation and the sum of partials hardly depend on the shape: these three show them.
_HELPER_SHAPES = {(64, 384), (7, 33), (1024, 2048)}


def cases(arch: config.Arch) -> Iterator[Case]:
    """Every kernel of every plan on ``arch``, as the launcher launches them."""
    seen = set()
    for dtype, K, D, asked in _SHAPES:
        options = set(asked.split())
        unit, distances, coded = (option in options for option in ("unit", "distances", "codes"))
        plan = config.plan(arch, dtype, K, D, D % 16 == 0, unit, distances, coded)
        for name, constants in _constants(plan, K, D, unit).items():
            helper = name in ("prepare", "reduce")
            if helper and (dtype not in (torch.bfloat16, torch.float32) or (K, D) not in _HELPER_SHAPES):
                continue
            case = _case(arch, name, dtype, K, D, options, plan, constants)
            if case not in seen:
                seen.add(case)
                yield case


def _case(
    arch: config.Arch,
    name: str,
    dtype: torch.dtype,
    K: int,
    D: int,
    options: set[str],
    plan: config.Plan,
    constants: dict[str, Any],
) -> Case:
    kernel, helper = _KERNELS[name], name in ("prepare", "reduce")
    present = {
        "index_ptr": "index",
        "distances_ptr": "distances",
        "weights_ptr": "unit",
        "row_codes_ptr": "codes",
    }
    absent = {pointer for pointer, option in present.items() if option not in options}
    if dtype not in config.SCALED_DTYPES:
        absent.add("row_scale_ptr")
    constants = {**constants, **{pointer: None for pointer in kernel.arg_names if pointer in absent}}
    pointers = {"x_ptr": _TYPES[dtype], "parts_ptr": _TYPES[_parts_dtype(dtype, "unit" in options, plan)]}
    pointers |= dict.fromkeys(("cu_ptr", "index_ptr", "counts_ptr", "codes_ptr"), "i64")
    pointers |= {"row_codes_ptr": "i16", "partial_counts_ptr": "i32"}
    names = [n for n in kernel.arg_names if n not in constants]
    launch = {"single": plan.single, "assign": plan.assign, "aggregate": plan.aggregate}.get(name)
    matrix = dtype != torch.float32 and not helper
    wide = matrix and D % 16 == 0
    return Case(
        arch.capability,
        kernel,
        name if helper else " ".join([name, *sorted(options)]),
        "e4m3" if dtype == torch.float8_e4m3fn else _TYPES[dtype],
        K,
        D,
        tuple((n, "*" + pointers.get(n, "fp32") if n.endswith("_ptr") else "i32") for n in names),
        tuple(constants.items()),
        launch.warps if launch is not None else 4,
        arch.shared,
        "-" if helper else str(plan.passes_over_rows),
        matrix,
        wide,
        asynchronous=wide and name != "single",
    )
