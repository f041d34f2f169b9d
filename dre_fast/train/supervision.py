"""What the supervised tasks of a run take from its training slides, and what it says of it at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dre_fast.data.cohort import Task
from dre_fast.nn.survival import hazard_edges


def fit_survival(tasks: Sequence[Task], targets: Mapping[str, Tensor]) -> list[Task]:
    """The tasks, hazard heads with the edges of their intervals: quantiles of the training slides' event times.

    Args:
        targets: of the training slides.

    Raises:
        ValueError: a survival task without event among the training slides, or with too few for its bins.
    """
    fitted = []
    for task in tasks:
        if task.kind == "survival":
            time, event = targets[task.name].unbind(1)
            if not (event == 1).any():
                raise ValueError(
                    f"task {task.name!r}, column {task.columns[1]!r}: no training slide has an event, so there is "
                    "nothing to learn from"
                )
            if task.method == "hazard":
                try:
                    task = task.with_edges(hazard_edges(time, event, task.bins))
                except ValueError as error:
                    raise ValueError(f"task {task.name!r}: {error}") from None
        fitted.append(task)
    return fitted


def describe_tasks(
    tasks: Sequence[Task], targets: Mapping[str, Tensor], weights: Mapping[str, Tensor | None]
) -> list[str]:
    """One line for each task whose classes are weighted, that is of survival, or whose classes look like numbers.

    Args:
        targets: of the training slides.
        weights: task -> class weights, or None.
    """
    lines = []
    for task in tasks:
        weight = weights[task.name]
        if weight is not None:
            what = "class weights" if task.kind == "multiclass" else "weight of positive labels"
            shown = ", ".join(f"{name} {w:.3g}" for name, w in zip(task.output_names, weight.tolist()))
            lines.append(f"task {task.name}: {what} {shown}")
        elif task.kind == "survival":
            event = targets[task.name][:, 1]
            line = f"task {task.name}: {int((event == 1).sum())} events among {int((~torch.isnan(event)).sum())} slides"
            if task.edges:
                line += f", intervals divided at {', '.join(f'{edge:.4g}' for edge in task.edges)}"
            lines.append(line)
        elif task.kind == "multiclass":
            seen = torch.bincount(targets[task.name].clamp_min(-1) + 1, minlength=len(task.classes) + 1)[1:]
            lone = int((seen == 1).sum())
            if 2 * lone > len(task.classes):  # months or ages, taken for classes
                lines.append(
                    f"task {task.name}: {lone} of its {len(task.classes)} classes have a single training slide; "
                    f"is {task.columns[0]!r} a column of classes? Survival: kind: survival"
                )
    return lines
