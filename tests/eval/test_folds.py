"""Folds by case: alike, frozen, never with one case or file on both sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dre_fast.data.cohort import Cohort, CohortError, SlideRecord, Task
from dre_fast.eval.folds import (
    deal_cases,
    fold_numbers,
    freeze_folds,
    frozen_folds,
    refuse_overlap,
    split_for,
    with_folds,
    write_cohort,
)

SUBTYPE, GENES = Task("subtype"), Task("genes", "multilabel", columns=("EGFR", "TP53"))


def cohort(cases: int = 50, seed: int = 0) -> Cohort:
    """One to three slides a case; a rare class, a gene with missing cells, a column of times."""
    rng = np.random.default_rng(seed)
    records = []
    for case in range(cases):
        labels = {
            "subtype": "rare" if case % 10 == 3 else ("a", "b")[case % 2],
            "EGFR": None if case % 7 == 0 else str(int(rng.random() < 0.3)),
            "TP53": str(int(rng.random() < 0.6)),
            "days": str(case * 13),
        }
        for slide in range(1 + case % 3):
            name = f"s{case}-{slide}"
            records.append(
                SlideRecord(name, f"c{case}", Path(f"{name}.npy"), labels=labels, row=len(records) + 2)
            )
    return Cohort(records, list(labels), "made.csv")


def test_labels_and_sizes_are_alike_in_every_fold():
    made = cohort()
    part_of = deal_cases(made, [0.2] * 5, [SUBTYPE, GENES, Task("days")], seed=3)
    assert sorted(part_of) == sorted(made.cases)
    sizes = np.bincount(list(part_of.values()), minlength=5)
    assert sizes.min() >= 9
    assert sizes.max() <= 11
    label = {record.case_id: record.labels for record in made.records}
    for column, value in (("subtype", "rare"), ("subtype", "a"), ("EGFR", "1"), ("TP53", "1")):
        held = np.bincount([part_of[c] for c in made.cases if label[c][column] == value], minlength=5)
        assert held.max() - held.min() <= 2, (column, held)
    rare = [part_of[c] for c in made.cases if label[c]["subtype"] == "rare"]
    assert sorted(rare) == [0, 1, 2, 3, 4]
    assert part_of == deal_cases(made, [0.2] * 5, [SUBTYPE, GENES, Task("days")], seed=3)
    assert part_of != deal_cases(made, [0.2] * 5, [SUBTYPE, GENES, Task("days")], seed=4)


def test_rounds_cover_every_slide_once_and_never_share_a_case():
    made = with_folds(cohort(), [SUBTYPE], folds=4, seed=0)
    for validation, expected in (("fold", 0.25), (0.2, 0.15), ("none", 0.0)):
        judged: list[str] = []
        for fold in fold_numbers(made):
            splits = split_for(made, fold, validation, [SUBTYPE], seed=0)
            sides = [{r.case_id for r in splits.records if r.split == s} for s in ("train", "val", "test")]
            assert not sides[0] & (sides[1] | sides[2])
            assert not sides[1] & sides[2]
            assert abs(len(sides[1]) / 50 - expected) < 0.05
            judged += splits.subset("test").ids
        assert sorted(judged) == sorted(made.ids)


def test_the_fold_column_is_used_and_a_case_in_two_folds_is_named(tmp_path: Path):
    table = tmp_path / "cohort.csv"
    head = "slide_id,case_id,path,subtype,fold\n"
    table.write_text(
        head + "".join(f"s{i},c{i // 2},s{i}.npy,{'ab'[i % 2]},{i // 2 % 3 + 1}\n" for i in range(12))
    )
    made = with_folds(Cohort.read(table), [SUBTYPE], folds=None, seed=0)
    assert fold_numbers(made) == [1, 2, 3]
    with pytest.raises(CohortError, match="3 folds, not the 5"):
        with_folds(made, [], folds=5, seed=0)
    table.write_text(head + "s0,c0,a.npy,a,1\ns1,c0,b.npy,b,2\n")
    with pytest.raises(CohortError, match="case 'c0' is in two folds"):
        Cohort.read(table)
    table.write_text(head + "s0,c0,a.npy,a,1\ns1,c1,b.npy,b,\n")
    with pytest.raises(CohortError, match="slide 's1' has none"):
        with_folds(Cohort.read(table), [], folds=None, seed=0)
    table.write_text(head + "s0,c0,a.npy,a,1\ns1,c1,a.npy,b,2\n")
    with pytest.raises(CohortError, match=r"'s0'.*'s1'.*same file"):
        with_folds(Cohort.read(table), [], folds=None, seed=0)


def test_frozen_folds_refuse_another_cohort(tmp_path: Path):
    file, columns = tmp_path / "folds.csv", ["subtype", "EGFR"]
    made = with_folds(cohort(), [SUBTYPE], folds=4, seed=0)
    freeze_folds(made, file, columns)
    turned = Cohort(reversed(cohort().records), made.label_names, "made.csv")
    again = frozen_folds(turned, file, columns, folds=None)
    assert again.ids == made.ids
    assert [r.fold for r in again.records] == [r.fold for r in made.records]
    with pytest.raises(CohortError, match=r"'s0-0'.*only in"):
        frozen_folds(Cohort(cohort().records[1:], made.label_names), file, columns, folds=None)
    with pytest.raises(CohortError, match=r"'s50-0'.*not in"):
        frozen_folds(cohort(51), file, columns, folds=None)
    with pytest.raises(CohortError, match=r"column 'EGFR'.*when the folds were made"):
        frozen_folds(cohort(seed=1), file, columns, folds=None)
    with pytest.raises(CohortError, match="4 folds, not the 3"):
        frozen_folds(made, file, columns, folds=3)


def test_a_written_round_reads_back_as_it_is(tmp_path: Path):
    made = split_for(with_folds(cohort(6), [], folds=3, seed=0), 1, "fold", [], seed=0)
    write_cohort(made, tmp_path / "deep" / "cohort.csv")
    back = Cohort.read(tmp_path / "deep" / "cohort.csv")
    assert [(r.slide_id, r.case_id, r.split, r.labels) for r in back.records] == [
        (r.slide_id, r.case_id, r.split, r.labels) for r in made.records
    ]
    assert all(r.path is not None and r.path == Path(f"{r.slide_id}.npy").absolute() for r in back.records)


@pytest.mark.parametrize(
    ("record", "word"),
    [
        (SlideRecord("new", "c3", Path("new.npy")), "case 'c3'"),
        (SlideRecord("new", "C3", Path("new.npy")), "case 'C3'"),
        (SlideRecord("s3-0", "new", Path("new.npy"), row=7), "other.csv, row 7, slide 's3-0'"),
        (SlideRecord("s3-0", "new", Path("new.npy")), "other.csv, slide 's3-0'"),
        (SlideRecord("new", "new", Path("s3-0.npy")), "s3-0.npy"),
    ],
)
def test_an_external_cohort_must_be_new(record: SlideRecord, word: str):
    with pytest.raises(CohortError, match=word):
        refuse_overlap(cohort(), Cohort([SlideRecord("x", "x", Path("x.npy")), record], (), "other.csv"))
    refuse_overlap(cohort(), Cohort([SlideRecord("x", "x", Path("x.npy"))], (), "other.csv"))


def test_too_few_cases_or_folds_are_said():
    with pytest.raises(CohortError, match="3 cases cannot be dealt to 5"):
        with_folds(cohort(3), [], folds=None, seed=0)
    with pytest.raises(CohortError, match="at least 2"):
        with_folds(cohort(), [], folds=1, seed=0)
    two = with_folds(cohort(), [], folds=2, seed=0)
    with pytest.raises(CohortError, match="--val"):
        split_for(two, 0, "fold", [], seed=0)
    with pytest.raises(CohortError, match="leaves none for val"):
        split_for(with_folds(cohort(4), [], folds=2, seed=0), 0, 0.01, [], seed=0)
