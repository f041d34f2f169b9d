"""Paired differences in AUC: the right numbers, by case, on the slides that both models judge."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dre_fast.data.cohort import Cohort, SlideRecord
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.eval.metrics import evaluate_predictions, task_of
from dre_fast.eval.paired import paired_differences

CARDS = {
    "grade": {"kind": "multiclass", "classes": ["x", "y", "z"], "columns": ["grade"]},
    "tumour": {"kind": "binary", "columns": ["tumour"]},
    "genes": {"kind": "multilabel", "columns": ["EGFR", "TP53", "RARE"]},
}


def study(cases: int = 40, noise: tuple[float, float] = (1.0, 1.4), shared: float = 1.0):
    """A cohort of two slides a case, and two models whose errors are partly the same."""
    rng = np.random.default_rng(0)
    grade, yes = rng.integers(3, size=cases), rng.integers(2, size=(cases, 3))
    records, ids = [], []
    for i in range(2 * cases):
        case = i // 2
        labels = {"grade": None if i == 3 else "xyz"[grade[case]], "tumour": str(yes[case, 0])}
        labels |= {"EGFR": str(yes[case, 1]) if i % 5 else None, "TP53": str(yes[case, 2]), "RARE": "0"}
        records.append(SlideRecord(f"s{i}", f"c{case}", labels=labels))
        ids.append(f"s{i}")
    cohort = Cohort(records, ["grade", "tumour", "EGFR", "TP53", "RARE"])
    common = shared * rng.normal(size=(2 * cases, 7))
    models = []
    for level in noise:
        scores = common + level * rng.normal(size=(2 * cases, 7))
        scores[:, :3] += 2 * np.eye(3)[grade.repeat(2)]
        scores[:, 3:6] += 2 * yes.repeat(2, axis=0)
        x = torch.tensor(scores).float()
        logits = {"grade": x[:, :3], "tumour": x[:, 3:4], "genes": x[:, 4:7]}
        models.append(SlideEmbeddings(ids, torch.zeros(len(ids), 2), None, logits, CARDS))
    return cohort, models


def test_aucs_are_those_of_evaluate_and_the_difference_is_theirs():
    cohort, models = study()
    expected = [
        {
            (r.task, r.column): r.value
            for r in evaluate_predictions(m, cohort, bootstrap=0)
            if r.metric == "auc"
        }
        for m in models
    ]
    rows = paired_differences(*models, cohort, bootstrap=50)
    assert [(row.task, row.column) for row in rows] == [
        *(("grade", None), ("tumour", None), ("genes", None), ("genes", "EGFR")),
        *(("genes", "TP53"), ("genes", "RARE")),
    ]
    for row in rows:
        key = row.task, row.column
        assert row.first == pytest.approx(expected[0][key]), key
        assert row.second == pytest.approx(expected[1][key]), key
        if row.column == "RARE":
            assert row.difference is None
            continue
        assert row.difference == pytest.approx(row.first - row.second)
        assert row.low < row.difference < row.high
    assert rows[0].samples == 79
    assert "without 1 of 3 columns" in rows[2].note


def test_intervals_are_those_of_resampled_cases():
    cohort, models = study(cases=15)
    (row,) = [r for r in paired_differences(*models, cohort, bootstrap=4000, seed=1) if r.task == "tumour"]
    rng = np.random.default_rng(7)
    y = cohort.encode(task_of("tumour", CARDS["tumour"])).numpy()
    scores = [m.logits["tumour"][:, 0].numpy() for m in models]
    found = []
    for _ in range(4000):
        drawn = rng.integers(15, size=15)
        slides = np.concatenate([2 * drawn, 2 * drawn + 1])
        a, b = (_auc(score[slides], y[slides]) for score in scores)
        found.append(a - b)
    low, high = np.nanquantile(found, [0.025, 0.975])
    assert row.low == pytest.approx(low, abs=0.02)
    assert row.high == pytest.approx(high, abs=0.02)
    again = [r for r in paired_differences(*models, cohort, bootstrap=4000, seed=1) if r.task == "tumour"]
    assert again == [row]


def test_what_is_easy_for_both_cancels():
    cohort, models = study(noise=(0.1, 0.1), shared=2.0)
    single = {
        r.task: r for r in evaluate_predictions(models[0], cohort) if r.metric == "auc" and r.column is None
    }
    row = paired_differences(*models, cohort)[1]
    assert row.high - row.low < 0.5 * (single["tumour"].high - single["tumour"].low)
    same = paired_differences(models[0], models[0], cohort)[0]
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)


def test_only_common_slides_and_equal_tasks_are_judged():
    cohort, (first, second) = study()
    part = second.select(second.slide_ids[20:])
    assert paired_differences(first, part, cohort, bootstrap=0)[1].samples == 60
    turned = {**CARDS, "grade": {**CARDS["grade"], "classes": ["z", "y", "x"]}}
    other = SlideEmbeddings(second.slide_ids, second.embedding, None, second.logits, turned)
    assert {r.task for r in paired_differences(first, other, cohort, bootstrap=0)} == {"tumour", "genes"}
    strangers = SlideEmbeddings(["u"], torch.zeros(1, 2), None, {"tumour": torch.zeros(1, 1)}, CARDS)
    with pytest.raises(ValueError, match="predicted by both"):
        paired_differences(first, strangers, cohort)


def _auc(score: np.ndarray, y: np.ndarray) -> float:
    p, q = score[y == 1], score[y == 0]
    if not len(p) or not len(q):
        return float("nan")
    return float(((p[:, None] > q) + 0.5 * (p[:, None] == q)).mean())
