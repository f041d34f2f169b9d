"""Curves of a run, from its metrics log."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dre_fast.eval.figures import INK, MUTED, PALETTE, label_x, new_figure, save_figure, tidy

_JUDGED = ("val_auc_", "val_c_index_")
_STATISTICS = {"q50": "median", "q90": "90th percentile", "q99": "99th percentile", "max": "largest"}

Log = Sequence[Mapping[str, Any]]


def draw_curves(path: str | os.PathLike[str], logs: Mapping[str, Log]) -> Path:
    """Draws training loss, validation loss and the validation AUC or c-index of each task, one line a run.

    Args:
        path: file to write; its suffix decides the format (.png, .pdf, .svg).
        logs: run name -> lines of its metrics.jsonl. Lines of kind "step" have step and loss; lines of kind
            "epoch" have epoch and, where the run was validated, val_loss, val_auc_TASK and val_c_index_TASK.

    Raises:
        ValueError: no run, or no line of kind "step" in any of them.
    """
    if not any(record.get("kind") == "step" for log in logs.values() for record in log):
        raise ValueError("the metrics logs hold no training step to draw")
    keys = [
        key
        for key in dict.fromkeys(k for log in logs.values() for record in log for k in record)
        if key == "val_loss" or key.startswith(_JUDGED)
    ]
    keys.sort(key=lambda key: key != "val_loss")  # beside the training loss
    panels = [("step", "loss"), *(("epoch", key) for key in keys)]
    figure, axes = panels_of(len(panels))
    for axis, (kind, key) in zip(axes, panels):
        for (name, log), colour in zip(logs.items(), _colours(len(logs))):
            x, y = series(log, kind, "epoch" if kind == "epoch" else "step", key)
            if not len(x):
                continue
            if kind == "step":
                axis.plot(x, y, color=colour, linewidth=0.6, alpha=0.25)
                axis.plot(x, smoothed(y), color=colour, linewidth=1.8, marker=lone(x), label=name)
            else:
                axis.plot(x + 1, y, color=colour, linewidth=1.8, marker="o", markersize=3, label=name)
        label_x(axis, kind)
        axis.set_title(_title(key), fontsize=9, color=INK, loc="left")
        if key.startswith(_JUDGED):
            axis.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
            axis.set_ylim(top=1.02)
        tidy(axis)
    if len(logs) > 1:
        axes[0].legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def draw_staleness(
    path: str | os.PathLike[str], log: Log, *, statistics: Mapping[str, Any] | None = None
) -> Path:
    """Draws how old the rows of the memory bank are and how far features move when they are refreshed.

    Args:
        path: file to write; its suffix decides the format.
        log: lines of a metrics.jsonl; lines of kind "epoch" have bank_age_mean, bank_age_max,
            bank_never_refreshed, bank_drift_mean and quantiles bank_drift_*. Lines of kind "fidelity" add a panel:
            the cosines of slide embedding and encoder gradient with the exact ones; those of kind "drift" one of the
            drift guard.
        statistics: what `MemoryBank.statistics()` gives; adds the histograms of ages and of drift.

    Raises:
        ValueError: no line of kind "epoch" with statistics of the bank.
    """
    if not any(record.get("kind") == "epoch" and "bank_age_mean" in record for record in log):
        raise ValueError(
            "the metrics log holds no statistics of the memory bank to draw (lines of kind 'epoch')"
        )
    probed = any(record.get("kind") == "fidelity" for record in log)
    guarded = any(record.get("kind") == "drift" for record in log)
    figure, axes = panels_of(3 + 2 * bool(statistics) + probed + guarded)
    groups = (
        ("age of rows, steps", [("mean", "bank_age_mean"), ("oldest", "bank_age_max")]),
        ("drift when refreshed, 1 - cos", _drift_keys(log)),
        ("rows still from the first fill", [("", "bank_never_refreshed")]),
    )
    for axis, (title, lines) in zip(axes, groups):
        drawn = 0
        for (name, key), colour in zip(lines, _colours(len(lines))):
            x, y = series(log, "epoch", "epoch", key)
            if len(x):
                axis.plot(x + 1, y, color=colour, linewidth=1.8, marker=lone(x), label=name)
                drawn += 1
            if "drift" in key and len(y) and y.min() > 0:
                _log_scale(axis)
        axis.set_title(title, fontsize=9, color=INK, loc="left")
        label_x(axis, "epoch")
        if drawn > 1:  # below the panel: there are as many lines as places in it
            axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
        tidy(axis)
    axes[2].set_ylim(0, 1)
    if statistics:
        _draw_histogram(axes[3], statistics["age_histogram"], "ages now, rows", "steps since written")
        _draw_histogram(axes[4], statistics["drift_histogram"], "last drift, rows", "1 - cos when refreshed")
        axes[4].set_xscale("log")
    if probed:
        _draw_fidelity(axes[-1 - guarded], log)
    if guarded:
        _draw_guard(axes[-1], log)
    return save_figure(figure, path)


def _draw_histogram(axis: Any, histogram: Mapping[str, Any], title: str, unit: str) -> None:
    edges, rows = (np.asarray(histogram[name], dtype=float) for name in ("edges", "rows"))
    axis.bar(edges[:-1], rows, width=np.diff(edges), align="edge", color=PALETTE[0])
    axis.set_title(title, fontsize=9, color=INK, loc="left")
    label_x(axis, unit)
    tidy(axis)


def _draw_guard(axis: Any, log: Log) -> None:
    lines = (("load (1 = limit)", "load"), ("factor on the encoder's rate", "factor"))
    for (name, key), colour in zip(lines, _colours(2)):
        x, y = series(log, "drift", "step", key)
        axis.plot(x, y, color=colour, linewidth=1.2, marker=lone(x), label=name)
    axis.axhline(1, color=MUTED, linewidth=0.8, linestyle=":")
    axis.set_ylim(0, None)
    axis.set_title("drift guard", fontsize=9, color=INK, loc="left")
    label_x(axis, "step")
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1)
    tidy(axis)


def _draw_fidelity(axis: Any, log: Log) -> None:
    for (name, key), colour in zip((("embedding", "embedding"), ("gradient", "gradient")), _colours(2)):
        x, y = series(log, "fidelity", "step", key)
        if len(x):
            axis.plot(x, y, color=colour, linewidth=1.2, marker=".", markersize=4, label=name)
    axis.axhline(1, color=MUTED, linewidth=0.8, linestyle=":")
    axis.set_title("cosine with the exact", fontsize=9, color=INK, loc="left")
    label_x(axis, "step")
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    tidy(axis)


def _drift_keys(log: Log) -> list[tuple[str, str]]:
    found = dict.fromkeys(
        key
        for record in log
        if record.get("kind") == "epoch"
        for key in record
        if key.startswith("bank_drift_")
    )
    return [
        (_STATISTICS.get(name, name), f"bank_drift_{name}")
        for name in (k.removeprefix("bank_drift_") for k in found)
    ]


def _log_scale(axis: Any) -> None:
    """A logarithmic axis with plain numbers on it, also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(LogLocator(subs=()))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def panels_of(count: int):  # type: ignore[no-untyped-def]
    """A figure of `count` panels in rows of at most four, as even as they go."""
    rows = math.ceil(count / 4)
    columns = math.ceil(count / rows)
    figure = new_figure(3.1 * columns, 2.5 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def series(log: Log, kind: str, x_key: str, y_key: str) -> tuple[np.ndarray, np.ndarray]:
    """The points of one curve; lines without the key, or with null, are left out."""
    points = [
        (record[x_key], record[y_key])
        for record in log
        if record.get("kind") == kind and record.get(x_key) is not None and record.get(y_key) is not None
    ]
    array = np.array(points, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def lone(x: np.ndarray) -> str:
    """The marker of a curve: a line through a single point cannot be seen, so that one gets a dot."""
    return "o" if len(x) == 1 else ""


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about a twentieth of the run, without the pull of a zero start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    average, weight, out = 0.0, 0.0, np.empty_like(values)
    for i, value in enumerate(values):
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out[i] = average / weight
    return out


def _title(key: str) -> str:
    if key == "loss":
        return "training loss"
    if key == "val_loss":
        return "validation loss"
    if key.startswith("val_c_index_"):
        return f"validation c-index: {key.removeprefix('val_c_index_')}"
    return f"validation AUC: {key.removeprefix('val_auc_')}"


def _colours(count: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]
