"""Backward of the loss of slides against every report of a cohort, in Triton; the forward is in ``contrast_forward``.

With g_i the gradient of slide i's loss, and the logits formed again,

    w_ij = g_i (exp(z_ij - logsumexp_i) - [j in P_i] / |P_i|)    (InfoNCE)    g_i (sigmoid(z_ij) - [j in P_i])    (sigmoid)
    dx_i = scale sum_j w_ij r_j        dscale = sum_ij w_ij x_i.r_j        dbias = sum_ij w_ij

Reports are frozen and get no gradient. They are taken a chunk at a time: one kernel leaves the weights w of a chunk in
scratch of a bounded size (2^22 numbers, whatever M), a second one multiplies them with the chunk's reports, in ranges of
reports that each add to a partial sum of their own; these are added in order. No atomics: two runs agree in every bit.

Exactness: as in the forward; with bf16 reports the weights too are in three bf16 parts, which hold all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from dre_fast.kernels import config, contrast_config
from dre_fast.kernels.case import Case
from dre_fast.kernels.contrast_forward import (
    HEIGHTS,
    INFO_NCE,
    SHAPES,
    SIGMOID,
    absent_of,
    case_of,
    check,
    constants_of,
    prepare,
)
from dre_fast.kernels.contrast_kernels import finish_kernel, sums_kernel, weights_kernel

_FINISH = {"BLOCK": 256, "AT_ONCE": 16}


def info_nce_rows_backward(
    grad: torch.Tensor,
    slides: torch.Tensor,
    reports: torch.Tensor,
    slide_cases: torch.Tensor,
    report_cases: torch.Tensor,
    scale: torch.Tensor,
    lse: torch.Tensor,
    positives: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``contrast_forward.info_nce_rows``; no host synchronisation. Formulas: top of this file.

    Args:
        grad: fp32 [B], gradient of the loss.
        lse, positives: fp32 and int64 [B] as the forward returned them.
        slides, reports, slide_cases, report_cases, scale: as in the forward.

    Returns:
        Gradients of slides, fp32 [B, T], and scale, fp32 0-d; NaN where a slide has no positive.

    Raises:
        ValueError: wrong shape, dtype, device, or a GPU older than compute capability 8.0.
    """
    if positives.dtype != torch.int64 or positives.shape != slides.shape[:1]:
        raise ValueError(
            f"positives must be int64 [{len(slides)}], not {positives.dtype} {list(positives.shape)}"
        )
    d_slides, totals = _backward(
        grad, slides, reports, slide_cases, report_cases, scale, None, lse.contiguous(), positives.contiguous()
    )  # fmt: skip
    return d_slides, totals[0]


def siglip_rows_backward(
    grad: torch.Tensor,
    slides: torch.Tensor,
    reports: torch.Tensor,
    slide_cases: torch.Tensor,
    report_cases: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``contrast_forward.siglip_rows`` to slides [B, T], scale and bias (0-d), fp32.

    grad: fp32 [B]. The other arguments and the errors are as in the forward.
    """
    d_slides, totals = _backward(grad, slides, reports, slide_cases, report_cases, scale, bias, None, None)
    return d_slides, totals[0].clone(), totals[1].clone()


def _backward(
    grad: torch.Tensor,
    slides: torch.Tensor,
    reports: torch.Tensor,
    slide_cases: torch.Tensor,
    report_cases: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    lse: torch.Tensor | None,
    positives: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the slides, and those of scale and bias, [2]."""
    check(slides, reports, slide_cases, report_cases, (scale, bias), (grad, lse))
    B, T = slides.shape
    d_slides = torch.empty_like(slides)
    grad, slide_cases, report_cases = (t.contiguous() for t in (grad, slide_cases, report_cases))
    with torch.cuda.device_of(slides):
        parts, reports, plan = prepare(slides, reports)
        tile, sums, padded, M = plan.weights, plan.sums, plan.padded(B), len(reports)
        chunk, width = plan.chunk(B, M), plan.width(T)
        stacks = padded // tile.slides
        tiles = width // sums.dim, padded // sums.slides
        ranges, height = plan.ranges(chunk, tiles[0] * tiles[1], sums, together=2)
        weights = slides.new_empty((plan.parts, padded, chunk), dtype=plan.operand)
        totals = torch.zeros((chunk // tile.reports, stacks, 2), device=slides.device)
        found = torch.zeros((ranges, padded, width), device=slides.device)
        for first in range(0, M, chunk):
            part, cases = reports[first : first + chunk], report_cases[first : first + chunk]
            count = len(part)
            weights_kernel[(stacks, triton.cdiv(count, tile.reports))](
                part, part.stride(0), cases, parts, slide_cases, scale, bias, grad, lse, positives, weights, totals,
                B, count, padded, chunk, T, width, **constants_of(plan, tile), num_warps=tile.warps,
            )  # fmt: skip
            sums_kernel[(*tiles, triton.cdiv(count, height))](
                part, part.stride(0), weights, found, count, padded, height, chunk, T, width, **constants_of(plan, sums),
                num_warps=sums.warps,
            )  # fmt: skip
        finish_kernel[(triton.cdiv(padded * width, _FINISH["BLOCK"]),)](
            found, scale, d_slides, *d_slides.stride(), B, padded, ranges, T, width, **_FINISH
        )
    return d_slides, totals.sum(dim=(0, 1))


def cases(arch: config.Arch) -> Iterator[Case]:
    """Every kernel of every plan on ``arch``, as the launcher launches them."""
    for dtype, T in SHAPES:
        for height in HEIGHTS:
            plan = contrast_config.plan(arch, dtype, height)
            for kind, without in (("InfoNCE", INFO_NCE), ("sigmoid", SIGMOID)):
                constants = constants_of(plan, plan.weights)
                absent = absent_of(weights_kernel, without)
                yield case_of(
                    arch, dtype, T, weights_kernel, f"backward weights {kind}", constants, absent, plan.weights, "2"
                )  # fmt: skip
            constants = constants_of(plan, plan.sums)
            yield case_of(arch, dtype, T, sums_kernel, "backward sums", constants, (), plan.sums, "2")
        yield case_of(arch, dtype, T, finish_kernel, "backward finish", dict(_FINISH))
