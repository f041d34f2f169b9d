"""Whether probabilities mean what they say: reliability curves, expected calibration error, Brier score."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dre_fast.data.cohort import Cohort
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.data.files import write_text_atomic
from dre_fast.eval.figures import MUTED, PALETTE, new_figure, save_figure, tidy
from dre_fast.eval.metrics import JudgedTask, judged_tasks

Array = NDArray[np.float64]
BINS = 10


@dataclass(frozen=True)
class Calibration:
    """How well the probabilities of one task (one column of it) fit.

    Args:
        task: its name.
        column: of a multilabel task, else None.
        samples: slides or patients with a label.
        ece: expected calibration error (Guo et al. 2017, equation 3): mean over the samples of the distance, in their
            bin, between stated and observed frequency; in [0, 1].
        brier: mean squared distance of the probabilities from the labels (Brier 1950: summed over the classes; yes or
            no: of the yes).
        stated: float64 [bins], mean probability in the bin; NaN where it is empty.
        observed: float64 [bins], how often it was right; NaN where it is empty.
        counts: int64 [bins].
    """

    task: str
    column: str | None
    samples: int
    ece: float
    brier: float
    stated: Array
    observed: Array
    counts: NDArray[np.int64]


def reliability(probability: Array, right: Array, bins: int = BINS) -> tuple[Array, Array, NDArray[np.int64]]:
    """Stated and observed frequencies in bins of equal width over [0, 1], the upper edge with the last one.

    Args:
        probability: float [S] in [0, 1].
        right: float [S], 1 where what it was said of is so.
        bins: how many.

    Returns:
        float64 [bins], float64 [bins] (NaN: empty), int64 [bins].

    Raises:
        ValueError: a probability outside of [0, 1], or NaN.
    """
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError("probabilities must lie in [0, 1]")
    which = np.minimum((probability * bins).astype(np.int64), bins - 1)
    counts = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        stated = np.bincount(which, probability, bins) / counts
        observed = np.bincount(which, right, bins) / counts
    return stated, observed, counts


def calibrate(
    embeddings: SlideEmbeddings,
    cohort: Cohort,
    *,
    split: str | Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    level: str = "slide",
    allow_missing: bool = False,
    bins: int = BINS,
) -> list[Calibration]:
    """Calibration of every task with classes; survival heads say risks, no probabilities, and are left out.

    Of several classes it is the most likely one's probability that counts, of yes or no that of the yes. Arguments and
    errors as of :func:`dre_fast.eval.metrics.evaluate_predictions`.
    """
    found: list[Calibration] = []
    for judged in judged_tasks(embeddings, cohort, split, tasks, level, allow_missing):
        if judged.task.kind == "multiclass":
            found.append(_of_classes(judged, bins))
        elif judged.task.kind != "survival":
            multilabel = judged.task.kind == "multilabel"
            for i in range(judged.truth.shape[1]):
                column = judged.task.columns[i] if multilabel else None
                found.append(
                    _of_column(judged.task.name, column, judged.probability[:, i], judged.truth[:, i], bins)
                )
    return found


def _of_column(task: str, column: str | None, probability: Array, truth: Array, bins: int) -> Calibration:
    there = ~np.isnan(truth)
    p, y = probability[there], truth[there]
    curve = reliability(p, y, bins)
    brier = float(np.mean((p - y) ** 2)) if len(p) else float("nan")
    return Calibration(task, column, len(p), _ece(*curve), brier, *curve)


def _of_classes(judged: JudgedTask, bins: int) -> Calibration:
    there = ~np.isnan(judged.truth[:, 0])
    p, y = judged.probability[there], judged.truth[there, 0].astype(np.int64)
    if p.shape[1] == 2:  # the second class is the positive one, as for the AUC
        return _of_column(judged.task.name, None, judged.probability[:, 1], judged.truth[:, 0], bins)
    curve = reliability(p.max(1), (p.argmax(1) == y).astype(np.float64), bins)
    brier = float(np.mean(((p - np.eye(p.shape[1])[y]) ** 2).sum(1))) if len(p) else float("nan")
    return Calibration(judged.task.name, None, len(p), _ece(*curve), brier, *curve)


def _ece(stated: Array, observed: Array, counts: NDArray[np.int64]) -> float:
    """Guo et al. 2017, equation 3."""
    full = counts > 0
    if not full.any():
        return float("nan")
    return float((counts[full] * np.abs(stated - observed)[full]).sum() / counts.sum())


def write_calibration(found: Sequence[Calibration], folder: str | os.PathLike[str]) -> list[Path]:
    """``calibration.csv``, a line a task or column, and ``calibration.png``, their curves; returns the files."""
    with io.StringIO() as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["task", "column", "samples", "ece", "brier"])
        for each in found:
            row = [each.task, each.column or "", each.samples, f"{each.ece:.6g}", f"{each.brier:.6g}"]
            writer.writerow(row)
        table = Path(folder) / "calibration.csv"
        write_text_atomic(table, text.getvalue())
    return [table, draw_calibration(found, Path(folder) / "calibration.png")]


def draw_calibration(found: Sequence[Calibration], path: str | os.PathLike[str]) -> Path:
    """Reliability curves, a panel each: observed over stated frequency, and below how many samples said so."""
    columns = min(max(len(found), 1), 4)
    rows = -(-max(len(found), 1) // columns)
    figure = new_figure(3.2 * columns + 0.4, 3.8 * rows)
    from matplotlib.ticker import MaxNLocator

    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3, 1] * rows)
    for i, each in enumerate(found):
        row, column = 2 * (i // columns), i % columns
        curve, bars = figure.add_subplot(grid[row, column]), figure.add_subplot(grid[row + 1, column])
        curve.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1)
        full = each.counts > 0
        curve.plot(each.stated[full], each.observed[full], color=PALETTE[0], marker="o", markersize=4)
        curve.set_title(
            f"{each.column or each.task}: ECE {each.ece:.2f}, Brier {each.brier:.2f}, n = {each.samples}",
            fontsize=8,
        )
        curve.set_ylabel("observed frequency", fontsize=8)
        edges = np.linspace(0, 1, len(each.counts) + 1)
        bars.bar(
            edges[:-1], each.counts, width=np.diff(edges), align="edge", color=PALETTE[5], edgecolor="white"
        )
        bars.set_xlabel("stated probability", fontsize=8)
        bars.set_ylabel("samples", fontsize=8)
        bars.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
        for axes in (curve, bars):
            axes.set_xlim(-0.02, 1.02)
            tidy(axes)
        curve.set_ylim(-0.02, 1.02)
    return save_figure(figure, path)
