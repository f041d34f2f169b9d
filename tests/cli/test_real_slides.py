"""The whole command line on real slides and real reports."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import pytest

from dre_fast.cli import main
from dre_fast.train.state import read_metrics

CASE = "TCGA-CR-7395"


@pytest.fixture
def cohort(test_data: Path, tmp_path: Path) -> Path:
    """Two real slides, each twice, a copy to validate on (so that there is something to contrast), real reports."""
    with open(test_data / "reports" / "tcga_reports.csv", newline="", encoding="utf-8") as file:
        texts = [(row["patient_filename"][:12], row["text"]) for row in csv.DictReader(file)]
    (tmp_path / "report.txt").write_text(texts[0][1], encoding="utf-8")
    slides = test_data / "slides"
    names = ("CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs")
    other = {name: shutil.copyfile(slides / name, tmp_path / name) for name in names}
    rows = [
        ("CMU-1-A", "cmu-a", slides / "CMU-1-Small-Region.svs", "report.txt", "skin", "1", "train"),
        (
            f"{CASE}-01A-01-TS1",
            "",
            slides / "TCGA-CR-7395-01A-01-TS1.svs",
            texts[1][1],
            "head",
            "WT",
            "train",
        ),
        ("CMU-1-B", "cmu-b", other["CMU-1-Small-Region.svs"], texts[2][1], "skin", "", "val"),
        ("TCGA-CR-7396-01A", "", other["TCGA-CR-7395-01A-01-TS1.svs"], texts[3][1], "head", "G12C", "val"),
    ]
    with open(tmp_path / "cohort.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "case_id", "path", "report", "site", "KRAS", "split"])
        writer.writerows(rows)
    return tmp_path


def command(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.slow
def test_tile_embed_train_encode_evaluate_heatmap(cohort, capsys):
    table, tiles, reports, run = (
        cohort / name for name in ("cohort.csv", "tiles", "reports.safetensors", "run")
    )
    assert command("tile", table, "--out", tiles) == 2
    message = capsys.readouterr().err
    assert "TCGA-CR-7395-01A-01-TS1" in message
    assert "--mpp" in message

    assert command("tile", table, "--out", tiles, "--mpp", 0.5) == 0
    assert command("embed-reports", table, "--out", reports) == 0
    settings = [
        f"data.cohort={table}",
        f"data.tiles={tiles}",
        f"data.reports={reports}",
        "data.mpp=0.5",
        "data.augment=false",
        "model.encoder=conv-tiny",
        "model.codewords=8",
        "model.width=32",
        "memory.live=8",
        "loss.tasks=[{name: site}, {name: KRAS, kind: multilabel}]",
        "optim.epochs=8",
        "optim.head_warmup_epochs=0",
        "optim.lr=3e-3",
        "optim.warmup_steps=1",
        "run.tensorboard=false",
        "run.validate_every=8",
    ]
    assert command("train", *settings, "--out", run) == 0
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "step"]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) < sum(losses[:3])

    predictions = cohort / "all.safetensors"
    assert (
        command("encode", run, "--cohort", table, "--tiles", tiles, "--mpp", 0.5, "--out", predictions) == 0
    )
    assert (
        command("evaluate", predictions, "--cohort", table, "--bootstrap", 50, "--out", cohort / "results")
        == 0
    )
    printed = capsys.readouterr().out
    assert "auc" in printed
    assert "KRAS" in printed
    maps = cohort / "maps"
    assert (
        command("heatmap", run, "--cohort", table, "--tiles", tiles, "--slide", "CMU-1-A", "--out", maps) == 0
    )
    assert {file.name for file in maps.iterdir()} >= {"CMU-1-A_codewords.png"}


def test_a_broken_slide_is_named_counted_and_skipped_only_on_request(test_data, tmp_path, capsys):
    slides = test_data / "slides"
    (tmp_path / "cohort.csv").write_text(
        "slide_id,path\n"
        f"good,{slides / 'CMU-1-Small-Region.svs'}\n"
        f"damaged,{slides / 'broken.svs'}\n"
        f"no-mpp,{slides / 'TCGA-CR-7395-01A-01-TS1.svs'}\n"
    )
    assert command("tile", tmp_path / "cohort.csv", "--out", tmp_path / "tiles") == 2
    assert "damaged" in capsys.readouterr().err
    assert command("tile", tmp_path / "cohort.csv", "--out", tmp_path / "tiles", "--skip-bad") == 0
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert "damaged" in text
    assert "no-mpp" in text
    assert "2" in text
    assert (tmp_path / "tiles" / "good.h5").exists()
    assert not (tmp_path / "tiles" / "damaged.h5").exists()
