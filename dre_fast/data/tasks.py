"""Supervised tasks: which label columns they read, and how the text of a cell becomes a number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("multiclass", "binary", "multilabel")
NEGATIVE = frozenset(
    {"0", "0.0", "false", "f", "no", "n", "wt", "wildtype", "wild-type", "negative", "neg"}
    | {"normal", "benign", "absent", "nontumor", "nontumour"}
)
POSITIVE = frozenset(
    {"1", "1.0", "true", "t", "yes", "y", "mut", "mutant", "mutated", "mutation", "positive", "pos"}
    | {"tumor", "tumour", "cancer", "malignant", "present"}
)
_RESIDUE = r"(?:[A-Z*]|[A-Z][a-z]{2})"
# HGVS protein changes as cBioPortal writes them: residue, position, then what became of it.
_PROTEIN_CHANGE = re.compile(
    rf"(?:p\.)?\(?{_RESIDUE}\d+(?:_{_RESIDUE}\d+)?"
    rf"(?:{_RESIDUE}?(?:fs|ext).*|{_RESIDUE}|[=?]|_splice|(?:del|dup|ins).*)\)?"
)


class LabelError(ValueError):
    """A label that cannot be encoded; the message names the slide, the column and the value."""


@dataclass(frozen=True)
class Task:
    """One supervised task over the label columns of a cohort.

    Attributes:
        name: of the task, and of its column when ``columns`` is empty.
        kind: ``"multiclass"``: one column, one of ``classes``; ``"binary"``: one column, yes or no;
            ``"multilabel"``: several columns (the genes of a mutation panel), each yes or no, each allowed to
            be missing on its own.
        classes: multiclass: the class names in the order of the logits; empty until
            :meth:`dre_fast.data.cohort.Cohort.resolve` fills them in. Binary and multilabel: empty, or
            ``(negative, positive)`` when the cells hold other words than those of :func:`truth_value`.
        columns: label columns read.
    """

    name: str
    kind: str = "multiclass"
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a task needs a name")
        for field in ("classes", "columns"):
            value = getattr(self, field)
            if isinstance(value, str):
                raise ValueError(
                    f"task {self.name!r}: {field} must be a list of names, got the string {value!r}"
                )
            object.__setattr__(self, field, tuple(str(item) for item in value))
        if self.kind not in KINDS:
            raise ValueError(f"task {self.name!r}: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not self.columns:
            object.__setattr__(self, "columns", (self.name,))
        if self.kind != "multilabel" and len(self.columns) != 1:
            raise ValueError(
                f"task {self.name!r}: a {self.kind} task reads one column, got {list(self.columns)}"
            )
        for field in ("classes", "columns"):
            if len(set(getattr(self, field))) != len(getattr(self, field)):
                raise ValueError(
                    f"task {self.name!r}: {field} has repeated names: {list(getattr(self, field))}"
                )
        if self.kind != "multiclass" and len(self.classes) not in (0, 2):
            raise ValueError(
                f"task {self.name!r}: classes of a {self.kind} task are [negative, positive], "
                f"got {list(self.classes)}"
            )

    @property
    def outputs(self) -> int:
        """Number of logits: classes of a multiclass task, 1 of a binary one, columns of a multilabel one."""
        return len(self.classes) if self.kind == "multiclass" else len(self.columns)

    def with_classes(self, classes: Iterable[str]) -> Task:
        """The same task with its ``classes`` set."""
        return replace(self, classes=tuple(classes))


def truth_value(text: str) -> float | None:
    """1.0 or 0.0 for the words labels are written in, ``None`` for any other text.

    0: ``0, false, no, wt, wildtype, negative, normal, benign, absent``. 1: ``1, true, yes, mut, mutated,
    positive, tumour, malignant, present``, or one or more protein changes (``G12C``, ``E746_A750del``,
    ``X331_splice``, ``R158Lfs*12``, ``p.Gly12Cys``, ``T125=``: a silent change that cBioPortal
    lists is a splice variant). Upper and lower case are the same, except in protein changes.
    """
    word = text.strip().lower()
    if word in NEGATIVE:
        return 0.0
    if word in POSITIVE:
        return 1.0
    changes = [part for part in re.split(r"[\s,;|/]+", text.strip()) if part]
    if changes and all(_PROTEIN_CHANGE.fullmatch(change) for change in changes):
        return 1.0
    return None


def sort_classes(values: Iterable[str]) -> tuple[str, ...]:
    """Distinct class names in a stable order: by number when all are numbers, else alphabetically."""
    names = set(values)
    try:
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(names))


def encode_task(task: Task, slide_ids: Sequence[str], labels: Sequence[dict[str, str | None]]) -> Tensor:
    """Targets of some slides.

    Args:
        task: with its ``classes`` filled in when it is multiclass.
        slide_ids: B names, for messages.
        labels: B dictionaries column -> text, ``None`` = missing.

    Returns:
        multiclass: int64 [B], -1 = missing. binary: float32 [B], NaN = missing. multilabel: float32 [B, L],
        NaN = missing.

    Raises:
        LabelError: a value that is none of the classes (named with its slide and column).
    """
    if task.kind == "multiclass":
        if not task.classes:
            raise LabelError(f"task {task.name!r} has no classes yet: use Cohort.resolve(task)")
        index = {name: i for i, name in enumerate(task.classes)}
        column = task.columns[0]
        codes = []
        for slide_id, row in zip(slide_ids, labels):
            value = row[column]
            if value is not None and value not in index:
                raise LabelError(
                    f"slide {slide_id!r}, column {column!r}: {value!r} is not a class of task {task.name!r} "
                    f"(classes: {', '.join(task.classes)})"
                )
            codes.append(-1 if value is None else index[value])
        return torch.tensor(codes, dtype=torch.int64)
    rows = [
        [_truth(task, slide_id, column, row[column]) for column in task.columns]
        for slide_id, row in zip(slide_ids, labels)
    ]
    target = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(task.columns))
    return target[:, 0] if task.kind == "binary" else target


def _truth(task: Task, slide_id: str, column: str, value: str | None) -> float:
    if value is None:
        return float("nan")
    if task.classes:
        if value in task.classes:
            return float(task.classes.index(value))
        expected = f"neither {task.classes[0]!r} nor {task.classes[1]!r}"
    else:
        truth = truth_value(value)
        if truth is not None:
            return truth
        expected = (
            "neither yes nor no (0/1, true/false, WT or a protein change ...); "
            "give the task classes: [negative, positive], make its kind multiclass, "
            "or list the value among the cohort's missing values"
        )
    raise LabelError(f"slide {slide_id!r}, column {column!r}, task {task.name!r}: {value!r} is {expected}")
