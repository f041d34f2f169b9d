"""Harrell's c-index against a count of pairs, and the rows that it gives for files of predictions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dre_fast.data.cohort import Cohort, SlideRecord
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.eval import scores
from dre_fast.eval.metrics import c_index, evaluate_predictions
from dre_fast.eval.probe import linear_probe

NAN = float("nan")
CARD = {"kind": "survival", "classes": [], "columns": ["T", "E"], "method": "cox", "bins": 4, "edges": []}


def counted(risk, time, event, weight) -> float:
    good = pairs = 0.0
    for i, j in itertools.permutations(range(len(risk)), 2):
        if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
            pairs += weight[i] * weight[j]
            good += weight[i] * weight[j] * (1.0 if risk[i] > risk[j] else 0.5 * (risk[i] == risk[j]))
    return good / pairs if pairs else NAN


def index(risk, time, event) -> float:
    n = len(risk)
    return scores.c_index(
        np.array(risk, float), np.array(time, float), np.array(event, bool), np.ones((1, n))
    )[0]


def test_by_hand():
    assert index([3, 2, 1], [1, 2, 3], [1, 1, 1]) == 1
    assert index([1, 2, 3], [1, 2, 3], [1, 1, 1]) == 0
    assert index([3, 1, 2], [1, 2, 3], [1, 1, 1]) == pytest.approx(2 / 3)
    assert index([1, 1, 1], [1, 2, 3], [1, 1, 1]) == 0.5
    # censored at 1: it may have gone at any time after, so only the pair of the other two compares
    assert index([0, 2, 1], [1, 2, 3], [0, 1, 1]) == 1
    # event and censoring at one time: the event came first; two events at one time do not compare
    assert index([2, 1], [5, 5], [1, 0]) == 1
    assert index([2, 1, 0], [5, 5, 6], [1, 1, 0]) == 1
    assert np.isnan(index([2, 1], [5, 5], [1, 1]))
    assert np.isnan(index([2, 1], [1, 5], [0, 0]))
    assert np.isnan(index([], [], []))


def test_pairs_of_different_models_do_not_count():
    risk, time = np.array([3.0, 1.0, 10.0, 20.0]), np.array([1.0, 2.0, 3.0, 4.0])
    event, weights = np.ones(4, dtype=bool), np.ones((1, 4))
    model = np.array([0, 0, 7, 7])
    # of 0 with 1 the earlier has the higher risk, of 2 with 3 the later; the other four pairs are of two models
    assert scores.c_index(risk, time, event, weights, model) == 0.5
    assert scores.c_index(risk, time, event, weights) == pytest.approx(1 / 6)
    assert np.isnan(scores.c_index(risk, time, event, weights, np.arange(4)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [False, True])
def test_weights_count_pairs(monkeypatch, seed: int, ties: bool):
    monkeypatch.setattr(scores, "_PAIRS", 300)  # several blocks
    rng = np.random.default_rng(seed)
    risk, time, event = rng.normal(size=40), rng.exponential(3, 40), rng.random(40) < 0.6
    if ties:
        risk, time = np.round(risk), np.ceil(time)
    weights = np.stack([np.ones(40), *rng.integers(0, 4, (4, 40))]).astype(float)
    got = scores.c_index(risk, time, event, weights)
    for value, weight in zip(got, weights):
        assert value == pytest.approx(counted(risk, time, event, weight), rel=1e-12)
    repeated = np.repeat(np.arange(40), weights[1].astype(int))  # a weight is a number of copies
    assert got[1] == pytest.approx(index(risk[repeated], time[repeated], event[repeated]), rel=1e-12)


def study(n: int = 60, slides_per_case: int = 2) -> tuple[SlideEmbeddings, Cohort, np.ndarray]:
    rng = np.random.default_rng(0)
    case = np.arange(n) // slides_per_case
    risk = rng.normal(size=n // slides_per_case)
    time = rng.exponential(np.exp(-risk)) + 0.01
    event = rng.random(len(risk)) < 0.7
    known = rng.random(len(risk)) < 0.8
    records = [
        SlideRecord(
            f"s{i}",
            f"c{case[i]}",
            labels={
                "T": repr(float(time[case[i]])) if known[case[i]] else None,
                "E": str(int(event[case[i]])) if known[case[i]] else None,
            },
        )
        for i in range(n)
    ]
    logits = (risk[case] + rng.normal(size=n)).astype(np.float32)
    e = SlideEmbeddings(
        [f"s{i}" for i in range(n)],
        torch.zeros(n, 2),
        None,
        {"os": torch.tensor(logits)[:, None]},
        {"os": CARD},
    )
    return e, Cohort(records, ("T", "E")), logits


def test_a_row_with_an_interval_over_cases():
    e, cohort, logits = study()
    (row,) = evaluate_predictions(e, cohort, bootstrap=200)
    target = cohort.encode(cohort_task())
    there = ~np.isnan(target[:, 0].numpy())
    time, event = target[there, 0].numpy(), target[there, 1].numpy()
    assert row.metric == "c-index"
    assert (row.task, row.column, row.note) == ("os", None, "")
    assert row.value == pytest.approx(counted(logits[there], time, event, np.ones(there.sum())))
    assert row.value == pytest.approx(c_index("cox", e.logits["os"], target))
    assert (row.samples, row.cases) == (there.sum(), there.sum() // 2)
    assert row.low < row.value < row.high
    assert 0.5 < row.value < 1
    assert evaluate_predictions(e, cohort, bootstrap=200) == [row]


def cohort_task():
    from dre_fast.data.cohort import Task

    return Task.from_card("os", CARD)


def test_by_patient_risks_are_averaged():
    e, cohort, logits = study()
    (row,) = evaluate_predictions(e, cohort, level="patient", bootstrap=0)
    target = cohort.encode(cohort_task())[::2].numpy()
    there = ~np.isnan(target[:, 0])
    mean = logits.astype(float).reshape(-1, 2).mean(1)
    assert row.value == pytest.approx(
        counted(mean[there], target[there, 0], target[there, 1], np.ones(there.sum()))
    )
    assert row.samples == row.cases == there.sum()
    cohort.records[1].labels["T"] = "123"
    cohort.records[1].labels["E"] = "1"
    cohort.records[0].labels.update({"T": "7", "E": "1"})
    with pytest.raises(ValueError, match="column 'T': slides of case 'c0' have different labels"):
        evaluate_predictions(e, cohort, level="patient", bootstrap=0)


def test_hazards_are_judged_by_their_survival():
    # probabilities of outliving both intervals: 0.9 and 0.81; 0.1 and 0.01; 0.5 and 0.25
    logits = torch.logit(torch.tensor([[0.1, 0.1], [0.9, 0.9], [0.5, 0.5]]))
    target = torch.tensor([[9.0, 1], [1, 1], [4, 1]])
    assert c_index("hazard", logits, target) == 1
    # the other way round: last, first and in between go at 4, 1 and 9; one pair of three is wrong
    assert c_index("hazard", logits, target.flip(0)) == pytest.approx(2 / 3)
    card = {**CARD, "method": "hazard", "bins": 2, "edges": [3.0]}
    records = [
        SlideRecord(f"s{i}", f"c{i}", labels={"T": str(t), "E": "1:DEAD"}) for i, t in enumerate([9, 1, 4])
    ]
    e = SlideEmbeddings(["s0", "s1", "s2"], torch.zeros(3, 1), None, {"os": logits}, {"os": card})
    assert evaluate_predictions(e, Cohort(records, ("T", "E")), bootstrap=0)[0].value == 1


def test_nothing_to_compare_is_none_and_says_why():
    assert c_index("cox", torch.zeros(3, 1), torch.tensor([[1.0, 0], [2, 0], [NAN, NAN]])) is None
    e, _, _ = study(4)
    for value, note in ((None, "no labels"), ("0", "no two samples can be compared")):
        labels = {"T": value and "5", "E": value}
        records = [SlideRecord(f"s{i}", f"c{i}", labels=dict(labels)) for i in range(4)]
        (row,) = evaluate_predictions(e, Cohort(records, ("T", "E")), bootstrap=20)
        assert row.value is None
        assert row.note == note


def test_files_keep_what_the_head_means(tmp_path):
    card = {**CARD, "method": "hazard", "bins": 3, "edges": [1.25, 7.5]}
    e = SlideEmbeddings(["a"], torch.zeros(1, 1), None, {"os": torch.zeros(1, 3)}, {"os": card})
    for name in ("e.safetensors", "e.h5"):
        e.save(tmp_path / name)
        assert SlideEmbeddings.load(tmp_path / name).tasks == {"os": card}
    with pytest.raises(ValueError, match=r"'os'.*needs 3 logits a slide, got 2"):
        SlideEmbeddings(["a"], torch.zeros(1, 1), None, {"os": torch.zeros(1, 2)}, {"os": card})


def test_a_linear_probe_does_not_fit_survival():
    e, cohort, _ = study()
    with pytest.raises(ValueError, match=r"'os'.*does not fit survival"):
        linear_probe(e, cohort, [cohort_task()])
