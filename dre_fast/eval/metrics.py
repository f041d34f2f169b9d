"""How good the predictions of a slide model are: scores with bootstrap intervals, by slide or by patient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dre_fast.data.cohort import Cohort, SlideRecord, Task
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.eval import scores
from dre_fast.eval.tables import MetricRow, format_rows, write_tables
from dre_fast.nn.survival import risk_score

__all__ = ["MetricRow", "auc", "c_index", "evaluate_predictions", "format_rows", "task_of", "write_tables"]

C_INDEX = "c-index"  # of survival tasks
METRICS = ("auc", "average_precision", "f1", "accuracy", "balanced_accuracy")
LEVELS = ("slide", "patient")
_BLOCK = 4_000_000  # weights held at once

Array = NDArray[np.float64]
# Scores of R weightings: weights [R, n] -> {metric: [..., R]}
Scorer = Callable[[Array], dict[str, Array]]


def auc(kind: str, logits: Tensor, target: Tensor) -> float | None:
    """Area under the ROC curve of one task.

    Args:
        kind: "multiclass" (macro one-versus-rest; two classes: of the second), "binary" or "multilabel" (mean
            over the columns for which it is defined).
        logits: float [S, C].
        target: multiclass int64 [S], -1 = missing; binary float [S], NaN = missing; multilabel float [S, C],
            NaN = missing.

    Returns:
        The AUC in [0, 1], or None where it is undefined: a class without a labelled slide.
    """
    columns, scorer = _prepare(kind, logits, target)
    weights = np.ones((1, len(logits)))
    if kind != "multilabel":
        return _value(scorer(weights)["auc"][0])
    values = [_value(column(weights)["auc"][0]) for column in columns]
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def c_index(method: str, logits: Tensor, target: Tensor) -> float | None:
    """Harrell's concordance index of a survival task.

    Args:
        method: "cox" or "hazard", see `dre_fast.nn.survival.risk_score`.
        logits: float [S, 1] or [S, bins].
        target: float [S, 2], time and event, NaN = missing.

    Returns:
        The index in [0, 1], or None where no two slides can be compared.
    """
    risk, truth = _risk(method, logits), target.detach().cpu().double().numpy()
    return _value(_survival_scorer(risk, truth)(np.ones((1, len(logits))))[C_INDEX][0])


def task_of(name: str, card: dict[str, Any]) -> Task:
    """The task that predictions were made for, from its entry in `SlideEmbeddings.tasks`."""
    return Task.from_card(name, card)


def evaluate_predictions(
    embeddings: SlideEmbeddings,
    cohort: Cohort,
    *,
    split: str | Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    level: str = "slide",
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    allow_missing: bool = False,
    model_of: Mapping[str, int] | None = None,
) -> list[MetricRow]:
    """Scores of every task of a file of predictions.

    Intervals are percentile bootstrap intervals. Whole cases are drawn, not slides: slides of one patient are
    not independent, and drawing them alone makes intervals too narrow.

    Args:
        embeddings: predictions with logits; slides that the cohort does not list are left out.
        cohort: where the labels are.
        split: judge only these slides; None: all.
        tasks: names of tasks; None: all that the predictions have.
        level: "slide", or "patient": probabilities (survival: risk scores) of a patient's slides are averaged
            first.
        bootstrap: number of resamples; 0: no intervals.
        confidence: of the intervals, in (0, 1).
        seed: of the resampling; the same seed gives the same intervals.
        allow_missing: accept slides of the cohort without prediction (they are left out).
        model_of: slide -> number of the model that predicted it, where several did. Survival tasks then compare only
            slides of one model: risks have no common zero, Cox's likelihood knows none. The slides of a case have one.

    Returns:
        For each task one row a metric (auc, average_precision, f1, accuracy, balanced_accuracy); multilabel
        tasks first give the mean over their columns (column None), then each column; survival tasks have one row,
        c-index (Harrell). f1 and multiclass auc
        and average_precision are means over classes. A value that is undefined is None, and its note says
        why.

    Raises:
        ValueError: no logits, an unknown task, level or split, a slide of the cohort without prediction, or
            (by patient) slides of one case with different labels; the message names them.
    """
    if bootstrap < 0 or not 0 < confidence < 1:
        raise ValueError(f"bootstrap must be >= 0 and confidence in (0, 1), got {bootstrap} and {confidence}")
    rows: list[MetricRow] = []
    for judged in judged_tasks(embeddings, cohort, split, tasks, level, allow_missing, model_of):
        rows += _evaluate_task(judged, level, (bootstrap, confidence, seed))
    return rows


@dataclass(frozen=True)
class JudgedTask:
    """What a model said of a task, beside the labels.

    Args:
        task: its card.
        probability: float64 [S, C], of the classes or the columns; of survival tasks the risk, [S, 1].
        truth: float64 [S, columns] (survival: time and event), NaN = missing.
        cases: of the S slides or patients.
        model: int64 [S], which model predicted each; None: one did all.
    """

    task: Task
    probability: Array
    truth: Array
    cases: list[str]
    model: NDArray[np.int64] | None = None


def judged_tasks(
    embeddings: SlideEmbeddings,
    cohort: Cohort,
    split: str | Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    level: str = "slide",
    allow_missing: bool = False,
    model_of: Mapping[str, int] | None = None,
) -> list[JudgedTask]:
    """Predictions and labels of the slides (or patients) to be judged; arguments and errors as of
    :func:`evaluate_predictions`."""
    if not embeddings.logits:
        raise ValueError(
            "these embeddings have no logits to judge; fit a linear probe (--linear-probe) instead"
        )
    if level not in LEVELS:
        raise ValueError(f"level must be slide or patient, got {level!r}")
    names = list(embeddings.logits) if tasks is None else list(tasks)
    unknown = [name for name in names if name not in embeddings.logits]
    if unknown:
        raise ValueError(f"no predictions for task {unknown[0]!r}; there are: {', '.join(embeddings.logits)}")
    records = _judged(embeddings, cohort.subset(split), allow_missing)
    chosen = embeddings.select([record.slide_id for record in records])
    of_case = None if model_of is None else {r.case_id: model_of[r.slide_id] for r in records}
    found = []
    for name in names:
        logits = chosen.logits[name]
        bad = ~torch.isfinite(logits).all(1)
        if bad.any():
            slide = chosen.slide_ids[int(bad.nonzero()[0, 0])]
            raise ValueError(f"task {name!r}: the logits of slide {slide!r} are not finite; encode it again")
        task = task_of(name, chosen.tasks[name])
        survival = task.kind == "survival"
        probability = _risk(task.method, logits)[:, None] if survival else probabilities(task.kind, logits)
        truth = cohort.encode(task, records).double().numpy()
        truth = np.where(truth < 0, np.nan, truth).reshape(len(records), -1)
        cases = [record.case_id for record in records]
        if level == "patient":
            probability, truth, cases = _by_case(task, probability, truth, cases)
        model = None if of_case is None else np.array([of_case[case] for case in cases], dtype=np.int64)
        found.append(JudgedTask(task, probability, truth, cases, model))
    return found


def check_patient_labels(cohort: Cohort, tasks: Sequence[Task]) -> None:
    """Refuse to judge by patient where slides of one case have different labels.

    Raises:
        ValueError: names task, column and case.
    """
    for task in tasks:
        truth = cohort.encode(task).double().numpy().reshape(len(cohort), -1)
        truth = np.where(truth < 0, np.nan, truth)
        _by_case(task, np.zeros((len(truth), 1)), truth, [record.case_id for record in cohort.records])


def _judged(embeddings: SlideEmbeddings, cohort: Cohort, allow_missing: bool) -> list[SlideRecord]:
    predicted = set(embeddings.slide_ids)
    absent = [record.slide_id for record in cohort.records if record.slide_id not in predicted]
    if len(absent) == len(cohort):
        raise ValueError(
            f"{cohort.source}: none of its {len(cohort)} slides to be judged has a prediction (the cohort's "
            f"first is "
            f"{absent[0]!r}, the predictions' first {embeddings.slide_ids[0]!r})"
            if embeddings.slide_ids
            else "the file of predictions holds no slide"
        )
    if absent and not allow_missing:
        shown = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
        raise ValueError(
            f"{cohort.source}: {len(absent)} of {len(cohort)} slides have no prediction: {shown}. Encode "
            f"them, or leave "
            "them out knowingly (--allow-missing)"
        )
    return [record for record in cohort.records if record.slide_id in predicted]


def _evaluate_task(judged: JudgedTask, level: str, resampling: tuple[int, float, int]) -> list[MetricRow]:
    task, probability, truth, cases = judged.task, judged.probability, judged.truth, judged.cases
    group = np.unique(cases, return_inverse=True)[1] if cases else np.zeros(0, dtype=np.int64)
    kind_row = MetricRow(task.name, None, "", None, None, None, level, 0, 0, "")
    if task.kind == "survival":
        return [_survival_row(kind_row, probability[:, 0], truth, group, resampling, judged.model)]
    if task.kind != "multilabel":
        names = task.classes if task.kind == "multiclass" else None
        return _score_rows(kind_row, task.kind, probability, truth[:, 0], group, resampling, names)
    per_column: list[MetricRow] = []
    parts = []
    for i, column in enumerate(task.columns):
        row = replace(kind_row, column=column)
        per_column += _score_rows(
            row, "binary", probability[:, i : i + 1], truth[:, i], group, resampling, None
        )
        parts.append((column, _scorer("binary", probability[:, i : i + 1], truth[:, i])))
    return [*_macro_rows(kind_row, parts, truth, group, resampling), *per_column]


def _score_rows(
    template: MetricRow,
    kind: str,
    probability: Array,
    truth: Array,
    group: NDArray[np.int64],
    resampling: tuple[int, float, int],
    class_names: Sequence[str] | None,
) -> list[MetricRow]:
    """One row a metric for one column of labels."""
    there = ~np.isnan(truth)
    scorer = _scorer(kind, probability, truth)
    point = scorer(np.ones((1, len(truth))))
    present = np.unique(truth[there]).astype(int)
    classes = len(class_names) if class_names else 2
    labels = class_names or ("negative", "positive")
    absent = [str(labels[c]) for c in range(classes) if c not in present]
    note = f"no labelled sample of {', '.join(absent)}" if absent else ""
    if not there.any():
        note = "no labels"
    spread = _bootstrap(scorer, np.where(there, group, -1), resampling) if there.any() else {}
    template = replace(template, samples=int(there.sum()), cases=len(np.unique(group[there])))
    return [
        _row(template, metric, point[metric][0], spread.get(metric), resampling, note) for metric in METRICS
    ]


def _survival_row(
    template: MetricRow,
    risk: Array,
    truth: Array,
    group: NDArray[np.int64],
    resampling: tuple[int, float, int],
    model: NDArray[np.int64] | None,
) -> MetricRow:
    """The c-index of a survival task."""
    there = ~np.isnan(truth).any(1)
    template = replace(template, samples=int(there.sum()), cases=len(np.unique(group[there])))
    scorer = _survival_scorer(risk, truth, model)
    point = scorer(np.ones((1, len(truth))))[C_INDEX][0]
    if np.isnan(point):
        note = "no two samples can be compared" if there.any() else "no labels"
        return _row(template, C_INDEX, point, None, resampling, note)
    spread = _bootstrap(scorer, np.where(there, group, -1), resampling)
    return _row(template, C_INDEX, point, spread.get(C_INDEX), resampling, "")


def _macro_rows(
    template: MetricRow,
    parts: list[tuple[str, Scorer]],
    truth: Array,
    group: NDArray[np.int64],
    resampling: tuple[int, float, int],
) -> list[MetricRow]:
    """Mean over the columns of a multilabel task for which the score is defined."""
    there = ~np.isnan(truth).all(1)
    template = replace(template, samples=int(there.sum()), cases=len(np.unique(group[there])))

    def every_column(weights: Array) -> dict[str, Array]:
        each = [scorer(weights) for _, scorer in parts]
        return {metric: np.stack([values[metric] for values in each]) for metric in METRICS}

    point = every_column(np.ones((1, len(truth))))
    spread = _bootstrap(every_column, np.where(there, group, -1), resampling) if there.any() else {}
    rows = []
    for metric in METRICS:
        used = ~np.isnan(point[metric][:, 0])
        left_out = [column for (column, _), fine in zip(parts, used) if not fine]
        note = f"without {', '.join(left_out)}: one class only or no labels" if left_out else ""
        if not used.any():
            rows.append(_row(template, metric, float("nan"), None, resampling, "undefined for every column"))
            continue
        # A resample counts only where every such column is defined: otherwise its mean is of something else.
        drawn = spread[metric][used].mean(0) if spread else None
        rows.append(_row(template, metric, point[metric][used].mean(), drawn, resampling, note))
    return rows


def _row(
    template: MetricRow,
    metric: str,
    value: float,
    spread: Array | None,
    resampling: tuple[int, float, int],
    note: str,
) -> MetricRow:
    point = _value(value)
    low = high = None
    if point is None:
        return replace(template, metric=metric, note=note or "undefined")
    if spread is not None and len(spread):
        defined = spread[~np.isnan(spread)]
        tail = (1 - resampling[1]) / 2
        if len(defined):
            low, high = (float(q) for q in np.quantile(defined, [tail, 1 - tail]))
        if len(defined) < len(spread):
            left = f"{len(spread) - len(defined)} of {len(spread)} resamples undefined"
            note = f"{note}; {left}" if note else left
    return replace(template, metric=metric, value=point, low=low, high=high, note=note)


def _bootstrap(
    scorer: Scorer, group: NDArray[np.int64], resampling: tuple[int, float, int]
) -> dict[str, Array]:
    """Scores of resamples of whole groups: {metric: [..., resamples]}; samples of group -1 never count."""
    resamples, _, seed = resampling
    if not resamples:
        return {}
    labels, index = np.unique(group[group >= 0], return_inverse=True)
    rng = np.random.default_rng(seed)
    found: list[dict[str, Array]] = []
    block = max(1, _BLOCK // max(1, len(group)))
    for first in range(0, resamples, block):
        count = min(block, resamples - first)
        # How often each group is drawn when as many are drawn, with replacement, as there are.
        drawn = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=count)
        weights = np.zeros((count, len(group)))
        weights[:, group >= 0] = drawn[:, index]
        found.append(scorer(weights))
    return {metric: np.concatenate([part[metric] for part in found], axis=-1) for metric in found[0]}


def _scorer(kind: str, probability: Array, truth: Array) -> Scorer:
    """The metrics of one column as a function of sample weights; samples without label are left out."""
    there = ~np.isnan(truth)
    p, y = probability[there], truth[there].astype(np.int64)
    if kind == "binary":
        p = np.concatenate([1 - p, p], axis=1)
    classes = p.shape[1]
    # Two classes: the second is the positive one. More: each against the rest.
    targets = [1] if classes == 2 else list(range(classes))
    # Ties go to the lower class, as in argmax.
    predicted = p.argmax(1) if len(p) else np.zeros(0, dtype=np.int64)

    def score(weights: Array) -> dict[str, Array]:
        w = weights[:, there]
        matrix = scores.confusion(predicted, y, classes, w)
        return {
            "auc": np.mean([scores.auc(p[:, c], y == c, w) for c in targets], axis=0),
            "average_precision": np.mean(
                [scores.average_precision(p[:, c], y == c, w) for c in targets], axis=0
            ),
            "f1": scores.macro_f1(matrix),
            "accuracy": scores.accuracy(matrix),
            "balanced_accuracy": scores.balanced_accuracy(matrix),
        }

    return score


def _survival_scorer(risk: Array, truth: Array, model: NDArray[np.int64] | None = None) -> Scorer:
    """The c-index as a function of sample weights; samples without label are left out."""
    there = ~np.isnan(truth).any(1)
    r, time, event = risk[there], truth[there, 0], truth[there, 1] == 1
    own = None if model is None else model[there]
    return lambda weights: {C_INDEX: scores.c_index(r, time, event, weights[:, there], own)}


def _risk(method: str, logits: Tensor) -> Array:
    """float64 [S], higher = earlier event."""
    return risk_score(method, logits.detach().cpu().double()).numpy()


def _prepare(kind: str, logits: Tensor, target: Tensor) -> tuple[list[Scorer], Scorer]:
    if kind not in ("multiclass", "binary", "multilabel"):
        raise ValueError(f"kind must be multiclass, binary or multilabel, got {kind!r}")
    probability = probabilities(kind, logits)
    truth = target.detach().cpu().double().numpy()
    truth = np.where(truth < 0, np.nan, truth).reshape(len(logits), -1)
    if kind == "multilabel":
        columns = [_scorer("binary", probability[:, i : i + 1], truth[:, i]) for i in range(truth.shape[1])]
        return columns, columns[0]
    return [], _scorer(kind, probability, truth[:, 0])


def probabilities(kind: str, logits: Tensor) -> Array:
    """float64 [S, C]: softmax over classes, or a sigmoid for each column."""
    values = logits.detach().cpu().double()
    return (torch.softmax(values, -1) if kind == "multiclass" else torch.sigmoid(values)).numpy()


def _by_case(
    task: Task, probability: Array, truth: Array, cases: list[str]
) -> tuple[Array, Array, list[str]]:
    """Mean probability and the common label of each case."""
    names, index = np.unique(cases, return_inverse=True)
    mean = np.stack([probability[index == i].mean(0) for i in range(len(names))])
    label = np.full((len(names), truth.shape[1]), np.nan)
    for i, name in enumerate(names):
        for j in range(truth.shape[1]):
            known = np.unique(truth[index == i, j][~np.isnan(truth[index == i, j])])
            if len(known) > 1:
                raise ValueError(
                    f"task {task.name!r}, column {task.columns[j]!r}: slides of case {str(name)!r} have "
                    f"different labels, so "
                    "there is no label of the patient; judge this task by slide"
                )
            if len(known):
                label[i, j] = known[0]
    return mean, label, [str(name) for name in names]


def _value(number: float) -> float | None:
    return None if np.isnan(number) else float(number)
