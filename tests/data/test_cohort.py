"""The cohort table: what is read, and that every fault is named with its row and column."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from dre_fast.data.cohort import Cohort, CohortError, LabelError, SlideRecord, Task, case_of
from dre_fast.data.tasks import sort_classes, truth_value

HEADER = "slide_id,case_id,path,report,subtype,EGFR,TP53,split,fold"


def write(folder: Path, *rows: str, header: str = HEADER, encoding: str = "utf-8") -> Path:
    file = folder / "cohort.csv"
    file.write_text("\n".join([header, *rows]) + "\n", encoding=encoding)
    return file


def test_reads_every_column(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/b.txt").write_text("squamous cell carcinoma\n")
    file = write(
        tmp_path,
        's1,A,slides/s1.svs,"adenocarcinoma, well\ndifferentiated",LUAD,L858R,WT,train,0',
        "TCGA-05-4244-01Z-00-DX1,,/abs/s2.svs,r/b.txt,LUSC,NA,,Validation,1.0",
        "s3,,s3.svs,,,,,,",
    )
    cohort = Cohort.read(file)
    first, second, third = cohort
    assert first.slide_id == "s1"
    assert first.case_id == "A"
    assert first.path == tmp_path / "slides/s1.svs"
    assert first.report == "adenocarcinoma, well\ndifferentiated"
    assert first.labels == {"subtype": "LUAD", "EGFR": "L858R", "TP53": "WT"}
    assert (first.split, first.fold, first.row) == ("train", 0, 2)
    assert second.case_id == "TCGA-05-4244"
    assert second.path == Path("/abs/s2.svs")
    assert second.report == "squamous cell carcinoma"
    assert second.labels == {"subtype": "LUSC", "EGFR": None, "TP53": None}
    assert (second.split, second.fold, second.row) == ("val", 1, 3)
    assert (third.case_id, third.report, third.split, third.fold) == ("s3", None, None, None)
    assert cohort.label_names == ("subtype", "EGFR", "TP53")
    assert cohort.ids == ["s1", "TCGA-05-4244-01Z-00-DX1", "s3"]
    assert cohort.cases == ["A", "TCGA-05-4244", "s3"]
    assert cohort.splits == {"train": 1, "val": 1}
    assert cohort["s3"] is third
    assert cohort[0] is first
    assert "s3" in cohort
    assert "s4" not in cohort
    assert pickle.loads(pickle.dumps(cohort)).ids == cohort.ids


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_delimiters_and_byte_order_mark(tmp_path, delimiter, encoding):
    header, row = (text.replace(",", delimiter) for text in ("Slide_ID,path,stage", "s1,a.svs,é"))
    cohort = Cohort.read(write(tmp_path, row, header=header, encoding=encoding))
    assert cohort["s1"].labels == {"stage": "é"}


def test_windows_line_ends_blank_lines_and_spaces(tmp_path):
    file = tmp_path / "cohort.csv"
    file.write_bytes(b"slide_id , path\r\n\r\n s1 , a.svs \r\n,\r\ns2,b.svs\r\n\r\n")
    cohort = Cohort.read(file)
    assert cohort.ids == ["s1", "s2"]
    assert [record.row for record in cohort] == [3, 5]


def test_case_of():
    assert case_of("TCGA-55-8507-01Z-00-DX1.3C6198CF") == "TCGA-55-8507"
    assert case_of("TCGA-55-8507") == "TCGA-55-8507"
    assert case_of("C3L-00001-21") == "C3L-00001-21"
    assert case_of("TCGA-55-85071-01Z") == "TCGA-55-85071-01Z"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["s1,,,,,,,,"], r"row 2, column 'path': empty.*'s1'"),
        ([",,a.svs,,,,,,"], r"row 2, column 'slide_id': empty"),
        (["a/b,,a.svs,,,,,,"], r"row 2, column 'slide_id': 'a/b' is not usable"),
        (
            ["s1,,a.svs,,,,,,", "s2,,b.svs,,,,,hold,"],
            r"row 3, column 'split': 'hold' must be train, val or test",
        ),
        (["s1,,a.svs,,,,,,1.5"], r"row 2, column 'fold': '1.5' must be a whole number"),
        (["s1,,a.svs,,,,,,-1"], r"row 2, column 'fold': '-1' must be a whole number"),
        (["s1,,a.svs,gone.txt,,,,,"], r"row 2, column 'report': .*gone\.txt: no such file"),
        (["s1,,a.svs,,,,,,", "s1,,b.svs,,,,,,"], r"'s1' is listed twice: row 2 and row 3, column 'slide_id'"),
        (["s1,,a.svs,,,,,"], r"row 2 .*8 cells where the header has 9"),
        (['s1,,a.svs,"open,,,,,'], r"row 2 \(line \d\): unexpected end of data"),
        ([], r"no rows below the header"),
    ],
)
def test_faults_name_row_and_column(tmp_path, rows, message):
    with pytest.raises(CohortError, match=f"cohort.csv.*{message}"):
        Cohort.read(write(tmp_path, *rows))


def test_row_number_counts_rows_not_lines(tmp_path):
    with pytest.raises(CohortError, match=r"row 3, column 'split'"):
        Cohort.read(write(tmp_path, 's1,,a.svs,"one\ntwo\nthree",,,,,', "s2,,b.svs,,,,,hold,"))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("case_id,path", r"row 1: no column 'slide_id'.*case_id, path"),
        ("slide_id,label", r"row 1: no column 'path'.*slide_id, label"),
        ("slide_id,path,x,x", r"row 1: column 'x' is there twice"),
        (",slide_id,path", r"row 1: column 1 has no name .*pandas"),
    ],
)
def test_faults_of_the_header(tmp_path, header, message):
    with pytest.raises(CohortError, match=message):
        Cohort.read(write(tmp_path, header=header))


def test_unreadable_files(tmp_path):
    with pytest.raises(CohortError, match=r"none\.csv: no such file"):
        Cohort.read(tmp_path / "none.csv")
    with pytest.raises(CohortError, match="is a folder"):
        Cohort.read(tmp_path)
    (tmp_path / "empty.csv").write_text("\n")
    with pytest.raises(CohortError, match=r"empty\.csv: empty"):
        Cohort.read(tmp_path / "empty.csv")
    with pytest.raises(CohortError, match="not UTF-8"):
        Cohort.read(write(tmp_path, "s1,é.svs", header="slide_id,path", encoding="latin-1"))


def test_empty_report_file_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(CohortError, match=r"row 2, column 'report': .*a\.txt is empty"):
        Cohort.read(write(tmp_path, "s1,,a.svs,a.txt,,,,,"))


def test_paths_may_be_absent_or_must_exist(tmp_path):
    file = write(tmp_path, "s1,LUAD", header="slide_id,subtype")
    assert Cohort.read(file, require_path=False)["s1"].path is None
    file = write(tmp_path, "s1,a.svs", header="slide_id,path")
    assert Cohort.read(file)["s1"].path == tmp_path / "a.svs"
    with pytest.raises(CohortError, match=r"row 2, column 'path': slide 's1': no such file: .*a\.svs"):
        Cohort.read(file, must_exist=True)
    (tmp_path / "a.svs").touch()
    assert len(Cohort.read(file, must_exist=True)) == 1


@pytest.mark.parametrize(("column", "one", "two"), [("split", "train", "test"), ("fold", 0, 1)])
def test_a_case_never_falls_into_two_splits_or_folds(tmp_path, column, one, two):
    file = write(
        tmp_path, f"a,P7,x,{one}", f"b,P8,x,{two}", f"c,P7,x,{two}", header=f"slide_id,case_id,path,{column}"
    )
    with pytest.raises(CohortError, match=rf"column '{column}': case 'P7'.*'a' in .*row 2.*'c' in .*row 4"):
        Cohort.read(file)


@pytest.mark.parametrize(("column", "one", "two"), [("split", "train", "test"), ("fold", 0, 1)])
def test_a_case_written_in_two_ways(tmp_path, column, one, two):
    rows = [f"a,p7,x,{one}", f"b,P8,x,{two}", f"c,P7,x,{one}", f"d,P7,x,{two}"]
    header = f"slide_id,case_id,path,{column}"
    with pytest.raises(
        CohortError, match=r"cases 'p7' \(row 2, .*'P7' \(row 4, .*differ in upper and lower case alone"
    ):
        Cohort.read(write(tmp_path, rows[0], rows[1], rows[3], header=header))
    assert Cohort.read(write(tmp_path, *rows[:3], header=header)).cases == ["p7", "P8", "P7"]


def test_slides_of_one_tcga_patient_are_one_case(tmp_path):
    assert case_of("tcga-05-4244-01z-00-dx1") == "tcga-05-4244"
    rows = ["TCGA-05-4244-01Z-00-DX1,x,train", "TCGA-05-4244-01A-01-BS1,x,test"]
    with pytest.raises(CohortError, match="case 'TCGA-05-4244' is in two splits"):
        Cohort.read(write(tmp_path, *rows, header="slide_id,path,split"))


def test_subset_and_select(tmp_path):
    file = write(tmp_path, "a,x,train", "b,x,test", "c,x,", header="slide_id,path,split")
    cohort = Cohort.read(file)
    assert cohort.subset("train").ids == ["a"]
    assert cohort.subset(["train", "test"]).ids == ["a", "b"]
    assert cohort.subset(None) is cohort
    assert cohort.select(["c", "a"]).ids == ["c", "a"]
    with pytest.raises(
        CohortError, match=r"column 'split': no slide is in val \(slides per split: .*'train': 1"
    ):
        cohort.subset("val")
    with pytest.raises(CohortError, match="'trian' must be"):
        cohort.subset("trian")
    with pytest.raises(CohortError, match="no slide 'zz'"):
        cohort.select(["zz"])


def test_cross_validation(tmp_path):
    file = write(tmp_path, *(f"s{i},x,{i % 3}" for i in range(6)), header="slide_id,path,fold")
    cohort = Cohort.read(file)
    tested = []
    for fold in range(3):
        round_ = cohort.cross_validation(fold)
        assert round_.splits == {"train": 2, "val": 2, "test": 2}
        assert {record.fold for record in round_.subset("test")} == {fold}
        assert {record.fold for record in round_.subset("val")} == {(fold + 1) % 3}
        tested += round_.subset("test").ids
    assert sorted(tested) == sorted(cohort.ids)
    assert cohort.cross_validation(1, validate=False).splits == {"train": 4, "test": 2}
    with pytest.raises(CohortError, match=r"no fold 7 \(folds: \[0, 1, 2\]\)"):
        cohort.cross_validation(7)
    two = cohort.select(["s0", "s1"])
    with pytest.raises(CohortError, match="2 folds are too few"):
        two.cross_validation(0)
    with pytest.raises(CohortError, match=r"row 2, column 'fold': slide 's1' has none"):
        Cohort.read(write(tmp_path, "s1,x,", header="slide_id,path,fold")).cross_validation(0)


def test_reports_are_shared_by_the_slides_of_a_case(tmp_path):
    header = "slide_id,case_id,path,report"
    file = write(tmp_path, "a,P,x,tumour  seen", "b,P,x,", "c,P,x,tumour seen", "d,Q,x,", header=header)
    assert Cohort.read(file).reports() == {"P": "tumour  seen"}
    file = write(tmp_path, "a,P,x,tumour seen", "b,P,x,no tumour", header=header)
    with pytest.raises(CohortError, match=r"case 'P' has two different reports: row 2 .*'a'.* row 3 .*'b'"):
        Cohort.read(file).reports()


def labelled(tmp_path: Path) -> Cohort:
    rows = ["a,x,LUSC,WT,R158Lfs*12", "b,x,,G12C G13D,wt", "c,x,LUAD,,NA"]
    return Cohort.read(write(tmp_path, *rows, header="slide_id,path,subtype,EGFR,TP53"))


def test_multiclass_targets(tmp_path):
    cohort = labelled(tmp_path)
    task = cohort.resolve(Task("subtype"))
    assert task.classes == ("LUAD", "LUSC")
    assert task.outputs == 2
    assert cohort.encode(task).tolist() == [1, -1, 0]
    assert cohort.encode(Task("subtype"), cohort.records[2:]).tolist() == [0]  # classes of the whole cohort
    given = Task("s", classes=["LUSC", "LUAD", "SCLC"], columns=["subtype"])
    assert cohort.encode(given).tolist() == [0, -1, 1]
    with pytest.raises(LabelError, match=r"slide 'c', column 'subtype': 'LUAD' is not a class .*LUSC, SCLC"):
        cohort.encode(Task("subtype", classes=["LUSC", "SCLC"]))


def test_multilabel_targets_with_missing_genes(tmp_path):
    cohort = labelled(tmp_path)
    task = Task("genes", "multilabel", columns=["EGFR", "TP53"])
    target = cohort.encode(task)
    assert target.dtype == torch.float32
    nan = float("nan")
    torch.testing.assert_close(target, torch.tensor([[0, 1], [1, 0], [nan, nan]]), equal_nan=True)
    assert task.outputs == 2
    assert cohort.encode(task, []).shape == (0, 2)
    both = cohort.encode_labels([task, Task("subtype")])
    assert set(both) == {"genes", "subtype"}


def test_binary_targets(tmp_path):
    cohort = labelled(tmp_path)
    torch.testing.assert_close(
        cohort.encode(Task("EGFR", "binary")), torch.tensor([0, 1, float("nan")]), equal_nan=True
    )
    given = Task("squamous", "binary", classes=["LUAD", "LUSC"], columns=["subtype"])
    torch.testing.assert_close(cohort.encode(given), torch.tensor([1, float("nan"), 0]), equal_nan=True)
    with pytest.raises(LabelError, match=r"slide 'a', column 'subtype'.*'LUSC' is neither yes nor no"):
        cohort.encode(Task("subtype", "binary"))
    with pytest.raises(LabelError, match=r"'LUSC' is neither 'LUAD' nor 'SCLC'"):
        cohort.encode(Task("subtype", "binary", classes=["LUAD", "SCLC"]))


def test_missing_values_are_an_option(tmp_path):
    file = write(tmp_path, "a,x,NS", "b,x,WT", header="slide_id,path,EGFR")
    with pytest.raises(LabelError, match=r"slide 'a', column 'EGFR'.*'NS'.*missing values"):
        Cohort.read(file).encode(Task("EGFR", "binary"))
    target = Cohort.read(file, missing_values=("NA", "ns")).encode(Task("EGFR", "binary"))
    torch.testing.assert_close(target, torch.tensor([float("nan"), 0]), equal_nan=True)


def test_classes_in_number_order(tmp_path):
    file = write(tmp_path, "a,x,10,T2", "b,x,9,T10", "c,x,2,T1", header="slide_id,path,grade,stage")
    cohort = Cohort.read(file)
    assert cohort.label_values("grade") == ("2", "9", "10")
    assert cohort.label_values("stage") == ("T1", "T10", "T2")
    with pytest.raises(CohortError, match=r"no label column 'x1'; label columns: grade, stage"):
        cohort.label_values("x1")
    with pytest.raises(CohortError, match=r"no label column 'x1' \(task 't'\)"):
        cohort.encode(Task("t", columns=["x1"]))


def test_classes_with_a_nan_among_them_have_one_order():
    """A NaN is neither below nor above a number: sorted by number, the order would be that of a set's hashes."""
    names = ["2", "nan", "1", "10", "3"]
    orders = {sort_classes(names[i:] + names[:i]) for i in range(5)}
    assert orders == {("1", "10", "2", "3", "nan")}
    assert sort_classes(["2", "10", "1"]) == ("1", "2", "10")


def test_a_column_with_one_class_is_no_task(tmp_path):
    file = write(tmp_path, "a,x,LUAD", "b,x,", header="slide_id,path,subtype")
    with pytest.raises(CohortError, match="needs at least two classes, found LUAD"):
        Cohort.read(file).resolve(Task("subtype"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "regression"}, "kind must be one of"),
        ({"columns": ["a", "b"]}, "reads one column"),
        ({"columns": "EGFR"}, "must be a list of names"),
        ({"kind": "multilabel", "columns": ["a", "a"]}, "repeated names"),
        ({"kind": "binary", "classes": ["a", "b", "c"]}, r"\[negative, positive\]"),
    ],
)
def test_faulty_tasks(options, message):
    with pytest.raises(ValueError, match=f"task 't'.*{message}"):
        Task("t", **options)


@pytest.mark.parametrize("text", ["0", "0.0", "False", "WT", "wt", "no", "Negative", "normal"])
def test_words_for_no(text):
    assert truth_value(text) == 0.0


PROTEIN_CHANGES = ("G12C", "E746_A750del", "X331_splice", "T125=", "E298*", "R158Lfs*12", "p.Gly12Cys", "M1?")


@pytest.mark.parametrize("text", ["1", "TRUE", "Mutated", *PROTEIN_CHANGES, "L858R T790M", "G12C;G13D"])
def test_words_for_yes(text):
    assert truth_value(text) == 1.0


@pytest.mark.parametrize("text", ["NS", "LUAD", "T2", "T2a", "Stage 2", "T1N0M0", "2", "unknown", ""])
def test_words_for_neither(text):
    assert truth_value(text) is None


def test_a_record_is_filled_up_with_missing_labels():
    cohort = Cohort([SlideRecord("a", "a"), SlideRecord("b", "b", labels={"x": "1"})], ["x"])
    assert [record.labels for record in cohort] == [{"x": None}, {"x": "1"}]


def test_real_slide_level_mutations(test_data):
    cohort = Cohort.read(test_data / "labels/tcga_luad_slide_mutations.csv", require_path=False)
    assert len(cohort) == 1345
    assert len(cohort.cases) == 521
    target = cohort.encode(Task("genes", "multilabel", columns=["EGFR", "TP53", "KRAS"]))
    assert target.shape == (1345, 3)
    assert 0.05 < target[:, 0].mean() < 0.3 < target[:, 1].mean() < 0.7


def test_real_protein_changes(test_data, tmp_path):
    lines = (test_data / "labels/tcga_lung_mutations.csv").read_text().splitlines()
    (tmp_path / "c.csv").write_text("\n".join(["slide_id" + lines[0].removeprefix("case_id"), *lines[1:]]))
    genes = ["EGFR", "KRAS", "BRAF", "PIK3CA", "STK11", "TP53", "KEAP1"]
    cohort = Cohort.read(tmp_path / "c.csv", require_path=False, missing_values=("", "NA", "NS"))
    target = cohort.encode(Task("genes", "multilabel", columns=genes))
    assert int(target.isnan().sum()) == 21
    assert 0.5 < target[:, 5].nanmean() < 0.8  # TP53 in lung cancer


@pytest.mark.parametrize(
    ("values", "said"),
    [(("LUAD", "LUSC", "luad"), "'LUAD' and 'luad'"), (("1", "2", "1.0"), "'1' and '1.0'")],
)
def test_one_class_written_in_two_ways(values, said):
    records = [SlideRecord(f"s{i}", f"c{i}", labels={"y": value}) for i, value in enumerate(values)]
    cohort = Cohort(records, ("y",), "l.csv")
    with pytest.raises(CohortError, match=rf"l\.csv, column 'y': {said} would be two classes of task 'y'"):
        cohort.resolve(Task("y"))
    assert cohort.resolve(Task("y", classes=values)).classes == values  # they are, if one says so
