"""Calibration against scikit-learn, known values, missing labels, what is written and drawn."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from dre_fast.data.cohort import Cohort, SlideRecord
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.eval.calibration import calibrate, draw_calibration, reliability, write_calibration


def predictions(
    logits: dict[str, torch.Tensor], cards: dict, labels: list[dict]
) -> tuple[SlideEmbeddings, Cohort]:
    n = len(labels)
    records = [SlideRecord(f"s{i}", f"c{i}", labels=row, split="test") for i, row in enumerate(labels)]
    embeddings = SlideEmbeddings([f"s{i}" for i in range(n)], torch.zeros(n, 2), None, logits, cards)
    return embeddings, Cohort(records, tuple(labels[0]))


def binary(n: int = 400, slope: float = 1.0, missing: float = 0.0):
    rng = np.random.default_rng(0)
    logit = rng.normal(size=n) * 2
    yes = rng.random(n) < 1 / (1 + np.exp(-logit))
    gone = rng.random(n) < missing
    labels = [{"R": None if no else str(int(y))} for y, no in zip(yes, gone, strict=True)]
    cards = {"single": {"kind": "binary", "classes": [], "columns": ["R"]}}
    return predictions({"single": torch.tensor(logit * slope).float()[:, None]}, cards, labels), yes, gone


def test_yes_or_no_as_scikit_learn() -> None:
    (embeddings, cohort), yes, gone = binary(missing=0.3)
    (found,) = calibrate(embeddings, cohort)
    p = torch.sigmoid(embeddings.logits["single"][:, 0].double()).numpy()[~gone]
    observed, stated = calibration_curve(yes[~gone], p, n_bins=10)
    full = found.counts > 0
    np.testing.assert_allclose(found.stated[full], stated)
    np.testing.assert_allclose(found.observed[full], observed)
    assert found.brier == pytest.approx(brier_score_loss(yes[~gone], p))
    assert found.samples == found.counts.sum() == (~gone).sum()


def test_a_model_that_is_too_sure_has_the_larger_error() -> None:
    (fair, cohort), _, _ = binary(4000)
    (sure, _), _, _ = binary(4000, slope=4.0)
    (a,), (b,) = calibrate(fair, cohort), calibrate(sure, cohort)
    assert a.ece < 0.03
    assert b.ece > 0.1
    assert b.brier > a.brier


def test_known_values_of_several_classes() -> None:
    """Four slides, each 0.75 sure of the first of three classes; one in two is of it."""
    logits = torch.tensor([0.75, 0.125, 0.125]).log().repeat(4, 1)
    labels = [{"kind": kind} for kind in ("a", "a", "b", "c")]
    cards = {"type": {"kind": "multiclass", "classes": ["a", "b", "c"], "columns": ["kind"]}}
    (found,) = calibrate(*predictions({"type": logits}, cards, labels))
    assert found.ece == pytest.approx(0.25)
    right, wrong = 0.25**2 + 2 * 0.125**2, 0.75**2 + 0.875**2 + 0.125**2
    assert found.brier == pytest.approx((right + wrong) / 2)
    assert found.counts.tolist() == [0] * 7 + [4, 0, 0]


def test_a_panel_has_a_line_a_column_and_risks_none(tmp_path) -> None:
    logits = {"panel": torch.randn(6, 2), "os": torch.randn(6, 1)}
    cards = {
        "panel": {"kind": "multilabel", "classes": [], "columns": ["P", "Q"]},
        "os": {"kind": "survival", "classes": [], "columns": ["t", "e"], "method": "cox"},
    }
    labels = [{"P": str(i % 2), "Q": None, "t": "3", "e": "1"} for i in range(6)]
    found = calibrate(*predictions(logits, cards, labels))
    assert [(each.column, each.samples) for each in found] == [("P", 6), ("Q", 0)]
    assert np.isnan(found[1].ece)
    assert np.isnan(found[1].brier)
    table, picture = write_calibration(found, tmp_path)
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert [row["column"] for row in rows] == ["P", "Q"]
    assert float(rows[0]["ece"]) == pytest.approx(found[0].ece, rel=1e-4)
    assert picture.stat().st_size > 10_000


def test_sure_is_in_the_last_bin_and_more_is_refused() -> None:
    _, observed, counts = reliability(np.array([1.0, 0.0]), np.array([1.0, 0.0]), 4)
    assert counts.tolist() == [1, 0, 0, 1]
    assert observed[[0, 3]].tolist() == [0, 1]
    for bad in (1.1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="must lie in"):
            reliability(np.array([bad]), np.array([1.0]))


def test_many_panels_fit_in_one_picture(tmp_path) -> None:
    (embeddings, cohort), _, _ = binary()
    assert draw_calibration(calibrate(embeddings, cohort) * 6, tmp_path / "c.png").exists()
