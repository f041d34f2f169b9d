"""The cohort table: one CSV row per slide, with its case, file, report, labels, split and fold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from dre_fast.data.tables import CohortError, read_table
from dre_fast.data.tasks import UNCLEAR, LabelError, Task, encode_task, sort_classes

__all__ = ["Cohort", "CohortError", "LabelError", "SlideRecord", "Task", "case_of"]

RESERVED = ("slide_id", "case_id", "path", "report", "split", "fold")
MISSING = ("", "NA")
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_NO_NAME = ("nan", "null", "<na>", "#n/a", "n/a")  # as ids they would make one slide, or one patient, of many
_TCGA = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])", re.I)


@dataclass(frozen=True)
class SlideRecord:
    """One slide of a cohort.

    Attributes:
        slide_id: unique, usable as a file name.
        case_id: the patient. Slides of one case share a report and never fall into two splits.
        path: of the slide, absolute or relative to the working folder; ``None`` when the table has none.
        report: its text (already read when the table names a file), ``None`` when missing.
        labels: column -> text of the cell, ``None`` when missing.
        split: ``"train"``, ``"val"``, ``"test"`` or ``None``.
        fold: cross-validation fold or ``None``.
        row: row of the table as a spreadsheet counts it (the header is row 1), for messages.
    """

    slide_id: str
    case_id: str
    path: Path | None = None
    report: str | None = None
    labels: dict[str, str | None] = field(default_factory=dict)
    split: str | None = None
    fold: int | None = None
    row: int | None = None


def case_of(slide_id: str) -> str:
    """Case of a slide when the table does not say: a TCGA barcode's first 12 characters, else the slide."""
    return slide_id[:12] if _TCGA.match(slide_id) else slide_id


class Cohort:
    """The slides of a study, in table order.

    Args:
        records: one per slide, ids distinct.
        label_names: label columns; every record's ``labels`` has exactly these keys.
        source: name for messages, the CSV's path when there is one.

    Raises:
        CohortError: a repeated slide, or a case in two splits or two folds, also one written in upper and in lower
            case.
    """

    def __init__(
        self, records: Iterable[SlideRecord], label_names: Sequence[str] = (), source: str = "cohort"
    ) -> None:
        self.label_names = tuple(label_names)
        self.source = source
        empty: dict[str, str | None] = dict.fromkeys(self.label_names)
        self.records = tuple(replace(record, labels={**empty, **record.labels}) for record in records)
        self._index: dict[str, SlideRecord] = {}
        for record in self.records:
            first = self._index.setdefault(record.slide_id, record)
            if first is not record:
                raise CohortError(
                    f"{source}: slide {record.slide_id!r} is listed twice: "
                    f"{_row(first)} and {_row(record)}, column 'slide_id'"
                )
        for column in ("split", "fold"):
            self._refuse_overlap(column)

    @classmethod
    def read(
        cls,
        csv_path: str | Path,
        require_path: bool = True,
        *,
        must_exist: bool = False,
        missing_values: Sequence[str] = MISSING,
        columns: Mapping[str, str] | None = None,
    ) -> Cohort:
        """Read a cohort CSV.

        Columns, in any order: ``slide_id``; ``case_id`` (optional or empty: a TCGA barcode's first 12
        characters, else the slide itself); ``path`` of the slide, relative to the CSV; ``report``, the text
        itself or a ``.txt`` file relative to the CSV; ``split`` (train, val, test); ``fold`` (whole number).
        Every other column is a label. Comma, semicolon and tab are recognised as delimiters, UTF-8 with or
        without a BOM.

        Args:
            csv_path: the table.
            require_path: every row must name a slide file.
            must_exist: every named slide file must be there.
            missing_values: cells read as missing, upper and lower case alike; add ``"NS"`` for cBioPortal
                tables in which it means "not sequenced".
            columns: columns of other names, such as ``{"case_id": "case_submitter_id"}``. A column that is called
                ``case_id`` beside it is not read.

        Raises:
            CohortError: names the row (the header is row 1) and the column.
        """
        path = Path(csv_path)
        required = ("slide_id", "path") if require_path else ("slide_id",)
        required = (*required, *(name for name in columns or () if name not in required))
        names, rows = read_table(path, required, _renamed(columns or {}))
        label_names = [name for name in names if name not in RESERVED]
        missing = {value.strip().lower() for value in missing_values} | {""}
        records = []
        for row, cells in rows:
            values: dict[str, str | None] = {
                name: None if cell.strip().lower() in missing else cell.strip()
                for name, cell in zip(names, cells)
            }
            records.append(_record(path, row, values, label_names, require_path, must_exist))
        if not records:
            raise CohortError(f"{path}: no rows below the header")
        return cls(records, label_names, str(path))

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[SlideRecord]:
        return iter(self.records)

    def __getitem__(self, key: int | str) -> SlideRecord:
        """A record by position or by slide id."""
        if isinstance(key, str):
            if key not in self._index:
                raise CohortError(f"{self.source}: no slide {key!r}")
            return self._index[key]
        return self.records[key]

    def __contains__(self, slide_id: object) -> bool:
        return slide_id in self._index

    def __repr__(self) -> str:
        return f"Cohort({self.source!r}: {len(self)} slides of {len(self.cases)} cases, splits {self.splits})"

    @property
    def ids(self) -> list[str]:
        """Slide ids, in table order."""
        return [record.slide_id for record in self.records]

    @property
    def cases(self) -> list[str]:
        """Distinct case ids, by first appearance."""
        return list(dict.fromkeys(record.case_id for record in self.records))

    @property
    def splits(self) -> dict[str, int]:
        """Number of slides in each split that occurs."""
        return dict(Counter(record.split for record in self.records if record.split is not None))

    def subset(self, split: str | Sequence[str] | None) -> Cohort:
        """The slides of a split, or of several; ``None``: all.

        Raises:
            CohortError: no slide is in them.
        """
        if split is None:
            return self
        wanted = [split] if isinstance(split, str) else list(split)
        unknown = [name for name in wanted if name not in SPLITS]
        if unknown:
            raise CohortError(f"split {unknown[0]!r} must be train, val or test")
        kept = {SPLITS[name] for name in wanted}
        records = [record for record in self.records if record.split in kept]
        if not records:
            raise CohortError(
                f"{self.source}, column 'split': no slide is in {' or '.join(sorted(kept))} "
                f"(slides per split: {self.splits or 'none has a split'})"
            )
        return Cohort(records, self.label_names, self.source)

    def select(self, slide_ids: Iterable[str]) -> Cohort:
        """These slides, in this order."""
        return Cohort([self[slide_id] for slide_id in slide_ids], self.label_names, self.source)

    def cross_validation(self, fold: int, validate: bool = True) -> Cohort:
        """Splits of one round of cross-validation, from the ``fold`` column in place of ``split``.

        Fold ``fold`` becomes test, the next one val (train too when ``validate`` is false), all others train.

        Raises:
            CohortError: a slide without fold, no such fold, or fewer folds than splits asked for.
        """
        for record in self.records:
            if record.fold is None:
                raise CohortError(
                    f"{self.source}, {_row(record)}, column 'fold': slide {record.slide_id!r} has none"
                )
        folds = sorted({record.fold for record in self.records if record.fold is not None})
        if fold not in folds:
            raise CohortError(f"{self.source}, column 'fold': no fold {fold} (folds: {folds})")
        if len(folds) < 2 + validate:
            raise CohortError(
                f"{self.source}, column 'fold': {len(folds)} folds are too few for train, val and test"
            )
        held_out = folds[(folds.index(fold) + 1) % len(folds)] if validate else None
        splits = {other: "val" if other == held_out else "train" for other in folds}
        splits[fold] = "test"
        records = [replace(r, split=splits[r.fold]) for r in self.records if r.fold is not None]
        return Cohort(records, self.label_names, self.source)

    def reports(self) -> dict[str, str]:
        """Case -> report text, for the cases that have one; a report on any slide of a case is the case's.

        Raises:
            CohortError: two different texts for one case.
        """
        found: dict[str, SlideRecord] = {}
        for record in self.records:
            if record.report is None:
                continue
            first = found.setdefault(record.case_id, record)
            if (first.report or "").split() != record.report.split():
                raise CohortError(
                    f"{self.source}, column 'report': case {record.case_id!r} has two different reports: "
                    f"{_row(first)} (slide {first.slide_id!r}) and {_row(record)} "
                    f"(slide {record.slide_id!r}); join the texts, or give the slides different case_ids"
                )
        return {case: record.report for case, record in found.items() if record.report is not None}

    def label_values(self, name: str) -> tuple[str, ...]:
        """Distinct values of a label column, missing ones left out; by number when all are numbers."""
        self._check_columns((name,))
        return sort_classes(v for r in self.records if (v := r.labels[name]) is not None)

    def resolve(self, task: Task) -> Task:
        """``task`` with its columns checked and, when multiclass without classes, those of its column.

        Raises:
            CohortError: no such column, a multiclass column with fewer than two values, or one with a value such as
                "unknown" that would become a class, or with one class written in two ways.
        """
        self._check_columns(task.columns, task)
        if task.kind != "multiclass" or task.classes:
            return task
        classes = self.label_values(task.columns[0])
        unclear = [value for value in classes if value.lower() in UNCLEAR]
        if unclear:
            raise self._unclear(task, classes, unclear)
        first: dict[str | float, str] = {}
        for value in classes:
            other = first.setdefault(_alike(value), value)
            if other != value:
                raise CohortError(
                    f"{self.source}, column {task.columns[0]!r}: {other!r} and {value!r} would be two classes of task "
                    f"{task.name!r}; write them one way, or give the task its classes ([{', '.join(classes)}])"
                )
        if len(classes) < 2:
            raise CohortError(
                f"{self.source}, column {task.columns[0]!r}: task {task.name!r} needs at least two classes, "
                f"found {', '.join(classes) or 'no label'}"
            )
        return task.with_classes(classes)

    def encode(self, task: Task, records: Sequence[SlideRecord] | None = None) -> Tensor:
        """Targets of a task for these records (default: all).

        Classes that the task leaves open come from the whole cohort, so that all splits agree on them.

        Returns:
            multiclass: int64 [B], -1 = missing; binary: float32 [B], multilabel: [B, L], NaN = missing.

        Raises:
            CohortError: no such column. LabelError: a value that is none of the classes.
        """
        task = self.resolve(task)
        chosen = self.records if records is None else records
        return encode_task(task, [r.slide_id for r in chosen], [r.labels for r in chosen])

    def encode_labels(self, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """Task name -> targets of all slides; see :meth:`encode`."""
        return {task.name: self.encode(task) for task in tasks}

    def _unclear(self, task: Task, classes: Sequence[str], unclear: Sequence[str]) -> CohortError:
        """Values that a class would be made of, though they seem to say that there is no label."""
        column = task.columns[0]
        slides = sum(record.labels[column] in unclear for record in self.records)
        return CohortError(
            f"{self.source}, column {column!r}: {' and '.join(map(repr, unclear))} ({slides} of {len(self)} slides) "
            f"would be classes of task {task.name!r}. If such a label is missing, list the word among the missing values "
            f"(--missing {' '.join(map(repr, unclear))}, or data.missing_values of a run); if it is a class, give "
            f"the task its classes ([{', '.join(classes)}])"
        )

    def _check_columns(self, columns: Sequence[str], task: Task | None = None) -> None:
        for column in columns:
            if column not in self.label_names:
                owner = f" (task {task.name!r})" if task else ""
                raise CohortError(
                    f"{self.source}: no label column {column!r}{owner}; label columns: "
                    f"{', '.join(self.label_names) or 'none'}"
                )

    def _refuse_overlap(self, column: str) -> None:
        first: dict[str, SlideRecord] = {}
        for record in self.records:
            value = getattr(record, column)
            if value is None:
                continue
            other = first.setdefault(record.case_id.casefold(), record)
            if getattr(other, column) != value and other.case_id != record.case_id:
                raise CohortError(
                    f"{self.source}, column {column!r}: cases {other.case_id!r} ({_row(other)}, in "
                    f"{getattr(other, column)!r}) and {record.case_id!r} ({_row(record)}, in {value!r}) "
                    "differ in upper and lower case alone; write one patient one way, two patients clearly apart"
                )
            if getattr(other, column) != value:
                raise CohortError(
                    f"{self.source}, column {column!r}: case {record.case_id!r} is in two {column}s: "
                    f"slide {other.slide_id!r} in {getattr(other, column)!r} ({_row(other)}) and "
                    f"slide {record.slide_id!r} in {value!r} ({_row(record)}); "
                    f"all slides of a case belong to one {column}"
                )


def _alike(value: str) -> str | float:
    """The same for ``LUAD`` and ``luad``, and for ``1`` and ``1.0``."""
    try:
        return float(value)
    except ValueError:
        return " ".join(value.casefold().split())


def _row(record: SlideRecord) -> str:
    return "row ?" if record.row is None else f"row {record.row}"


def _canonical(name: str) -> str:
    """Header cell -> column name; the names this module knows are recognised whatever their case."""
    name = name.strip()
    return name.lower() if name.lower() in RESERVED else name


def _renamed(columns: Mapping[str, str]) -> Callable[[str], str]:
    """`_canonical` where the columns on the left have the names on the right."""
    unknown = [name for name in columns if name not in RESERVED]
    if unknown:
        raise ValueError(f"columns: {unknown[0]!r} must be one of {', '.join(RESERVED)}")
    of_header = {header: name for name, header in columns.items()}

    def rename(header: str) -> str:
        name = of_header.get(header.strip()) or _canonical(header)
        return f"{name} (not read)" if name in columns and header.strip() not in of_header else name

    return rename


def _record(
    table: Path,
    row: int,
    values: dict[str, str | None],
    label_names: list[str],
    require_path: bool,
    must_exist: bool,
) -> SlideRecord:
    """One row of the table, checked."""

    def fault(column: str, message: str) -> CohortError:
        return CohortError(f"{table}, row {row}, column {column!r}: {message}")

    slide_id = values["slide_id"]
    if slide_id is None:
        raise fault("slide_id", "empty; every row needs one")
    for column in ("slide_id", "case_id"):
        if (values.get(column) or "").lower() in _NO_NAME:
            raise fault(
                column,
                f"{values[column]!r} stands for a missing value; write the name, or leave an unknown case empty",
            )
    if "/" in slide_id or "\\" in slide_id or slide_id.startswith("."):
        raise fault(
            "slide_id", f"{slide_id!r} is not usable as a file name; the slide file belongs in column 'path'"
        )
    file = values.get("path")
    if file is None and require_path:
        raise fault("path", f"empty; where is slide {slide_id!r}?")
    slide_path = None if file is None else table.parent / Path(file).expanduser()
    if must_exist and slide_path is not None and not slide_path.exists():
        raise fault("path", f"slide {slide_id!r}: no such file: {slide_path}")
    split = values.get("split")
    if split is not None and split.lower() not in SPLITS:
        raise fault("split", f"{split!r} must be train, val or test (or empty)")
    fold = values.get("fold")
    if fold is not None and not re.fullmatch(r"\d+(\.0*)?", fold):
        raise fault("fold", f"{fold!r} must be a whole number (or empty)")
    report = values.get("report")
    if report is not None and report.lower().endswith(".txt") and "\n" not in report:
        report = _read_report(table.parent / Path(report).expanduser(), fault)
    return SlideRecord(
        slide_id=slide_id,
        case_id=values.get("case_id") or case_of(slide_id),
        path=slide_path,
        report=report,
        labels={name: values[name] for name in label_names},
        split=None if split is None else SPLITS[split.lower()],
        fold=None if fold is None else int(float(fold)),
        row=row,
    )


def _read_report(path: Path, fault: Callable[[str, str], CohortError]) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise fault("report", f"report file {path}: {reason}") from None
    if not text:
        raise fault("report", f"report file {path} is empty; leave the cell empty where there is no report")
    return text
