"""Labels and bags joined: by slide, by case, by name with a dot; what is missing on either side is named."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dre_fast.data.bag_cohort import (
    bag_cohort,
    cohort_of_bags,
    refuse_shared_file,
    refuse_shared_report,
    yes_where_not,
)
from dre_fast.data.cohort import Cohort, CohortError, SlideRecord, Task
from dre_fast.data.task_words import parse_tasks
from mil_study import write_bag, write_table


def bags(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        write_bag(folder / "features", name, np.full((2, 3), i, np.float32))
    return folder / "features"


def test_a_table_of_clam(tmp_path):
    folder = bags(tmp_path, "s1", "s2", "s3")
    table = write_table(
        tmp_path / "l.csv",
        [
            {"case_id": c, "slide_id": s, "label": x}
            for c, s, x in [("p", "s1", "a"), ("p", "s2", "a"), ("q", "s3", "b")]
        ],
    )
    cohort = bag_cohort(folder, table)
    assert [(r.slide_id, r.case_id, r.path) for r in cohort] == [
        ("s1", "p", folder / "s1.h5"),
        ("s2", "p", folder / "s2.h5"),
        ("s3", "q", folder / "s3.h5"),
    ]
    assert parse_tasks(None, cohort) == [Task("label", "multiclass", classes=("a", "b"))]


def test_slides_under_an_unknown_name_with_cases_twice(tmp_path):
    folder = bags(tmp_path, "s1", "s2")
    rows = [{"case_id": "p", "image_id": s, "y": 1} for s in ("s1", "s2")]
    table = write_table(tmp_path / "l.csv", rows)
    said = r"case 'p' is listed twice: row 2 and row 3, column 'case_id'; .*--slide-column \(there are image_id, y\)$"
    with pytest.raises(CohortError, match=said):
        bag_cohort(folder, table)
    assert [(r.slide_id, r.case_id) for r in bag_cohort(folder, table, slide_column="image_id")] == [
        ("s1", "p"),
        ("s2", "p"),
    ]


def test_what_is_missing_is_counted_and_named(tmp_path):
    folder = bags(tmp_path, "s1", "x1", "x2")
    table = write_table(tmp_path / "l.csv", [{"slide_id": s, "case_id": s, "y": 1} for s in ("s1", "s2")])
    with pytest.raises(
        CohortError, match=r"1 slide .* has no bag .*'s2'; 2 bags .* no row .*'x1', 'x2'.*--skip-missing"
    ):
        bag_cohort(folder, table)
    with pytest.warns(UserWarning, match="left out") as said:
        assert bag_cohort(folder, table, skip_missing=True).ids == ["s1"]
    assert len(said) == 2
    write_table(table, [{"slide_id": "z", "case_id": "z", "y": 1}])
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(CohortError, match="none of its 1 rows has a bag"),
    ):
        bag_cohort(folder, table, skip_missing=True)
    with pytest.raises(ValueError, match="no such folder"):
        bag_cohort(tmp_path / "none", table)


def test_names_of_slide_files_and_names_that_go_on(tmp_path):
    folder = bags(tmp_path, "TCGA-05-4244-01Z-00-DX1.D4FF32CD", "TCGA-05-4249-01Z-00-DX1.AAAA", "b")
    table = write_table(
        tmp_path / "l.csv",
        [
            {"slide_id": s, "y": y}
            for s, y in [
                ("TCGA-05-4244-01Z-00-DX1", 1),
                ("TCGA-05-4249-01Z-00-DX1.AAAA.svs", 0),
                ("b.tiff", 1),
            ]
        ],
    )
    with pytest.warns(UserWarning, match="'b.tiff' bear no TCGA barcode"):
        cohort = bag_cohort(folder, table)
    assert [r.path.stem for r in cohort] == [
        "TCGA-05-4244-01Z-00-DX1.D4FF32CD",
        "TCGA-05-4249-01Z-00-DX1.AAAA",
        "b",
    ]
    bags(tmp_path, "TCGA-05-4244-01Z-00-DX1.OTHER")
    with (
        pytest.warns(UserWarning, match="bear no"),
        pytest.raises(CohortError, match=r"row 2.* any of 2 bags"),
    ):
        bag_cohort(folder, table)


def test_columns_of_other_names(tmp_path):
    folder = bags(tmp_path, "s1", "s2")
    rows = [{"image": s, "patient_id": "p", "case_id": s, "y": 1} for s in ("s1", "s2")]
    table = write_table(tmp_path / "l.csv", rows)
    cohort = bag_cohort(folder, table, slide_column="image", case_column="patient_id")
    assert cohort.cases == ["p"]
    assert cohort.label_names == ("case_id (not read)", "y")
    write_table(table, [{"image": "s1", "y": 1}])
    with pytest.raises(CohortError, match=r"no column 'slide_id'.*image, y.*--slide-column, --case-column"):
        bag_cohort(folder, table)
    with pytest.raises(CohortError, match="no column 'case_id'"):
        bag_cohort(folder, table, slide_column="image", case_column="who")


def test_a_column_of_patients_is_not_passed_over(tmp_path):
    folder = bags(tmp_path, "s1", "s2")
    table = write_table(tmp_path / "l.csv", [{"slide_id": s, "patient": "p", "y": 1} for s in ("s1", "s2")])
    with pytest.raises(CohortError, match=r"no column 'case_id', but 'patient'.*--case-column patient"):
        bag_cohort(folder, table)
    assert bag_cohort(folder, table, case_column="patient").cases == ["p"]
    assert bag_cohort(folder, table, case_column="slide_id").cases == ["s1", "s2"]


def test_labels_of_cases(tmp_path):
    folder = bags(tmp_path, "P1-a", "P1-b", "P12_x", "P3")
    table = write_table(
        tmp_path / "l.csv",
        [{"case_id": c, "gene": g} for c, g in [("P1", "WT"), ("P12", "NS"), ("P3", "x9")]],
    )
    cohort = bag_cohort(folder, table, missing=["NS"])
    assert {r.slide_id: (r.case_id, r.labels["gene"]) for r in cohort} == {
        "P1-a": ("P1", "WT"),
        "P1-b": ("P1", "WT"),
        "P12_x": ("P12", None),
        "P3": ("P3", "x9"),
    }
    told = yes_where_not(cohort, ["wt"])
    assert [r.labels["gene"] for r in told] == ["0", "0", None, "1"]
    with pytest.raises(CohortError, match="no label column holds none"):
        yes_where_not(cohort, ["none"])
    write_table(table, [{"case_id": c, "gene": "WT"} for c in ("P1", "P1-a")])
    with pytest.raises(CohortError, match="bag 'P1-a' could be of case 'P1' or 'P1-a'"):
        bag_cohort(folder, table)
    write_table(table, [{"case_id": c, "gene": "WT"} for c in ("P1", "P1")])
    with pytest.raises(CohortError, match="listed twice"):
        bag_cohort(folder, table)


def test_real_labels_by_slide(test_data, tmp_path):
    table = test_data / "labels" / "tcga_luad_slide_mutations.csv"
    listed = Cohort.read(table, require_path=False)
    names = listed.ids[:40]
    folder = bags(tmp_path, *(f"{name}.7A3C" for name in names[:20]), *names[20:])
    with pytest.raises(CohortError, match="1305 slides"):
        bag_cohort(folder, table)
    with pytest.warns(UserWarning, match="1305 slides"):
        cohort = bag_cohort(folder, table, case_column="case_submitter_id", skip_missing=True)
    assert cohort.ids == names
    assert cohort.cases == list(dict.fromkeys(name[:12] for name in names))
    with pytest.warns(UserWarning, match="1305 slides"):
        assert bag_cohort(folder, table, skip_missing=True).cases == cohort.cases
    task = parse_tasks(["genes=EGFR,KRAS,TP53"], cohort)[0]
    assert not cohort.encode(task).isnan().any()


def test_real_labels_by_file_name(test_data, tmp_path):
    table = test_data / "labels" / "tcga_luad_slide_mutations.csv"
    lines = table.read_text().splitlines()
    files = [line.split(",")[2] for line in lines[1:4]]
    (tmp_path / "l.csv").write_text("\n".join(lines[:4]))
    folder = bags(tmp_path, *(name.removesuffix(".svs") for name in files))
    cohort = bag_cohort(folder, tmp_path / "l.csv", slide_column="file_name")
    assert cohort.ids == files
    assert cohort.cases == list(dict.fromkeys(name[:12] for name in files))


def test_real_labels_by_case(test_data, tmp_path):
    table = test_data / "labels" / "tcga_lung_mutations.csv"
    with open(table) as file:
        cases = [line.split(",")[0] for line in file][1:]
    folder = tmp_path / "features"
    folder.mkdir()
    for name in (*(f"{case}-01Z-00-DX1" for case in cases), f"{cases[0]}-01A-01-TS1"):
        (folder / f"{name}.h5").touch()  # a thousand bags that nobody opens
    genes = "EGFR,KRAS,BRAF,PIK3CA,STK11,TP53,KEAP1"
    cohort = bag_cohort(folder, table, missing=["NS"])
    assert len(cohort) == len(cases) + 1
    task = parse_tasks([f"genes={genes}"], cohort)[0]
    target = cohort.encode(task)
    assert int(target.isnan().sum()) == 21
    told = yes_where_not(cohort, ["WT"])
    assert target.nan_to_num(2).equal(told.encode(task).nan_to_num(2))
    bare = bag_cohort(folder, table)
    with pytest.raises(ValueError, match=r"slide 'TCGA-.*column '\w+'.*'NS' is neither yes nor no"):
        parse_tasks([f"genes={genes}"], bare)


def test_bags_without_a_table(tmp_path):
    folder = bags(tmp_path, "TCGA-05-4244-01Z-00-DX1.D4FF32CD", "b")
    assert cohort_of_bags(folder).cases == ["TCGA-05-4244", "b"]


def test_one_file_and_one_report_in_two_parts(tmp_path):
    folder = bags(tmp_path, "a")
    os.link(folder / "a.h5", folder / "b.h5")
    a, b = (
        SlideRecord(name, name, folder / f"{name}.h5", split=split)
        for name, split in (("a", "train"), ("b", "test"))
    )
    with pytest.raises(CohortError, match=r"'a' \(split train\) and 'b' \(split test\) are the same file"):
        refuse_shared_file(Cohort([a, b]), "split")
    refuse_shared_file(Cohort([a, replace(b, split="train")]), "split")
    one, two = replace(a, report="The same  text."), replace(b, report="The same text.")
    with pytest.raises(CohortError, match=r"'a' \(case 'a', split train\) and 'b' .* the same report"):
        refuse_shared_report(Cohort([one, two]), "split")
    refuse_shared_report(Cohort([one, replace(two, report="Another.")]), "split")


def test_words_of_tasks():
    cohort = Cohort(
        [
            SlideRecord(str(i), str(i), labels={"x": "ab"[i % 2], "g": str(i % 2), "t": str(i), "e": "1"})
            for i in range(4)
        ],
        ["x", "g", "t", "e"],
    )
    found = parse_tasks(
        ["x", "g", "p=g,e", "{name: os, kind: survival, columns: [t, e], method: hazard, bins: 2}"],
        cohort,
        ["c=t,e"],
    )
    assert [(task.name, task.kind) for task in found] == [
        ("x", "multiclass"),
        ("g", "binary"),
        ("p", "multilabel"),
        ("os", "survival"),
        ("c", "survival"),
    ]
    assert found[3].method == "hazard"
    with pytest.raises(CohortError, match=r"name what to learn with --tasks.*x, g, t"):
        parse_tasks(None, cohort)
    for words, message in (
        (["y"], "no label column 'y'"),
        (["x", "x"], "two tasks are called 'x'"),
        (["{name: a, sort: b}"], "a task has name, kind"),
        (["{name: "], "not YAML"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_tasks(words, cohort)
    with pytest.raises(ValueError, match="NAME=TIME,EVENT"):
        parse_tasks(["x"], cohort, ["c=t"])
