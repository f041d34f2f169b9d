"""The numerics contract of the loss against all reports, for tests of the kernels that compute it."""

from __future__ import annotations

import torch
from torch import Tensor

from dre_fast.kernels import (
    info_nce_rows,
    info_nce_rows_backward,
    siglip_rows,
    siglip_rows_backward,
)
from dre_fast.reference import loss as reference
from dre_fast.reference.encode import l2_normalize
from error_rule import within_error_rule

KINDS = ("InfoNCE", "sigmoid")
TILE = 8192  # reports at a time in plain torch
GRADIENTS = ("gradient of slides", "gradient of scale", "gradient of bias")


def make(
    slides: int, reports: int, dim: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slides near reports, reports, and the cases of both: one or two reports each, and as many slides as it comes."""
    generator = torch.Generator(device).manual_seed(seed)
    given = {"device": device, "generator": generator}
    report_cases = torch.randperm(reports, **given) * 2 // 3
    rows = torch.randint(reports, (slides,), **given)
    r = l2_normalize(torch.randn(reports, dim, **given))
    x = l2_normalize(r[rows] + 2 * torch.randn(slides, dim, **given) / dim**0.5)
    return x, r.to(dtype), report_cases[rows], report_cases


def _follows(got: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
    atol = 1e-6 * max(1.0, float(exact.abs().max()))
    within_error_rule(got, plain, exact, atol, name)


def check(
    slides: Tensor,
    reports: Tensor,
    slide_cases: Tensor,
    report_cases: Tensor,
    kind: str,
    scale: float,
    bias: float = -2.0,
) -> tuple[Tensor, ...]:
    """The whole contract of one loss, forward and backward; returns what the kernels gave: results, then gradients.

    Plain torch is the reference in fp32, for bf16 reports too.
    """
    cases = slide_cases, report_cases
    inputs = slides, reports.float(), torch.tensor(scale, device=slides.device)
    double = tuple(t.double() for t in inputs)
    own = slides, reports, *cases, inputs[2]
    grad = torch.linspace(-1, 2, len(slides), device=slides.device) / len(slides)
    shift = torch.tensor(bias, device=slides.device)

    def both() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if kind == "InfoNCE":
            found = info_nce_rows(*own)
            return found, info_nce_rows_backward(grad, *own, *found[1:])
        return (siglip_rows(*own, shift),), siglip_rows_backward(grad, *own, shift)

    def by_torch(x: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        arguments, g = (x, r, *cases, s), grad.to(x.dtype)
        if kind == "InfoNCE":
            found = reference.info_nce_rows(*arguments, TILE)
            return *found, *reference.info_nce_rows_backward(g, *arguments, *found[1:], TILE)
        b = shift.to(x.dtype)
        loss = reference.siglip_rows(*arguments, b, TILE)
        return loss, *reference.siglip_rows_backward(g, *arguments, b, TILE)

    results, gradients = both()
    for one, other in zip((*results, *gradients), sum(both(), ()), strict=True):
        assert torch.equal(one, other), "two runs differ"
    names = (*(("loss", "logsumexp", "positives") if kind == "InfoNCE" else ("loss",)), *GRADIENTS)
    got, plain, exact = (*results, *gradients), by_torch(*inputs), by_torch(*double)
    for name, one, near, right in zip(names, got, plain, exact, strict=False):
        if name == "positives":
            assert one.dtype == torch.int64
            assert torch.equal(one, right)
        else:
            assert one.dtype == torch.float32
            _follows(one, near, right, f"{kind} {name}")
    return got
