"""A cohort of bags: a table of labels, by slide or by case, and the feature file of each of its slides."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dre_fast.data.bags import find_bags
from dre_fast.data.cohort import MISSING, Cohort, CohortError, SlideRecord, case_of
from dre_fast.data.tables import read_table

SHOWN = 5
_SLIDE_FILE = re.compile(
    r"\.(svs|tiff?|ome\.tiff?|ndpi|mrxs|scn|vms|vmu|bif|czi|dcm|svslide|h5|hdf5|pt|npy|npz)$", re.I
)
_PATIENT = re.compile(
    r"(case|patient|subject|participant|donor)(_?submitter)?[_ ]?(id|barcode|name|number)?$", re.I
)


def bag_cohort(
    folder: str | Path,
    labels: str | Path,
    *,
    slide_column: str | None = None,
    case_column: str | None = None,
    missing: Sequence[str] = (),
    skip_missing: bool = False,
) -> Cohort:
    """The slides that a table of labels lists, each with the feature file of a folder as its ``path``.

    The table has a row a slide: a column ``slide_id`` (or ``slide_column``), ``case_id`` (or ``case_column``; without
    one a TCGA barcode's first 12 characters, else the slide itself), and labels; ``split`` and ``fold`` are read where
    there. A table without slides, such as cBioPortal's, has a row a case: its labels are those of every bag of the case,
    which is the one whose id begins the name of the bag.

    A slide is found under its own name, without the suffix of a slide file, or, where no bag has that name, under the
    one name that goes on with a dot behind it, as in ``TCGA-05-4244-01Z-00-DX1.D4FF32CD-....h5``; not with a number
    alone, as in ``P1.2.h5``: that is another slide than P1.

    Args:
        folder: of feature files, or a table of their paths, see :func:`dre_fast.data.bags.find_bags`.
        labels: CSV.
        missing: label cells that mean "unknown", besides empty ones and NA; ``["NS"]`` for cBioPortal.
        skip_missing: leave out slides (or cases) without bag, and bags without row, with a warning.

    Raises:
        CohortError: slides without bag or the reverse (counted and named), a slide with several bags, or a table whose
            cases cannot be told; and as of :meth:`dre_fast.data.cohort.Cohort.read`.
        ValueError: as of ``find_bags``.
    """
    table, files = Path(labels), find_bags(folder)
    values = [*MISSING, *missing]
    header = read_table(table, ())[0]
    lower = {name.lower() for name in header}
    if slide_column is None and "slide_id" not in lower and (case_column or "case_id" in lower):
        column = case_column or next(name for name in header if name.lower() == "case_id")
        try:
            cases = Cohort.read(
                table, require_path=False, missing_values=values, columns={"slide_id": column}
            )
        except CohortError as error:
            if "is listed twice" not in str(error):
                raise
            said = (
                str(error).replace(": slide ", ": case ").replace("column 'slide_id'", f"column {column!r}")
            )
            raise CohortError(
                f"{said}; without a column slide_id a table has a row a case: name the column of slides with "
                f"--slide-column (there are {', '.join(name for name in header if name != column)})"
            ) from None
        return _of_cases(cases, files, Path(folder), skip_missing)
    own = case_column is not None and case_column == (slide_column or "slide_id")
    columns = {"slide_id": slide_column, "case_id": None if own else case_column}
    try:
        cohort = Cohort.read(
            table,
            require_path=False,
            missing_values=values,
            columns={name: column for name, column in columns.items() if column is not None},
        )
    except CohortError as error:
        named = [f"--{n.removesuffix('_id')}-column" for n, c in columns.items() if c is None]
        hint = f" (columns of other names: {', '.join(named)})" if "no column" in str(error) else ""
        raise CohortError(f"{error}{hint}") from None
    _check_cases(cohort, lower, case_column)
    if own:
        records = [replace(record, case_id=record.slide_id) for record in cohort.records]
        cohort = Cohort(records, cohort.label_names, cohort.source)
    return _of_slides(cohort, files, Path(folder), skip_missing)


def cohort_of_bags(folder: str | Path) -> Cohort:
    """The bags of a folder as a cohort without labels; cases as :func:`dre_fast.data.cohort.case_of` knows them."""
    files = find_bags(folder)
    return Cohort([SlideRecord(name, case_of(name), file) for name, file in files.items()], (), str(folder))


def yes_where_not(cohort: Cohort, negative: Sequence[str]) -> Cohort:
    """The cohort with "0" for the words of ``negative`` and "1" for all others in every column that has such a word.

    Args:
        negative: words that mean no, such as ``WT``, in any case; missing labels stay missing.

    Raises:
        CohortError: no label column has such a word.
    """
    words = {word.strip().lower() for word in negative}
    there = [c for c in cohort.label_names if words & {value.lower() for value in cohort.label_values(c)}]
    if not there:
        raise CohortError(f"{cohort.source}: no label column holds {' or '.join(negative)}")

    def told(column: str, value: str | None) -> str | None:
        return value if column not in there or value is None else str(int(value.lower() not in words))

    records = [replace(r, labels={c: told(c, v) for c, v in r.labels.items()}) for r in cohort.records]
    return Cohort(records, cohort.label_names, cohort.source)


def refuse_shared_report(cohort: Cohort, column: str) -> None:
    """Refuse one report text under two cases that are in different parts (``column``: ``"split"`` or ``"fold"``).

    Raises:
        CohortError: names both slides.
    """
    first: dict[str, SlideRecord] = {}
    for record in cohort.records:
        part = getattr(record, column)
        if record.report is None or part is None:
            continue
        other = first.setdefault(" ".join(record.report.split()), record)
        if getattr(other, column) != part:
            raise CohortError(
                f"{cohort.source}, column 'report': slides {other.slide_id!r} (case {other.case_id!r}, {column} "
                f"{getattr(other, column)}) and {record.slide_id!r} (case {record.case_id!r}, {column} {part}) have the "
                "same report, as slides of one patient have; give them one case_id, or leave the column out"
            )


def refuse_shared_file(cohort: Cohort, column: str) -> None:
    """Refuse one file, by whatever path, under two slides that are in different parts.

    Raises:
        CohortError: names both slides.
    """
    first: dict[tuple[int, int], SlideRecord] = {}
    for record in cohort.records:
        part = getattr(record, column)
        if record.path is None or part is None:
            continue
        status = record.path.stat()
        other = first.setdefault((status.st_dev, status.st_ino), record)
        if getattr(other, column) != part:
            raise CohortError(
                f"{cohort.source}: slides {other.slide_id!r} ({column} {getattr(other, column)}) and "
                f"{record.slide_id!r} ({column} {part}) are the same file, {record.path}; give them one case_id, or "
                "take one out"
            )


def _of_slides(cohort: Cohort, files: Mapping[str, Path], folder: Path, skip: bool) -> Cohort:
    of_stem: dict[str, list[str]] = {}
    for name in files:
        of_stem.setdefault(name.split(".")[0], []).append(name)
    records: list[SlideRecord] = []
    absent: list[str] = []
    used: dict[str, SlideRecord] = {}
    for record in cohort.records:
        bag = _bag_of(record, files, of_stem, cohort.source)
        if bag is None:
            absent.append(record.slide_id)
            continue
        other = used.setdefault(bag, record)
        if other is not record:
            raise CohortError(
                f"{cohort.source}, rows {other.row} and {record.row}: slides {other.slide_id!r} and "
                f"{record.slide_id!r} both mean the bag {files[bag]}; take one out"
            )
        records.append(replace(record, path=files[bag]))
    _say_missing(cohort.source, folder, "slides", absent, [name for name in files if name not in used], skip)
    return _whole(records, cohort, folder, files)


def _bag_of(
    record: SlideRecord, files: Mapping[str, Path], of_stem: Mapping[str, list[str]], source: str
) -> str | None:
    plain = _SLIDE_FILE.sub("", record.slide_id)
    for exact in (record.slide_id, plain):
        if exact in files:
            return exact
    longer = [
        name
        for name in of_stem.get(plain, ())
        if name.startswith(f"{plain}.")
        and not name[len(plain) + 1 :].isdecimal()  # P1.2 is another slide than P1
    ]
    if len(longer) > 1:
        raise CohortError(
            f"{source}, row {record.row}: slide {record.slide_id!r} could be any of {len(longer)} bags, "
            f"{', '.join(longer[:SHOWN])}; name the bags in the table in full"
        )
    return longer[0] if longer else None


def _of_cases(cases: Cohort, files: Mapping[str, Path], folder: Path, skip: bool) -> Cohort:
    """Every bag with the labels of its case, whose id begins its name."""
    records: list[SlideRecord] = []
    spare: list[str] = []
    used: set[str] = set()
    for name, file in files.items():
        ends = [i for i, letter in enumerate(name) if letter in "-_. "] + [len(name)]
        owners = [name[:end] for end in ends if name[:end] in cases]
        if len(owners) > 1:
            raise CohortError(
                f"{cases.source}: bag {name!r} could be of case {owners[0]!r} or {owners[1]!r}; give the table a column "
                "slide_id"
            )
        if not owners:
            spare.append(name)
            continue
        used.add(owners[0])
        records.append(replace(cases[owners[0]], slide_id=name, case_id=owners[0], path=file))
    absent = [case for case in cases.ids if case not in used]
    _say_missing(cases.source, folder, "cases", absent, spare, skip)
    return _whole(records, cases, folder, files)


def _say_missing(
    source: str, folder: Path, what: str, absent: Sequence[str], spare: Sequence[str], skip: bool
) -> None:
    found = []
    if absent:
        have = (
            f"1 {what[:-1]} of {source} has" if len(absent) == 1 else f"{len(absent)} {what} of {source} have"
        )
        found.append(f"{have} no bag in {folder}: {_some(absent)}")
    if spare:
        have = f"1 bag of {folder} has" if len(spare) == 1 else f"{len(spare)} bags of {folder} have"
        found.append(f"{have} no row in {source}: {_some(spare)}")
    if found and not skip:
        raise CohortError(f"{'; '.join(found)}. Add them, or leave them out knowingly (--skip-missing)")
    for line in found:
        warnings.warn(f"{line}; left out", stacklevel=4)


def _whole(records: list[SlideRecord], cohort: Cohort, folder: Path, files: Mapping[str, Path]) -> Cohort:
    if not records:
        raise CohortError(
            f"{cohort.source}: none of its {len(cohort)} rows has a bag in {folder}; the first row is "
            f"{cohort.records[0].slide_id!r}, the first bag {next(iter(files))!r}"
        )
    return Cohort(records, cohort.label_names, cohort.source)


def _check_cases(cohort: Cohort, header: Iterable[str], case_column: str | None) -> None:
    """Without a column of cases every slide is its own; a column that looks like one must not be passed over."""
    if case_column is not None or "case_id" in header:
        return
    bare = [record.slide_id for record in cohort.records if record.case_id == record.slide_id]
    alike = [name for name in cohort.label_names if _PATIENT.match(name)]
    if bare and alike:
        raise CohortError(
            f"{cohort.source}: no column 'case_id', but {alike[0]!r}: name the column of patients with --case-column "
            f"{alike[0]} (or --case-column slide_id where every slide is a case of its own)"
        )
    if bare:
        warnings.warn(
            f"{cohort.source}: no column of cases, and slides such as {bare[0]!r} bear no TCGA barcode: each counts as a "
            "case of its own; if patients have several slides, name their column with --case-column",
            stacklevel=3,
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (
        f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )
