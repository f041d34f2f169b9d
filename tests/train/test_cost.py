"""What a run took, from its log; written and said at the end, the same after a resume."""

from __future__ import annotations

import json

import pytest
import torch
from train_cohort import interrupt, tiny_config

from dre_fast.train.cost import cost_of
from dre_fast.train.loop import Trainer
from dre_fast.train.state import read_metrics


def test_sums_and_means() -> None:
    log = [
        {"kind": "prefill", "seconds": 1800.0, "tiles": 30_000},
        {"kind": "step", "seconds": 2.0, "tiles": 32},
        {"kind": "step", "seconds": 4.0, "tiles": 28},
        {"kind": "epoch", "seconds": 1794.0},
    ]
    cost = cost_of(log, [10_000, 20_000], torch.device("cpu"), processes=4, peak=3 * 10**9)
    assert cost.hours == 1.0
    assert cost.device_hours == 4.0
    assert cost.peak_gb == 3.0
    assert cost.seconds_per_slide == 3.0
    assert cost.seconds_per_10k_tiles == 2.0
    assert cost.tiles_per_second == 10.0
    assert "4 device hours (4 x " in cost.line()
    assert "peak 3 GB, 3 s a slide, 2 s per 10,000 tiles" in cost.line()


def test_a_run_says_and_keeps_it(tiny_cohort, tmp_path, capsys) -> None:
    config = tiny_config(tiny_cohort, "optim.epochs=2")
    interrupt(config, tmp_path / "run", 3)
    assert not (tmp_path / "run" / "cost.json").exists()
    Trainer(config, tmp_path / "run", resume=True).fit()
    kept = json.loads((tmp_path / "run" / "cost.json").read_text())
    log = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert kept["hours"] * 3600 == pytest.approx(sum(row.get("seconds", 0) for row in log), rel=1e-3)
    assert 0.05 < kept["peak_gb"] < 50
    assert kept["processes"] == 1
    assert "cost: " in capsys.readouterr().err
