"""Curves of runs against each other: losses, validation, fidelity and staleness, speed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dre_fast.eval.compare import Log, Run, scores_first
from dre_fast.eval.figures import INK, MUTED, PALETTE, label_x, save_figure, tidy
from dre_fast.eval.plots import panels_of, series, smoothed
from dre_fast.eval.report import Figure

Curve = tuple[np.ndarray, np.ndarray]
_STYLES = ("-", "--", ":", "-.")


@dataclass
class Panel:
    """One pair of axes: its title, the name of x, and the curves of each run (one a fold)."""

    title: str
    x: str
    curves: list[list[Curve]]
    smooth: bool = False
    level: float | None = None  # where a dotted line says what would be perfect, or chance
    drawn: bool = field(init=False)

    def __post_init__(self) -> None:
        self.drawn = any(len(x) for run in self.curves for x, _ in run)


def draw_comparison(folder: str | os.PathLike[str], runs: Sequence[Run]) -> list[Figure]:
    """Draws loss.png, validation.png, memory.png and speed.png, each where the logs have something to show.

    A run has one colour in all of them, with a line for each fold of a cross-validation.
    """
    groups = {
        "loss": (
            [_by_step(runs, "loss", "training loss", smooth=True), *_losses(runs)],
            "Training losses, smoothed",
        ),
        "validation": (
            _validation(runs),
            "Validation scores by epoch",
        ),
        "memory": (
            _memory(runs),
            "Fidelity: cosine with the exact step. Staleness of the memory bank's rows",
        ),
        "speed": (_speed(runs), "Speed. Minutes count pre-fill, steps, codebook, probes and validation"),
    }
    found = []
    for name, (panels, caption) in groups.items():
        shown = [panel for panel in panels if panel.drawn]
        if shown:
            found.append(
                Figure(_draw(Path(folder) / f"{name}.png", shown, [run.name for run in runs]), caption)
            )
    return found


def _losses(runs: Sequence[Run]) -> list[Panel]:
    return [
        _by_step(runs, key, f"loss {key.removeprefix('loss_')}", smooth=True)
        for key in _keys(runs, "step", "loss_")
    ]


def _validation(runs: Sequence[Run]) -> list[Panel]:
    keys = scores_first(_keys(runs, "epoch", "val_"))
    return [
        _by_epoch(
            runs, key, validation_title(key), 0.5 if key.startswith(("val_auc_", "val_c_index_")) else None
        )
        for key in keys
    ]


def validation_title(key: str) -> str:
    """The name of a task stands as it is: it may hold an underscore."""
    for start, shown in (("val_auc_", "AUC"), ("val_c_index_", "c-index"), ("val_loss_", "loss")):
        if key.startswith(start):
            return f"{shown}: {key.removeprefix(start)}"
    return key.removeprefix("val_")


def _memory(runs: Sequence[Run]) -> list[Panel]:
    return [
        _each(
            runs,
            lambda log, _: series(log, "fidelity", "step", "embedding"),
            "cosine of the embedding",
            level=1,
        ),
        _each(
            runs,
            lambda log, _: series(log, "fidelity", "step", "gradient"),
            "cosine of the gradient",
            level=1,
        ),
        _each(
            runs,
            lambda log, _: series(log, "drift", "step", "factor"),
            "factor on the encoder's rate",
            level=1,
        ),
        _by_epoch(runs, "bank_age_mean", "mean age of rows, steps"),
        _by_epoch(runs, "bank_drift_mean", "mean drift when refreshed, 1 - cos"),
        _by_epoch(runs, "bank_never_refreshed", "rows still from the first fill"),
    ]


def _speed(runs: Sequence[Run]) -> list[Panel]:
    def rate(log: Log, _: Run) -> Curve:
        counted = [line for line in log if "tiles" in line]
        x, seconds = series(counted, "step", "step", "seconds")
        return x, series(counted, "step", "step", "tiles")[1] / np.maximum(seconds, 1e-9)

    def clock(log: Log, _: Run) -> Curve:
        points = [(line["step"], end) for line, end in _ends(log) if line["kind"] == "step"]
        array = np.array(points, dtype=float).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    def score(log: Log, _: Run) -> Curve:
        points = [(end, line["val_score"]) for line, end in _ends(log) if line.get("val_score") is not None]
        array = np.array(points, dtype=float).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    return [
        _by_step(runs, "seconds", "seconds a step", smooth=True),
        _each(runs, rate, "live tiles a second", smooth=True),
        _each(runs, clock, "minutes since the start"),
        _each(runs, score, "validation score by time", x="minutes"),
    ]


def _ends(log: Log) -> list[tuple[dict, float]]:
    """Each line of a log with the minutes at which it ended."""
    ends = np.cumsum([line.get("seconds", 0.0) for line in log]) / 60
    return list(zip(log, ends.tolist()))


def _keys(runs: Sequence[Run], kind: str, start: str) -> list[str]:
    lines = (line for run in runs for log in run.logs for line in log if line.get("kind") == kind)
    return list(dict.fromkeys(key for line in lines for key in line if key.startswith(start)))


def _each(
    runs: Sequence[Run],
    curve: Callable[[Log, Run], Curve],
    title: str,
    *,
    x: str = "step",
    smooth: bool = False,
    level: float | None = None,
) -> Panel:
    return Panel(title, x, [[curve(log, run) for log in run.logs] for run in runs], smooth, level)


def _by_step(runs: Sequence[Run], key: str, title: str, *, smooth: bool) -> Panel:
    return _each(runs, lambda log, _: series(log, "step", "step", key), title, smooth=smooth)


def _by_epoch(runs: Sequence[Run], key: str, title: str, level: float | None = None) -> Panel:
    def curve(log: Log, _: Run) -> Curve:
        x, y = series(log, "epoch", "epoch", key)
        return x + 1, y

    return _each(runs, curve, title, x="epoch", level=level)


def _look(i: int) -> dict[str, str]:
    """Colour and, past the palette's end, dashes of a run's lines."""
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": _STYLES[i // len(PALETTE) % len(_STYLES)]}


def _draw(path: Path, panels: Sequence[Panel], names: Sequence[str]) -> Path:
    figure, axes = panels_of(len(panels))
    for axis, panel in zip(axes, panels):
        for i, curves in enumerate(panel.curves):
            for x, y in curves:
                marker = "o" if len(x) == 1 else None  # a line of one point is nothing to see
                axis.plot(
                    x,
                    smoothed(y) if panel.smooth else y,
                    linewidth=1.5,
                    marker=marker,
                    markersize=4,
                    **_look(i),
                )
        if panel.level is not None:
            axis.axhline(panel.level, color=MUTED, linewidth=0.8, linestyle=":")
        axis.set_title(panel.title, fontsize=9, color=INK, loc="left")
        label_x(axis, panel.x)
        tidy(axis)
    if len(names) == 1:
        return save_figure(figure, path)
    from matplotlib.lines import Line2D

    handles = []
    for i in range(len(names)):
        handles.append(Line2D([], []))
        handles[-1].set(**_look(i))
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(len(names), 4), fontsize=8, frameon=False
    )
    return save_figure(figure, path)
