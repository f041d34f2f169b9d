"""Survival losses against sums written out in float64, by hand, and by the symmetries they must have."""

from __future__ import annotations

import math

import pytest
import torch

from dre_fast.nn.survival import cox_loss, hazard_edges, hazard_loss, risk_score, survival_probabilities


def efron(risk: list[float], time: list[float], event: list[int]) -> float:
    """The definition, event time by event time, with plain floats."""
    total, events = 0.0, sum(event)
    for t in sorted({t for t, e in zip(time, event) if e}):
        dead = [math.exp(r) for r, u, e in zip(risk, time, event) if u == t and e]
        there = sum(math.exp(r) for r, u in zip(risk, time) if u >= t)
        for l in range(len(dead)):
            total += math.log(there - l / len(dead) * sum(dead))
        total -= sum(math.log(x) for x in dead)
    return total / max(events, 1)


def hazards(logits: list[list[float]], time: list[float], event: list[int], edges: list[float]) -> float:
    total = 0.0
    for row, t, e in zip(logits, time, event):
        own = sum(t >= edge for edge in edges)
        h = [1 / (1 + math.exp(-x)) for x in row]
        likelihood = math.prod(1 - x for x in h[:own]) * (h[own] if e else 1 - h[own])
        total -= math.log(likelihood)
    return total / len(time)


def cohort(seed: int, n: int = 40, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    time = torch.rand(n, generator=g).mul(12)
    return (
        torch.randn(n, generator=g).double(),
        time.ceil() if ties else time,
        (torch.rand(n, generator=g) < 0.6).float(),
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [False, True])
def test_cox_equals_the_definition(seed: int, ties: bool):
    risk, time, event = cohort(seed, ties=ties)
    expected = efron(risk.tolist(), time.tolist(), event.int().tolist())
    assert cox_loss(risk, time, event).item() == pytest.approx(expected, rel=1e-12)
    single = cox_loss(risk.float(), time, event.bool())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-6)
    assert cox_loss(risk.bfloat16(), time, event).dtype == torch.float32


def test_cox_by_hand():
    # Three deaths and one censored at 2, all of the same risk: risk sets of 4, 3 and 1.
    zero, time = torch.zeros(4), torch.tensor([1.0, 2, 2, 3])
    untied = cox_loss(zero, time, torch.tensor([1, 1, 0, 1]))
    assert untied.item() == pytest.approx((math.log(4) + math.log(3) + math.log(1)) / 3)
    # Both at 2 die: Efron takes 3 and then 3 - 1/2 * 2 = 2.
    tied = cox_loss(zero, time, torch.tensor([1, 1, 1, 1]))
    assert tied.item() == pytest.approx((math.log(4) + math.log(3) + math.log(2) + math.log(1)) / 4)
    # The one at higher hazard (3 to 1) dies first: probability 3/4; last: 1/4.
    risk = torch.tensor([math.log(3.0), 0.0])
    assert cox_loss(risk, torch.tensor([1.0, 2]), torch.ones(2)).item() == pytest.approx(-math.log(3 / 4) / 2)
    assert cox_loss(risk, torch.tensor([2.0, 1]), torch.ones(2)).item() == pytest.approx(-math.log(1 / 4) / 2)


def test_cox_finds_the_known_hazard_ratio():
    # Deaths at 1 (treated), 2 (control), 3 (treated), 4 (control). With hazard ratio x the risk sets weigh 2x + 2, x + 2,
    # x + 1 and 1, so the slope of the likelihood is 2 - 2x/(2x + 2) - x/(x + 2) - x/(x + 1), zero where x^2 = x + 4.
    time, treated = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 0, 1, 0]).double()

    def slope(b: float) -> float:
        log_ratio = torch.tensor(b, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(cox_loss(log_ratio * treated, time, torch.ones(4)), log_ratio)[0].item()

    assert slope(math.log((1 + math.sqrt(17)) / 2)) == pytest.approx(0, abs=1e-12)
    assert slope(0.0) == pytest.approx(-(2 - 1 / 2 - 1 / 3 - 1 / 2) / 4)


@pytest.mark.parametrize("ties", [False, True])
def test_gradients(ties: bool):
    risk, time, event = cohort(7, n=8, ties=ties)
    assert torch.autograd.gradcheck(lambda r: cox_loss(r, time, event), risk.requires_grad_())
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 4, dtype=torch.float64, generator=g, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hazard_loss(x, time, event, [3.0, 6, 9]), logits)


def test_cox_is_blind_to_order_units_and_a_common_shift():
    risk, time, event = cohort(3, ties=True)
    loss = cox_loss(risk, time, event)
    order = torch.randperm(len(risk), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(cox_loss(risk[order], time[order], event[order]), loss)
    torch.testing.assert_close(cox_loss(risk, time / 12, event), loss)
    torch.testing.assert_close(cox_loss(risk + 3, time, event), loss)
    # Far from zero fp32 has few digits left, but they are enough once the common part is gone.
    coarse = (risk * 8).round() / 8
    near = cox_loss(coarse.float(), time, event)
    torch.testing.assert_close(cox_loss(coarse.float() + 65536, time, event), near, rtol=1e-5, atol=0)


def test_extreme_risks_stay_finite():
    time, event = torch.arange(1.0, 5.0), torch.ones(4)
    risk = torch.tensor([-400.0, 300.0, -200.0, 500.0], requires_grad=True)
    loss = cox_loss(risk, time, event)
    loss.backward()
    # each of the first three loses to the last: 900 + 200 + 700
    assert loss.item() == pytest.approx(1800 / 4)
    torch.testing.assert_close(risk.grad, torch.tensor([-1.0, -1, -1, 3]) / 4)
    logits = torch.tensor([[-500.0, 500.0]], requires_grad=True)
    value = hazard_loss(logits, torch.tensor([0.5]), torch.ones(1), [1.0])
    value.backward()
    assert value.item() == 500
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 0]]))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_no_event_is_zero_with_a_graph(n: int):
    risk = torch.ones(n, requires_grad=True)
    loss = cox_loss(risk, torch.arange(float(n)), torch.zeros(n))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(risk.grad, torch.zeros(n))
    empty = torch.ones(0, 3, requires_grad=True)
    loss = hazard_loss(empty, torch.ones(0), torch.ones(0), [1.0, 2.0])
    loss.backward()
    assert loss.item() == 0


def test_a_single_death_teaches_cox_nothing():
    risk = torch.tensor([2.0], requires_grad=True)
    loss = cox_loss(risk, torch.tensor([3.0]), torch.ones(1))
    loss.backward()
    assert loss.item() == risk.grad.item() == 0


@pytest.mark.parametrize("seed", range(3))
def test_hazards_equal_the_definition(seed: int):
    _, time, event = cohort(seed, ties=True)  # times on the edges, too
    edges = [2.0, 5.0, 9.0]
    logits = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = hazards(logits.tolist(), time.tolist(), event.int().tolist(), edges)
    assert hazard_loss(logits, time, event, edges).item() == pytest.approx(expected, rel=1e-12)
    assert hazard_loss(logits.float(), time, event, edges).item() == pytest.approx(expected, rel=1e-6)


def test_hazards_by_hand():
    # Hazards 1/2 and 1/4 (edge at 10). Event at 5: 1/2. At 10: 1/2 * 1/4. Censored at 5: 1/2. At 12: 1/2 * 3/4.
    logits = torch.tensor([[0.0, -math.log(3.0)]])
    for time, event, likelihood in ((5, 1, 1 / 2), (10, 1, 1 / 8), (5, 0, 1 / 2), (12, 0, 3 / 8)):
        loss = hazard_loss(logits, torch.tensor([float(time)]), torch.tensor([event]), [10.0])
        assert loss.item() == pytest.approx(-math.log(likelihood))
    torch.testing.assert_close(survival_probabilities(logits), torch.tensor([[1 / 2, 3 / 8]]))
    torch.testing.assert_close(risk_score("hazard", logits), torch.tensor([-7 / 8]))
    torch.testing.assert_close(risk_score("cox", torch.tensor([[1.5], [-2]])), torch.tensor([1.5, -2]))


def test_best_hazards_are_those_of_the_life_table():
    # 10 at risk, 3 die in the first interval and 1 is censored there; of the other 6, 2 die in the second.
    time = torch.tensor([1.0] * 4 + [2.0] * 6)
    event = torch.tensor([1.0] * 3 + [0] + [1.0] * 2 + [0] * 4)
    h = torch.tensor([3 / 10, 2 / 6], dtype=torch.float64)
    logits = torch.logit(h).requires_grad_()
    hazard_loss(logits.expand(10, 2), time, event, [1.5]).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(2, dtype=torch.float64))


def test_edges_are_quantiles_of_the_event_times():
    time = torch.tensor([1.0, 2, 3, 4, 5, 100, 200, float("nan")])
    event = torch.tensor([1.0, 1, 1, 1, 1, 0, 0, float("nan")])
    assert hazard_edges(time, event, 4) == [2.0, 3.0, 4.0]
    assert hazard_edges(time, event, 2) == [3.0]
    with pytest.raises(ValueError, match="at least 2"):
        hazard_edges(time, event, 1)
    with pytest.raises(ValueError, match="5 distinct event times are too few for 6"):
        hazard_edges(time, event, 6)
    with pytest.raises(ValueError, match="2 distinct event times are too few for 3"):
        hazard_edges(torch.tensor([1.0, 1, 1, 9]), torch.ones(4), 3)
    with pytest.raises(ValueError, match="0 distinct event times"):
        hazard_edges(time, torch.zeros(8), 2)
    g = torch.Generator().manual_seed(0)
    many, bins = torch.rand(1000, generator=g), 5
    own = torch.bucketize(many.double(), torch.tensor(hazard_edges(many, torch.ones(1000), bins)).double())
    assert own.bincount().tolist() == [200] * bins


def test_what_does_not_fit_is_refused():
    one, two = torch.ones(1), torch.ones(2)
    with pytest.raises(ValueError, match=r"\(2,\), \(1,\)"):
        cox_loss(two, one, one)
    with pytest.raises(ValueError, match="1 dimension"):
        cox_loss(torch.ones(2, 1), two, two)
    with pytest.raises(ValueError, match="3 logits"):
        hazard_loss(torch.ones(2, 3), two, two, [1.0])
