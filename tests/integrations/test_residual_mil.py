"""ResidualMIL: layouts, codebook and state, precision, odd bags, contributions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mil_bags import ASSIGNMENTS, CLASSES, CODEWORDS, DIM, fitted, padded, ragged, some_bags
from torch import nn

import dre_fast
from dre_fast import ResidualMIL
from dre_fast.ops.normalize import normalize_residuals


@pytest.mark.parametrize("head", ["transformer", "light"])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_every_layout_gives_the_logits_of_the_bags_by_themselves(assignment: str, head: str) -> None:
    model, bags = fitted(assignment, head=head), some_bags()
    alone = torch.cat([model(bag) for bag in bags])
    assert alone.shape == (len(bags), CLASSES)
    assert torch.isfinite(alone).all()
    assert alone.std(0).min() > 1e-3  # the bags differ
    x, cu = ragged(bags)
    torch.testing.assert_close(model(x, cu_seqlens=cu), alone)
    x, mask = padded(bags)
    torch.testing.assert_close(model(x, mask=mask), alone)
    order = torch.randperm(len(bags[0]))
    torch.testing.assert_close(model(bags[0][order]), alone[:1])


def test_it_is_encoding_then_slide_encoder_then_linear() -> None:
    model, bag = fitted(), some_bags()[0]
    V = dre_fast.residual_encode(bag, model.encoding.codebook, normalize=("intra", "l2"), normalize_rows=True)
    assert isinstance(model.head, dre_fast.SlideEncoder)
    assert torch.equal(model(bag), model.classifier(model.head(V)))
    assert torch.equal(model.embed(bag), model.head(V))


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_one_training_step_on_ragged_bags(assignment: str) -> None:
    model = fitted(assignment, dropout=0.1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, cu = ragged(some_bags())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = nn.functional.cross_entropy(model(x, cu_seqlens=cu), torch.tensor([0, 1, 2, 0, 1]))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"classifier.weight", "head.tokens.weight"} <= moved
    assert ("encoding.codebook" in moved) == (assignment != "hard")


def test_codebook_is_fitted_by_one_call_and_the_same_every_time() -> None:
    model, bags = ResidualMIL(DIM, 1, CODEWORDS, width=32), some_bags()
    inertia = model.fit_codebook(bags, seed=3)
    rows = nn.functional.normalize(torch.cat(bags), dim=1)
    assert inertia == pytest.approx(
        float(torch.cdist(rows, model.encoding.codebook).min(1).values.square().sum()), rel=1e-4
    )
    again = ResidualMIL(DIM, 1, CODEWORDS, width=32)
    again.fit_codebook([bag.numpy() for bag in bags], seed=3)
    assert torch.equal(model.encoding.codebook, again.encoding.codebook)
    again.fit_codebook(bags, seed=4)
    assert not torch.equal(model.encoding.codebook, again.encoding.codebook)


def test_before_the_codebook_is_fitted() -> None:
    model = ResidualMIL(DIM, 2, CODEWORDS, width=32)
    assert not model.fitted
    assert "not fitted" in repr(model)
    for call in (model, model.embed, model.contributions):
        with pytest.raises(RuntimeError, match=r"fit_codebook\(bags\)"):
            call(torch.randn(4, DIM))
    with pytest.raises(RuntimeError, match="not fitted"):
        ResidualMIL(DIM, 2, CODEWORDS, "soft", learnable=False, width=32)(torch.randn(4, DIM))
    assert ResidualMIL(DIM, 2, CODEWORDS, "netvlad", width=32)(torch.randn(4, DIM)).shape == (1, 2)
    model.fit_codebook(some_bags())
    assert model.fitted
    assert "not fitted" not in repr(model)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_state_dict_carries_the_codebook(assignment: str, tmp_path: Any) -> None:
    model, bag = fitted(assignment), some_bags()[0]
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = ResidualMIL(DIM, CLASSES, CODEWORDS, assignment, width=32).eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert other.fitted
    assert torch.equal(other(bag), model(bag))
    assert torch.equal(copy.deepcopy(model)(bag), model(bag))
    inside = nn.ModuleDict({"mil": ResidualMIL(DIM, CLASSES, CODEWORDS, assignment, width=32)})
    inside.load_state_dict({f"mil.{name}": value for name, value in model.state_dict().items()})
    assert inside["mil"].fitted
    other.load_state_dict(ResidualMIL(DIM, CLASSES, CODEWORDS, assignment, width=32).state_dict())
    assert not other.fitted


def test_codebook_of_another_model() -> None:
    model, other = fitted("soft"), ResidualMIL(DIM, 1, CODEWORDS, "soft", width=16)
    other.load_codebook(model.encoding.state_dict())
    assert other.fitted
    assert torch.equal(other.sums(some_bags()[0]), model.sums(some_bags()[0]))
    with pytest.raises(ValueError, match="the model needs"):
        ResidualMIL(DIM, 1, CODEWORDS, "hard", width=16).load_codebook(model.encoding.state_dict())


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16])
def test_autocast_encodes_in_fp32(assignment: str, rows: torch.dtype) -> None:
    model, bag = fitted(assignment).train(), some_bags(rows)[0]
    expected = model.sums(bag)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, V = model(bag), model.sums(bag)
        scores = model.contributions(bag, 1)
    assert logits.dtype == torch.bfloat16
    assert V.dtype == torch.float32
    assert torch.equal(V, expected)
    torch.testing.assert_close(logits.float(), model(bag), atol=0.05, rtol=0.05)
    assert torch.equal(scores, model.contributions(bag, 1))
    nn.functional.cross_entropy(logits.float(), torch.tensor([1])).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("normalize", [(), ("power",), ("intra", "l2")])
@pytest.mark.parametrize("normalize_rows", [True, False])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_contributions_sum_to_the_first_order_term(
    assignment: str, normalize_rows: bool, normalize: tuple[str, ...]
) -> None:
    model = fitted(assignment, normalize_rows=normalize_rows, normalize=normalize).double()
    for bag in some_bags(torch.float64):
        V = model.sums(bag).detach().requires_grad_()
        logit = model.classifier(model.head(normalize_residuals(V, model.normalize)))[0, 1]
        (gradient,) = torch.autograd.grad(logit, V)
        scores = model.contributions(bag, 1)
        assert scores.shape == (len(bag),)
        assert not scores.requires_grad
        term = (gradient * V).sum().detach()
        torch.testing.assert_close(scores.sum(), term, atol=1e-10, rtol=1e-10)
        if len(bag) > CODEWORDS and "intra" not in normalize:
            assert term.abs() > 1e-5  # a sum that says something


def test_under_intra_the_scores_of_a_codeword_sum_to_zero() -> None:
    model = fitted().double()
    bag = some_bags(torch.float64)[4]
    rows = nn.functional.normalize(bag, dim=1)
    codes = torch.cdist(rows, model.encoding.codebook).argmin(1)
    scores = model.contributions(bag, 1)
    assert scores.abs().max() > 1e-3
    per_codeword = torch.zeros(CODEWORDS, dtype=torch.float64).index_add(0, codes, scores)
    torch.testing.assert_close(per_codeword, torch.zeros_like(per_codeword), atol=1e-10, rtol=0)


def test_contributions_are_first_order_in_the_weight_of_a_tile() -> None:
    # without normalisation of V: adding a share e of a tile's residual moves the logit by e times its contribution
    model = fitted("soft", normalize=(), learnable=False).double()
    bag = some_bags(torch.float64)[0]
    scores, e = model.contributions(bag, 2), 1e-6
    model.requires_grad_(False)
    V = model.sums(bag)
    for tile in (0, 17):
        own = model.sums(bag[tile : tile + 1])
        moved, at = (model.classifier(model.head(v))[0, 2] for v in (V + e * own, V - e * own))
        assert float((moved - at) / (2 * e)) == pytest.approx(float(scores[tile]), rel=1e-5)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_contributions_in_every_layout(assignment: str) -> None:
    model, bags = fitted(assignment), some_bags()
    alone = [model.contributions(bag) for bag in bags]
    x, cu = ragged(bags)
    torch.testing.assert_close(model.contributions(x, cu_seqlens=cu), torch.cat(alone), atol=1e-5, rtol=1e-3)
    x, mask = padded(bags, float("-inf"))
    scores = model.contributions(x, mask=mask)
    assert scores.shape == mask.shape
    torch.testing.assert_close(scores[mask], torch.cat(alone), atol=1e-5, rtol=1e-3)
    assert not scores[~mask].any()
    every = model.class_contributions(x, mask=mask)
    assert every.shape == (CLASSES, *mask.shape)
    likely = model(x, mask=mask).argmax(1)
    assert len(likely.unique()) > 1  # of each bag its own class
    assert torch.equal(every.gather(0, likely[None, :, None].expand_as(every[:1]))[0], scores)
    assert torch.equal(model.contributions(x, likely, mask=mask), scores)


def test_contributions_where_no_gradient_is_recorded() -> None:
    model = fitted(dropout=0.5).train()
    bag = some_bags()[0]
    expected = model.contributions(bag, 0)
    with torch.no_grad():
        assert torch.equal(model.contributions(bag, 0), expected)
    with torch.inference_mode():
        assert torch.equal(model.contributions(bag.clone(), 0), expected)
    assert torch.equal(model.requires_grad_(False).contributions(bag, 0), expected)
    assert all(part.training for part in model.modules())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_jacobian_by_torch_func(assignment: str) -> None:
    model, bag = fitted(assignment), some_bags()[3]
    jacobian = torch.func.jacrev(lambda rows: model(rows)[0])(bag)
    by_rows = []
    for target in range(CLASSES):
        rows = bag.clone().requires_grad_()
        by_rows.append(torch.autograd.grad(model(rows)[0, target], rows)[0])
    torch.testing.assert_close(jacobian, torch.stack(by_rows))


def test_many_tiles_go_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, cu) = fitted("soft"), ragged(some_bags())
    whole = model.contributions(x, 1, cu_seqlens=cu)
    monkeypatch.setattr("dre_fast.nn.residual_mil._CHUNK_ENTRIES", 7 * DIM)
    torch.testing.assert_close(model.contributions(x, 1, cu_seqlens=cu), whole)


def test_a_new_classifier() -> None:
    model, bag = fitted(), some_bags()[0]
    h = model.embed(bag)
    model.reset_classifier(7)
    assert model(bag).shape == (1, 7)
    assert torch.equal(model.embed(bag), h)
    assert model.contributions(bag, 6).shape == (len(bag),)
    with pytest.raises(ValueError, match="classes must be at least 1"):
        model.reset_classifier(0)


def test_errors() -> None:
    model = fitted()
    with pytest.raises(ValueError, match=r"target must lie in 0 \.\. 2, got 3"):
        model.contributions(torch.randn(4, DIM), 3)
    with pytest.raises(ValueError, match="row 2 of bag 0 holds NaN"):
        model(torch.randn(4, DIM).index_fill_(0, torch.tensor([2]), float("nan")))
    with pytest.raises(ValueError, match="codebook D=12"):
        model(torch.randn(4, 7))
    with pytest.raises(ValueError, match="mask must be bool"):
        model(torch.randn(2, 4, DIM), mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="'transformer' or 'light'"):
        ResidualMIL(DIM, 2, head="mlp")
    with pytest.raises(ValueError, match="classes must be at least 1"):
        ResidualMIL(DIM, 0)
    with pytest.raises(ValueError, match="multiple of 4"):
        ResidualMIL(DIM, 2, width=30, head="light")
    with pytest.raises(ValueError, match="rows have D=7, not 12"):
        ResidualMIL(DIM, 2).fit_codebook([torch.randn(40, 7)])
