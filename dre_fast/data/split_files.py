"""Splits of a cohort from a file of their own: CLAM's ``splits_N.csv``, or a table of slide_id and split."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dre_fast.data.cohort import SPLITS, Cohort, CohortError
from dre_fast.data.tables import read_table

PARTS = ("train", "val", "test")
_INDEX = "row"  # pandas leaves the name of this column empty
_SHOWN = 5


def read_splits(path: str | Path) -> dict[str, str]:
    """Slide -> train, val or test.

    Layouts, told apart by the header:
        ``,train,val,test``: CLAM's ``splits_N.csv``, the slides of a split one below the other, shorter columns filled
        up with empty cells; or its ``splits_N_bool.csv``, a row a slide with one True.
        ``slide_id,split``, and any other columns.

    Raises:
        CohortError: another header, a slide in two splits, a row that says nothing, or no slide in train; names the row.
    """
    table = Path(path)
    names, rows = read_table(table, (), lambda cell: cell.strip().lower() or _INDEX)
    if "slide_id" in names and "split" in names:
        pairs = _of_rows(table, names, rows)
    elif "train" in names and set(names) <= {_INDEX, *PARTS}:
        flags = {cells[names.index("train")].strip().lower() for _, cells in rows}
        own = _INDEX in names and bool(flags) and flags <= {"true", "false"}
        pairs = _of_flags(table, names, rows) if own else _of_columns(names, rows)
    else:
        raise CohortError(
            f"{table}, row 1: a file of splits has the columns train, val and test (CLAM), or slide_id and split; it has "
            f"{', '.join(names)}"
        )
    found: dict[str, str] = {}
    for row, slide, split in pairs:
        if slide in found:
            where = "twice" if found[slide] == split else f"in {found[slide]} and in {split}"
            raise CohortError(
                f"{table}, row {row}: slide {slide!r} is {where}; a slide belongs to one split, once"
            )
        found[slide] = split
    if "train" not in found.values():
        raise CohortError(f"{table}: no slide is in train")
    return found


def with_splits(cohort: Cohort, path: str | Path, *, skip_missing: bool = False) -> Cohort:
    """A cohort with the splits of a file in place of its own, and without folds.

    Slides of the cohort that the file does not name have no split, with a warning. Ids of digits are also found where
    pandas wrote them as fractions (``12.0``).

    Args:
        skip_missing: pass over slides of the file that the cohort does not have, with a warning.

    Raises:
        CohortError: slides of the file that the cohort does not have (counted and named), a case in two splits; and as of
            :func:`read_splits`.
    """
    said = read_splits(path)
    splits: dict[str, str] = {}
    absent: list[str] = []
    for slide, split in said.items():
        known = next((name for name in (slide, slide.removesuffix(".0")) if name in cohort), None)
        if known is None:
            absent.append(slide)
        else:
            splits[known] = split
    if absent:
        line = f"{path}: {len(absent)} of its {len(said)} slides are not in {cohort.source}: {_some(absent)}"
        if not skip_missing or not splits:
            raise CohortError(f"{line}. Add them, or leave them out knowingly (--skip-missing)")
        warnings.warn(f"{line}; left out", stacklevel=2)
    bare = [slide for slide in cohort.ids if slide not in splits]
    if bare:
        warnings.warn(
            f"{path}: {len(bare)} of {len(cohort)} slides are in no split: {_some(bare)}; left out",
            stacklevel=2,
        )
    records = [replace(record, split=splits.get(record.slide_id), fold=None) for record in cohort.records]
    return Cohort(records, cohort.label_names, f"{cohort.source} with {path}")


def _of_columns(names: list[str], rows: list[tuple[int, list[str]]]) -> Iterator[tuple[int, str, str]]:
    for split in PARTS:
        if split not in names:
            continue
        for row, cells in rows:
            slide = cells[names.index(split)].strip()
            if slide and slide.lower() != "nan":
                yield row, slide, split


def _of_flags(
    table: Path, names: list[str], rows: list[tuple[int, list[str]]]
) -> Iterator[tuple[int, str, str]]:
    for row, cells in rows:
        slide = cells[names.index(_INDEX)].strip()
        own = [
            split for split in PARTS if split in names and cells[names.index(split)].strip().lower() == "true"
        ]
        if len(own) != 1:
            raise CohortError(
                f"{table}, row {row}: slide {slide!r} needs one True among its splits, it has {len(own)}"
            )
        yield row, slide, own[0]


def _of_rows(
    table: Path, names: list[str], rows: list[tuple[int, list[str]]]
) -> Iterator[tuple[int, str, str]]:
    for row, cells in rows:
        slide, split = cells[names.index("slide_id")].strip(), cells[names.index("split")].strip().lower()
        if not split:
            continue
        if split not in SPLITS:
            raise CohortError(
                f"{table}, row {row}, column 'split': {split!r} must be train, val or test (or empty)"
            )
        yield row, slide, SPLITS[split]


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )
