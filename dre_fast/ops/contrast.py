"""Registered operations of the loss against a whole cohort of reports, their autograd, and the choice of what runs them.

CUDA tensors run in Triton: fp32 slides against fp32 or bf16 reports. Float64, other dtypes, sizes beyond the kernels'
and CPU tensors run the reference, which defines the formulas: :mod:`dre_fast.reference.loss`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dre_fast.ops import native
from dre_fast.ops.once import differentiable_once
from dre_fast.reference import loss as reference

NAMES = ("info_nce_rows", "info_nce_rows_backward", "siglip_rows", "siglip_rows_backward")
_TILE_LOGITS = 1 << 20  # B x tile logits at a time: 4 MB of fp32

_lib = torch.library.Library("dre_fast", "FRAGMENT")
_lib.define(
    "info_nce_rows(Tensor slides, Tensor reports, Tensor slide_cases, Tensor report_cases, Tensor scale,"
    " SymInt tile) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "info_nce_rows_backward(Tensor grad, Tensor slides, Tensor reports, Tensor slide_cases,"
    " Tensor report_cases, Tensor scale, Tensor lse, Tensor positives, SymInt tile) -> (Tensor, Tensor)"
)
_lib.define(
    "siglip_rows(Tensor slides, Tensor reports, Tensor slide_cases, Tensor report_cases, Tensor scale,"
    " Tensor bias, SymInt tile) -> Tensor"
)
_lib.define(
    "siglip_rows_backward(Tensor grad, Tensor slides, Tensor reports, Tensor slide_cases,"
    " Tensor report_cases, Tensor scale, Tensor bias, SymInt tile) -> (Tensor, Tensor, Tensor)"
)


def backend(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """What runs an operation on slides of a device and dtype: "Triton" (up to its largest T) or "reference".

    Raises:
        ValueError: no such operation.
    """
    if name not in NAMES:
        raise ValueError(f"no contrast operation is called {name!r}")
    if torch.device(device).type == "cuda" and dtype == torch.float32 and native.triton_available():
        return "Triton"
    return "reference"


def _run(name: str, slides: Tensor, reports: Tensor, *arguments: Any) -> Any:
    """Call an operation; the last argument, the tile, is the reference's alone."""
    if backend(name, slides.device, slides.dtype) == "Triton":
        from dre_fast import kernels  # Triton is imported, and needed, only for CUDA tensors
        from dre_fast.kernels import contrast_config

        if contrast_config.covers(slides, reports):
            return getattr(kernels, name)(*arguments[:-1])
    return getattr(reference, name)(*arguments)


@torch.library.impl(_lib, "info_nce_rows", "CompositeExplicitAutograd")
def _info_nce(slides: Tensor, reports: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _run("info_nce_rows", slides, reports, slides, reports, *others)  # type: ignore[no-any-return]


@torch.library.impl(_lib, "info_nce_rows_backward", "CompositeExplicitAutograd")
def _info_nce_backward(grad: Tensor, slides: Tensor, reports: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _run(  # type: ignore[no-any-return]
        "info_nce_rows_backward", slides, reports, grad, slides, reports, *others
    )


@torch.library.impl(_lib, "siglip_rows", "CompositeExplicitAutograd")
def _siglip(slides: Tensor, reports: Tensor, *others: Any) -> Tensor:
    return _run("siglip_rows", slides, reports, slides, reports, *others)  # type: ignore[no-any-return]


@torch.library.impl(_lib, "siglip_rows_backward", "CompositeExplicitAutograd")
def _siglip_backward(
    grad: Tensor, slides: Tensor, reports: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _run(  # type: ignore[no-any-return]
        "siglip_rows_backward", slides, reports, grad, slides, reports, *others
    )


@torch.library.register_fake("dre_fast::info_nce_rows", lib=_lib)
def _info_nce_fake(
    slides: Tensor, reports: Tensor, slide_cases: Tensor, report_cases: Tensor, scale: Tensor, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows = slides.shape[0]
    return slides.new_empty(rows), slides.new_empty(rows), slide_cases.new_empty(rows)


@torch.library.register_fake("dre_fast::info_nce_rows_backward", lib=_lib)
def _info_nce_backward_fake(grad: Tensor, slides: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(slides), torch.empty_like(others[3])


@torch.library.register_fake("dre_fast::siglip_rows", lib=_lib)
def _siglip_fake(slides: Tensor, *_: Any) -> Tensor:
    return slides.new_empty(slides.shape[0])


@torch.library.register_fake("dre_fast::siglip_rows_backward", lib=_lib)
def _siglip_backward_fake(grad: Tensor, slides: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(slides), torch.empty_like(others[3]), torch.empty_like(others[4])


_info_nce_op = torch.ops.dre_fast.info_nce_rows.default
_info_nce_backward_op = torch.ops.dre_fast.info_nce_rows_backward.default
_siglip_op = torch.ops.dre_fast.siglip_rows.default
_siglip_backward_op = torch.ops.dre_fast.siglip_rows_backward.default


class _InfoNceRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        slides: Tensor,
        reports: Tensor,
        slide_cases: Tensor,
        report_cases: Tensor,
        scale: Tensor,
        tile: int,
    ) -> tuple[Tensor, Tensor]:
        loss, lse, positives = _info_nce_op(slides, reports, slide_cases, report_cases, scale, tile)
        ctx.save_for_backward(slides, reports, slide_cases, report_cases, scale, lse, positives)
        ctx.tile = tile
        ctx.mark_non_differentiable(positives)
        return loss, positives

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        d_slides, d_scale = _info_nce_backward_op(grad, *ctx.saved_tensors, ctx.tile)
        return d_slides, None, None, None, d_scale, None


class _SiglipRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        slides: Tensor,
        reports: Tensor,
        slide_cases: Tensor,
        report_cases: Tensor,
        scale: Tensor,
        bias: Tensor,
        tile: int,
    ) -> Tensor:
        ctx.save_for_backward(slides, reports, slide_cases, report_cases, scale, bias)
        ctx.tile = tile
        return _siglip_op(slides, reports, slide_cases, report_cases, scale, bias, tile)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_slides, d_scale, d_bias = _siglip_backward_op(grad, *ctx.saved_tensors, ctx.tile)
        return d_slides, None, None, None, d_scale, d_bias, None


def _tile(slides: Tensor, tile: int | None) -> int:
    return tile or max(64, _TILE_LOGITS // max(slides.shape[0], 1))


def info_nce_rows(
    slides: Tensor,
    reports: Tensor,
    slide_cases: Tensor,
    report_cases: Tensor,
    scale: Tensor,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each slide against all reports, [B], and its number of positives, int64 [B].

    Formula: :func:`dre_fast.reference.loss.info_nce_rows`. Peak memory does not grow with the number of
    reports. Gradient to slides and scale, once; reports are frozen.

    Args:
        slides: [B, T] L2-normalised, fp32 or float64.
        reports: [M, T] L2-normalised, in the dtype of slides or bf16.
        slide_cases: int64 [B].
        report_cases: int64 [M].
        scale: 0-d, the inverse temperature, in the dtype of slides.
        tile: reports at a time in the reference; by default about a million logits.
    """
    return _InfoNceRows.apply(  # type: ignore[no-any-return]
        slides, reports, slide_cases, report_cases, scale, _tile(slides, tile)
    )


def siglip_rows(
    slides: Tensor,
    reports: Tensor,
    slide_cases: Tensor,
    report_cases: Tensor,
    scale: Tensor,
    bias: Tensor,
    tile: int | None = None,
) -> Tensor:
    """Sigmoid loss of each slide summed over all reports, [B]; arguments as :func:`info_nce_rows`."""
    return _SiglipRows.apply(  # type: ignore[no-any-return]
        slides, reports, slide_cases, report_cases, scale, bias, _tile(slides, tile)
    )
