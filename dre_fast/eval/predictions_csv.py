"""Predictions as a table that people and spreadsheets read: a row a slide."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from dre_fast.data.cohort import Cohort, Task
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.data.files import write_text_atomic
from dre_fast.nn.survival import risk_score


def write_predictions(
    predictions: SlideEmbeddings,
    cohort: Cohort,
    path: Path,
    extra: Mapping[str, Mapping[str, object]] | None = None,
) -> Path:
    """Writes slide_id, case_id, ``extra`` columns (name -> slide -> value), and for every task labels and predictions.

    Columns of a task: ``label_COLUMN``, the cell of the cohort, where it has one; ``p_TASK_CLASS``, probability of a
    class, or ``p_COLUMN``, of the yes of a column (``p_TASK_COLUMN`` where two tasks read it); survival: ``risk_TASK``,
    higher = earlier.
    """
    header = ["slide_id", "case_id", *(extra or {})]
    columns: list[list[object]] = [
        list(predictions.slide_ids),
        [cohort[slide].case_id for slide in predictions.slide_ids],
        *([values[slide] for slide in predictions.slide_ids] for values in (extra or {}).values()),
    ]
    tasks = {name: Task.from_card(name, predictions.tasks[name]) for name in predictions.logits}
    said = {name: _said(task, predictions.logits[name].double()) for name, task in tasks.items()}
    often = Counter(title for own in said.values() for title, _ in own)
    for name, task in tasks.items():
        for column in task.columns:
            if column in cohort.label_names and f"label_{column}" not in header:
                header.append(f"label_{column}")
                columns.append([cohort[slide].labels[column] for slide in predictions.slide_ids])
        for title, values in said[name]:
            header.append(title if often[title] == 1 else f"p_{name}_{title.removeprefix('p_')}")
            columns.append([f"{value:.6g}" for value in values.tolist()])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if cell is None else cell for cell in row] for row in zip(*columns))
    write_text_atomic(path, text.getvalue())
    return path


def _said(task: Task, logits: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if task.kind == "survival":
        return [(f"risk_{task.name}", risk_score(task.method, logits))]
    if task.kind == "multiclass":
        chances = torch.softmax(logits, 1)
        return [(f"p_{task.name}_{name}", chances[:, i]) for i, name in enumerate(task.classes)]
    return [(f"p_{column}", torch.sigmoid(logits[:, i])) for i, column in enumerate(task.columns)]
