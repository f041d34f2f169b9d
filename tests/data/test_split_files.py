"""Splits from files: CLAM's two layouts and a plain table, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from dre_fast.data.cohort import Cohort, CohortError, SlideRecord
from dre_fast.data.split_files import read_splits, with_splits

CLAM = ",train,val,test\n0,S1,S4,S5\n1,S2,,S 6.x\n2,S3,,\n"


def written(folder: Path, text: str) -> Path:
    (folder / "splits_0.csv").write_text(text)
    return folder / "splits_0.csv"


def cohort(*names: str, cases: dict[str, str] | None = None) -> Cohort:
    return Cohort(
        [SlideRecord(n, (cases or {}).get(n, f"case of {n}"), fold=1) for n in names], (), "labels.csv"
    )


@pytest.mark.parametrize(
    "text",
    [
        CLAM,
        "train,val,test\nS1,S4,S5\nS2,,S 6.x\nS3,nan,\n",
        ",train,val,test\nS1,True,False,False\nS2,True,False,False\nS3,True,False,False\nS4,False,True,False\n"
        "S5,False,False,True\nS 6.x,False,False,True\n",
        "case_id,slide_id,split\na,S1,train\na,S2,training\na,S3,Train\nb,S4,valid\nc,S5,test\nc,S 6.x,testing\nd,S7,\n",
    ],
)
def test_every_layout_says_the_same(tmp_path, text):
    found = read_splits(written(tmp_path, text))
    assert found == {"S1": "train", "S2": "train", "S3": "train", "S4": "val", "S5": "test", "S 6.x": "test"}


def test_a_cohort_takes_them_in_place_of_its_folds(tmp_path):
    names = ["S1", "S2", "S3", "S4", "S5", "S 6.x", "S7"]
    with pytest.warns(UserWarning, match=r"1 of 7 slides are in no split: 'S7'; left out"):
        found = with_splits(cohort(*names), written(tmp_path, CLAM))
    assert [r.split for r in found.records] == ["train"] * 3 + ["val", "test", "test", None]
    assert {r.fold for r in found.records} == {None}


def test_ids_of_digits_that_pandas_made_fractions(tmp_path):
    found = with_splits(cohort("12", "7", "3.0"), written(tmp_path, ",train,val,test\n0,12.0,7.0,3.0\n"))
    assert [r.split for r in found.records] == ["train", "val", "test"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (",train,val,test\n0,S1,S1,S2\n", r"row 2: slide 'S1' is in train and in val"),
        (",train,val,test\n0,S1,S2,\n1,S1,,\n", r"row 3: slide 'S1' is twice"),
        (",train,val,test\n0,,S2,S3\n", "no slide is in train"),
        (
            "slide,part\nS1,train\n",
            r"columns train, val and test \(CLAM\), or slide_id and split; it has slide, part",
        ),
        ("slide_id,split\nS1,trian\n", r"row 2, column 'split': 'trian'"),
        (
            ",train,val,test\nS1,True,True,False\n",
            r"row 2: slide 'S1' needs one True among its splits, it has 2",
        ),
    ],
)
def test_a_file_that_cannot_be(tmp_path, text, said):
    with pytest.raises(CohortError, match=said):
        read_splits(written(tmp_path, text))


def test_slides_that_the_cohort_lacks(tmp_path):
    file = written(tmp_path, CLAM)
    few = cohort("S1", "S4", "S5")
    with pytest.raises(
        CohortError, match=r"3 of its 6 slides are not in labels.csv: 'S2', 'S3', 'S 6.x'.*--skip-missing"
    ):
        with_splits(few, file)
    with pytest.warns(UserWarning, match="left out"):
        assert with_splits(few, file, skip_missing=True).splits == {"train": 1, "val": 1, "test": 1}
    with pytest.raises(CohortError, match="6 of its 6 slides"):
        with_splits(cohort("other"), file, skip_missing=True)


def test_a_patient_in_two_of_its_splits(tmp_path):
    names = ["S1", "S2", "S3", "S4", "S5", "S 6.x"]
    with pytest.raises(
        CohortError, match=r"case 'P' is in two splits: slide 'S1' in 'train'.*slide 'S5' in 'test'"
    ):
        with_splits(cohort(*names, cases={"S1": "P", "S5": "P"}), written(tmp_path, CLAM))
