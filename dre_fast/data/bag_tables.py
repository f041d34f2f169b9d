"""Bags that a table names by their paths, as MIL_BASELINE, DSMIL and eva list theirs."""

from __future__ import annotations

import os
from pathlib import Path

from dre_fast.data.bag_layouts import HDF5, is_zarr
from dre_fast.data.bag_rows import BagError
from dre_fast.data.tables import CohortError, read_table

SUFFIXES = (*HDF5, ".pt", ".npy")
PATH_COLUMNS = ("path", "slide_path", "bag_path", "feature_path", "features_path", "embeddings")
_SPLIT_COLUMNS = ("train_slide_path", "val_slide_path", "test_slide_path")  # MIL_BASELINE's, of splits


def slide_id_of(path: Path) -> str:
    """The slide a bag belongs to, by its name: ``S1.h5`` and ``S1.zarr`` are of slide S1."""
    name = path.name
    known = path.suffix.lower() in (*SUFFIXES, ".zarr")
    return name[: -len(path.suffix)] if known else name


def is_table(path: Path) -> bool:
    """Whether ``path`` is a file of comma- or tab-separated values."""
    return path.suffix.lower() in (".csv", ".tsv") and path.is_file()


def bags_of_table(path: Path) -> dict[str, Path]:
    """The bag of every slide that a table names, sorted by slide.

    Columns: one of :data:`PATH_COLUMNS`, or MIL_BASELINE's ``train_slide_path``, ``val_slide_path`` and
    ``test_slide_path``; paths are absolute or relative to the table; empty cells name none. The slide is that of a column
    ``slide_id``, else the name of the file without its suffix. All else in the table is passed over.

    Raises:
        BagError: no column of paths or several, a file that is not there or no bag, or two bags of one slide; names the
            row.
    """
    try:
        names, rows = read_table(path, (), lambda cell: cell.strip().lower() or "row")
    except CohortError as error:
        raise BagError(str(error)) from error
    columns = [name for name in names if name in _SPLIT_COLUMNS] or [
        name for name in names if name in PATH_COLUMNS
    ]
    if not columns or (len(columns) > 1 and columns[0] not in _SPLIT_COLUMNS):
        what = f"several columns of paths, {' and '.join(columns)}" if columns else "no column of paths"
        raise BagError(
            f"{path}, row 1: {what}: looked for one of {', '.join(PATH_COLUMNS)}, found {', '.join(names)[:300]}"
        )
    named = "slide_id" in names and len(columns) == 1
    found: dict[str, Path] = {}
    row_of: dict[str, int] = {}
    for column in columns:
        for row, cells in rows:
            cell = cells[names.index(column)].strip()
            if not cell:
                continue
            bag = path.parent / Path(cell).expanduser()
            where = f"{path}, row {row}, column {column!r}"
            if not os.path.lexists(bag):
                raise BagError(f"{where}: no such file: {bag}")
            if not is_zarr(bag) and bag.suffix.lower() not in SUFFIXES:
                raise BagError(
                    f"{where}: {bag} is no bag of features; bags are {', '.join(SUFFIXES)} files, or .zarr folders"
                )
            slide = cells[names.index("slide_id")].strip() if named else ""
            slide = slide or slide_id_of(bag)
            if slide in found:
                raise BagError(
                    f"{where}: slide {slide!r} has two bags, {found[slide]} (row {row_of[slide]}) and {bag}; "
                    "a slide has one bag"
                )
            found[slide], row_of[slide] = bag, row
    if not found:
        raise BagError(f"{path}: names no bag")
    return dict(sorted(found.items()))
