"""Supervised tasks: which label columns they read, and how the text of a cell becomes a number."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

KINDS = ("multiclass", "binary", "multilabel", "survival")
METHODS = ("cox", "hazard")
NEGATIVE = frozenset(
    {"0", "0.0", "false", "f", "no", "n", "wt", "wildtype", "wild-type", "negative", "neg"}
    | {"normal", "benign", "absent", "nontumor", "nontumour"}
)
POSITIVE = frozenset(
    {"1", "1.0", "true", "t", "yes", "y", "mut", "mutant", "mutated", "mutation", "positive", "pos"}
    | {"tumor", "tumour", "cancer", "malignant", "present"}
)
# What tables write where a label is missing, and what may also be the name of a class.
UNCLEAR = frozenset(
    {
        "nan",
        "n/a",
        "n.a.",
        "#n/a",
        "<na>",
        "null",
        "none",
        "unknown",
        "unk",
        "missing",
        "not available",
        "not reported",
    }
    | {"not applicable", "not evaluated", "not done", "[not available]", "[unknown]", "[not evaluated]"}
    | {"[not applicable]", "[discrepancy]", "-", "--", "'--", "?", "."}
)
ALIVE = frozenset({"alive", "living", "censored"})
DEAD = frozenset({"dead", "deceased", "died", "event"})
# cBioPortal: "1:DECEASED", "0:LIVING", "1:Recurred/Progressed", "0:DiseaseFree"
_STATUS = re.compile(r"([01])\s*:.*", re.DOTALL)
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
            be missing on its own; ``"survival"``: two columns [time, event].
        classes: multiclass: the class names in the order of the logits; empty until
            :meth:`dre_fast.data.cohort.Cohort.resolve` fills them in. Binary and multilabel: empty, or
            ``(negative, positive)`` when the cells hold other words than those of :func:`truth_value`; survival:
            empty, or ``(censored, event)`` for other words than those of :func:`event_value`.
        columns: label columns read.
        method: survival: ``"cox"``, one logit, the log hazard ratio; ``"hazard"``, ``bins`` logits, the hazards of as
            many intervals of time.
        bins: of a hazard head, at least 2.
        edges: the bins - 1 times between the intervals of a hazard head, in the unit of its time column; empty until
            they are taken from the training slides.
    """

    name: str
    kind: str = "multiclass"
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    method: str = "cox"
    bins: int = 4
    edges: tuple[float, ...] = ()

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
        if self.kind == "survival":
            self._check_survival()
        elif self.kind != "multilabel" and len(self.columns) != 1:
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
                f"task {self.name!r}: classes of a {self.kind} task are "
                f"{'[censored, event]' if self.kind == 'survival' else '[negative, positive]'}, "
                f"got {list(self.classes)}"
            )

    def _check_survival(self) -> None:
        if len(self.columns) != 2:
            raise ValueError(
                f"task {self.name!r}: a survival task reads two columns, [time, event], got {list(self.columns)}"
            )
        if self.method not in METHODS:
            raise ValueError(
                f"task {self.name!r}: method must be one of {', '.join(METHODS)}, got {self.method!r}"
            )
        if self.bins < 2:
            raise ValueError(f"task {self.name!r}: bins must be at least 2, got {self.bins}")
        edges = tuple(float(edge) for edge in self.edges)
        object.__setattr__(self, "edges", edges)
        if edges and (
            len(edges) != self.bins - 1 or not all(low < high for low, high in zip((0.0, *edges), edges))
        ):
            raise ValueError(
                f"task {self.name!r}: {self.bins} bins need {self.bins - 1} ascending edges > 0, got {list(edges)}"
            )

    @property
    def outputs(self) -> int:
        """Number of logits: of a multiclass task its classes, of a binary or Cox one 1, of a multilabel one its
        columns, of a hazard one its bins."""
        return len(self.output_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """What each logit speaks of: a class, a column, ``risk`` or ``hazard 1``, ``hazard 2`` ..."""
        if self.kind == "survival":
            hazards = tuple(f"hazard {i + 1}" for i in range(self.bins))
            return hazards if self.method == "hazard" else ("risk",)
        return self.classes if self.kind == "multiclass" else self.columns

    def with_classes(self, classes: Iterable[str]) -> Task:
        """The same task with its ``classes`` set."""
        return replace(self, classes=tuple(classes))

    def with_edges(self, edges: Iterable[float]) -> Task:
        """The same survival task with the ``edges`` of its intervals set."""
        return replace(self, edges=tuple(edges))

    def card(self) -> dict[str, Any]:
        """What a saved model or file of predictions says of the task, as plain values for JSON."""
        card: dict[str, Any] = {
            "kind": self.kind,
            "classes": list(self.classes),
            "columns": list(self.columns),
        }
        if self.kind == "survival":
            card.update(method=self.method, bins=self.bins, edges=list(self.edges))
        return card

    @classmethod
    def from_card(cls, name: str, card: Mapping[str, Any]) -> Task:
        """The task that :meth:`card` describes.

        Raises:
            ValueError: no task has such values.
        """
        return cls(
            name,
            card["kind"],
            tuple(card.get("classes", ())),
            tuple(card.get("columns", ())),
            card.get("method", "cox"),
            card.get("bins", 4),
            tuple(card.get("edges", ())),
        )


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


def event_value(text: str) -> float | None:
    """1.0 for an event, 0.0 for a censored time, ``None`` for any other text.

    The plain words of :func:`truth_value` without protein changes, ``dead, deceased, died, event``, ``alive, living,
    censored``, and the codes of cBioPortal, which begin with the number: ``1:DECEASED``, ``0:LIVING``. Upper and lower
    case are the same.
    """
    word = text.strip().lower()
    if code := _STATUS.fullmatch(word):
        return float(code[1])
    if word in DEAD | POSITIVE:
        return 1.0
    return 0.0 if word in ALIVE | NEGATIVE else None


def sort_classes(values: Iterable[str]) -> tuple[str, ...]:
    """Distinct class names in a stable order: by number when all are numbers, else alphabetically."""
    names = set(values)
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        return tuple(sorted(names))
    if any(math.isnan(number) for number in numbers.values()):  # no place among numbers: any order would do
        return tuple(sorted(names))
    return tuple(sorted(names, key=lambda name: (numbers[name], name)))


def encode_task(task: Task, slide_ids: Sequence[str], labels: Sequence[dict[str, str | None]]) -> Tensor:
    """Targets of some slides.

    Args:
        task: with its ``classes`` filled in when it is multiclass.
        slide_ids: B names, for messages.
        labels: B dictionaries column -> text, ``None`` = missing.

    Returns:
        multiclass: int64 [B], -1 = missing. binary: float32 [B], NaN = missing. multilabel: float32 [B, L],
        NaN = missing. survival: float32 [B, 2], time and event (1, or 0 = censored), both NaN = missing.

    Raises:
        LabelError: a value that is none of the classes, or no time; a time without event or the reverse (named with
            its slide and column).
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
                    f"(classes: {', '.join(task.classes)}); if it means that the label is missing, list it among the "
                    "cohort's missing values"
                )
            codes.append(-1 if value is None else index[value])
        return torch.tensor(codes, dtype=torch.int64)
    if task.kind == "survival":
        pairs = [_time_and_event(task, slide_id, row) for slide_id, row in zip(slide_ids, labels)]
        return torch.tensor(pairs, dtype=torch.float32).reshape(len(pairs), 2)
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


def _time_and_event(task: Task, slide_id: str, row: dict[str, str | None]) -> tuple[float, float]:
    """A slide's time and event; both NaN when both cells are empty."""

    def fault(column: str, message: str) -> LabelError:
        return LabelError(f"slide {slide_id!r}, column {column!r}, task {task.name!r}: {message}")

    time_column, event_column = task.columns
    time, event = row[time_column], row[event_column]
    if time is None and event is None:
        return math.nan, math.nan
    for missing, column, other in ((event, event_column, time_column), (time, time_column, event_column)):
        if missing is None:
            raise fault(
                column, f"missing, but column {other!r} is {row[other]!r}; give both, or leave both empty"
            )
    assert time is not None
    assert event is not None
    try:
        moment = float(time)
    except ValueError:
        moment = math.nan
    if not 0 <= moment < math.inf:
        raise fault(time_column, f"{time!r} is not a time: a number >= 0")
    if task.classes:
        happened = float(task.classes.index(event)) if event in task.classes else None
        words = f"neither {task.classes[0]!r} nor {task.classes[1]!r}"
    else:
        happened = event_value(event)
        words = (
            "neither an event nor its absence (1/0, dead/alive, 1:DECEASED/0:LIVING ...); "
            "give the task classes: [censored, event], or list the value among the cohort's missing values"
        )
    if happened is None:
        raise fault(event_column, f"{event!r} is {words}")
    return moment, happened
