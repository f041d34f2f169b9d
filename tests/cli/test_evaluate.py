"""dre-fast evaluate: from a file of predictions and a cohort to a table."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from dre_fast.cli import evaluate
from dre_fast.data.embeddings import SlideEmbeddings


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """pred.safetensors with logits, bare.h5 without, cohort.csv without slide files."""
    rng = np.random.default_rng(0)
    n = 80
    y, gene = rng.integers(2, size=n), rng.integers(2, size=(n, 2))
    names = [f"S{i:03d}" for i in range(n)]
    with open(tmp_path / "cohort.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "case_id", "subtype", "EGFR", "TP53", "split"])
        for i, name in enumerate(names):
            label = "" if i % 9 == 0 else ("x", "y")[y[i]]
            genes = ["" if i % 7 == j else int(g) for j, g in enumerate(gene[i])]
            writer.writerow([name, f"C{i // 2}", label, *genes, "train" if i < 40 else "test"])
    embedding = torch.tensor(rng.normal(size=(n, 6))).float()
    embedding[:, 0] += 3 * torch.tensor(y)
    embedding[:, 1] += 3 * torch.tensor(gene[:, 0])
    logits = torch.stack([-embedding[:, 0] + 1.5, embedding[:, 0] - 1.5], 1)
    cards = {"subtype": {"kind": "multiclass", "classes": ["x", "y"], "columns": ["subtype"]}}
    SlideEmbeddings(names, embedding, None, {"subtype": logits}, cards).save(tmp_path / "pred.safetensors")
    SlideEmbeddings(names, embedding).save(tmp_path / "bare.h5")
    return tmp_path


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    evaluate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["evaluate", *argv])
    return args.run(args)


def test_table_and_files(study: Path, capsys: pytest.CaptureFixture[str]):
    code = run(
        str(study / "pred.safetensors"),
        *("--cohort", str(study / "cohort.csv"), "--split", "test", "--bootstrap", "100"),
        *("--out", str(study / "scores")),
    )
    assert code == 0
    out = capsys.readouterr().out
    assert "average_precision" in out
    assert "subtype" in out
    with open(study / "scores" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["metric"] == "auc"
    assert float(rows[0]["value"]) > 0.9
    assert float(rows[0]["low"]) <= float(rows[0]["value"]) <= float(rows[0]["high"])
    assert int(rows[0]["samples"]) == 36
    assert (study / "scores" / "metrics.md").exists()
    assert (study / "scores" / "metrics.json").exists()


def test_linear_probe_without_logits(study: Path, capsys: pytest.CaptureFixture[str]):
    common = [str(study / "bare.h5"), "--cohort", str(study / "cohort.csv"), "--split", "test"]
    with pytest.raises(ValueError, match="--linear-probe"):
        run(*common)
    assert run(*common, "--linear-probe", "--tasks", "subtype", "genes=EGFR,TP53", "--bootstrap", "0") == 0
    table = {tuple(line.split()[:3]): line.split() for line in capsys.readouterr().out.splitlines()}
    assert float(table["subtype", "auc", _third(table, "subtype", "auc")][2]) > 0.9
    egfr = float(table["genes", "EGFR", "auc"][3])
    tp53 = float(table["genes", "TP53", "auc"][3])
    assert egfr > 0.9
    assert tp53 < 0.8


def test_values_that_mean_missing_and_training_slides_are_said(
    study: Path, capsys: pytest.CaptureFixture[str]
):
    table = study / "ns.csv"
    lines = (study / "cohort.csv").read_text().splitlines()
    slide, case, _, *rest = lines[-1].split(",")
    table.write_text("\n".join([*lines[:-1], ",".join([slide, case, "NS", *rest])]) + "\n")
    common = [str(study / "pred.safetensors"), "--cohort", str(table), "--bootstrap", "0"]
    with pytest.raises(ValueError, match="'NS'"):
        run(*common, "--split", "test")
    assert run(*common, "--split", "test", "--missing", "NS") == 0
    assert "train split" not in capsys.readouterr().err
    assert run(*common, "--missing", "NS", "--allow-missing") == 0
    assert "40 of these slides are in the train split" in capsys.readouterr().err
    lines.append("unseen,C99,x,,,train")  # without prediction, so not judged
    table.write_text("\n".join(lines) + "\n")
    assert run(*common, "--allow-missing") == 0
    assert "40 of these slides" in capsys.readouterr().err


def _third(table: dict, task: str, metric: str) -> str:
    (key,) = [key for key in table if key[:2] == (task, metric)]
    return key[2]


def test_probe_judges_every_label_column_by_default(study: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        run(
            str(study / "bare.h5"),
            *("--cohort", str(study / "cohort.csv"), "--split", "test", "--linear-probe", "--bootstrap", "0"),
        )
        == 0
    )
    out = capsys.readouterr().out
    assert all(name in out for name in ("subtype", "EGFR", "TP53"))


def test_faults_are_named(study: Path):
    cohort = ["--cohort", str(study / "cohort.csv")]
    with pytest.raises(FileNotFoundError, match="gone"):
        run(str(study / "gone.h5"), *cohort)
    with pytest.raises(ValueError, match="'grade'"):
        run(str(study / "bare.h5"), *cohort, "--linear-probe", "--split", "test", "--tasks", "grade")
    with pytest.raises(ValueError, match="--split val or test"):
        run(str(study / "bare.h5"), *cohort, "--linear-probe")  # would judge the slides it was fitted on
    with pytest.raises(ValueError, match="'stage'"):
        run(str(study / "pred.safetensors"), *cohort, "--tasks", "stage")
