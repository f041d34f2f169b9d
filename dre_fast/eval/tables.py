"""Tables of scores as text, CSV, Markdown and JSON."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dre_fast.data.files import write_text_atomic
from dre_fast.eval.grids import Grid

HEADER = ("task", "column", "metric", "value", "low", "high", "level", "samples", "cases", "note")
SHOWN = ("task", "column", "metric", "value", "interval", "samples", "note")


@dataclass(frozen=True)
class MetricRow:
    """One score.

    Attributes:
        task, metric: what was judged, and how.
        column: label column of a multilabel task; None: the whole task.
        value: the score, None where it is undefined (`note` says why).
        low, high: bootstrap interval, None without one.
        level: "slide" or "patient".
        samples: labelled slides (or patients) judged. cases: distinct cases among them.
        note: what to know about this score; mostly empty.
    """

    task: str
    column: str | None
    metric: str
    value: float | None
    low: float | None
    high: float | None
    level: str
    samples: int
    cases: int
    note: str


def format_rows(rows: Sequence[MetricRow]) -> str:
    """The rows as a text table for the terminal."""
    return Grid(SHOWN, [shown(row) for row in rows]).text()


def write_tables(rows: Sequence[MetricRow], stem: str | os.PathLike[str]) -> list[Path]:
    """Writes ``stem.csv`` and ``stem.md`` (four decimals) and ``stem.json`` (full precision); returns their
    paths."""
    base = Path(stem)
    files = [base.with_name(base.name + suffix) for suffix in (".csv", ".md", ".json")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for row in rows:
        values = asdict(row)
        writer.writerow([_plain(values[name]) for name in HEADER])
    write_text_atomic(files[0], text.getvalue())
    header = [name.capitalize() for name in SHOWN]
    write_text_atomic(files[1], Grid(header, [shown(row) for row in rows]).markdown())
    write_text_atomic(files[2], json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return files


def read_tables(path: str | os.PathLike[str]) -> list[MetricRow]:
    """The rows of the ``.json`` that :func:`write_tables` wrote.

    Raises:
        ValueError: it is another file; named.
    """
    try:
        return [MetricRow(**row) for row in json.loads(Path(path).read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)}: not a table of scores of `dre-fast evaluate` ({error})"
        ) from error


def _plain(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def shown(row: MetricRow) -> tuple[str, ...]:
    """Its cells for people, under the header :data:`SHOWN`."""
    value = "undefined" if row.value is None else f"{row.value:.3f}"
    interval = "" if row.low is None or row.high is None else f"{row.low:.3f} - {row.high:.3f}"
    samples = f"{row.samples} {row.level}{'s' if row.samples != 1 else ''}" + (
        f" of {row.cases} case{'s' if row.cases != 1 else ''}" if row.cases != row.samples else ""
    )
    return (row.task, row.column or "", row.metric, value, interval, samples, row.note)
