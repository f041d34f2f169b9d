"""The page about a run: what stands on it, with slides and scores, and what the end of a run writes by itself."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from train_cohort import tiny_config, write_cohort

from dre_fast.cli import main
from dre_fast.cli.report import some_slides
from dre_fast.data.cohort import Cohort, SlideRecord, Task
from dre_fast.eval.colours import distinct_colours, to_lab
from dre_fast.eval.run_report import write_report
from dre_fast.train.explain import explain, label_of
from dre_fast.train.inference import load_run
from dre_fast.train.loop import Trainer
from dre_fast.train.state import read_metrics


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cohort/ and run/, which wrote its own report."""
    root = tmp_path_factory.mktemp("report")
    (root / "cohort").mkdir()
    write_cohort(root / "cohort", side=64)
    settings = ("optim.epochs=2", "run.pictures=true", "run.probe_every=2", "optim.lr=0.002")
    Trainer(tiny_config(root / "cohort", *settings), root / "run").fit()
    return root


def cells(page: str, title: str) -> list[list[str]]:
    """The table under a headline: header and rows."""
    table = page.split(f"<h3>{title}</h3>")[1].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_the_end_of_a_run_writes_it(trained: Path) -> None:
    page = (trained / "run" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", page)
    assert [link for link in re.findall(r'(?:src|href)="(.{6})', page) if link[0] != "#"] == ["data:i"] * 4
    split, train, val = cells(page, "Slides")
    assert dict(zip(split, train)) == {
        **{"split": "train", "slides": "6", "cases": "6", "with a report": "6", "tiles": "24"},
        **{"fewest a slide": "4", "median a slide": "4", "most a slide": "4"},
    }
    assert val[:2] == ["val", "4"]
    labels = {tuple(row[:-2]): row[-2:] for row in cells(page, "Labels, slides")[1:]}
    assert labels["kind", "dots"] == ["3", "2"]
    assert labels["EGFR", "yes"] == ["2", "1"]  # s2, s5 of train, s8 of val
    assert labels["EGFR", "not labelled"] == ["2", "2"]
    settings = {row[0]: row[1:] for row in cells(page, "Settings that are not at their defaults")[1:]}
    assert settings["optim.lr"] == ["0.002", "0.001"]
    assert "optim.weight_decay" not in settings
    log = [row for row in read_metrics(trained / "run" / "metrics.jsonl") if row["kind"] == "epoch"]
    best = max(log, key=lambda row: row["val_score"])
    header, *scores = cells(page, "Scores on the validation slides")
    assert header[1] == f"epoch {best['epoch'] + 1}, kept"
    assert {row[0]: row[1] for row in scores}["AUC: kind"] == f"{best['val_auc_kind']:.3f}"
    cost = json.loads((trained / "run" / "cost.json").read_text())
    assert f"peak {cost['peak_gb']:.3g} GB" in page
    assert "ABMILX, ResNet-18" in page
    assert "one RTX 3090" in page
    assert "drift guard" in page
    assert "cosine of slide embedding" in page
    assert "Unseen slides" not in page


def test_with_scores_and_slides(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cohort, tiles = str(trained / "cohort" / "cohort.csv"), str(trained / "cohort" / "tiles")
    applied = ["--cohort", cohort, "--tiles", tiles, "--mpp", "1.0"]
    encoded = str(tmp_path / "val.safetensors")
    assert main(["encode", str(trained / "run"), *applied, "--split", "val", "--out", encoded]) == 0
    judge = ["--cohort", cohort, "--split", "val", "--bootstrap", "20", "--out", str(tmp_path / "scores")]
    assert main(["evaluate", encoded, *judge]) == 0
    capsys.readouterr()
    out = tmp_path / "page.html"
    wanted = ["--scores", str(tmp_path / "scores"), "--slides", "s9", "s6", "--out", str(out)]
    assert main(["report", str(trained / "run"), *wanted]) == 0  # of the run's own cohort
    assert capsys.readouterr().out.strip() == str(out)
    page = out.read_text(encoding="utf-8")
    with open(tmp_path / "scores" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = cells(page, "Scores with bootstrap intervals by case")
    assert len(shown) == 1 + len(rows)
    assert f"{float(rows[0]['value']):.3f}" in shown[1]
    assert [row[0] for row in cells(page, "Calibration")[1:]] == ["EGFR", "kind"]
    assert page.count("data:image/jpeg") == 2 * 2 + 1  # two maps a slide, one sheet of codewords
    for caption in ("s9: each tile in the colour", "s6: what each tile adds", "these 2 slides nearest"):
        assert caption in page


def test_an_older_run_and_one_that_has_just_begun(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "a")
    for name in ("data.json", "cost.json", "staleness.png"):
        (tmp_path / "a" / name).unlink()
    page = write_report(tmp_path / "a").read_text(encoding="utf-8")
    assert "before runs kept counts" in page
    assert 'href="#s5"' not in page  # Data, Settings, Training, Memory bank, Validation: no Cost
    log = tmp_path / "a" / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))  # pre-fill and codebook
    assert "No step has been taken yet" in write_report(tmp_path / "a").read_text(encoding="utf-8")


def test_faults_are_named(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert main(["report", *words]) == 2
        return capsys.readouterr().err

    run = str(trained / "run")
    assert "holds no training run" in said(str(trained / "cohort"))
    assert "holds no metrics.json" in said(run, "--scores", str(tmp_path))
    (tmp_path / "metrics.json").write_text('[{"task": 1}]')
    assert "metrics.json: not a table of scores" in said(run, "--scores", str(tmp_path))
    assert "s77" in said(run, "--slides", "s77")
    assert "no task 'grade'" in said(run, "--slides", "s1", "--task", "grade")
    shutil.copytree(trained / "run", tmp_path / "cv" / "fold-0")
    shutil.copy(trained / "run" / "config.yaml", tmp_path / "cv")
    assert "holds a cross-validation" in said(str(tmp_path / "cv"))


def test_slides_are_chosen_of_each_label() -> None:
    labels = [None, "a", "a", "a", "b", "b", None]
    records = [SlideRecord(f"s{i}", f"c{i}", labels={"y": y}, split="test") for i, y in enumerate(labels)]
    cohort = Cohort([*records, SlideRecord("t", "t", labels={"y": "b"}, split="train")], "table")
    assert list(some_slides(cohort, Task("y"))) == ["s1", "s2", "s4", "s5"]
    assert list(some_slides(cohort, None)) == ["s0", "s1", "s2", "s3"]


def test_probability_and_label_of_a_map(trained: Path) -> None:
    loaded = load_run(trained / "run")
    features = torch.nn.functional.normalize(torch.randn(9, loaded.model.bank.dim), dim=1)
    kind, gene = loaded.tasks
    with torch.no_grad():
        logits = loaded.model.encode_bags(features).logits
    for i, name in enumerate(kind.classes):
        found = explain(loaded, features, kind, name)
        assert found.probability == pytest.approx(float(logits["kind"].softmax(1)[0, i]), abs=1e-5)
        assert found.score == f"probability {found.probability:.2f}"
    assert explain(loaded, features, gene).probability == pytest.approx(
        float(logits["EGFR"].sigmoid()), abs=1e-5
    )
    record = SlideRecord(
        "s", "c", labels={"kind": "dots", "EGFR": None, "TP53": "1", "os": "12", "dead": "0"}
    )
    assert label_of(record, kind, "stripes") == "label dots"
    assert label_of(record, gene, "EGFR") == "not labelled"
    panel = Task("genes", "multilabel", columns=("EGFR", "TP53"))
    assert label_of(record, panel, "TP53") == "label 1"
    assert label_of(record, Task("t", "survival", columns=("os", "dead")), "risk") == "label 12, 0"


@pytest.mark.parametrize(("count", "apart"), [(8, 0.2), (16, 0.12), (64, 0.06)])
def test_colours_can_be_told_apart(count: int, apart: float) -> None:
    colours = distinct_colours(count)
    assert np.array_equal(colours[:8], distinct_colours(8))
    lab = to_lab(colours)
    distance = np.sqrt(((lab[:, None] - lab[None]) ** 2).sum(-1)) + 9 * np.eye(count)
    assert distance.min() > apart
    white, black = to_lab(np.array([[1.0, 1, 1], [0, 0, 0]]))
    np.testing.assert_allclose(white, [1, 0, 0], atol=1e-4)
    np.testing.assert_allclose(black, 0, atol=1e-6)


def test_more_colours_than_there_are() -> None:
    many = distinct_colours(5000)
    assert many.shape == (5000, 3)
    assert distinct_colours(0).shape == (0, 3)
