"""Cohorts that are odd but real: empty and tiny slides, batches of one, no reports, one patient only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_cohort import TILE, assert_resumes, tiny_config, write_cohort

from dre_fast.data.cohort import Task
from dre_fast.data.coords import write_coords
from dre_fast.data.slides import open_slide
from dre_fast.data.tiling import tile_slide
from dre_fast.train.inference import judge_epoch
from dre_fast.train.loop import Trainer
from dre_fast.train.state import read_metrics

MODES = ["full", "sampled", "none", "exact"]


def steps(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "step"]


def shrink(root: Path, slide: int, tiles: int) -> None:
    """Make a slide of the cohort one of so many tiles in a row; 0: its file of coordinates lists none."""
    pixels = np.random.default_rng(slide).integers(90, 150, (TILE, max(tiles, 1) * TILE, 3)).astype(np.uint8)
    np.save(root / f"s{slide}.npy", pixels)
    mask = None if tiles else np.zeros((1, 1), dtype=bool)
    with open_slide(root / f"s{slide}.npy", mpp=1.0) as opened:
        tiling = tile_slide(
            opened,
            tile_size=TILE,
            mpp=1.0,
            tissue="none" if mask is None else mask,
            allow_empty=True,
        )
    assert len(tiling) == tiles
    write_coords(root / "tiles" / f"s{slide}.h5", tiling)


def test_a_slide_without_tiles_is_named_before_training(tmp_path: Path) -> None:
    write_cohort(tmp_path)
    shrink(tmp_path, 2, 0)
    with pytest.raises(ValueError, match=r"slide s2: .*s2\.h5 holds no tiles; take the slide out"):
        Trainer(tiny_config(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("mode", MODES)
def test_slides_with_fewer_tiles_than_are_live(tmp_path: Path, mode: str) -> None:
    write_cohort(tmp_path)
    shrink(tmp_path, 1, 1)
    shrink(tmp_path, 4, 3)
    config = tiny_config(
        tmp_path, f"memory.mode={mode}", "memory.retrieved=6", "memory.live=4", "optim.epochs=2"
    )
    trainer = Trainer(config, tmp_path / "run")
    trainer.fit()
    assert all(math.isfinite(row["loss"]) for row in steps(tmp_path / "run"))
    bank = trainer.model.bank
    for slide, tiles in ((1, 1), (4, 3)):
        assert (
            bank.ages(slide).tolist() == [int(bank.ages(slide).max())] * tiles
        )  # all live at the last visit
        assert int(bank.ages(slide).max()) > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("negatives", ["batch", "all"])
def test_batches_of_one_slide(tiny_cohort: Path, tmp_path: Path, mode: str, negatives: str) -> None:
    config = tiny_config(
        tiny_cohort,
        f"memory.mode={mode}",
        "memory.retrieved=6",
        f"loss.negatives={negatives}",
        "optim.batch_size=1",
        "optim.epochs=2",
    )
    out = Trainer(config, tmp_path / "run").fit()
    contrast = [row["loss_contrastive"] for row in steps(out)]
    assert len(contrast) == 12
    # alone, a slide has nothing to be told apart from; against all reports it has
    assert all(loss == 0 if negatives == "batch" else loss > 0 for loss in contrast)


@pytest.mark.parametrize("mode", MODES)
def test_a_cohort_without_reports(tmp_path: Path, mode: str) -> None:
    write_cohort(tmp_path, reports=False)
    config = tiny_config(
        tmp_path,
        "data.reports=null",
        "loss.contrastive=null",
        f"memory.mode={mode}",
        "memory.retrieved=6",
        "optim.epochs=2",
    )
    out = Trainer(config, tmp_path / "run").fit()
    rows = steps(out)
    assert all("loss_contrastive" not in row and row["temperature"] is None for row in rows)
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert (out / "best.safetensors").exists()


def test_a_cohort_of_one_case(tmp_path: Path) -> None:
    """All slides are positives of each other: the loss cannot go below log B, and pulls them together."""
    cohort = write_cohort(tmp_path)
    lines = cohort.read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    same = [",".join([row[0], "c0", *row[2:5], "train"]) for row in rows]
    cohort.write_text("\n".join([lines[0], *same]) + "\n")
    config = tiny_config(tmp_path, "data.val_split=null", "loss.tasks=[]", "optim.epochs=4")
    out = Trainer(config, tmp_path / "run").fit()
    found = [row["loss"] for row in steps(out)]
    assert all(math.log(2) - 1e-5 <= loss < math.inf for loss in found)
    assert np.mean(found[-5:]) < np.mean(found[:5])


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_resumes_as_it_was(tiny_cohort: Path, tmp_path: Path, mode: str) -> None:
    probe = f"run.probe_every={0 if mode == 'exact' else 3}"
    config = tiny_config(tiny_cohort, f"memory.mode={mode}", "memory.retrieved=6", probe)
    assert_resumes(config, tmp_path, step=4)


def test_the_validation_loss_is_that_of_the_run(tmp_path: Path) -> None:
    """Parts by their weights; a task that no validation slide has a label of is said, and has none."""
    cohort = write_cohort(tmp_path)
    lines = [line.split(",") for line in cohort.read_text().splitlines()]
    blind = [",".join([*line[:4], "" if line[5] == "val" else line[4], line[5]]) for line in lines]
    cohort.write_text("\n".join(blind) + "\n")
    tasks = "loss.tasks=[{name: kind, weight: 0.25}, {name: EGFR, kind: binary, weight: 3}]"
    config = tiny_config(tmp_path, tasks, "loss.contrastive_weight=0.5", "optim.epochs=1")
    with pytest.warns(UserWarning, match="task 'EGFR': no validation slide has a label"):
        out = Trainer(config, tmp_path / "run").fit()
    last = read_metrics(out / "metrics.jsonl")[-1]
    assert not [key for key in last if key.startswith("val_") and "EGFR" in key]
    total = 0.5 * last["val_loss_contrastive"] + 0.25 * last["val_loss_kind"]
    assert last["val_loss"] == pytest.approx(total)
    assert last["val_score"] == pytest.approx(last["val_auc_kind"] - 1e-3 * total / (1 + total))


def test_more_live_tiles_than_any_slide_has(tiny_cohort: Path, tmp_path: Path) -> None:
    """25 tiles a slide: a million live tiles are these, and take no room for the others."""
    losses = []
    for live in (25, 10**6):
        trainer = Trainer(
            tiny_config(tiny_cohort, f"memory.live={live}", "optim.epochs=1"), tmp_path / str(live)
        )
        losses.append([row["loss"] for row in steps(trainer.fit())])
        assert trainer.planner.plan(0).tiles.shape == (6, 25)
    assert losses[0] == losses[1]


def test_an_infinite_loss_leaves_the_score_a_number() -> None:
    task = Task("kind", "multiclass", ("a", "b"))
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found, score = judge_epoch(
        [task],
        {"kind": logits},
        {"kind": torch.tensor([0, 1])},
        lambda *_: torch.tensor(torch.inf),
        {"kind": 1.0},
    )
    assert score == pytest.approx(1 - 1e-3)
    assert found["val_loss"] == torch.inf
