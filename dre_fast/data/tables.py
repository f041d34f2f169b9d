"""Reading CSV tables: delimiter and encoding recognised, every fault named with its row."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path


class CohortError(ValueError):
    """A fault in a table of slides, labels or reports; the message names the file, the row and the column."""


class ReportError(ValueError):
    """A fault in reports, their encoder or their embeddings; the message names the case or the file."""


def read_table(
    path: Path, required: Sequence[str], rename: Callable[[str], str] = str.strip
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows of a CSV file, delimited by commas, semicolons or tabs, in UTF-8 with or without BOM.

    Args:
        path: the file.
        required: columns it must have.
        rename: header cell -> column name.

    Returns:
        the column names, and (row number, cells) of the non-empty rows. Rows are numbered as a spreadsheet
        counts them: the header is row 1, and a cell with line breaks does not start a new row.

    Raises:
        CohortError: not readable, a required column missing, a column twice, or a row of another length.
    """
    text = _read_text(path)
    header_line = next(line for line in text.splitlines() if line.strip())
    reader = csv.reader(
        StringIO(text, newline=""), delimiter=_delimiter(path, header_line, required, rename), strict=True
    )
    names: list[str] = []
    rows: list[tuple[int, list[str]]] = []
    number = 0
    try:
        for cells in reader:
            number += 1
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = [rename(cell) for cell in cells]
                _check_names(path, number, names)
            elif len(cells) != len(names):
                raise CohortError(
                    f"{path}, row {number} (ends on line {reader.line_num}): {len(cells)} cells where the "
                    f"header has {len(names)}; a text with the delimiter in it needs quotes"
                )
            else:
                rows.append((number, cells))
    except csv.Error as error:
        raise CohortError(f"{path}, row {number + 1} (line {reader.line_num}): {error}") from None
    return names, rows


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise CohortError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CohortError(f"{path} is a folder, not a CSV file") from None
    except UnicodeDecodeError as error:
        raise CohortError(f"{path}: not UTF-8 (at byte {error.start}); save it as 'CSV UTF-8'") from None
    if not text.strip():
        raise CohortError(f"{path}: empty")
    return text


def _delimiter(path: Path, line: str, required: Sequence[str], rename: Callable[[str], str]) -> str:
    """The delimiter under which the header has the required columns."""
    headers = {d: [rename(name) for name in next(csv.reader([line], delimiter=d))] for d in ",;\t"}
    fitting = [d for d, names in headers.items() if set(required) <= set(names)]
    if not fitting:
        best = max(headers.values(), key=lambda names: (len(set(required) & set(names)), len(names)))
        missing = [name for name in required if name not in best]
        raise CohortError(
            f"{path}, row 1: no column {', '.join(map(repr, missing))}; the columns, "
            f"split at commas, semicolons or tabs: {', '.join(best)[:300]}"
        )
    return max(fitting, key=lambda d: len(headers[d]))


def _check_names(path: Path, row: int, names: list[str]) -> None:
    for position, name in enumerate(names):
        if not name:
            raise CohortError(
                f"{path}, row {row}: column {position + 1} has no name "
                "(an index written by pandas? save with index=False)"
            )
        if names.index(name) != position:
            raise CohortError(f"{path}, row {row}: column {name!r} is there twice")
