"""Scores over folds: each fold, their mean and spread, and the predictions of all folds judged at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.eval.grids import Cell, Grid
from dre_fast.eval.tables import MetricRow


@dataclass(frozen=True)
class FoldScore:
    """One score over folds.

    Attributes:
        task, column, metric: as in `MetricRow`.
        folds: fold -> score, None where it is undefined.
        mean, sd: over the folds in which it is defined; sd (n - 1 in the denominator) needs two of them.
        joint: the score of all predictions at once, with its interval.
    """

    task: str
    column: str | None
    metric: str
    folds: Mapping[int, float | None]
    mean: float | None
    sd: float | None
    joint: MetricRow


def fold_scores(per_fold: Mapping[int, Sequence[MetricRow]], joint: Sequence[MetricRow]) -> list[FoldScore]:
    """One `FoldScore` for every row of ``joint``, from the rows of each fold for the same task, column and metric."""
    values = {
        fold: {(row.task, row.column, row.metric): row.value for row in rows}
        for fold, rows in per_fold.items()
    }
    found = []
    for row in joint:
        folds = {fold: scores.get((row.task, row.column, row.metric)) for fold, scores in values.items()}
        defined = [value for value in folds.values() if value is not None]
        found.append(
            FoldScore(
                row.task,
                row.column,
                row.metric,
                folds,
                float(np.mean(defined)) if defined else None,
                float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
                row,
            )
        )
    return found


def score_grid(scores: Sequence[FoldScore], joint: str) -> Grid:
    """The scores as a table; ``joint`` names the column of the joint score."""
    folds = list(scores[0].folds) if scores else []
    header = [
        "task",
        "column",
        "metric",
        *(f"fold {fold}" for fold in folds),
        "mean",
        "sd",
        joint,
        "low",
        "high",
    ]
    rows: list[list[Cell]] = []
    for score in scores:
        row, defined = score.joint, sum(value is not None for value in score.folds.values())
        note = "" if defined == len(folds) else f"defined in {defined} of {len(folds)} folds"
        rows.append(
            [
                *(score.task, score.column, score.metric, *(score.folds[fold] for fold in folds)),
                *(score.mean, score.sd, row.value, row.low, row.high),
                *(row.samples, row.cases, "; ".join(text for text in (row.note, note) if text)),
            ]
        )
    return Grid([*header, "samples", "cases", "note"], rows)


def pool_predictions(parts: Sequence[SlideEmbeddings]) -> SlideEmbeddings:
    """The predictions of several models for different slides, one after the other.

    A hazard head whose intervals differ from model to model has none in the result: its logits are not of one time.

    Raises:
        ValueError: the models have different tasks, or two of them the same slide.
    """
    first = parts[0]
    _same_tasks(parts)
    reports = [part.report_embedding for part in parts if part.report_embedding is not None]
    return SlideEmbeddings(
        [slide for part in parts for slide in part.slide_ids],
        torch.cat([part.embedding for part in parts]),
        torch.cat(reports) if len(reports) == len(parts) else None,
        {name: torch.cat([part.logits[name] for part in parts]) for name in first.logits},
        _common_cards(parts),
    )


def average_predictions(parts: Sequence[SlideEmbeddings]) -> SlideEmbeddings:
    """Several models' predictions for the same slides: the logits of their mean probabilities.

    Kinds of tasks without probabilities get the mean of their logits; hazards of intervals that differ from model to
    model, as those of the first, second ... interval of each. Embeddings of different models have nothing in common, so
    the result has none (E = 0).

    Raises:
        ValueError: the models have different tasks or slides.
    """
    first = parts[0]
    _same_tasks(parts)
    if any(part.slide_ids != first.slide_ids for part in parts):
        raise ValueError("only predictions for the same slides can be averaged")
    logits = {
        name: _average(first.tasks[name]["kind"], torch.stack([part.logits[name].double() for part in parts]))
        for name in first.logits
    }
    return SlideEmbeddings(first.slide_ids, torch.zeros(len(first), 0), None, logits, _common_cards(parts))


def _average(kind: str, logits: Tensor) -> Tensor:
    """float64 [M, S, C] of M models -> fp32 [S, C]. In logarithms, so that sure predictions stay finite."""
    if kind == "multiclass":
        return torch.logsumexp(torch.log_softmax(logits, -1), 0).float()  # softmax takes the factor 1/M out
    if kind in ("binary", "multilabel"):
        return (torch.logsumexp(logsigmoid(logits), 0) - torch.logsumexp(logsigmoid(-logits), 0)).float()
    return logits.mean(0).float()


def _common_cards(parts: Sequence[SlideEmbeddings]) -> dict[str, dict[str, Any]]:
    """Cards of the tasks, without the times between a hazard head's intervals where the models differ in them."""
    cards = {name: dict(card) for name, card in parts[0].tasks.items()}
    for name, card in cards.items():
        if any(part.tasks[name].get("edges") != card.get("edges") for part in parts):
            card["edges"] = []
    return cards


def _same_tasks(parts: Sequence[SlideEmbeddings]) -> None:
    def cards(part: SlideEmbeddings) -> dict[str, tuple[object, ...]]:
        return {
            name: tuple(part.tasks[name].get(key) for key in ("kind", "classes", "columns", "method", "bins"))
            for name in part.logits
        }

    for part in parts[1:]:
        if cards(part) != cards(parts[0]):
            raise ValueError(f"predictions of different tasks: {cards(parts[0])} and {cards(part)}")
