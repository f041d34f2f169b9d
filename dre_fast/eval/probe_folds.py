"""A linear probe over folds: what frozen slide embeddings tell about a label, judged on slides it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dre_fast.data.cohort import Cohort, Task
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.eval.folds import deal_cases, fold_numbers, with_folds

STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # inverse of the L2 penalty (scikit-learn's C)
INNER_FOLDS = 5
_LEAST = -14.0  # log-probability of a class that an inner fit has not seen

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FoldProbe:
    """Out-of-fold predictions of a probe.

    Attributes:
        predictions: the embeddings with the logits of the probes, each slide's from the fold that left it out.
        cohort: the slides probed, with their folds.
        strengths: (task, column) -> fold -> inverse of the L2 penalty that was taken.
    """

    predictions: SlideEmbeddings
    cohort: Cohort
    strengths: dict[tuple[str, str], dict[int, float]]


def probe_folds(
    embeddings: SlideEmbeddings,
    cohort: Cohort,
    tasks: Sequence[Task],
    *,
    folds: int | None = None,
    seed: int = 0,
) -> FoldProbe:
    """Fits a logistic regression on standardised embeddings, once a fold and label column, on the other folds.

    The L2 penalty is the one of `STRENGTHS` with the least log loss over inner folds by case of the slides fitted on,
    the strongest where several tie; the slides judged have no part in it.

    Args:
        embeddings: of every slide of the cohort.
        cohort: labels, and folds if its column ``fold`` has them; else cases are dealt, see `with_folds`.
        tasks: multiclass, binary or multilabel (one regression a column).
        folds: how many; None: as many as the column has, or 5.
        seed: of the folds, outer and inner.

    Raises:
        ValueError: a slide without embedding, a task of another kind, or a fold whose other slides do not hold every
            class of a column; named.
        ImportError: scikit-learn is missing.
    """
    for task in tasks:
        if task.kind not in ("multiclass", "binary", "multilabel"):
            raise ValueError(
                f"task {task.name!r}: a linear probe predicts classes, not {task.kind}; name the others with --tasks"
            )
    chosen = embeddings.select(cohort.ids)
    tasks = [cohort.resolve(task) for task in tasks]
    cohort = with_folds(cohort, tasks, folds=folds, seed=seed)
    x = chosen.embedding.double().numpy()
    if not np.isfinite(x).all():
        slide = chosen.slide_ids[int(np.nonzero(~np.isfinite(x).all(1))[0][0])]
        raise ValueError(f"the embedding of slide {slide!r} is not finite; encode it again")
    strengths: dict[tuple[str, str], dict[int, float]] = {}
    logits: dict[str, torch.Tensor] = {}
    for task in tasks:
        parts = [
            _probe_column(x, cohort, task, i, seed, strengths.setdefault((task.name, column), {}))
            for i, column in enumerate(task.columns)
        ]
        logits[task.name] = torch.from_numpy(np.concatenate(parts, axis=1)).float()
    cards = {
        task.name: {"kind": task.kind, "classes": list(task.classes), "columns": list(task.columns)}
        for task in tasks
    }
    predictions = SlideEmbeddings(chosen.slide_ids, chosen.embedding, chosen.report_embedding, logits, cards)
    return FoldProbe(predictions, cohort, strengths)


def _probe_column(
    x: Array, cohort: Cohort, task: Task, column: int, seed: int, strengths: dict[int, float]
) -> Array:
    """Out-of-fold logits of one label column, [S, classes] (multiclass) or [S, 1]; fills in ``strengths``."""
    single = (
        task
        if task.kind == "multiclass"
        else Task(task.name, "binary", task.classes, (task.columns[column],))
    )
    target = cohort.encode(single).double().numpy()
    labelled = ~np.isnan(target) & (target >= 0)
    classes = task.outputs if task.kind == "multiclass" else 2
    fold_of = np.array([record.fold for record in cohort.records])
    found = np.zeros((len(x), classes))
    for fold in fold_numbers(cohort):
        rows = np.nonzero(labelled & (fold_of != fold))[0]
        absent = sorted(set(range(classes)) - set(target[rows].astype(int).tolist()))
        if absent:
            names = task.classes or ("negative", "positive")
            raise ValueError(
                f"task {task.name!r}, column {task.columns[column]!r}: the slides beside fold {fold} hold no "
                f"{names[absent[0]]!r}, so no probe can be fitted; leave this task out, or take other folds"
            )
        cases = Cohort([cohort.records[row] for row in rows], cohort.label_names, cohort.source)
        strength = _pick_strength(x[rows], target[rows].astype(int), cases, single, classes, seed)
        strengths[fold] = strength
        held = fold_of == fold
        found[held] = _log_probabilities(x[rows], target[rows].astype(int), x[held], classes, strength)
    return found if task.kind == "multiclass" else found[:, 1:] - found[:, :1]


def _pick_strength(
    x: Array, y: NDArray[np.int_], cohort: Cohort, task: Task, classes: int, seed: int
) -> float:
    """The strength with the least log loss over inner folds by case."""
    count = min(INNER_FOLDS, len(cohort.cases))
    part_of = deal_cases(cohort, [1 / count] * count, [task], seed)
    part = np.array([part_of[record.case_id] for record in cohort.records])
    loss = np.zeros(len(STRENGTHS))
    for inner in range(count):
        fitted, held = part != inner, part == inner
        if len(np.unique(y[fitted])) < 2:
            continue  # nothing to fit, whatever the strength
        for i, strength in enumerate(STRENGTHS):
            found = _log_probabilities(x[fitted], y[fitted], x[held], classes, strength)
            loss[i] -= found[np.arange(held.sum()), y[held]].sum()
    return STRENGTHS[int(loss.argmin())]


def _log_probabilities(x: Array, y: NDArray[np.int_], judged: Array, classes: int, strength: float) -> Array:
    """Fits on x [n, E] and y [n]; log-probabilities [S, classes] of ``judged`` [S, E], always finite."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("a linear probe needs scikit-learn: pip install 'dre_fast[train]'") from error
    mean, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    model = LogisticRegression(C=strength, max_iter=5000).fit((x - mean) / spread, y)
    margin = model.decision_function((judged - mean) / spread)
    if margin.ndim == 1:  # two classes: the log-odds of the second
        margin = np.stack([np.zeros_like(margin), margin], axis=1)
    found = np.full((len(judged), classes), _LEAST)
    found[:, model.classes_] = margin - np.logaddexp.reduce(margin, axis=1, keepdims=True)
    return found
