"""What a run learns from, in numbers: slides, cases, tiles and labels of each split. Kept beside the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dre_fast.data.cohort import Task
from dre_fast.data.files import write_text_atomic
from dre_fast.train.build import SlideSet
from dre_fast.train.tile_scales import scales_seen

DATA = "data.json"


def data_card(train: SlideSet, val: SlideSet | None, tasks: Sequence[Task]) -> dict[str, Any]:
    """Counts of the splits of a run, as JSON holds them.

    Returns:
        ``splits``: name -> slides, cases, with_report, tiles in all and tiles_least, tiles_median and tiles_most of a
        slide. ``labels``: a list of task, column, label and the number of slides of each split that have it (label
        None: not labelled). ``tiles``: as :func:`dre_fast.train.tile_scales.scales_seen`.
    """
    splits = {"train": train, **({} if val is None else {"val": val})}
    labels: list[dict[str, Any]] = []
    for task in tasks:
        counted = {name: _labels(task, slides.targets[task.name]) for name, slides in splits.items()}
        for key in counted["train"]:
            column, label = key
            found = {name: counts[key] for name, counts in counted.items()}
            if label is not None or any(found.values()):
                labels.append({"task": task.name, "column": column, "label": label, **found})
    return {
        "splits": {name: _counts(slides) for name, slides in splits.items()},
        "labels": labels,
        "tiles": scales_seen(train.reader.tilings),
    }


def write_data_card(out: Path, card: dict[str, Any]) -> None:
    """Into the folder of the run."""
    write_text_atomic(out / DATA, json.dumps(card, indent=1) + "\n")


def read_data_card(out: Path) -> dict[str, Any] | None:
    """Of the run in a folder; None of runs that did not write one yet."""
    file = out / DATA
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _counts(slides: SlideSet) -> dict[str, int]:
    tiles = sorted(slides.reader.tiles_per_slide)
    return {
        "slides": len(slides),
        "cases": len({record.case_id for record in slides.records}),
        "with_report": int((slides.report_rows >= 0).sum()),
        "tiles": sum(tiles),
        "tiles_least": tiles[0],
        "tiles_median": tiles[len(tiles) // 2],
        "tiles_most": tiles[-1],
    }


def _labels(task: Task, target: Tensor) -> dict[tuple[str | None, str | None], int]:
    """(column, label) -> slides."""
    found: dict[tuple[str | None, str | None], int] = {}
    if task.kind == "multiclass":
        for c, name in enumerate(task.classes):
            found[None, name] = int((target == c).sum())
        found[None, None] = int((target < 0).sum())
        return found
    columns: dict[str | None, Tensor]
    if task.kind == "survival":
        names = task.classes or ("censored", "event")
        columns = {None: target[:, 1]}
    else:
        names = task.classes or ("no", "yes")
        lone = task.kind == "binary"
        columns = {
            None if lone else name: target.reshape(len(target), -1)[:, i].double()
            for i, name in enumerate(task.columns)
        }
    for column, values in columns.items():
        found[column, names[0]] = int((values == 0).sum())
        found[column, names[1]] = int((values == 1).sum())
        found[column, None] = int((torch.isnan(values) | (values < 0)).sum())
    return found
