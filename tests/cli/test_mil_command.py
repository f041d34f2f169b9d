"""dre-fast mil and mil-deploy: a folder of features and a table to scores, and what they refuse."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dre_fast.cli import main
from dre_fast.data.cohort import Cohort, Task
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.train.mil_files import load_mil
from mil_study import write_bag, write_study, write_table

SMALL = [
    *("--codewords", "6", "--width", "32", "--head", "light", "--epochs", "12", "--lr", "3e-3"),
    *("--batch-size", "8", "--bootstrap", "200"),
]
TASK = ["--tasks", "label"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("command")
    write_study(root)
    write_study(root / "other", cases=12, first=100, seed=1)
    return root


@pytest.fixture(scope="module")
def cv(study: Path) -> Path:
    """A cross-validation of three folds."""
    out = study / "cv"
    assert mil(study, out, *TASK, "--folds", "3") == 0
    return out


def mil(study: Path, out: Path, *more: str) -> int:
    return main(["mil", str(study / "features"), str(study / "labels.csv"), "--out", str(out), *SMALL, *more])


def deploy(run: Path, root: Path, out: Path, *more: str) -> int:
    return main(["mil-deploy", str(run), str(root / "features"), "--out", str(out), *more])


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_two_commands_of_a_new_user(study, tmp_path):
    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dre_fast.cli", *words],
            cwd=study,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = str(tmp_path / "cv")
    rows = read(study / "labels.csv")
    write_table(tmp_path / "clam.csv", [{k: r[k] for k in ("case_id", "slide_id", "label")} for r in rows])
    said = run("mil", "features", str(tmp_path / "clam.csv"), "--out", out, *SMALL, "--folds", "3")
    auc = next(r for r in read(tmp_path / "cv" / "scores.csv") if r["metric"] == "auc")
    assert float(auc["pooled"]) > 0.85
    assert float(auc["low"]) <= float(auc["pooled"]) <= float(auc["high"])
    assert {"fold 0", "fold 1", "fold 2", "mean", "sd"} <= set(auc)
    assert "pooled" in said
    assert "calibration.png" in said
    said = run(
        "mil-deploy", out, "other/features", "--labels", "other/labels.csv", "--out", str(tmp_path / "d")
    )
    assert "averaged" in said
    assert float(read(tmp_path / "d" / "scores.csv")[0]["averaged"]) > 0.85


def test_files_of_a_cross_validation(study, cv):
    cohort = Cohort.read(cv / "folds.csv", require_path=False)
    assert len(cohort) == 64
    rows = read(cv / "predictions.csv")
    assert {row["slide_id"]: int(row["fold"]) for row in rows} == {r.slide_id: r.fold for r in cohort}
    pooled = SlideEmbeddings.load(cv / "out_of_fold.safetensors")
    chance = pooled.logits["label"].sigmoid()[:, 0].tolist()
    assert [float(row["p_label"]) for row in rows] == pytest.approx(chance, abs=1e-5)
    assert [row["label_label"] for row in rows] == [cohort[row["slide_id"]].labels["label"] for row in rows]
    assert float(read(cv / "calibration.csv")[0]["ece"]) <= 1
    for fold in range(3):
        trained = load_mil(cv / f"fold-{fold}")
        assert trained.tasks == [Task("label", "binary")]
        history = read(cv / f"fold-{fold}" / "history.csv")
        best = max(history, key=lambda row: float(row["val_score"]))
        assert int(best["epoch"]) == trained.epoch
    assert json.loads((cv / "settings.json").read_text())["codewords"] == 6
    costs = [json.loads((cv / f"fold-{fold}" / "cost.json").read_text()) for fold in range(3)]
    whole = json.loads((cv / "cost.json").read_text())
    assert whole["hours"] == pytest.approx(sum(cost["hours"] for cost in costs), rel=2e-3)
    assert whole["tiles_are"] == "stored"
    assert whole["seconds_per_10k_tiles"] > 0
    assert not [file for file in cv.rglob("*") if file.suffix in (".pt", ".pkl", ".pickle")]


def test_two_runs_and_a_resumed_one_are_the_same(study, cv, tmp_path):
    assert mil(study, tmp_path / "a", *TASK, "--folds", "3") == 0
    for name in ("scores.csv", "predictions.csv", "folds.csv", "bags.csv", "fold-1/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (cv / name).read_bytes(), name
    for gone in ("fold-1/predictions.safetensors", "fold-1/model.safetensors", "scores.csv"):
        (tmp_path / "a" / gone).unlink()
    assert mil(study, tmp_path / "a", *TASK, "--resume") == 0
    for name in ("scores.csv", "predictions.csv", "fold-1/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (cv / name).read_bytes(), name


def test_a_resumed_run_keeps_cohort_settings_and_bags(study, cv, tmp_path, capsys):
    def refused(message: str, *more: str, root: Path = tmp_path) -> None:
        assert mil(root, tmp_path / "cv", *TASK, *more) == 2
        assert message in capsys.readouterr().err

    shutil.copytree(study / "features", tmp_path / "features")
    shutil.copytree(cv, tmp_path / "cv")
    rows = read(study / "labels.csv")
    write_table(tmp_path / "labels.csv", rows)
    refused("already holds a run: pass --resume")
    refused("lr was 0.003 when it began and is 0.5 now", "--resume", "--lr", "0.5")
    refused("holds 3 folds, not the 4 asked for", "--resume", "--folds", "4")
    rows[3]["label"] = "tumor" if rows[3]["label"] == "normal" else "normal"
    write_table(tmp_path / "labels.csv", rows)
    refused(f"slide {rows[3]['slide_id']!r}, column 'label'", "--resume")
    write_table(tmp_path / "labels.csv", rows[1:])
    refused("has no row", "--resume")
    refused("only in the cohort that the folds were made of", "--resume", "--skip-missing")
    write_table(tmp_path / "labels.csv", read(study / "labels.csv"))
    write_bag(tmp_path / "features", "P003-1", np.ones((9, 16), np.float32))
    refused("the features of slide 'P003-1' are not those", "--resume")


def test_one_model_on_given_splits(study, tmp_path, capsys):
    rows = read(study / "labels.csv")
    for row in rows:
        number = int(row["case_id"][1:])
        row["split"] = "train" if number < 28 else "val" if number < 36 else "test"
    rows[-1]["split"] = ""
    table = write_table(tmp_path / "splits.csv", rows)
    command = ["mil", str(study / "features"), str(table), *TASK, *SMALL]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    assert "one model" in capsys.readouterr().err
    auc = read(tmp_path / "one" / "scores.csv")[0]
    assert auc["metric"] == "auc"
    assert float(auc["value"]) > 0.85
    assert (
        int(auc["samples"])
        == sum(row["split"] == "test" for row in rows)
        == len(read(tmp_path / "one" / "predictions.csv"))
    )
    assert rows[-1]["slide_id"] not in Cohort.read(tmp_path / "one" / "splits.csv", require_path=False)
    assert deploy(tmp_path / "one", study / "other", tmp_path / "d") == 0
    assert len(read(tmp_path / "d" / "predictions.csv")) == len(read(study / "other" / "labels.csv"))

    def refused(message: str, *more: str) -> None:
        write_table(table, rows)
        assert main([*command, "--out", str(tmp_path / "two"), *more]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "two").exists()

    refused("--resume is of a cross-validation", "--resume")
    rows[1]["split"] = "test"  # the second slide of P000, whose first is in train
    refused("case 'P000' is in two splits: slide 'P000-0' in 'train'")
    rows[1]["split"] = "train"
    for row in rows:
        row["fold"] = "0" if row["split"] == "train" else "1"
    refused("has both a column 'split' and a column 'fold'")


def test_splits_of_clam(study, tmp_path, capsys):
    parts = {"train": [], "val": [], "test": []}
    for row in read(study / "labels.csv"):
        number = int(row["case_id"][1:])
        parts["train" if number < 28 else "val" if number < 36 else "test"].append(row["slide_id"])
    lines = [
        {"": i, **{name: (slides[i : i + 1] or [""])[0] for name, slides in parts.items()}}
        for i in range(len(parts["train"]))
    ]
    table = write_table(tmp_path / "splits_0.csv", lines)
    assert mil(study, tmp_path / "one", *TASK, "--splits", str(table)) == 0
    frozen = Cohort.read(tmp_path / "one" / "splits.csv", require_path=False)
    assert {name: [r.slide_id for r in frozen.subset(name).records] for name in parts} == parts
    assert len(read(tmp_path / "one" / "predictions.csv")) == len(parts["test"])
    lines[0]["test"] = "P000-1"  # its patient's other slide is in train
    lines[1]["train"] = ""
    write_table(table, lines)
    assert mil(study, tmp_path / "two", *TASK, "--splits", str(table)) == 2
    assert "case 'P000' is in two splits" in capsys.readouterr().err
    assert mil(study, tmp_path / "two", *TASK, "--splits", str(table), "--folds", "3") == 2
    assert "give one of them" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_leaks_between_folds_are_refused(study, tmp_path, capsys):
    shutil.copytree(study / "features", tmp_path / "features")
    rows = [{**row, "fold": int(row["case_id"][1:]) % 3} for row in read(study / "labels.csv")]
    command = ["mil", str(tmp_path / "features"), str(tmp_path / "labels.csv"), *TASK, *SMALL]

    def refused(message: str) -> None:
        write_table(tmp_path / "labels.csv", rows)
        assert main([*command, "--out", str(tmp_path / "cv")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "cv").exists()

    rows[1]["fold"] = 1
    refused("case 'P000' is in two folds")
    rows[1]["fold"] = 0
    (tmp_path / "features" / "P001-0.h5").unlink()
    (tmp_path / "features" / "P001-0.h5").symlink_to(tmp_path / "features" / "P000-0.h5")
    refused("are the same file")
    (tmp_path / "features" / "P001-0.h5").unlink()
    shutil.copy(tmp_path / "features" / "P000-0.h5", tmp_path / "features" / "P001-0.h5")
    refused("hold the same features")
    shutil.copy(study / "features" / "P001-0.h5", tmp_path / "features" / "P001-0.h5")
    for row in rows:
        row["report"] = ""
    rows[0]["report"] = rows[2]["report"] = "Adenocarcinoma of the left lung."
    refused("have the same report")


def test_deploy_refuses_what_the_models_have_seen(study, cv, tmp_path, capsys):
    shutil.copytree(study / "other" / "features", tmp_path / "features")
    rows = read(study / "other" / "labels.csv")

    def refused(message: str) -> None:
        table = write_table(tmp_path / "labels.csv", rows)
        assert deploy(cv, tmp_path, tmp_path / "d", "--labels", str(table)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "d").exists()

    rows[4]["label"] = "unclear"
    refused("task 'label': 'unclear' is neither yes nor no")
    rows[4]["label"], case = "normal", rows[4]["case_id"]
    rows[4]["case_id"] = "P002"
    refused("case 'P002' is in")
    rows[4]["case_id"] = case
    shutil.copy(study / "features" / "P001-0.h5", tmp_path / "features" / f"{rows[4]['slide_id']}.h5")
    refused("holds the same features as slide 'P001-0'")
    write_bag(tmp_path / "features", rows[4]["slide_id"], np.ones((4, 16), np.float32))
    table = write_table(tmp_path / "labels.csv", rows)
    assert deploy(cv, tmp_path, tmp_path / "d", "--labels", str(table), "--level", "patient") == 0
    found = SlideEmbeddings.load(tmp_path / "d" / "averaged.safetensors")
    parts = [
        SlideEmbeddings.load(tmp_path / "d" / f"fold-{i}.safetensors").logits["label"].sigmoid()
        for i in range(3)
    ]
    assert found.logits["label"].sigmoid().allclose(sum(parts) / 3, atol=1e-6)
    assert int(read(tmp_path / "d" / "scores.csv")[0]["samples"]) == 12


def test_deploy_overwrites_neither_a_run_nor_other_predictions(study, cv, tmp_path, capsys):
    before = {file.name: file.read_bytes() for file in cv.iterdir() if file.is_file()}
    assert deploy(cv, study / "other", cv) == 2
    assert "already holds a run of `dre-fast mil` (folds.csv); name another folder" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in cv.iterdir() if file.is_file()} == before
    labels = str(study / "other" / "labels.csv")
    assert deploy(cv, study / "other", tmp_path / "d", "--labels", labels, "--bootstrap", "0") == 0
    assert deploy(cv, study / "other", tmp_path / "d") == 2  # scores.csv would be of other predictions
    assert "already holds predictions of `dre-fast mil-deploy`" in capsys.readouterr().err


def test_deploy_of_an_unfinished_run_and_of_none(cv, study, tmp_path, capsys):
    shutil.copytree(cv, tmp_path / "cv")
    (tmp_path / "cv" / "fold-2" / "model.safetensors").unlink()
    assert deploy(tmp_path / "cv", study / "other", tmp_path / "d") == 2
    assert "fold 2 has no model yet" in capsys.readouterr().err
    assert deploy(study, study / "other", tmp_path / "d") == 2
    assert "no run of `dre-fast mil` there" in capsys.readouterr().err


def test_survival_and_a_panel_by_patient(study, tmp_path):
    more = [
        "--tasks",
        "genes=gene,dead",
        "--survival",
        "os=months,dead",
        "--level",
        "patient",
        "--balance",
        "inverse",
    ]
    assert mil(study, tmp_path / "cv", *more, "--folds", "3", "--val", "none", "--amp", "bf16") == 0
    found = {(row["task"], row["column"], row["metric"]): row for row in read(tmp_path / "cv" / "scores.csv")}
    assert float(found["os", "", "c-index"]["pooled"]) > 0.6
    assert int(found["os", "", "c-index"]["samples"]) == 48
    assert int(found["genes", "gene", "auc"]["samples"]) == 38  # ten patients without it


def test_patients_with_two_labels_are_said_before_training(study, tmp_path, capsys):
    assert mil(study, tmp_path / "cv", "--tasks", "chance", "--level", "patient") == 2
    assert "different labels" in capsys.readouterr().err
    assert not (tmp_path / "cv").exists()


def test_faults_of_tables_are_said(study, tmp_path, capsys):
    def refused(message: str, *more: str) -> None:
        assert mil(study, tmp_path / "cv", *more) == 2
        assert message in capsys.readouterr().err

    refused("name what to learn with --tasks")
    refused("no label column 'grade'", "--tasks", "grade")
    refused("column 'months', task 'panel': ", "--tasks", "panel=label,months")
    refused("no label column holds WT", "--negative", "WT", *TASK)
    refused("at least 2", "--folds", "1", *TASK)


def test_a_word_for_unknown_becomes_no_class(study, tmp_path, capsys):
    rows = read(study / "labels.csv")
    rows[3]["label"], rows[5]["label"], rows[4]["gene"] = "nan", "Unknown", "unknown"
    table = write_table(tmp_path / "labels.csv", rows)
    command = ["mil", str(study / "features"), str(table), "--out", str(tmp_path / "cv"), *SMALL]
    assert main([*command, *TASK]) == 2
    said = capsys.readouterr().err
    assert f"column 'label': 'Unknown' and 'nan' (2 of {len(rows)} slides) would be classes" in said
    assert "--missing 'Unknown' 'nan'" in said
    assert main([*command, "--tasks", "gene"]) == 2  # 0, 1 and a word: no third class either
    assert "column 'gene': 'unknown'" in capsys.readouterr().err
    rows[3]["label"] = rows[5]["label"] = "normal"
    rows[0]["case_id"] = rows[1]["case_id"] = "NaN"
    write_table(table, rows)
    assert main([*command, *TASK]) == 2
    assert "row 2, column 'case_id': 'NaN' stands for a missing value" in capsys.readouterr().err
    assert not (tmp_path / "cv").exists()


def test_one_kind_of_label_is_nothing_to_learn(study, tmp_path, capsys):
    rows = [{**row, "label": "tumor"} for row in read(study / "labels.csv")]
    table = write_table(tmp_path / "labels.csv", rows)
    assert main(["mil", str(study / "features"), str(table), "--out", str(tmp_path / "cv"), *TASK]) == 2
    assert "needs slides of both kinds, and all say 'tumor'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_said_before_bags_are_read(study, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("dre_fast.eval.mil.open_bags", None)
    assert mil(study, tmp_path / "file" / "cv", *TASK) == 2
    assert f"{tmp_path / 'file'} is no folder" in capsys.readouterr().err
    monkeypatch.setattr("dre_fast.data.files.os.access", lambda *_: False)
    assert mil(study, tmp_path / "cv", *TASK) == 2
    assert f"{tmp_path} may not be written into" in capsys.readouterr().err


def test_a_fold_without_labels_to_learn_from_is_said_before_bags_are_read(
    study, tmp_path, capsys, monkeypatch
):
    rows = read(study / "labels.csv")
    for row in rows:
        row["gene"] = {"P001": "1", "P002": "0"}.get(row["case_id"], "")
        row["fold"] = 0 if row["gene"] else 1 + int(row["case_id"][1:]) % 2
    table = write_table(tmp_path / "labels.csv", rows)
    monkeypatch.setattr("dre_fast.eval.mil.open_bags", None)
    command = ["mil", str(study / "features"), str(table), "--out", str(tmp_path / "cv"), "--tasks", "gene"]
    assert main(command) == 2
    assert (
        "fold 0: task 'gene', column 'gene': no training slide has a label; label" in capsys.readouterr().err
    )
