"""dre-fast compare: two tiny runs against each other, as figures, tables and a page."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from train_cohort import tiny_config, write_cohort

from dre_fast.cli import main
from dre_fast.eval import compare_figures
from dre_fast.eval.compare import Run, read_runs, result_grid, results, settings_grid
from dre_fast.train.config import Config
from dre_fast.train.loop import Trainer
from dre_fast.train.state import read_metrics


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cohort, and two runs on it, full and exact, with predictions of every slide."""
    root = tmp_path_factory.mktemp("runs")
    (root / "cohort").mkdir()
    table = write_cohort(root / "cohort", side=64, reports=False)
    alone = ("loss.contrastive=null", "data.reports=null", "optim.epochs=2", "run.threads=0")
    for mode, probe in (("full", "run.probe_every=2"), ("exact", "optim.lr=0.01")):
        Trainer(tiny_config(root / "cohort", *alone, f"memory.mode={mode}", probe), root / mode).fit()
        found = [
            "--tiles",
            str(root / "cohort" / "tiles"),
            "--mpp",
            "1.0",
            "--out",
            str(root / mode / "predictions.h5"),
        ]
        assert main(["encode", str(root / mode), "--cohort", str(table), *found]) == 0
    return root


def table(file: Path) -> dict[str, dict[str, str]]:
    with open(file, newline="") as opened:
        return {next(iter(row.values())): row for row in csv.DictReader(opened)}


def test_figures_tables_and_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    both = [str(runs / "full"), str(runs / "exact")]
    judged = ["--cohort", str(runs / "cohort" / "cohort.csv"), "--split", "val", "--bootstrap", "50"]
    assert main(["compare", *both, "--out", str(tmp_path), *judged]) == 0
    said = capsys.readouterr().out
    for name in ("loss", "validation", "memory", "speed"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png") == 4
    assert "optim.lr" in page
    settings = table(tmp_path / "settings.csv")
    assert set(settings) == {"memory.mode", "optim.lr", "run.probe_every"}
    assert (settings["memory.mode"]["full"], settings["memory.mode"]["exact"]) == ("full", "exact")
    found = table(tmp_path / "results.csv")
    log = read_metrics(runs / "full" / "metrics.jsonl")
    scores = [line["val_score"] for line in log if line["kind"] == "epoch"]
    assert float(found["val_score"]["full"]) == pytest.approx(max(scores), rel=1e-5)
    assert int(found["best epoch"]["full"]) == 1 + scores.index(max(scores))
    seconds = sum(line.get("seconds", 0) for line in log)
    assert float(found["minutes in all"]["full"]) == pytest.approx(seconds / 60, rel=1e-4)
    assert 0 < float(found["cosine of the gradient with the exact"]["full"]) <= 1.0001
    assert found["cosine of the gradient with the exact"]["exact"] == ""
    (pair,) = [
        row
        for row in csv.DictReader((tmp_path / "paired.csv").read_text().splitlines())
        if row["task"] == "kind"
    ]
    assert (pair["A"], pair["B"], pair["slides"]) == ("full", "exact", "4")
    assert float(pair["A - B"]) == pytest.approx(float(pair["AUC of A"]) - float(pair["AUC of B"]), abs=1e-5)
    for title in ("Results", "Settings that differ", "Paired differences"):
        assert title in said


def test_tiles_of_a_step_are_those_with_gradient(runs: Path):
    full, exact = read_runs([runs / "full", runs / "exact"])
    # two slides a step: of 64 px, so of four tiles of 32 px, all of them live in both modes
    for run in (full, exact):
        assert {line["tiles"] for line in run.logs[0] if line["kind"] == "step"} == {2 * 4}
    begun = [line for line in exact.logs[0] if line["kind"] != "epoch"]
    steps = [line for line in begun if line["kind"] == "step"]
    rate = sum(line["tiles"] for line in steps) / sum(line["seconds"] for line in steps)
    assert results(begun)["live tiles/s"] == pytest.approx(rate)
    assert "val_score" not in results(begun)


def test_folds_of_a_cross_validation_count_as_one(runs: Path, tmp_path: Path):
    for fold, mode in ((0, "full"), (10, "exact"), (2, "exact")):
        shutil.copytree(runs / mode, tmp_path / "cv" / f"fold-{fold}")
    shutil.copy(runs / "full" / "config.yaml", tmp_path / "cv" / "config.yaml")
    shutil.copy(runs / "full" / "predictions.h5", tmp_path / "cv" / "out_of_fold.h5")
    cv, full, exact = read_runs([tmp_path / "cv", runs / "full", runs / "exact"])
    assert len(cv.logs) == 3
    assert cv.predictions == tmp_path / "cv" / "out_of_fold.h5"
    row = next(row for row in result_grid([cv, full, exact]).rows if row[0] == "val_loss")
    assert row[1] == pytest.approx((row[2] + 2 * row[3]) / 3)
    assert settings_grid([cv, full]).rows == []


def test_names_tell_runs_apart(runs: Path, tmp_path: Path):
    shutil.copytree(runs / "full", tmp_path / "other" / "full")
    assert [run.name for run in read_runs([runs / "full", tmp_path / "other" / "full"])] == [
        f"{runs.name}/full",
        "other/full",
    ]
    with pytest.raises(ValueError, match="named twice"):
        read_runs([runs / "full", runs / "cohort" / ".." / "full"])


def test_faults_and_gaps_are_said(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compare_figures, "draw_comparison", lambda out, runs: [])  # drawn above

    def call(*words: str) -> tuple[int, str]:
        code = main(["compare", *words, "--out", str(tmp_path / "out")])
        return code, capsys.readouterr().err

    cohort = ["--cohort", str(runs / "cohort" / "cohort.csv")]
    assert "holds no training run" in call(str(runs / "cohort"))[1]
    assert "one a run" in call(str(runs / "full"), *cohort, "--predictions", "a.h5", "b.h5")[1]
    shutil.copytree(runs / "full", tmp_path / "bare")
    (tmp_path / "bare" / "predictions.h5").unlink()
    code, said = call(str(runs / "full"), str(tmp_path / "bare"), *cohort)
    assert code == 0
    assert f"{tmp_path / 'bare'} holds no predictions" in said
    assert "two runs with predictions" in said
    assert "train split" in said
    (tmp_path / "bare" / "config.yaml").write_text("model: {depht: 3}\n")
    assert str(tmp_path / "bare" / "config.yaml") in call(str(tmp_path / "bare"))[1]


def test_panels_name_a_task_as_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"kind": "epoch", "epoch": 0, "val_c_index_os_h": 0.6, "val_auc_kind": 0.7, "val_loss_os_h": 2.0}
    drawn: list[compare_figures.Panel] = []

    def keep(file: Path, panels: list[compare_figures.Panel], names: list[str]) -> Path:
        drawn.extend(panels)
        return file

    monkeypatch.setattr(compare_figures, "_draw", keep)
    compare_figures.draw_comparison(tmp_path, [Run("a", tmp_path, Config(), ([line],), None)])
    found = {panel.title: panel.level for panel in drawn}
    assert found == {"c-index: os_h": 0.5, "AUC: kind": 0.5, "loss: os_h": None}
