"""The slide-report loss against every report of a cohort, forward and backward, against the whole matrix of logits.

    pytest --benchmark-only -k contrast

A call is the InfoNCE loss of each slide and the gradients of slides and scale for a given gradient of it. Every way is
checked against dre_fast before it is timed. "whole matrix" is torch's cross entropy on all logits; with bf16 reports it
multiplies in fp32, as dre_fast does to fp32's accuracy, and "bf16 product" in bf16, which is not as exact. "tiles" is
dre_fast's reference, the same sums a tile of reports at a time in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import peers
from benchmarks.memory import Job
from benchmarks.registry import CPU_CONTRAST, GPU_CONTRAST, Contrast
from dre_fast.ops import contrast
from dre_fast.reference import loss as reference

SHAPES = {shape.id: shape for shape in (*CPU_CONTRAST, *GPU_CONTRAST)}
TILE = 1 << 20  # logits at a time


@dataclass(frozen=True)
class Inputs:
    """Slides and scale as leaves, reports, the row of each slide's report, cases of both, the gradient of the loss."""

    slides: Tensor
    reports: Tensor
    rows: Tensor
    cases: Tensor
    scale: Tensor
    grad: Tensor


@lru_cache(maxsize=1)
def inputs(shape: Contrast, device: str) -> Inputs:
    """Unit slides near their reports, of which every case has one."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    reports = functional.normalize(normal(shape.reports, shape.dim), dim=1)
    rows = torch.randint(shape.reports, (shape.slides,), device=device, generator=generator)
    slides = functional.normalize(reports[rows] + normal(shape.slides, shape.dim) / shape.dim**0.5, dim=1)
    return Inputs(
        slides.requires_grad_(),
        reports.to(shape.dtype),
        rows,
        torch.arange(shape.reports, device=device),
        torch.tensor(20.0, device=device).requires_grad_(),
        torch.full((shape.slides,), 1 / shape.slides, device=device),
    )


def ours(given: Inputs) -> Tensor:
    """The registered operation."""
    return contrast.info_nce_rows(given.slides, given.reports, given.rows, given.cases, given.scale)[0]


def _whole(slides: Tensor, reports: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return functional.cross_entropy(scale * slides @ reports.to(slides.dtype).T, rows, reduction="none")


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_whole, dynamic=False)


def whole(given: Inputs) -> Tensor:
    """Cross entropy on the B x M logits, in fp32."""
    return _whole(given.slides, given.reports, given.rows, given.scale)


def whole_compiled(given: Inputs) -> Tensor:
    """torch.compile of :func:`whole`."""
    return _compiled()(given.slides, given.reports, given.rows, given.scale)


def whole_bf16(given: Inputs) -> Tensor:
    """The same with the product in bf16."""
    logits = (given.slides.bfloat16() @ given.reports.bfloat16().T).float() * given.scale
    return functional.cross_entropy(logits, given.rows, reduction="none")


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slides, reports, rows, cases, scale):  # type: ignore[no-untyped-def]
        tile = max(64, TILE // len(slides))
        loss, lse, positives = reference.info_nce_rows(slides, reports, rows, cases, scale, tile)
        ctx.save_for_backward(slides, reports, rows, cases, scale, lse, positives)
        ctx.tile = tile
        return loss

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        d_slides, d_scale = reference.info_nce_rows_backward(grad, *ctx.saved_tensors, ctx.tile)
        return d_slides, None, None, None, d_scale


def tiles(given: Inputs) -> Tensor:
    """The reference of dre_fast: the same sums in plain torch."""
    return _Tiles.apply(given.slides, given.reports, given.rows, given.cases, given.scale)  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[Inputs], Tensor]] = {
    "dre_fast": ours,
    "whole matrix": whole,
    "whole matrix, compiled": whole_compiled,
    "whole matrix, bf16 product": whole_bf16,
    "tiles": tiles,
}


def ways(shape: Contrast, device: str) -> list[str]:
    """What is compared at a shape: a product in bf16 where the reports are, tiles where dre_fast does not run them."""
    left_out = set() if shape.dtype == torch.bfloat16 else {"whole matrix, bf16 product"}
    if contrast.backend("info_nce_rows", device) == "reference":
        left_out.add("tiles")
    return [name for name in WAYS if name not in left_out]


def step(given: Inputs, name: str) -> tuple[Tensor, ...]:
    """The loss and the gradients of slides and scale."""
    loss = WAYS[name](given)
    return (loss.detach(), *torch.autograd.grad(loss, (given.slides, given.scale), given.grad))


@lru_cache(maxsize=1)
def expected(shape: Contrast, device: str) -> tuple[Tensor, ...]:
    """What dre_fast gives."""
    return step(inputs(shape, device), "dre_fast")


def job(shape_id: str, name: str) -> Job:
    """One CPU way at one shape, to watch its memory."""
    shape = SHAPES[shape_id]
    given = inputs(shape, "cpu")
    small = given if "compiled" in name else inputs.__wrapped__(replace(shape, reports=200), "cpu")
    return Job(partial(step, given, name), partial(step, small, name))


CASES = [
    pytest.param(shape, device, name, id=f"{shape.id}-{device}-{name}", marks=marks)
    for shapes, device, marks in ((CPU_CONTRAST, "cpu", ()), (GPU_CONTRAST, "cuda", pytest.mark.gpu))
    for shape in shapes
    for name in ways(shape, device)
]


@pytest.mark.parametrize(("shape", "device", "name"), CASES)
def test_contrast(benchmark, peak_memory, shape: Contrast, device: str, name: str) -> None:
    if "compiled" in name and (reason := peers.why_no_compiler(device)):
        pytest.skip(reason)
    given = inputs(shape, device)
    run = partial(step, given, name)
    results, right = run(), expected(shape, device)
    least = 0.999 if "bf16" in name else 0.99999
    for got, wanted in zip(results, right, strict=True):
        assert functional.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > least
        assert abs(float(got.norm() / wanted.norm()) - 1) < 10 * (1 - least)

    calls = 5 if device == "cuda" else 1

    def some_calls() -> None:
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"loss against all reports, forward and backward, {shape.id} {device}: {shape}"
    benchmark.extra_info.update(
        implementation=name,
        ours=name == "dre_fast",
        backend=contrast.backend("info_nce_rows", device),
        bytes=shape.bytes,
        calls=calls,
        peak=peak_memory(run, device, "benchmarks.test_contrast:job", shape.id, name),
        difference=float((results[1] - right[1]).norm() / right[1].norm()),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
    )
    benchmark.pedantic(some_calls, rounds=10)  # it ran above
