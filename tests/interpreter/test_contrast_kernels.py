"""The Triton loss against all reports, beside the float64 reference: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from contrast_check import KINDS, check, make
from dre_fast import SlideReportLoss
from dre_fast.kernels import (
    contrast_config,
    info_nce_rows,
    info_nce_rows_backward,
    siglip_rows,
    siglip_rows_backward,
)
from dre_fast.kernels import contrast_forward as forward
from dre_fast.ops import contrast
from dre_fast.reference import loss as reference

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("slides", "reports", "dim", "scale"),
    [(1, 1, 64, 100.0), (3, 63, 100, 1.0), (3, 63, 384, 100.0), (65, 63, 64, 14.0), (3, 1000, 64, 100.0)],
)
def test_sizes(
    slides: int, reports: int, dim: int, scale: float, kind: str, dtype: torch.dtype, kernel_device: str
) -> None:
    check(*make(slides, reports, dim, dtype, kernel_device), kind, scale)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "scale"), [(100, 1.0), (384, 100.0)])
def test_many_slides_and_reports(
    dim: int, scale: float, kind: str, dtype: torch.dtype, kernel_device: str
) -> None:
    check(*make(65, 1000, dim, dtype, kernel_device), kind, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_reports(kind: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward takes 300 reports in three chunks, the last of them not full."""
    given = make(5, 300, 40, torch.bfloat16, kernel_device)
    whole = check(*given, kind, 10.0)
    monkeypatch.setattr(contrast_config, "_SCRATCH", 32 * 128)
    for one, other in zip(check(*given, kind, 10.0), whole, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_positives(kind: str, kernel_device: str) -> None:
    """All reports of one case, all slides of one case, every pair."""
    slides, reports, slide_cases, report_cases = make(4, 70, 32, torch.float32, kernel_device)
    large = 2**40 + report_cases  # cases are 64 bits wide
    check(slides, reports, slide_cases + 2**40, large, kind, 10.0)
    check(slides, reports, torch.full_like(slide_cases, 7), torch.full_like(report_cases, 7), kind, 10.0)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_slide_without_positives_spoils_no_other(kernel_device: str) -> None:
    slides, reports, slide_cases, report_cases = make(4, 70, 32, torch.float32, kernel_device)
    scale, grad = torch.tensor(10.0, device=kernel_device), torch.ones(4, device=kernel_device)
    given = (slides, reports, slide_cases, report_cases, scale)
    loss, lse, positives = info_nce_rows(*given)
    d_slides = info_nce_rows_backward(grad, *given, lse, positives)[0]
    slide_cases[2] = -5
    alone = info_nce_rows(*given)
    d_alone, d_scale = info_nce_rows_backward(grad, *given, *alone[1:])
    assert alone[0].isnan().tolist() == [False, False, True, False]
    assert alone[2].tolist() == [*positives[:2].tolist(), 0, int(positives[3])]
    assert torch.equal(alone[1], lse)
    assert d_alone.isnan().all(1).tolist() == [False, False, True, False]
    assert d_scale.isnan()  # as in the formula: it is a sum over all slides
    others = [0, 1, 3]
    assert torch.equal(alone[0][others], loss[others])
    assert torch.equal(d_alone[others], d_slides[others])
    # the sigmoid loss has no mean over positives: it is finite
    check(*given[:4], "sigmoid", 10.0)


@pytest.mark.parametrize("bias", [-60.0, -20.0, 0.0, 60.0])
def test_sigmoid_losses_near_zero_keep_their_digits(bias: float, kernel_device: str) -> None:
    slides, reports, _, report_cases = make(3, 70, 32, torch.float32, kernel_device)
    none = torch.full((3,), -1, device=kernel_device)
    scale, shift = torch.tensor(8.0, device=kernel_device), torch.tensor(bias, device=kernel_device)
    found = siglip_rows(slides, reports, none, report_cases, scale, shift)
    exact = reference.siglip_rows(
        slides.double(), reports.double(), none, report_cases, scale.double(), shift.double(), 100
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_slides_in_three_parts_are_whole(kernel_device: str) -> None:
    slides, reports, *_ = make(3, 5, 100, torch.bfloat16, kernel_device)
    parts = forward.prepare(slides, reports)[0].float()
    assert parts.shape == (3, 32, 128)
    assert torch.equal(parts, parts.bfloat16().float())
    expected = torch.zeros(32, 128, device=kernel_device)
    expected[:3, :100] = slides
    assert torch.equal(parts.double().sum(0), expected.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype, kernel_device: str) -> None:
    """Strided, transposed and unaligned views give what their contiguous copies give."""
    slides, reports, *cases = make(4, 40, 32, dtype, kernel_device)
    scale, grad = torch.tensor(5.0, device=kernel_device), torch.ones(4, device=kernel_device)

    def run(x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = info_nce_rows(x, r, *cases, scale)
        return *found, *info_nce_rows_backward(grad.expand(4), x, r, *cases, scale, *found[1:])

    expected = run(slides, reports)
    padded = torch.cat([reports, torch.full_like(reports, float("nan"))], 1)[:, :32]
    shifted = torch.cat([reports.new_zeros(1), reports.flatten()])[1:].view_as(reports)
    for x in (slides, slides.T.contiguous().T):
        for r in (padded, shifted, reports.T.contiguous().T):
            found = run(x, r)
            assert found[3].stride() == torch.empty_like(x).stride()
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other)


def test_bad_arguments_are_named(kernel_device: str) -> None:
    slides, reports, *cases = make(4, 9, 16, torch.float32, kernel_device)
    one = torch.tensor(1.0, device=kernel_device)
    for x, r, message in (
        (slides[:, :8], reports, r"slides must be \[B, T\]"),
        (slides.double(), reports.double(), "fp32 slides"),
        (slides, reports.half(), "fp32 or bf16 reports"),
        (slides, reports[:0], "B, M >= 1"),
        (slides[:0], reports, "B, M >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            info_nce_rows(x, r, *cases, one)
    wide = torch.zeros(4, 4097, device=kernel_device)
    with pytest.raises(ValueError, match="T from 1 to 4096"):
        siglip_rows(wide, wide, *cases, one, one)
    with pytest.raises(ValueError, match=r"slide_cases must be int64 \[4\]"):
        info_nce_rows(slides, reports, cases[0].int(), cases[1], one)
    with pytest.raises(ValueError, match=r"report_cases must be int64 \[9\]"):
        info_nce_rows(slides, reports, cases[0], cases[1][:3], one)
    with pytest.raises(ValueError, match="scale and bias must be fp32"):
        siglip_rows(slides, reports, *cases, one, one.double())
    with pytest.raises(ValueError, match="scale and bias must be fp32"):
        info_nce_rows(slides, reports, *cases, one.expand(4))
    with pytest.raises(ValueError, match=r"gradient and logsumexp must be fp32 \[4\]"):
        siglip_rows_backward(one.expand(5), slides, reports, *cases, one, one)
    with pytest.raises(ValueError, match=r"positives must be int64 \[4\]"):
        info_nce_rows_backward(one.expand(4), slides, reports, *cases, one, one.expand(4), cases[0][:2])


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_the_loss_module_through_the_kernels(
    kind: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registered operations hand the kernels what they hand the reference: loss and every gradient agree."""
    reports, slides = torch.randn(50, 24), torch.randn(5, 24)
    cases = torch.tensor([3, 40, 3, 7, 0])

    def run(backend: str) -> list[torch.Tensor]:
        monkeypatch.setattr(contrast, "backend", lambda *_: backend)
        loss = SlideReportLoss(kind, "all").to(kernel_device)
        loss.set_reports(reports, torch.arange(50) // 2 * 2)
        leaf = slides.to(kernel_device).requires_grad_()
        value = loss(leaf, leaf.detach().flip(1), (cases // 2 * 2).to(kernel_device))
        return [value.detach(), *torch.autograd.grad(value, [leaf, *loss.parameters()])]

    for one, other in zip(run("Triton"), run("reference"), strict=True):
        torch.testing.assert_close(one, other)
