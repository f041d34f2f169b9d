"""Two models on the same slides: the difference of their AUCs, with a paired bootstrap interval by case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dre_fast.data.cohort import Cohort
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.eval import scores
from dre_fast.eval.metrics import task_of

Array = NDArray[np.float64]
# AUCs of both models under R weightings of the slides: [R, n] -> ([R], [R])
Pair = Callable[[Array], tuple[Array, Array]]


@dataclass(frozen=True)
class PairedDifference:
    """AUCs of two models for the same slides.

    Attributes:
        task, column: column None: the task (multilabel: mean over the columns for which it is defined).
        first, second: their AUCs, None where undefined.
        difference: first - second. low, high: its bootstrap interval, None without one.
        samples, cases: labelled slides, and distinct cases among them.
        note: what to know; mostly empty.
    """

    task: str
    column: str | None
    first: float | None
    second: float | None
    difference: float | None
    low: float | None
    high: float | None
    samples: int
    cases: int
    note: str = ""


def paired_differences(
    first: SlideEmbeddings,
    second: SlideEmbeddings,
    cohort: Cohort,
    *,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[PairedDifference]:
    """Differences in AUC for the slides that both models predict and the cohort labels.

    Each resample draws cases with replacement and judges both models on the same draw: what makes a draw easy for both
    cancels, so the interval is narrower than two intervals side by side would suggest.

    Args:
        cohort: labels of the slides to judge; others are left out.
        bootstrap: resamples; 0: no intervals.
        confidence: of the intervals, in (0, 1).
        seed: of the resampling.

    Returns:
        A row for each classification task that both have with the same kind, classes and columns; multilabel tasks:
        their mean, then each column.

    Raises:
        ValueError: no slide in common, or bad settings.
    """
    if bootstrap < 0 or not 0 < confidence < 1:
        raise ValueError(f"bootstrap must be >= 0 and confidence in (0, 1), got {bootstrap} and {confidence}")
    common = set(first.slide_ids) & set(second.slide_ids)
    ids = [slide for slide in cohort.ids if slide in common]
    if not ids:
        raise ValueError(
            f"{cohort.source}: none of its {len(cohort)} slides to be judged is predicted by both models"
        )
    one, two, judged = first.select(ids), second.select(ids), cohort.select(ids)
    rows = []
    for name in one.logits:
        task = task_of(name, one.tasks[name])
        if name not in two.logits or task != task_of(name, two.tasks[name]):
            continue
        if task.kind not in ("multiclass", "binary", "multilabel"):
            continue
        target = judged.encode(task).double().numpy().reshape(len(ids), -1)
        truth = np.where(target < 0, np.nan, target)
        chances = [_probabilities(task.kind, part.logits[name]) for part in (one, two)]
        group = np.unique([record.case_id for record in judged.records], return_inverse=True)[1]
        draws = _Draws(group, bootstrap, confidence, seed)
        if task.kind == "multiclass":
            rows.append(draws.row(name, None, truth[:, 0], _pair(chances, truth[:, 0])))
            continue
        columns = [_pair([p[:, i : i + 1] for p in chances], truth[:, i]) for i in range(truth.shape[1])]
        if task.kind == "binary":
            rows.append(draws.row(name, None, truth[:, 0], columns[0]))
            continue
        everything = np.ones((1, len(ids)))
        defined = [pair for pair in columns if not np.isnan(pair(everything)[0]).any()]
        left_out = len(columns) - len(defined)
        note = f"without {left_out} of {len(columns)} columns: one class only" if left_out else ""
        labelled = np.where(np.isnan(truth).all(1), np.nan, 0.0)
        rows.append(draws.row(name, None, labelled, _mean(defined), note))
        rows += [draws.row(name, column, truth[:, i], columns[i]) for i, column in enumerate(task.columns)]
    return rows


class _Draws:
    """Resamples of cases, the same for every task."""

    def __init__(self, group: NDArray[np.int64], bootstrap: int, confidence: float, seed: int) -> None:
        self.group, self.bootstrap, self.seed = group, bootstrap, seed
        self.tail = (1 - confidence) / 2

    def row(
        self, task: str, column: str | None, truth: Array, pair: Pair, note: str = ""
    ) -> PairedDifference:
        labelled = ~np.isnan(truth)
        samples, cases = int(labelled.sum()), len(np.unique(self.group[labelled]))
        a, b = (float(value[0]) for value in pair(np.ones((1, len(truth)))))
        if np.isnan(a):
            return PairedDifference(
                task, column, None, None, None, None, None, samples, cases, note or "undefined"
            )
        low = high = None
        if self.bootstrap:
            spread = self._spread(labelled, pair)
            kept = spread[~np.isnan(spread)]
            if len(kept):
                low, high = (float(q) for q in np.quantile(kept, [self.tail, 1 - self.tail]))
            if len(kept) < len(spread):
                left = f"{len(spread) - len(kept)} of {len(spread)} resamples undefined"
                note = f"{note}; {left}" if note else left
        return PairedDifference(task, column, a, b, a - b, low, high, samples, cases, note)

    def _spread(self, labelled: NDArray[np.bool_], pair: Pair) -> Array:
        """Differences of all resamples, [bootstrap]; as many labelled cases are drawn as there are."""
        index = np.unique(self.group[labelled], return_inverse=True)[1]
        count = int(index.max()) + 1
        rng = np.random.default_rng(self.seed)
        found = []
        block = max(1, 4_000_000 // len(labelled))  # weights held at once
        for begin in range(0, self.bootstrap, block):
            size = min(block, self.bootstrap - begin)
            weights = np.zeros((size, len(labelled)))
            weights[:, labelled] = rng.multinomial(count, np.full(count, 1 / count), size=size)[:, index]
            a, b = pair(weights)
            found.append(a - b)
        return np.concatenate(found)


def _pair(chances: list[Array], truth: Array) -> Pair:
    """AUCs of both models for one column; more than two classes: the mean of each against the rest."""
    there = ~np.isnan(truth)
    y = truth[there].astype(np.int64)
    width = chances[0].shape[1]
    # (column of the probabilities, its class): of two classes the second, of a yes/no column yes
    targets = [(width - 1, 1)] if width <= 2 else [(c, c) for c in range(width)]

    def both(weights: Array) -> tuple[Array, Array]:
        w = weights[:, there]
        a, b = (np.mean([scores.auc(p[there, c], y == k, w) for c, k in targets], axis=0) for p in chances)
        return a, b

    return both


def _mean(pairs: list[Pair]) -> Pair:
    """Mean AUCs over columns; undefined without any."""

    def both(weights: Array) -> tuple[Array, Array]:
        if not pairs:
            return np.full(len(weights), np.nan), np.full(len(weights), np.nan)
        found = [pair(weights) for pair in pairs]
        return np.mean([a for a, _ in found], axis=0), np.mean([b for _, b in found], axis=0)

    return both


def _probabilities(kind: str, logits: torch.Tensor) -> Array:
    values = logits.double()
    return (torch.softmax(values, -1) if kind == "multiclass" else torch.sigmoid(values)).numpy()
