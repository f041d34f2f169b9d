"""Backward of soft residual encoding in Triton: gradients of rows, codebook, scales or weights and biases.

With g_k and h_k the gradients of V_k and mass_k of a row's bag, and A formed again,

    e_ik = g_k.(x~_i - c_k) + h_k        d_ik = a_ik (e_ik - sum_l a_il e_il)    (gradient of the logits)
    Deep-TEN    dx~_i = sum_k a_ik g_k - 2 s_k d_ik (x~_i - c_k)    ds_k = -sum_i d_ik ||x~_i - c_k||^2
                dc_k = -sum_b mass_bk g_bk + 2 s_k sum_i d_ik (x~_i - c_k)
    NetVLAD     dx~_i = sum_k a_ik g_k + d_ik w_k    dw_k = sum_i d_ik x~_i    db_k = sum_i d_ik    dc_k = -sum_b mass_bk g_bk

and for unit rows dx_i = (dx~_i - (dx~_i.u_i) u_i) / ||x_i||. (The logits of Deep-TEN, Zhang et al. 2017, eq. 4, and of
NetVLAD, Arandjelovic et al. 2016, eq. 3, differentiated.)

Rows are taken a chunk at a time as in ``soft_encode``; scratch of a chunk is 2^22 numbers of 12 bytes. Sums over rows are
one partial a range of rows, added in order: no atomics, two runs agree in every bit.

Exactness. fp32 rows: fp32 throughout. Other rows: logits and e as in ``soft_encode``, g in two parts like the codewords.
The gradient of the rows is a product of fp16 numbers, scaled per row: it errs by about 2^-11 of sum_k |a_ik g_k| +
|d_ik w_k|, and is stored in the rows' dtype. Sums over rows take d_ik in two parts, which keep 2^-17 (bf16) or 2^-22 of
the largest one. All scales are powers of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton

from dre_fast.kernels import config, soft_config
from dre_fast.kernels.case import Case
from dre_fast.kernels.soft_backward_kernels import (
    add_kernel,
    codebook_kernel,
    logits_backward_kernel,
    parameters_kernel,
    rows_kernel,
)
from dre_fast.kernels.soft_config import SoftPlan
from dre_fast.kernels.soft_encode import (
    SHAPES,
    WARPS,
    Parts,
    Rows,
    assignment,
    case_of,
    check,
    helpers_shown,
    parts,
    parts_constants,
    prepare,
    products_constants,
    scratch_pitch,
)
from dre_fast.kernels.soft_kernels import parts_kernel, products_kernel

_ADD = {"BLOCK": 128, "AT_ONCE": 16}


def soft_encode_backward(
    grad: torch.Tensor,
    grad_mass: torch.Tensor,
    x: torch.Tensor,
    codebook: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mass: torch.Tensor,
    scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    unit: bool = False,
    rows: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``soft_encode``; deterministic, no host synchronisation. Formulas: top of this file.

    Args:
        grad: [B, K, D], gradient of V; grad_mass: [B, K], that of the mass. Float dtypes.
        mass: [B, K] as the forward returned it.
        rows: whether the gradient of the rows is wanted.
        x, codebook, cu_seqlens, scale, weight, bias, index, row_scale, unit: as in ``soft_encode``.

    Returns:
        Gradients of the M rows that were read [M, D] (dtype of x; fp32 for int8 and float8_e4m3fn), which is 0 for skipped
        rows, rows of no bag and, with ``unit``, rows of norm at most 1e-12; of codebook [K, D], scale [K], weight [K, D]
        and bias [K], fp32. Those not wanted or not given are empty, [0]. A row with NaN makes its own gradient and those of
        the parameters NaN.

    Raises:
        ValueError: wrong shape, dtype, device, or a GPU older than compute capability 8.0.
    """
    check(x, codebook, cu_seqlens, scale, weight, bias, index, row_scale)
    (K, D), bags = codebook.shape, cu_seqlens.shape[0] - 1
    if grad.shape != (bags, K, D) or grad_mass.shape != (bags, K) or mass.shape != (bags, K):
        shapes = ", ".join(str(list(t.shape)) for t in (grad, grad_mass, mass))
        raise ValueError(
            f"grad, grad_mass and mass must be {[bags, K, D]}, {[bags, K]} and {[bags, K]}, not {shapes}"
        )
    count = x.shape[0] if index is None else index.shape[0]
    out_dtype = torch.float32 if x.dtype in config.SCALED_DTYPES else x.dtype
    d_rows = x.new_empty((count, D) if rows else (0,), dtype=out_dtype)
    d_words = x.new_empty((K, D), dtype=torch.float32)
    sums = torch.zeros((K, D), dtype=torch.float32, device=x.device)
    totals = torch.zeros((2, K), dtype=torch.float32, device=x.device)
    source, plan = prepare(x, codebook, cu_seqlens, index, row_scale, unit)
    grad, grad_mass, mass, words = (t.float().contiguous() for t in (grad, grad_mass, mass, codebook))
    with torch.cuda.device_of(x):
        slopes = None
        if bags == 0:
            d_rows.zero_()
        elif count:
            slopes, points = assignment(words, scale, weight, bias, plan, narrow=rows)
            grads = parts(grad, plan, narrow=rows, add=grad_mass, codebook=words)
            if source.x.dtype != x.dtype and out_dtype == torch.bfloat16:  # interpreted: bf16 came as fp32
                kept = d_rows.float()
                _launch(source, slopes, points, grads, plan, kept if rows else None, sums, totals)
                d_rows = kept.to(out_dtype)
            else:
                _launch(source, slopes, points, grads, plan, d_rows if rows else None, sums, totals)
        codebook_kernel[(triton.cdiv(K * D, _ADD["BLOCK"]),)](
            grad, mass, sums, totals, slopes, words, d_words, bags, K=K, D=D, **_ADD
        )
    none = sums.new_empty(0)
    return (
        d_rows,
        d_words,
        none if scale is None else -totals[1],
        none if weight is None else sums,
        none if bias is None else totals[0].clone(),
    )


def _constants(plan: SoftPlan, K: int, D: int, unit: bool, distance: bool) -> dict[str, dict[str, Any]]:
    """The constexpr arguments of each kernel that is launched a chunk."""
    rows, sums = plan.rows, plan.sums
    both = {"UNIT": unit, "DISTANCE": distance}
    narrow = 2.0**-32 if plan.operand == torch.bfloat16 else 1.0
    return {
        "products": {**products_constants(plan, K, D, unit, distance), "STAGES": plan.gradient_stages},
        "logits": {"K": K, "KP": plan.codewords, "ROWS": plan.gradient, "UNIT": unit, "NARROW": narrow},
        "rows": {
            "D": D, "KP": plan.codewords, "DP": plan.dim, "KT": rows.codewords, "DT": rows.dim, "ROWS": rows.rows,
            "STAGES": rows.stages, **both,
        },
        "parameters": {
            "K": K, "D": D, "KT": sums.codewords, "DT": sums.dim, "ROWS": sums.rows, "STAGES": sums.stages, **both,
        },
    }  # fmt: skip


def _launch(
    rows: Rows,
    slopes: torch.Tensor | None,
    points: Parts,
    grads: Parts,
    plan: SoftPlan,
    d_rows: torch.Tensor | None,
    sums: torch.Tensor,
    totals: torch.Tensor,
) -> None:
    """Chunk by chunk: products, gradient of the logits, gradient of the rows, sums over rows."""
    (K, D), bags = sums.shape, rows.cu_seqlens.shape[0] - 1
    pitch = scratch_pitch(plan, len(rows))
    shape = (plan.codewords, pitch)
    z, e = sums.new_empty(shape), sums.new_empty(shape)
    a = b = factors = None
    if d_rows is not None:
        a, b = sums.new_empty(shape, dtype=plan.narrow), sums.new_empty(shape, dtype=plan.narrow)
        factors = sums.new_empty((2, pitch))
    weights = sums.new_empty(pitch) if rows.unit else None
    squares = sums.new_empty(pitch) if d_rows is not None and (rows.unit or slopes is not None) else None
    constants = _constants(plan, K, D, rows.unit, slopes is not None)
    tile = plan.sums
    tiles = (plan.dim // tile.dim, plan.codewords // tile.codewords)
    for start, part in rows.chunks(plan.chunk):
        N, X = len(part), part.x.shape[0]

        def segments(height: int, N: int = N, X: int = X) -> tuple[int, tuple[int, ...]]:
            ranges = triton.cdiv(N, height)
            return ranges + bags + 1, (N, X, bags, ranges, height, pitch)

        programs, sizes = segments(plan.products.rows)
        products_kernel[(programs, plan.codewords // plan.products.codewords)](
            *part.pointers, points.values, points.scale, points.extra, grads.values, grads.scale, part.cu_seqlens, z, e,
            weights, squares, *sizes, **constants["products"], num_warps=plan.products.warps,
        )  # fmt: skip
        peaks = None
        if plan.operand == torch.float16:
            peaks = torch.zeros(N, dtype=torch.float32, device=e.device)
        programs, sizes = segments(plan.gradient)
        logits_backward_kernel[(programs,)](
            part.x, part.index, part.scale, part.cu_seqlens, z, e, slopes, points.scale, points.extra, grads.scale,
            grads.extra, squares, a, b, factors, peaks, *sizes, **constants["logits"], num_warps=WARPS,
        )  # fmt: skip
        if d_rows is not None:
            programs, sizes = segments(plan.rows.rows)
            rows_kernel[(programs, plan.dim // plan.rows.dim)](
                *part.pointers, part.cu_seqlens, a, b, grads.narrow, points.narrow, factors, weights, squares,
                d_rows[start : start + N], *sizes, **constants["rows"], num_warps=plan.rows.warps,
            )  # fmt: skip
        ranges = min(triton.cdiv(plan.programs, tiles[0] * tiles[1]), triton.cdiv(N, tile.rows))
        height = triton.cdiv(triton.cdiv(N, ranges), tile.rows) * tile.rows
        partial, partial_totals = sums.new_empty((ranges, K, D)), sums.new_empty((ranges, 2, K))
        parameters_kernel[(ranges, *tiles)](
            *part.pointers, part.cu_seqlens, e, z, weights, None if peaks is None else peaks.amax(), partial, partial_totals,
            N, X, bags, ranges, height, pitch, **constants["parameters"], num_warps=tile.warps,
        )  # fmt: skip
        for to, found in ((sums, partial), (totals, partial_totals)):
            add_kernel[(triton.cdiv(to.numel(), _ADD["BLOCK"]),)](to, found, ranges, SIZE=to.numel(), **_ADD)


def cases(arch: config.Arch) -> Iterator[Case]:
    """Every kernel of every plan on ``arch``, as the launcher launches them."""
    for dtype, K, D, asked in SHAPES:
        options = set(asked.split())
        unit, distance = "unit" in options, "weight" not in options
        plan = soft_config.plan(arch, dtype, K, D)
        absent = set() if unit else {"weights_ptr"}
        absent |= set() if unit or distance else {"squares_ptr"}
        absent |= set() if distance else {"slope_ptr"}
        absent |= set() if plan.operand == torch.float16 else {"peak_ptr", "peaks_ptr"}
        constants = _constants(plan, K, D, unit, distance)
        one = partial(case_of, arch, dtype, K, D, plan)
        for name, kernel, narrow, tile in (
            ("products", products_kernel, (), plan.products),
            ("logits", logits_backward_kernel, ("a_ptr", "b_ptr"), None),
            ("rows", rows_kernel, ("a_ptr", "b_ptr", "grad_ptr", "p_ptr"), plan.rows),
            ("parameters", parameters_kernel, (), plan.sums),
        ):
            yield one(kernel, f"backward {name}", constants[name], options, absent, narrow, tile)
        if helpers_shown(dtype, options):
            both = {**parts_constants(plan, K, D, False), **({} if plan.parts == 2 else {"narrow_ptr": None})}
            yield one(parts_kernel, "backward parts", both, narrow=("narrow_ptr",))
            yield one(add_kernel, "backward add", {"SIZE": K * D, **_ADD})
            yield one(codebook_kernel, "backward codebook", {"K": K, "D": D, **_ADD})
