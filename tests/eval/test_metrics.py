"""Scores against scikit-learn, missing labels, undefined values, intervals over cases."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from dre_fast.data.cohort import Cohort, SlideRecord
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.eval import scores
from dre_fast.eval.metrics import MetricRow, auc, evaluate_predictions, format_rows, write_tables

CLASSES = ("a", "b", "c")


def value(rows: list[MetricRow], task: str, metric: str, column: str | None = None) -> MetricRow:
    (row,) = [r for r in rows if (r.task, r.metric, r.column) == (task, metric, column)]
    return row


def study(n: int = 60, seed: int = 0, slides_per_case: int = 2) -> tuple[SlideEmbeddings, Cohort]:
    """Predictions that are right more often than not; one label in five is missing."""
    rng = np.random.default_rng(seed)
    kind, yes = rng.integers(3, size=n), rng.integers(2, size=(n, 3))
    kind, yes = kind[np.arange(n) // slides_per_case * slides_per_case], yes
    missing = rng.random((n, 4)) < 0.2
    records = [
        SlideRecord(
            f"s{i}",
            f"c{i // slides_per_case}",
            labels={
                "kind": None if missing[i, 0] else CLASSES[kind[i]],
                **{g: None if missing[i, 1 + j] else str(yes[i, j]) for j, g in enumerate("PQR")},
            },
            split="test" if i < n // 2 else "train",
        )
        for i in range(n)
    ]
    onehot = np.eye(3)[kind]
    logits = {
        "kind": torch.tensor(onehot * 1.2 + rng.normal(size=(n, 3))).float(),
        "panel": torch.tensor(yes[:, :2] * 1.0 - 0.5 + rng.normal(size=(n, 2))).float(),
        "single": torch.tensor(yes[:, 2:] * 1.0 - 0.5 + rng.normal(size=(n, 1))).float(),
    }
    cards = {
        "kind": {"kind": "multiclass", "classes": list(CLASSES), "columns": ["kind"]},
        "panel": {"kind": "multilabel", "classes": [], "columns": ["P", "Q"]},
        "single": {"kind": "binary", "classes": [], "columns": ["R"]},
    }
    order = rng.permutation(n)
    e = SlideEmbeddings(
        [f"s{i}" for i in order], torch.zeros(n, 2), None, {k: v[order] for k, v in logits.items()}, cards
    )
    return e, Cohort(records, ("kind", "P", "Q", "R"))


def labelled(e: SlideEmbeddings, cohort: Cohort, column: str, task: str):
    rows = [(r.slide_id, r.labels[column]) for r in cohort.records if r.labels[column] is not None]
    return e.select([s for s, _ in rows]).logits[task].double(), [label for _, label in rows]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ties", [False, True])
def test_scores_equal_scikit_learn(seed: int, ties: bool):
    rng = np.random.default_rng(seed)
    y = rng.random(50) < 0.4
    s = rng.normal(size=50) + y
    if ties:
        s = np.round(s)
    weights = np.stack([np.ones(50), *rng.integers(0, 4, (5, 50))]).astype(float)
    for i, w in enumerate(weights):
        assert scores.auc(s, y, weights)[i] == pytest.approx(sk.roc_auc_score(y, s, sample_weight=w))
        assert scores.average_precision(s, y, weights)[i] == pytest.approx(
            sk.average_precision_score(y, s, sample_weight=w)
        )
    truth, predicted = rng.integers(4, size=50), rng.integers(4, size=50)
    matrix = scores.confusion(predicted, truth, 4, weights)
    for i, w in enumerate(weights):
        np.testing.assert_allclose(matrix[i], sk.confusion_matrix(truth, predicted, sample_weight=w))
        assert scores.accuracy(matrix)[i] == pytest.approx(
            sk.accuracy_score(truth, predicted, sample_weight=w)
        )
        assert scores.macro_f1(matrix)[i] == pytest.approx(
            sk.f1_score(truth, predicted, average="macro", sample_weight=w)
        )
        assert scores.balanced_accuracy(matrix)[i] == pytest.approx(
            sk.balanced_accuracy_score(truth, predicted, sample_weight=w)
        )


def test_table_equals_scikit_learn_with_missing_labels():
    e, cohort = study()
    rows = evaluate_predictions(e, cohort, bootstrap=0)
    p, y = labelled(e, cohort, "kind", "kind")
    p = torch.softmax(p, -1).numpy()
    assert value(rows, "kind", "auc").value == pytest.approx(
        sk.roc_auc_score(y, p, multi_class="ovr", average="macro", labels=list(CLASSES))
    )
    predicted = [CLASSES[i] for i in p.argmax(1)]
    assert value(rows, "kind", "accuracy").value == pytest.approx(sk.accuracy_score(y, predicted))
    assert value(rows, "kind", "f1").value == pytest.approx(sk.f1_score(y, predicted, average="macro"))
    assert value(rows, "kind", "auc").samples == len(y) < 60
    columns = []
    for i, gene in enumerate("PQ"):
        p, y = labelled(e, cohort, gene, "panel")
        truth = np.array(y) == "1"
        columns.append(sk.roc_auc_score(truth, p[:, i]))
        row = value(rows, "panel", "auc", gene)
        assert row.value == pytest.approx(columns[-1])
        assert row.samples == len(y)
        assert value(rows, "panel", "average_precision", gene).value == pytest.approx(
            sk.average_precision_score(truth, p[:, i])
        )
    assert value(rows, "panel", "auc").value == pytest.approx(np.mean(columns))
    p, y = labelled(e, cohort, "R", "single")
    assert value(rows, "single", "f1").value == pytest.approx(
        sk.f1_score(np.array(y) == "1", p[:, 0].numpy() > 0, average="macro")
    )
    assert all(row.low is None and row.high is None for row in rows)


def test_split_and_tasks_are_respected():
    e, cohort = study()
    rows = evaluate_predictions(e, cohort, split="test", tasks=["single"], bootstrap=0)
    assert {row.task for row in rows} == {"single"}
    assert rows[0].samples == sum(r.labels["R"] is not None for r in cohort.subset("test").records)


def test_quick_auc_agrees_with_the_table():
    e, cohort = study()
    rows = evaluate_predictions(e, cohort, bootstrap=0)
    from dre_fast.eval.metrics import task_of

    chosen = e.select(cohort.ids)
    for name in e.logits:
        task = task_of(name, e.tasks[name])
        assert auc(task.kind, chosen.logits[name], cohort.encode(task)) == pytest.approx(
            value(rows, name, "auc").value
        )


def test_undefined_is_none_and_says_why():
    logits = torch.randn(5, 2)
    assert auc("multiclass", logits, torch.tensor([1, 1, 1, -1, -1])) is None
    assert auc("binary", logits[:, :1], torch.full((5,), float("nan"))) is None
    nan = float("nan")
    one_sided = torch.tensor([[1.0, 0], [1, 1], [nan, 0], [1, nan], [1, 1]])
    assert auc("multilabel", logits, one_sided) == auc("binary", logits[:, 1:], one_sided[:, 1])

    records = [
        SlideRecord(f"s{i}", f"c{i}", labels={"P": "1", "Q": "01"[i % 2], "kind": "a"}) for i in range(6)
    ]
    cards = {
        "panel": {"kind": "multilabel", "classes": [], "columns": ["P", "Q"]},
        "kind": {"kind": "multiclass", "classes": ["a", "b"], "columns": ["kind"]},
    }
    e = SlideEmbeddings(
        [f"s{i}" for i in range(6)],
        torch.zeros(6, 1),
        None,
        {"panel": torch.randn(6, 2), "kind": torch.randn(6, 2)},
        cards,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = evaluate_predictions(e, Cohort(records, ("P", "Q", "kind")), bootstrap=50)
    row = value(rows, "panel", "auc", "P")
    assert row.value is None
    assert row.low is None
    assert "negative" in row.note
    assert value(rows, "kind", "auc").value is None
    assert "b" in value(rows, "kind", "auc").note
    assert value(rows, "kind", "accuracy").value is not None
    macro = value(rows, "panel", "auc")
    assert macro.value == value(rows, "panel", "auc", "Q").value
    assert "P" in macro.note
    assert "undefined" in format_rows(rows)


def test_no_labels_at_all():
    records = [SlideRecord(f"s{i}", f"c{i}", labels={"R": None}) for i in range(3)]
    card = {"single": {"kind": "binary", "classes": [], "columns": ["R"]}}
    e = SlideEmbeddings(["s0", "s1", "s2"], torch.zeros(3, 1), None, {"single": torch.zeros(3, 1)}, card)
    rows = evaluate_predictions(e, Cohort(records, ("R",)))
    assert all(row.value is None and row.samples == 0 for row in rows)
    assert rows[0].note == "no labels"


def test_intervals_are_seeded_and_hold_the_value():
    e, cohort = study(120)
    a = evaluate_predictions(e, cohort, bootstrap=300, seed=1)
    assert a == evaluate_predictions(e, cohort, bootstrap=300, seed=1)
    assert a != evaluate_predictions(e, cohort, bootstrap=300, seed=2)
    for row in a:
        assert row.low is not None
        assert row.value is not None
        assert row.high is not None
        assert row.low <= row.value <= row.high
    narrow = evaluate_predictions(e, cohort, bootstrap=300, seed=1, confidence=0.5)
    assert all(n.high - n.low < w.high - w.low for n, w in zip(narrow, a))


def test_intervals_resample_cases_not_slides():
    # Ten copies of each slide in one case: no new information, so the interval must not shrink.
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=24)
    s = torch.tensor(rng.normal(size=24) + y).float()
    card = {"t": {"kind": "binary", "classes": [], "columns": ["R"]}}

    def width(copies: int, same_case: bool) -> float:
        names = [f"s{i}-{k}" for i in range(24) for k in range(copies)]
        records = [
            SlideRecord(
                n, n.split("-")[0] if same_case else n, labels={"R": str(y[int(n[1:].split("-")[0])])}
            )
            for n in names
        ]
        e = SlideEmbeddings(
            names, torch.zeros(len(names), 1), None, {"t": s.repeat_interleave(copies)[:, None]}, card
        )
        row = evaluate_predictions(e, Cohort(records, ("R",)), bootstrap=500)[0]
        assert row.cases == (24 if same_case else len(names))
        return row.high - row.low

    single = width(1, True)
    assert width(10, True) == pytest.approx(single, rel=1e-9)
    assert width(10, False) < 0.6 * single


def test_interval_covers_the_truth_about_as_often_as_it_says():
    # AUC of N(1,1) against N(0,1) is Phi(1/sqrt 2) = 0.760
    rng = np.random.default_rng(5)
    card = {"t": {"kind": "binary", "classes": [], "columns": ["R"]}}
    y = np.arange(80) % 2
    names = [f"s{i}" for i in range(80)]
    cohort = Cohort([SlideRecord(n, n, labels={"R": str(v)}) for n, v in zip(names, y)], ("R",))
    hits = 0
    for _ in range(60):
        logits = torch.tensor(rng.normal(size=(80, 1)) + y[:, None]).float()
        e = SlideEmbeddings(names, torch.zeros(80, 1), None, {"t": logits}, card)
        row = evaluate_predictions(e, cohort, bootstrap=200, confidence=0.9)[0]
        hits += row.low <= 0.760 <= row.high
    assert 45 <= hits <= 60


def test_patient_level_averages_probabilities():
    e, cohort = study(60, slides_per_case=2)
    rows = evaluate_predictions(e, cohort, tasks=["kind"], level="patient", bootstrap=0)
    p = torch.softmax(e.select(cohort.ids).logits["kind"].double(), -1).numpy()
    p = p.reshape(30, 2, 3).mean(1)
    labels = [{cohort[2 * i].labels["kind"], cohort[2 * i + 1].labels["kind"]} - {None} for i in range(30)]
    there = [i for i in range(30) if labels[i]]
    y = [next(iter(labels[i])) for i in there]
    assert value(rows, "kind", "auc").value == pytest.approx(sk.roc_auc_score(y, p[there], multi_class="ovr"))
    assert value(rows, "kind", "auc").samples == len(y)
    assert value(rows, "kind", "auc").level == "patient"
    with pytest.raises(ValueError, match="different labels"):
        evaluate_predictions(e, cohort, tasks=["panel"], level="patient", bootstrap=0)


def test_bad_requests_are_named():
    e, cohort = study()
    with pytest.raises(ValueError, match="'nope'"):
        evaluate_predictions(e, cohort, tasks=["nope"])
    with pytest.raises(ValueError, match="level"):
        evaluate_predictions(e, cohort, level="tile")
    with pytest.raises(ValueError, match="linear probe"):
        evaluate_predictions(SlideEmbeddings(["s0"], torch.zeros(1, 1)), cohort)
    part = e.select([s for s in e.slide_ids if s != "s7"])
    with pytest.raises(ValueError, match="s7"):
        evaluate_predictions(part, cohort)
    rows = evaluate_predictions(part, cohort, allow_missing=True, bootstrap=0)
    assert rows[0].samples <= 59
    e.logits["kind"][3, 0] = float("nan")
    with pytest.raises(ValueError, match=f"'{e.slide_ids[3]}'"):
        evaluate_predictions(e, cohort)


def test_tables_on_disk(tmp_path: Path):
    e, cohort = study()
    rows = evaluate_predictions(e, cohort, bootstrap=50)
    files = write_tables(rows, tmp_path / "scores.test")
    assert [f.name for f in files] == ["scores.test.csv", "scores.test.md", "scores.test.json"]
    with open(files[0], newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    assert float(table[0]["value"]) == pytest.approx(rows[0].value, abs=1e-4)
    loaded = json.loads(files[2].read_text())
    assert [MetricRow(**row) for row in loaded] == rows
    lines = files[1].read_text().splitlines()
    assert len(lines) == len(rows) + 2
    assert len({line.count("|") for line in lines}) == 1


def test_a_thousand_resamples_are_quick():
    import time

    e, cohort = study(400)
    started = time.perf_counter()
    evaluate_predictions(e, cohort, bootstrap=1000)
    assert time.perf_counter() - started < 15
