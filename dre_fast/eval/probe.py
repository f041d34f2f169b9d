"""A linear probe: how much a frozen slide embedding tells about a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dre_fast.data.cohort import Cohort, Task
from dre_fast.data.embeddings import SlideEmbeddings


def linear_probe(
    embeddings: SlideEmbeddings,
    cohort: Cohort,
    tasks: Sequence[Task],
    *,
    train_split: str = "train",
    strength: float = 1.0,
) -> SlideEmbeddings:
    """Logistic regression on standardised embeddings, fitted on the training slides, applied to all.

    Args:
        embeddings: of training and judged slides alike.
        cohort: labels and splits.
        tasks: what to predict; multilabel tasks get one regression a column.
        train_split: where it is fitted.
        strength: inverse of the L2 penalty (scikit-learn's C).

    Returns:
        The same embeddings with the logits of the probe.

    Raises:
        ValueError: no training slide has an embedding, or the training labels of a column do not hold every
            class; a survival task.
        ImportError: scikit-learn is missing.
    """
    survival = [task.name for task in tasks if task.kind == "survival"]
    if survival:
        raise ValueError(
            f"task {survival[0]!r}: a linear probe is a logistic regression and does not fit survival; leave this task "
            "out (--tasks)"
        )
    known = set(embeddings.slide_ids)
    records = [record for record in cohort.subset(train_split).records if record.slide_id in known]
    if not records:
        raise ValueError(
            f"{cohort.source}: no slide of split {train_split!r} has an embedding, so there is nothing to "
            f"fit the probe on; "
            "encode the whole cohort"
        )
    position = {name: i for i, name in enumerate(embeddings.slide_ids)}
    rows = np.array([position[record.slide_id] for record in records])
    x = embeddings.embedding.double().numpy()
    spread = x[rows].std(0)
    x = (x - x[rows].mean(0)) / np.where(spread > 0, spread, 1.0)
    logits: dict[str, torch.Tensor] = {}
    cards: dict[str, dict[str, Any]] = {}
    for unresolved in tasks:
        task = cohort.resolve(unresolved)
        target = cohort.encode(task, records).double().numpy().reshape(len(records), -1)
        target = np.where(target < 0, np.nan, target)
        columns = [
            _fit(
                task,
                task.columns[i],
                x,
                rows,
                target[:, i],
                task.outputs if task.kind == "multiclass" else 2,
                strength,
            )
            for i in range(target.shape[1])
        ]
        logits[task.name] = torch.from_numpy(np.concatenate(columns, axis=1)).float()
        cards[task.name] = {"kind": task.kind, "classes": list(task.classes), "columns": list(task.columns)}
    return SlideEmbeddings(
        embeddings.slide_ids, embeddings.embedding, embeddings.report_embedding, logits, cards
    )


def _fit(
    task: Task,
    column: str,
    x: NDArray[np.float64],
    rows: NDArray[np.int64],
    target: NDArray[np.float64],
    classes: int,
    strength: float,
) -> NDArray[np.float64]:
    """Logits [S, classes] of a multiclass column, else [S, 1]."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("a linear probe needs scikit-learn: pip install 'dre_fast[train]'") from error
    there = ~np.isnan(target)
    labels = target[there].astype(int)
    absent = sorted(set(range(classes)) - set(labels.tolist()))
    if absent:
        names = task.classes or ("negative", "positive")
        raise ValueError(
            f"task {task.name!r}, column {column!r}: the training slides hold no {names[absent[0]]!r}, so "
            f"no probe can be "
            "fitted; leave this task out (--tasks)"
        )
    model = LogisticRegression(C=strength, max_iter=5000).fit(x[rows][there], labels)
    return model.predict_log_proba(x) if task.kind == "multiclass" else model.decision_function(x)[:, None]
