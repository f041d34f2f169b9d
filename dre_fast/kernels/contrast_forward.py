"""Loss of slides against every report of a cohort, in Triton: InfoNCE rows and sigmoid rows.

With z_ij = scale x_i.r_j (+ bias) and P_i the reports of the case of slide i:

    InfoNCE    L_i = log sum_j exp(z_ij) - mean over P_i of z_ij        (CLIP, Radford et al. 2021, case-aware)
    sigmoid    L_i = sum_j log(1 + exp(-y_ij z_ij)), y = 1 in P_i, else -1        (SigLIP, Zhai et al. 2023, eq. 1)

The log-sum-exp runs on over a range of reports: (m, l) -> (m', l exp(m - m') + sum exp(z - m')), m' = max(m, max z).
Logits live in registers. The reports are cut into equal ranges, as many as fill the GPU; each leaves one partial result a
slide, and a second kernel puts them together in order: no atomics, two runs agree in every bit. A tile of reports is read
from memory once; where there are more slides than one tile takes, the others ask for it at the same time and find it in
the L2 cache.

Exactness. bf16 reports are multiplied as they are with slides in three bf16 parts, which hold all 24 bits of an fp32
number; fp32 reports as three products of tf32 parts ("tf32x3"), which keep 2^-22 of each. What the matrix units add up
is at most 64 products long, since they do not round to nearest; longer sums are made of those in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton

from dre_fast.kernels import config, contrast_config
from dre_fast.kernels.case import Case
from dre_fast.kernels.contrast_config import ContrastPlan, Tile
from dre_fast.kernels.contrast_kernels import forward_kernel, merge_kernel, slides_kernel

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
_MERGE = {"MOST": 256, "BLOCK": 16}
_BLOCK = 1024  # numbers of slides that one program prepares


def info_nce_rows(
    slides: torch.Tensor,
    reports: torch.Tensor,
    slide_cases: torch.Tensor,
    report_cases: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy of each slide to the uniform distribution over its positives; no host synchronisation.

    Args:
        slides: fp32 [B, T], L2-normalised, 1 <= T <= 4096.
        reports: fp32 or bf16 [M, T], L2-normalised, M >= 1, any row stride.
        slide_cases: int64 [B]. report_cases: int64 [M].
        scale: fp32, 0-d.

    Returns:
        Loss fp32 [B] (NaN for a slide without a positive), logsumexp fp32 [B], number of positives int64 [B].

    Raises:
        ValueError: wrong shape, dtype, device, or a GPU older than compute capability 8.0.
    """
    loss, lse, positives = _forward(slides, reports, slide_cases, report_cases, scale, None)
    assert lse is not None
    assert positives is not None
    return loss, lse, positives


def siglip_rows(
    slides: torch.Tensor,
    reports: torch.Tensor,
    slide_cases: torch.Tensor,
    report_cases: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Sigmoid loss of each slide summed over the reports, fp32 [B]; arguments and errors as :func:`info_nce_rows`.

    bias: fp32, 0-d.
    """
    return _forward(slides, reports, slide_cases, report_cases, scale, bias)[0]


def check(
    slides: torch.Tensor,
    reports: torch.Tensor,
    slide_cases: torch.Tensor,
    report_cases: torch.Tensor,
    numbers: tuple[torch.Tensor | None, ...],
    vectors: tuple[torch.Tensor | None, ...] = (),
) -> None:
    """Raise ValueError for arguments that the loss does not take; ``numbers`` are fp32, 0-d, ``vectors`` fp32 [B]."""
    if slides.dim() != 2 or reports.dim() != 2 or slides.shape[1] != reports.shape[1]:
        raise ValueError(
            f"slides must be [B, T] and reports [M, T]; got {list(slides.shape)} and {list(reports.shape)}"
        )
    if not contrast_config.covers(slides, reports):
        raise ValueError(
            f"the Triton kernels take fp32 slides [B, T] and fp32 or bf16 reports [M, T] with B, M >= 1 and T from 1 to "
            f"{contrast_config.MAX_DIM}; got {slides.dtype} {list(slides.shape)} and {reports.dtype} {list(reports.shape)}"
        )
    for name, cases, rows in (("slide_cases", slide_cases, slides), ("report_cases", report_cases, reports)):
        if cases.dtype != torch.int64 or cases.shape != rows.shape[:1]:
            raise ValueError(f"{name} must be int64 [{len(rows)}], not {cases.dtype} {list(cases.shape)}")
    for what, given, shape in (
        ("scale and bias", numbers, torch.Size()),
        ("gradient and logsumexp", vectors, slides.shape[:1]),
    ):
        for one in given:
            if one is not None and (one.dtype != torch.float32 or one.shape != shape):
                raise ValueError(f"{what} must be fp32 {list(shape)}, not {one.dtype} {list(one.shape)}")
    given = (slides, reports, slide_cases, report_cases, *numbers, *vectors)
    devices = {t.device for t in given if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must share a device; got {', '.join(sorted(map(str, devices)))}")
    if slides.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"the Triton kernels need a CUDA device, not {slides.device} (TRITON_INTERPRET=1 interprets them)"
        )


def prepare(slides: torch.Tensor, reports: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, ContrastPlan]:
    """Slides in parts [parts, padded, dim], reports with unit stride within a row, and the plan for them."""
    arch = (
        config.INTERPRETER if INTERPRETED else config.arch_of(torch.cuda.get_device_capability(slides.device))
    )
    B, T = slides.shape
    plan = contrast_config.plan(arch, reports.dtype, contrast_config.height_of(B))
    if T > 1 and reports.stride(1) != 1:
        reports = reports.contiguous()
    reports = reports.to(plan.operand)  # fp32 for the interpreter, else it is that
    padded, width = plan.padded(B), plan.width(T)
    parts = slides.new_empty((plan.parts, padded, width), dtype=plan.operand)
    slides_kernel[(triton.cdiv(padded * width, _BLOCK),)](
        slides.contiguous(), parts, B, padded, T, width, BLOCK=_BLOCK, PARTS=plan.parts
    )
    return parts, reports, plan


def constants_of(plan: ContrastPlan, tile: Tile) -> dict[str, Any]:
    """The constexpr arguments of the kernels that multiply."""
    return {
        "S": tile.slides, "R": tile.reports, "DT": tile.dim, "PARTS": plan.parts, "PRECISION": plan.precision,
        "STAGES": tile.stages,
    }  # fmt: skip


def _forward(
    slides: torch.Tensor,
    reports: torch.Tensor,
    slide_cases: torch.Tensor,
    report_cases: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    check(slides, reports, slide_cases, report_cases, (scale, bias))
    B, T = slides.shape
    loss = slides.new_empty(B)
    lse = None if bias is not None else slides.new_empty(B)
    positives = None if bias is not None else slide_cases.new_empty(B)
    with torch.cuda.device_of(slides):
        parts, reports, plan = prepare(slides, reports)
        tile, padded, M = plan.forward, plan.padded(B), len(reports)
        ranges, height = plan.ranges(M, padded // tile.slides, tile, together=1)
        found = slides.new_empty((ranges, 3 if bias is None else 1, padded))
        counts = slides.new_empty((ranges, padded), dtype=torch.int32) if bias is None else None
        # the slides of a range come first: they ask for the same reports
        forward_kernel[(padded // tile.slides, ranges)](
            reports, reports.stride(0), report_cases.contiguous(), parts, slide_cases.contiguous(), scale, bias, found,
            counts, B, M, padded, height, T, plan.width(T), **constants_of(plan, tile), num_warps=tile.warps,
        )  # fmt: skip
        merge_kernel[(triton.cdiv(B, _MERGE["BLOCK"]),)](
            found, counts, loss, lse, positives, B, padded, ranges, **_MERGE
        )
    return loss, lse, positives


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Reports and T: rows that load 16 bytes at a time, and rows that do not.
SHAPES: tuple[tuple[torch.dtype, int], ...] = (
    (torch.bfloat16, 384),
    (torch.bfloat16, 1023),
    (torch.float32, 384),
    (torch.float32, 1023),
)
HEIGHTS = (32, 64)


def case_of(
    arch: config.Arch,
    dtype: torch.dtype,
    T: int,
    kernel: Any,
    label: str,
    constants: dict[str, Any],
    absent: tuple[str, ...] = (),
    tile: Tile | None = None,
    reads: str = "-",
) -> Case:
    """A case: ``absent`` pointers are None; ``tile`` where it multiplies. Its K is the slides of a tile."""
    constants = {**constants, **dict.fromkeys(absent)}
    rows = _TYPES[dtype]
    pointers = {
        "reports_ptr": rows, "parts_ptr": rows, "weights_ptr": rows, "report_cases_ptr": "i64", "slide_cases_ptr": "i64",
        "positives_ptr": "i64", "counts_ptr": "i32",
    }  # fmt: skip
    types = tuple(
        (n, "*" + pointers.get(n, "fp32") if n.endswith("_ptr") else "i32")
        for n in kernel.arg_names
        if n not in constants
    )
    bf16 = tile is not None and dtype == torch.bfloat16
    wide = bf16 and T % 16 == 0
    return Case(
        arch.capability, kernel, f"contrast {label}", rows, constants.get("S", 0), T, types, tuple(constants.items()),
        4 if tile is None else tile.warps, arch.shared, reads=reads, matrix=tile is not None, wide=wide,
        asynchronous=wide,
    )  # fmt: skip


# Pointers that are absent from the kernels of each loss.
INFO_NCE: tuple[str, ...] = ("bias_ptr",)
SIGMOID: tuple[str, ...] = ("counts_ptr", "lse_ptr", "positives_ptr")


def absent_of(kernel: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """The pointers of a kernel that one of the losses does without."""
    return tuple(name for name in names if name in kernel.arg_names)


def cases(arch: config.Arch) -> Iterator[Case]:
    """Every kernel of every plan on ``arch``, as the launcher launches them."""
    for dtype, T in SHAPES:
        plan = contrast_config.plan(arch, dtype, HEIGHTS[0])
        constants = constants_of(plan, plan.forward)
        for kind, without in (("InfoNCE", INFO_NCE), ("sigmoid", SIGMOID)):
            absent = absent_of(forward_kernel, without)
            yield case_of(
                arch, dtype, T, forward_kernel, f"forward {kind}", constants, absent, plan.forward, "1"
            )
        yield case_of(arch, dtype, T, slides_kernel, "slides", {"BLOCK": _BLOCK, "PARTS": plan.parts})
    for kind, without in (("InfoNCE", INFO_NCE), ("sigmoid", SIGMOID)):
        absent = absent_of(merge_kernel, without)
        yield case_of(arch, torch.float32, 0, merge_kernel, f"merge {kind}", dict(_MERGE), absent)
