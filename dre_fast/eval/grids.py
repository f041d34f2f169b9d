"""A plain table of cells as CSV, as Markdown and for the terminal."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dre_fast.data.files import write_text_atomic

Cell = str | int | float | None


@dataclass(frozen=True)
class Grid:
    """A table: names of its columns, and rows of as many cells; None is an empty cell.

    What is made for people leaves out columns without a filled cell; the CSV keeps them.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def text(self) -> str:
        """For the terminal: columns aligned, numbers with three decimals."""
        lines = self._filled()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)

    def markdown(self) -> str:
        """As a table in Markdown, numbers with three decimals."""
        header, *rows = self._filled()
        lines = [header, ["---"] * len(header), *rows]
        return "".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |\n" for line in lines)

    def _filled(self) -> list[list[str]]:
        """Header and rows as text, without empty columns."""
        rows = [[show(cell) for cell in row] for row in self.rows]
        kept = [i for i in range(len(self.header)) if not rows or any(row[i] for row in rows)]
        return [[line[i] for i in kept] for line in (self.header, *rows)]

    def write(self, stem: str | os.PathLike[str]) -> list[Path]:
        """Writes ``stem.csv`` (six significant digits) and ``stem.md``; returns their paths."""
        base = Path(stem)
        files = [base.with_name(base.name + suffix) for suffix in (".csv", ".md")]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows([_plain(cell) for cell in row] for row in self.rows)
        write_text_atomic(files[0], text.getvalue())
        write_text_atomic(files[1], self.markdown())
        return files


def show(cell: Cell) -> str:
    """A cell for people: three decimals where they say something; text and whole numbers as they are."""
    if cell is None:
        return ""
    if not isinstance(cell, float):
        return str(cell)
    if abs(cell) >= 1000:
        return f"{cell:.0f}"
    return f"{cell:.3f}" if abs(cell) >= 0.0005 or cell == 0 else f"{cell:.1e}"


def _plain(cell: Cell) -> str:
    return "" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else str(cell)
