"""SlideReportLoss: against the formulas, its gradients, its edges and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from dre_fast import SlideReportLoss
from dre_fast.ops import contrast
from dre_fast.reference import loss as reference
from dre_fast.reference.encode import l2_normalize

KINDS = ["infonce", "siglip"]


def double(loss: SlideReportLoss) -> SlideReportLoss:
    return loss.double()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_negatives_are_the_formula(kind: str) -> None:
    loss = double(SlideReportLoss(kind))
    slides, reports = torch.randn(6, 5).double(), torch.randn(4, 5).double()
    cases = torch.tensor([2, 0, 2, 1, 3, 3])
    a, b = l2_normalize(slides), l2_normalize(reports[cases])
    scale = loss.scale.detach()
    if kind == "infonce":
        expected = reference.info_nce(a, b, cases, scale)
        assert float(scale) == pytest.approx(1 / 0.07)
    else:
        assert loss.bias is not None
        expected = reference.siglip(a, b, cases, cases, scale, loss.bias.detach())
        assert float(scale) == pytest.approx(10)
    found = loss(slides, reports[cases], cases)
    torch.testing.assert_close(found.detach(), expected)
    names = ["S2", "S0", "S2", "S1", "S3", "S3"]
    assert loss(slides, reports[cases], names).item() == found.item()


@pytest.mark.parametrize("kind", KINDS)
def test_all_negatives_are_the_formula(kind: str) -> None:
    loss = double(SlideReportLoss(kind, "all"))
    reports, report_cases = torch.randn(30, 5).double(), torch.randperm(100)[:30]
    loss.set_reports(reports, report_cases)
    slides, rows = torch.randn(6, 5).double(), torch.tensor([4, 29, 4, 0, 7, 7])
    cases = report_cases[rows]
    a, b = l2_normalize(slides), l2_normalize(reports)
    scale = loss.scale.detach()
    if kind == "infonce":
        expected = reference.info_nce(a, b[rows], cases, scale, b, report_cases)
    else:
        assert loss.bias is not None
        expected = reference.siglip(a, b, cases, report_cases, scale, loss.bias.detach())
    found = loss(slides, reports[rows], cases)
    torch.testing.assert_close(found.detach(), expected)
    torch.testing.assert_close(loss(slides, None, cases).detach(), expected)  # the registered reports
    by_name = double(SlideReportLoss(kind, "all"))
    by_name.set_reports(reports, [f"TCGA-{int(case)}" for case in report_cases])
    torch.testing.assert_close(
        by_name(slides, None, [f"TCGA-{int(case)}" for case in cases]).detach(), expected
    )
    torch.testing.assert_close(
        loss.among(slides, reports[rows], cases), double(SlideReportLoss(kind))(slides, reports[rows], cases)
    )


@pytest.mark.parametrize("negatives", ["batch", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, negatives: str) -> None:
    loss = double(SlideReportLoss(kind, negatives, temperature=0.5, bias=-1.0))
    cohort = torch.randn(7, 3).double()
    loss.set_reports(cohort, torch.arange(7))
    cases = torch.tensor([1, 6, 1, 3])
    slides = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    parameters = list(loss.parameters())

    def run(slides: Tensor, *parameters: Tensor) -> Tensor:
        names = [name for name, _ in loss.named_parameters()]
        return torch.func.functional_call(
            loss, dict(zip(names, parameters, strict=True)), (slides, cohort[cases], cases)
        )

    assert gradcheck(run, (slides, *parameters))


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_normalised_inside(kind: str) -> None:
    loss = SlideReportLoss(kind)
    slides, reports = torch.randn(5, 8), torch.randn(5, 8)
    cases = torch.arange(5)
    expected = loss(slides, reports, cases)
    torch.testing.assert_close(loss(37 * slides, 0.01 * reports, cases), expected)


def test_training_matches_slides_to_reports() -> None:
    reports = torch.randn(12, 16)
    slides = torch.nn.Parameter(torch.randn(12, 16))
    for kind in KINDS:
        for negatives in ("batch", "all"):
            loss = SlideReportLoss(kind, negatives)
            loss.set_reports(reports, torch.arange(12))
            optimizer = torch.optim.Adam([slides, *loss.parameters()], lr=0.05)
            slides.data.normal_()
            before = loss(slides, reports, torch.arange(12)).item()
            for _ in range(150):
                optimizer.zero_grad()
                value = loss(slides, reports, torch.arange(12))
                value.backward()
                optimizer.step()
            assert value.item() < 0.3 * before
            nearest = (l2_normalize(slides.detach()) @ l2_normalize(reports).T).argmax(dim=1)
            assert torch.equal(nearest, torch.arange(12))


def test_edges_of_the_batch() -> None:
    report = torch.randn(1, 8)
    for negatives in ("batch", "all"):
        loss = SlideReportLoss(negatives=negatives)
        loss.set_reports(report, torch.tensor([5]))
        # one slide, one report: nothing to tell apart
        slide = torch.randn(1, 8, requires_grad=True)
        value = loss(slide, report, torch.tensor([5]))
        assert value.item() == pytest.approx(0.0, abs=1e-6)
        (grad,) = torch.autograd.grad(value, slide)
        torch.testing.assert_close(grad, torch.zeros(1, 8))
    # all slides of one case: log B where they agree
    loss = SlideReportLoss()
    value = loss(torch.randn(1, 8).expand(4, 8), report.expand(4, 8), ["one"] * 4)
    assert value.item() == pytest.approx(math.log(4), rel=1e-5)
    slides = torch.randn(4, 8, requires_grad=True)
    value = loss(slides, report.expand(4, 8), ["one"] * 4)
    assert value.item() > math.log(4)
    assert torch.isfinite(torch.autograd.grad(value, slides)[0]).all()
    # a zero embedding has no direction: finite value, no gradient from normalising it
    slides = torch.zeros(2, 8, requires_grad=True)
    value = loss(slides, torch.randn(2, 8), [0, 1])
    assert value.item() == pytest.approx(math.log(2), rel=1e-5)
    assert not torch.autograd.grad(value, slides)[0].any()


@pytest.mark.parametrize("negatives", ["batch", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind: str, negatives: str) -> None:
    loss = SlideReportLoss(kind, negatives)
    reports = torch.randn(40, 32)
    loss.set_reports(reports, torch.arange(40))
    cases = torch.tensor([1, 2, 2, 9])
    slides = torch.randn(4, 32)

    def run(enabled: bool) -> list[Tensor]:
        leaf = slides.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss(leaf, reports[cases], cases)
        assert value.dtype == torch.float32
        return [value.detach(), *torch.autograd.grad(value, [leaf, loss.log_scale])]

    plain, mixed = run(False), run(True)
    for one, other in zip(plain, mixed, strict=True):
        torch.testing.assert_close(one, other)
    assert loss(slides.half(), reports[cases].half(), cases).dtype == torch.float32


def test_temperature_is_learnt_within_its_bounds() -> None:
    loss = SlideReportLoss()
    assert float(loss.temperature) == pytest.approx(0.07)
    slides = torch.randn(16) + 0.3 * torch.randn(8, 16)  # much alike, so that sharper pays for long
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.2)
    for reports, bound in ((slides, 0.01), (-slides, 1.0)):  # sharper always pays, then never
        for _ in range(80):
            optimizer.zero_grad()
            loss(slides, reports, torch.arange(8)).backward()
            optimizer.step()
            assert 0.0099999 <= float(loss.temperature) <= 1.0000001
        assert float(loss.temperature) == pytest.approx(bound, rel=1e-4)


def test_a_temperature_that_overshot_comes_back() -> None:
    loss = SlideReportLoss()
    loss.log_scale.data.fill_(10.0)
    assert loss.scale.item() == pytest.approx(100.0)
    slides = torch.randn(8, 16)
    loss(slides, -slides, torch.arange(8)).backward()
    assert loss.log_scale.grad is not None
    assert float(loss.log_scale.grad) > 0  # descent lowers it
    loss.log_scale.grad = None
    loss.log_scale.data.fill_(-1.0)
    loss(slides, -slides, torch.arange(8)).backward()
    assert float(loss.log_scale.grad) == 0  # pushing further out is dropped


def test_reports_move_with_the_module_but_are_not_saved() -> None:
    loss = SlideReportLoss("siglip", "all")
    loss.set_reports(torch.randn(5, 4), list("abcde"))
    assert set(loss.state_dict()) == {"log_scale", "bias"}
    assert loss.double().reports is not None
    assert loss.reports.dtype == torch.float64
    torch.testing.assert_close(loss.reports.norm(dim=1), torch.ones(5).double())
    assert "registered reports=5" in repr(loss)
    other = SlideReportLoss("siglip", "all")
    other.load_state_dict(loss.state_dict())


def test_errors() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="kind must be"):
        SlideReportLoss("clip")
    with pytest.raises(ValueError, match="negatives must be"):
        SlideReportLoss(negatives="hard")
    with pytest.raises(ValueError, match="temperature must be"):
        SlideReportLoss(temperature=0.0)
    loss = SlideReportLoss()
    with pytest.raises(ValueError, match="needs report_emb"):
        loss(x, None, [0, 1, 2])
    with pytest.raises(ValueError, match=r"slide_emb is \(3, 4\), report_emb \(3, 5\)"):
        loss(x, torch.randn(3, 5), [0, 1, 2])
    with pytest.raises(ValueError, match="3 slides, but 2 case ids"):
        loss(x, x, [0, 1])
    with pytest.raises(ValueError, match=r"integers \[3\]"):
        loss(x, x, torch.ones(3))
    with pytest.raises(ValueError, match="B >= 1"):
        loss(x[:0], x[:0], [])
    bad = x.clone()
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"slide embedding 1 \(case 'B'\) holds NaN"):
        loss(bad, x, ["A", "B", "C"])
    with pytest.raises(ValueError, match=r"report embedding 1 \(case 8\) holds NaN"):
        loss(x, bad, torch.tensor([7, 8, 9]))


def test_errors_of_the_cohort() -> None:
    x = torch.randn(3, 4)
    loss = SlideReportLoss(negatives="all")
    with pytest.raises(ValueError, match="set_reports"):
        loss(x, x, [0, 1, 2])
    with pytest.raises(ValueError, match="M >= 1"):
        loss.set_reports(x[:0], [])
    with pytest.raises(ValueError, match="3 reports, but 2 case ids"):
        loss.set_reports(x, ["A", "B"])
    with pytest.raises(ValueError, match=r"report 2 \(case 'C'\) holds NaN"):
        loss.set_reports(torch.cat([x[:2], torch.full((1, 4), torch.inf)]), ["A", "B", "C"])
    loss.set_reports(x, ["A", "A", "B"])
    with pytest.raises(ValueError, match="no report is registered for case 'Z'"):
        loss(x, x, ["A", "Z", "B"])
    with pytest.raises(ValueError, match="pass a list"):
        loss(x, x, torch.arange(3))
    with pytest.raises(ValueError, match="case 'A' has 2 registered reports"):
        loss(x, None, ["B", "A", "B"])
    assert torch.isfinite(loss(x, x, ["B", "A", "B"]))
    with pytest.raises(ValueError, match="slide_emb has T=6, the registered reports T=4"):
        loss(torch.randn(3, 6), None, ["A", "A", "B"])
    for kind in KINDS:
        loss = SlideReportLoss(kind, "all")
        loss.set_reports(x, torch.tensor([4, 5, 6]))
        with pytest.raises(ValueError, match=r"no report is registered for case 9 \(row 1\)"):
            loss(x, x, torch.tensor([4, 9, 6]))
        with pytest.raises(ValueError, match="pass a tensor"):
            loss(x, x, [4, 5, 6])


def test_registered_operations() -> None:
    slides, reports = l2_normalize(torch.randn(3, 8)), l2_normalize(torch.randn(9, 8))
    given = (slides, reports, torch.tensor([2, 0, 2]), torch.arange(9) // 2, torch.tensor(5.0))
    loss, lse, positives = torch.ops.dre_fast.info_nce_rows(*given, 4)
    bias = torch.tensor(-1.0)
    for name, arguments in (
        ("info_nce_rows", (*given, 4)),
        ("info_nce_rows_backward", (loss, *given, lse, positives, 4)),
        ("siglip_rows", (*given, bias, 4)),
        ("siglip_rows_backward", (loss, *given, bias, 4)),
    ):
        assert name in contrast.NAMES
        torch.library.opcheck(getattr(torch.ops.dre_fast, name).default, arguments)
        assert contrast.backend(name, "cpu") == "reference"
        assert contrast.backend(name, "cuda", torch.float64) == "reference"
    with pytest.raises(ValueError, match="no contrast operation"):
        contrast.backend("info_nce")
