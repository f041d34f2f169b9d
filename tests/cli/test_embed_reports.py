"""`dre-fast embed-reports` end to end: tables in, safetensors out, what it says and how it fails."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from dre_fast.cli import embed_reports
from dre_fast.data.cohort import CohortError
from dre_fast.data.reports import ReportEmbeddings, ReportError

pytest.importorskip("sklearn", reason="needs scikit-learn")
pytest.importorskip("safetensors", reason="needs safetensors")

TISSUES = ("lung", "skin", "liver", "kidney")
GRADES = ("low grade", "high grade", "keratinising")


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    embed_reports.add_parser(parser.add_subparsers())
    args = parser.parse_args(["embed-reports", *map(str, words)])
    return args.run(args)


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    rows = ["slide_id,case_id,report,split"]
    for i in range(12):
        report = f"{TISSUES[i % 4]} tumour {GRADES[i % 3]}"
        rows.append(f"s{i},P{i},{report},{'train' if i < 8 else 'test'}")
    rows += ["s12,P0,,train", "s13,P13,,train"]
    file = tmp_path / "cohort.csv"
    file.write_text("\n".join(rows) + "\n")
    return file


def test_fits_on_training_cases_and_names_cases_without_report(cohort, tmp_path, capsys):
    out = tmp_path / "out" / "reports.safetensors"
    assert run(cohort, "--out", out) == 0
    embedded = ReportEmbeddings.load(out)
    assert embedded.case_ids == [f"P{i}" for i in range(12)]
    assert embedded.details["fitted_on"] == 8
    printed = capsys.readouterr()
    assert "12 of 13 cases embedded" in printed.out
    assert "fitted on the reports of 8 cases" in printed.out
    assert "no report for 1 case(s): P13" in printed.err
    assert "dimensions instead of 256" in printed.err
    first = out.read_bytes()
    assert run(cohort, "--out", out) == 0
    assert out.read_bytes() == first

    again = tmp_path / "again.safetensors"
    assert run(cohort, "--out", again, "--model", out.with_suffix(".tfidf.safetensors")) == 0
    later = ReportEmbeddings.load(again)
    assert later.model == embedded.model
    torch.testing.assert_close(later.matrix, embedded.matrix)

    everything = tmp_path / "all.safetensors"
    assert run(cohort, "--out", everything, "--fit-split", "all") == 0
    assert ReportEmbeddings.load(everything).details["fitted_on"] == 12


def test_a_table_without_splits_fits_on_all(tmp_path):
    (tmp_path / "c.csv").write_text("slide_id,report\na,lung tumour\nb,skin tumour\n")
    assert run(tmp_path / "c.csv", "--out", tmp_path / "r.safetensors") == 0
    assert ReportEmbeddings.load(tmp_path / "r.safetensors").details["fitted_on"] == 2
    with pytest.raises(CohortError, match="no slide is in train"):
        run(tmp_path / "c.csv", "--out", tmp_path / "r.safetensors", "--fit-split", "train")


def test_reports_kept_apart(cohort, tmp_path):
    reports = tmp_path / "reports.csv"
    reports.write_text("case_id,text\nP1,lung tumour\ns2,skin tumour\nother,liver\n")
    assert run(cohort, "--out", tmp_path / "r.safetensors", "--reports", reports) == 0
    assert ReportEmbeddings.load(tmp_path / "r.safetensors").case_ids == ["P1", "P2"]


def test_what_it_refuses(cohort, tmp_path):
    with pytest.raises(ReportError, match=r"reports\.pt: the file must end in \.safetensors"):
        run(cohort, "--out", tmp_path / "reports.pt")
    (tmp_path / "c.csv").write_text("slide_id,label\na,1\n")
    with pytest.raises(ReportError, match=r"no report in column 'report'.*--reports FILE"):
        run(tmp_path / "c.csv", "--out", tmp_path / "r.safetensors")
    with pytest.raises(ReportError, match=r"cannot load the text encoder .*none(.|\n)*local folder"):
        run(cohort, "--out", tmp_path / "r.safetensors", "--model", tmp_path / "none")
    assert not (tmp_path / "r.safetensors").exists()


def test_help_tells_everything(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    for word in (
        "--fit-split",
        "--pooling",
        "--max-length",
        "tfidf-svd",
        "Llama",
        "annotation.json",
        "default",
    ):
        assert word in text


def test_real_reports(test_data, tmp_path, capsys):
    reports = test_data / "reports/tcga_reports.csv"
    cases = sorted({line[:12] for line in reports.read_text().splitlines() if line.startswith("TCGA-")})[:60]
    rows = [f"{case}-01Z-00-DX1,{'train' if i % 4 else 'test'}" for i, case in enumerate(cases)]
    (tmp_path / "c.csv").write_text("\n".join(["slide_id,split", *rows, "TCGA-ZZ-0000-01Z-00-DX1,test"]))
    out = tmp_path / "r.safetensors"
    assert run(tmp_path / "c.csv", "--reports", reports, "--out", out, "--dim", "32") == 0
    embedded = ReportEmbeddings.load(out)
    assert embedded.case_ids == cases
    assert embedded.matrix.shape == (60, 32)
    assert "TCGA-ZZ-0000" in capsys.readouterr().err
