"""The loss formulas against loops pair by pair, and their streamed form against the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dre_fast.reference import loss as reference
from dre_fast.reference.encode import l2_normalize


def unit(rows: int, dim: int = 6) -> Tensor:
    return l2_normalize(torch.randn(rows, dim).double())


def cross_entropy_by_hand(logits: Tensor, rows: list[int], columns: list[int]) -> float:
    total = 0.0
    for i, case in enumerate(rows):
        normaliser = sum(math.exp(float(z)) for z in logits[i])
        own = [j for j, other in enumerate(columns) if other == case]
        total += sum(-math.log(math.exp(float(logits[i, j])) / normaliser) for j in own) / len(own)
    return total / len(rows)


@pytest.mark.parametrize("cases", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1], [7, 7, 7, 7, 7], [3]])
def test_info_nce_by_hand(cases: list[int]) -> None:
    slides, scale = unit(len(cases)), torch.tensor(3.0).double()
    reports = unit(8)[torch.tensor(cases)]
    logits = 3.0 * slides @ reports.T
    expected = (
        cross_entropy_by_hand(logits, cases, cases) + cross_entropy_by_hand(logits.T, cases, cases)
    ) / 2
    found = reference.info_nce(slides, reports, torch.tensor(cases), scale)
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_info_nce_against_a_cohort_by_hand() -> None:
    cohort, cohort_cases = unit(9), [0, 1, 2, 3, 4, 5, 5, 6, 7]  # case 5 has two reports
    cases = [5, 0, 0, 7]
    slides, scale = unit(4), torch.tensor(4.0).double()
    reports = cohort[torch.tensor([cohort_cases.index(case) for case in cases])]
    expected = (
        cross_entropy_by_hand(4.0 * slides @ cohort.T, cases, cohort_cases)
        + cross_entropy_by_hand(4.0 * reports @ slides.T, cases, cases)
    ) / 2
    found = reference.info_nce(
        slides, reports, torch.tensor(cases), scale, cohort, torch.tensor(cohort_cases)
    )
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_siglip_by_hand() -> None:
    slides, reports = unit(3), unit(5)
    cases, report_cases = [1, 4, 4], [0, 1, 2, 4, 1]
    expected = 0.0
    for i, case in enumerate(cases):
        for j, other in enumerate(report_cases):
            z = 5.0 * float(slides[i] @ reports[j]) - 2.0
            expected += math.log1p(math.exp(-z if case == other else z)) / 3
    found = reference.siglip(
        slides,
        reports,
        torch.tensor(cases),
        torch.tensor(report_cases),
        torch.tensor(5.0).double(),
        torch.tensor(-2.0).double(),
    )
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_case_mates_are_not_negatives() -> None:
    """Moving a slide nearer to the report of its case never costs: the gradient on that logit pulls."""
    cases = torch.tensor([0, 0, 1, 2])
    positive = reference.same_case(cases, cases)
    # at equal logits the share 1/p of a positive exceeds its softmax 1/B: the gradient is negative exactly
    # there
    flat = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(reference.cross_entropy_rows(flat, positive).sum(), flat)
    assert torch.equal(grad < 0, positive)


def test_one_case_reaches_log_b_where_the_slides_agree() -> None:
    report = unit(1).expand(6, -1)
    cases, scale = torch.zeros(6, dtype=torch.int64), torch.tensor(10.0).double()
    together = unit(1).expand(6, -1)
    assert float(reference.info_nce(together, report, cases, scale)) == pytest.approx(math.log(6))
    slides = unit(6).requires_grad_()
    apart = reference.info_nce(slides, report, cases, scale)
    (grad,) = torch.autograd.grad(apart, slides)
    apart = apart.detach()
    assert float(apart) > math.log(6)
    assert torch.isfinite(grad).all()
    step = reference.info_nce(l2_normalize(slides.detach() - 0.01 * grad), report, cases, scale)
    assert float(step) < float(apart)


def cohort() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    slides = unit(7).requires_grad_()
    reports = unit(50)
    report_cases = torch.randint(20, (50,))
    report_cases[:20] = torch.arange(20)
    cases = torch.tensor([3, 3, 0, 19, 7, 8, 3])
    return slides, reports, cases, report_cases, torch.tensor(12.0).double().requires_grad_()


@pytest.mark.parametrize("tile", [1, 7, 50, 64])
def test_streamed_info_nce(tile: int) -> None:
    slides, reports, cases, report_cases, scale = cohort()
    positive = reference.same_case(cases, report_cases)
    whole = reference.cross_entropy_rows(scale * slides @ reports.T, positive)
    weight = torch.randn(7).double()
    expected = torch.autograd.grad(whole, [slides, scale], weight)
    with torch.no_grad():
        loss, lse, positives = reference.info_nce_rows(slides, reports, cases, report_cases, scale, tile)
        found = reference.info_nce_rows_backward(
            weight, slides, reports, cases, report_cases, scale, lse, positives, tile
        )
    torch.testing.assert_close(loss, whole.detach())
    assert torch.equal(positives, positive.sum(dim=1))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tile", [1, 7, 50, 64])
def test_streamed_siglip(tile: int) -> None:
    slides, reports, cases, report_cases, scale = cohort()
    bias = torch.tensor(-3.0).double().requires_grad_()
    whole = reference.siglip(slides, reports, cases, report_cases, scale, bias)
    expected = torch.autograd.grad(whole, [slides, scale, bias])
    with torch.no_grad():
        loss = reference.siglip_rows(slides, reports, cases, report_cases, scale, bias, tile)
        found = reference.siglip_rows_backward(
            torch.full((7,), 1 / 7).double(), slides, reports, cases, report_cases, scale, bias, tile
        )
    torch.testing.assert_close(loss.mean(), whole.detach())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_streamed_log_sum_exp_does_not_overflow() -> None:
    slides = torch.eye(4)
    reports = torch.cat([-torch.eye(4), torch.eye(4)])
    cases, report_cases = torch.arange(4), torch.arange(8)
    loss, lse, _ = reference.info_nce_rows(slides, reports, cases, report_cases, torch.tensor(1e4), 3)
    torch.testing.assert_close(lse, torch.full((4,), 1e4))
    torch.testing.assert_close(loss, torch.full((4,), 2e4))


class _Total(TorchFunctionMode):
    """The largest number of elements of any result that owns its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out._base is None:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_streaming_memory_does_not_grow_with_the_cohort(kind: str) -> None:
    slides, cases = unit(8), torch.arange(8)
    scale, bias, tile = torch.tensor(5.0).double(), torch.tensor(-1.0).double(), 32
    largest = []
    for count in (64, 4096):
        reports, report_cases = unit(count), torch.arange(count)
        with _Total() as total:
            if kind == "infonce":
                _, lse, n = reference.info_nce_rows(slides, reports, cases, report_cases, scale, tile)
                reference.info_nce_rows_backward(
                    lse, slides, reports, cases, report_cases, scale, lse, n, tile
                )
            else:
                rows = reference.siglip_rows(slides, reports, cases, report_cases, scale, bias, tile)
                reference.siglip_rows_backward(rows, slides, reports, cases, report_cases, scale, bias, tile)
        largest.append(total.elements)
    assert largest[0] == largest[1] == 8 * tile
