"""Folds of a cohort: cases dealt to parts that are alike, frozen in a file, and the splits of each round."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dre_fast.data.cohort import Cohort, CohortError, SlideRecord, Task
from dre_fast.data.files import write_text_atomic

Label = tuple[str, int, float]  # task, column of its target, value


def deal_cases(cohort: Cohort, shares: Sequence[float], tasks: Sequence[Task], seed: int) -> dict[str, int]:
    """Deals the cases of a cohort to parts in which every label has its share.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011, algorithm 1), with cases for examples: the rarest
    label that is left goes first, each of its cases to the part that lacks most of this label, then most cases. Target
    columns whose values are mostly different, such as times, are left out.

    Args:
        cohort: its cases are dealt, each with all its slides.
        shares: of the parts, positive, with sum 1.
        tasks: whose labels are to be alike; may be empty.
        seed: of the order in which cases are dealt.

    Returns:
        case -> number of its part.

    Raises:
        CohortError: fewer cases than parts, or a column that a task reads is not there.
    """
    cases = cohort.cases
    if len(cases) < len(shares):
        raise CohortError(f"{cohort.source}: {len(cases)} cases cannot be dealt to {len(shares)} parts")
    labels = _labels_of_cases(cohort, tasks)
    left = [cases[i] for i in np.random.default_rng(seed).permutation(len(cases))]
    share = np.asarray(shares, dtype=float)
    counts: dict[Label, int] = {}
    for case in left:
        for label in labels[case]:
            counts[label] = counts.get(label, 0) + 1
    lacks = {label: share * count for label, count in counts.items()}
    lacks_cases = share * len(cases)
    part_of: dict[str, int] = {}

    def put(case: str, wish: np.ndarray) -> None:
        part = max(range(len(share)), key=lambda k: (wish[k], lacks_cases[k], -k))
        part_of[case] = part
        lacks_cases[part] -= 1
        for label in labels[case]:
            lacks[label][part] -= 1
            counts[label] -= 1

    while any(counts.values()):
        rarest = min((label for label, count in counts.items() if count), key=lambda x: (counts[x], x))
        for case in left:
            if case not in part_of and rarest in labels[case]:
                put(case, lacks[rarest])
    for case in left:
        if case not in part_of:
            put(case, lacks_cases)
    return part_of


def _labels_of_cases(cohort: Cohort, tasks: Sequence[Task]) -> dict[str, set[Label]]:
    found: dict[str, set[Label]] = {case: set() for case in cohort.cases}
    for task in tasks:
        target = cohort.encode(task).double().numpy().reshape(len(cohort), -1)
        for column in range(target.shape[1]):
            values = target[:, column]
            there = ~np.isnan(values) & (values >= 0)
            if len(np.unique(values[there])) > max(2, there.sum() / 2):
                continue
            for record, value, known in zip(cohort.records, values, there):
                if known:
                    found[record.case_id].add((task.name, column, float(value)))
    return found


def with_folds(cohort: Cohort, tasks: Sequence[Task], *, folds: int | None, seed: int) -> Cohort:
    """The cohort with a fold for every slide: those of its ``fold`` column where it has one, else dealt by case.

    Args:
        folds: how many; None: as many as the column has, or 5.

    Raises:
        CohortError: fewer than two folds, a slide without fold beside others that have one, a column with another
            number of folds than asked for, or one slide file in two folds.
    """
    there = {record.fold for record in cohort.records if record.fold is not None}
    if there:
        bare = next((record for record in cohort.records if record.fold is None), None)
        if bare is not None:
            raise CohortError(
                f"{cohort.source}, row {bare.row}, column 'fold': slide {bare.slide_id!r} has none; give every slide a "
                "fold, or leave the column out"
            )
        if folds not in (None, len(there)):
            raise CohortError(
                f"{cohort.source}, column 'fold': it has {len(there)} folds, not the {folds} asked for; leave out "
                "--folds, or the column"
            )
        found = cohort
    else:
        count = 5 if folds is None else folds
        if count < 2:
            raise CohortError(f"{count} fold{'' if count == 1 else 's'}: cross-validation needs at least 2")
        part_of = deal_cases(cohort, [1 / count] * count, tasks, seed)
        found = Cohort(
            [replace(record, fold=part_of[record.case_id]) for record in cohort.records],
            cohort.label_names,
            cohort.source,
        )
    names = fold_numbers(found)
    if len(names) < 2:
        raise CohortError(f"{cohort.source}: one fold alone; cross-validation needs at least 2")
    _refuse_shared_file(found)
    return found


def fold_numbers(cohort: Cohort) -> list[int]:
    """The folds of a cohort, ascending."""
    return sorted({record.fold for record in cohort.records if record.fold is not None})


def freeze_folds(cohort: Cohort, path: Path, columns: Sequence[str]) -> None:
    """Writes slide, case, fold and label columns of a cohort with folds, as CSV."""
    rows = [
        [r.slide_id, r.case_id, r.fold, *(r.labels[column] for column in columns)] for r in cohort.records
    ]
    write_text_atomic(path, _csv([["slide_id", "case_id", "fold", *columns], *rows]))


def frozen_folds(cohort: Cohort, path: Path, columns: Sequence[str], *, folds: int | None) -> Cohort:
    """A cohort with the folds, and in the order, of a file that :func:`freeze_folds` wrote.

    Raises:
        CohortError: the cohort has other slides, cases, labels or folds than the file; names the first.
    """
    frozen = Cohort.read(path, require_path=False, missing_values=[""])

    def refuse(message: str) -> CohortError:
        return CohortError(
            f"{cohort.source}: {message} ({path}); restore the former cohort, or begin in another folder"
        )

    for one, other, what in ((cohort, frozen, "not in"), (frozen, cohort, "only in")):
        foreign = [slide for slide in one.ids if slide not in other]
        if foreign:
            raise refuse(
                f"slide {foreign[0]!r} ({len(foreign)} in all) is {what} the cohort that the folds were made of"
            )
    for before in frozen.records:
        now = cohort[before.slide_id]
        pairs: list[tuple[str, object, object]] = [("case_id", before.case_id, now.case_id)]
        pairs += [(column, before.labels.get(column), now.labels[column]) for column in columns]
        pairs += [("fold", before.fold, now.fold)] if now.fold is not None else []
        for column, old, new in pairs:
            if old != new:
                raise refuse(
                    f"slide {before.slide_id!r}, column {column!r}: {new!r} now, {old!r} when the folds were made"
                )
    if folds not in (None, len(fold_numbers(frozen))):
        raise CohortError(f"{path}: holds {len(fold_numbers(frozen))} folds, not the {folds} asked for")
    records = [replace(cohort[record.slide_id], fold=record.fold) for record in frozen.records]
    found = Cohort(records, cohort.label_names, cohort.source)
    _refuse_shared_file(found)
    return found


def split_for(cohort: Cohort, fold: int, validation: str | float, tasks: Sequence[Task], seed: int) -> Cohort:
    """The splits of one round: ``fold`` is test; the rest is train and, by ``validation``, val.

    Args:
        validation: ``"fold"``: the next fold is val; ``"none"``: nothing is; a number in (0, 1): this share of the
            other cases, dealt by :func:`deal_cases`.

    Raises:
        CohortError: too few folds or cases.
    """
    if validation == "fold" and len(fold_numbers(cohort)) < 3:
        raise CohortError(
            f"{cohort.source}: with 2 folds none is left for validation; take 3 or more, a share of the training cases "
            "(--val 0.2), or none (--val none)"
        )
    rest = cohort.cross_validation(fold, validate=validation == "fold")
    if not isinstance(validation, float):
        return rest
    part_of = deal_cases(rest.subset("train"), [validation, 1 - validation], tasks, seed + fold)
    for part, name in ((0, "val"), (1, "train")):
        if part not in part_of.values():
            raise CohortError(
                f"{cohort.source}: a share of {validation} of the {len(part_of)} cases beside fold {fold} leaves none "
                f"for {name}"
            )
    records = [
        replace(record, split="val") if part_of.get(record.case_id) == 0 else record
        for record in rest.records
    ]
    return Cohort(records, cohort.label_names, cohort.source)


def write_cohort(cohort: Cohort, path: Path) -> None:
    """Writes slides, cases, absolute paths, labels and splits as a cohort CSV; it stays as it is if it says the same."""
    rows = [
        [r.slide_id, r.case_id, _absolute(r), r.split, *(r.labels[name] for name in cohort.label_names)]
        for r in cohort.records
    ]
    text = _csv([["slide_id", "case_id", "path", "split", *cohort.label_names], *rows])
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text_atomic(path, text)


def refuse_overlap(cohort: Cohort, other: Cohort) -> None:
    """Refuses two cohorts that share a case, a slide or a slide file.

    Raises:
        CohortError: names the first that is in both.
    """
    cases, slides = {case.casefold() for case in cohort.cases}, set(cohort.ids)
    files = {_real(record) for record in cohort.records} - {None}
    for record in other.records:
        for shared, what in (
            (record.case_id.casefold() in cases, f"case {record.case_id!r}"),
            (record.slide_id in slides, "this slide"),
            (_real(record) in files, f"its file {record.path}"),
        ):
            if shared:
                where = "" if record.row is None else f", row {record.row}"
                raise CohortError(
                    f"{other.source}{where}, slide {record.slide_id!r}: {what} is in {cohort.source}, too, "
                    "so models have trained on it; take it out of one of them, or give it a name of its own where it is "
                    "another one"
                )


def _refuse_shared_file(cohort: Cohort) -> None:
    """One file under two names would be trained on and judged."""
    first: dict[str, SlideRecord] = {}
    for record in cohort.records:
        file = _real(record)
        other = first.setdefault(file, record) if file else record
        if other.fold != record.fold:
            raise CohortError(
                f"{cohort.source}: slides {other.slide_id!r} (fold {other.fold}) and {record.slide_id!r} (fold "
                f"{record.fold}) are the same file, {record.path}; give them one case_id, or take one out"
            )


def _real(record: SlideRecord) -> str | None:
    return None if record.path is None else os.path.realpath(record.path)


def _absolute(record: SlideRecord) -> str:
    if record.path is None:
        raise CohortError(f"slide {record.slide_id!r} has no path; training needs the slide files")
    return os.path.abspath(record.path)


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [["" if cell is None else cell for cell in row] for row in rows]
    )
    return text.getvalue()
