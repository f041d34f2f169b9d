"""The drift guard: what it allows, what it does to a run, and that it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_cohort import assert_resumes, tiny_config

from dre_fast.train.config import ConfigError
from dre_fast.train.drift import DriftGuard
from dre_fast.train.loop import Trainer
from dre_fast.train.state import read_metrics

FAST = ("optim.head_warmup_epochs=0", "optim.warmup_steps=0", "memory.drift_tiles=24", "memory.drift_every=2")


def walk(guard: DriftGuard, speed: float, steps: int, cycle: float, *, march: bool, start: int = 0) -> float:
    """Features that move by ``speed * factor`` a step, straight on or at random; the furthest in one cycle."""
    generator = torch.Generator().manual_seed(start)
    at, path = torch.zeros(64, 8), [torch.zeros(64, 8)]
    guard.look(start, at, 1.0, cycle)
    direction = torch.nn.functional.normalize(torch.randn(64, 8, generator=generator), dim=1)
    for step in range(start, start + steps):
        if not march:
            direction = torch.nn.functional.normalize(torch.randn(64, 8, generator=generator), dim=1)
        at = at + speed * guard.factor * direction
        path.append(at)
        if guard.due(step):
            guard.look(step + 1, at, 1.0, cycle)
    ends = range(int(cycle), len(path))
    return max(float((path[e] - path[e - int(cycle)]).square().sum(1).mean().sqrt()) for e in ends)


@pytest.mark.parametrize("march", [True, False])
@pytest.mark.parametrize("speed", [0.05, 0.5, 5.0])
def test_features_stay_within_the_limit(speed: float, march: bool) -> None:
    """A march may overshoot while the guard finds out, by half at most; unguarded it would go 2.5 to 500 times as far."""
    furthest = walk(DriftGuard(1.0, every=5), speed, 400, 100.0, march=march)
    assert furthest < 1.5
    assert walk(DriftGuard(1e9, every=5), speed, 400, 100.0, march=march) > min(2.0, 8 * speed)


def test_slow_features_are_let_go() -> None:
    guard = DriftGuard(1.0, every=5)
    walk(guard, 0.0005, 200, 100.0, march=True)
    assert guard.factor == 1.0
    assert guard.load < 0.2


def test_after_a_rush_the_rate_comes_back() -> None:
    guard = DriftGuard(1.0, every=5)
    walk(guard, 1.0, 200, 50.0, march=True)
    slow = guard.factor
    assert slow < 0.1
    walk(guard, 0.0005, 500, 50.0, march=True, start=1000)
    assert guard.factor == 1.0


def test_a_rush_of_the_past_does_not_stop_the_encoder() -> None:
    """One jump to 1.2 times the limit keeps the load above 1 until it is 43 steps old; then the encoder rests."""
    guard = DriftGuard(1.0, every=5)
    at = torch.zeros(64, 8)
    guard.look(0, at, 1.0, 100.0)
    guard.factor = 1.0
    loads, factors = [], []
    for step in range(30, 80, 5):
        guard.clock = step
        found = guard.look(step, at + (1.2 * 0.3**0.5) / 8**0.5, 1.0, 100.0)
        loads.append(found["load"])
        factors.append(found["factor"])
    assert loads[0] == pytest.approx(1.2, rel=1e-5)
    assert loads[2] > 1
    assert factors[0] == pytest.approx(1 / 1.2, rel=1e-5)
    assert min(factors) == factors[0]  # cut once, not at every look until the jump is old enough


def test_a_slow_excess_is_cut_until_it_grows_at_most_half_as_fast_as_its_limit() -> None:
    """The distance grows by 4 % from step 30 to 35, the limit by 8 %: calm. By 5 % more at the next look: not."""
    guard = DriftGuard(1.0, every=5)
    guard.look(0, torch.zeros(64, 8), 1.0, 100.0)
    guard.factor, factors = 1.0, []
    for step, far in ((30, 1.2), (35, 1.2 * 1.039), (40, 1.2 * 1.039 * 1.05)):
        guard.clock = step
        guard.look(step, torch.full((64, 8), far * 0.3**0.5 / 8**0.5), 1.0, 100.0)
        factors.append(guard.factor)
    assert factors[1] == factors[0]
    assert factors[2] < factors[1]


def test_a_step_counts_by_the_square_of_its_share_of_the_rate() -> None:
    loads = {}
    for share in (1.0, 0.5):
        guard = DriftGuard(1.0, every=1)
        guard.look(0, torch.zeros(4, 2), 1.0, 100.0)
        for step in range(40):
            guard.due(step, share)
        loads[share] = guard.look(40, torch.full((4, 2), 0.1), 1.0, 100.0)["load"]
    assert loads[1.0] == pytest.approx(0.02**0.5 / 0.4**0.5, rel=1e-5)
    assert loads[0.5] == pytest.approx(2 * loads[1.0], rel=1e-6)


def test_distances_are_in_units_of_those_to_the_codewords() -> None:
    before, after = torch.zeros(5, 3), torch.full((5, 3), 0.1)
    found = {}
    for spread in (1.0, 0.01):
        guard = DriftGuard(1.0, every=1)
        guard.look(0, before, spread, 10.0)
        guard.clock = 10.0
        found[spread] = guard.look(10, after, 123.0, 10.0)
    assert found[1.0]["moved"] == pytest.approx(0.03**0.5, rel=1e-5)
    assert found[0.01]["moved"] == pytest.approx(3**0.5, rel=1e-5)
    assert found[1.0]["load"] == pytest.approx(found[1.0]["moved"])
    assert found[1.0]["age"] == 10
    assert found[0.01]["factor"] < found[1.0]["factor"]


def test_other_tiles_after_a_resume_are_a_new_start() -> None:
    """A slide that could be read before, and cannot now, leaves fewer tiles."""
    guard = DriftGuard(1.0, 1)
    guard.look(0, torch.zeros(6, 2), 1.0, 10.0)
    guard.look(1, torch.full((6, 2), 9.0), 1.0, 10.0)
    factor = guard.factor
    resumed = DriftGuard(1.0, 1)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.look(2, torch.zeros(5, 2), 1.0, 10.0)["load"] == 0.0
    assert resumed.factor == factor
    assert resumed.look(3, torch.full((5, 2), 9.0), 1.0, 10.0)["load"] > 1


def test_one_cycle_is_kept_and_no_more_than_64_of_it() -> None:
    guard = DriftGuard(1.0, every=1)
    for step in range(2000):
        guard.look(step, torch.zeros(4, 2), 1.0, 300.0)
    assert 60 <= len(guard.state_dict()["kept"]) <= 66
    assert guard.look(2000, torch.zeros(4, 2), 1.0, 300.0)["age"] >= 300


def rows_of(out: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == kind]


def moved(trainer: Trainer, before: Tensor) -> float:
    with torch.no_grad():
        after = trainer.model.eval().encode_tiles(trainer.train.reader.read(0, range(20)))
    return float((after - before).square().sum(1).mean())


def test_a_fast_encoder_is_held_back_and_more_rows_are_renewed(tiny_cohort: Path, tmp_path: Path) -> None:
    far, steps = {}, {}
    for limit in (0, 0.3):
        more = ["memory.max_refresh=20"] if limit else []
        trainer = Trainer(
            tiny_config(
                tiny_cohort,
                *FAST,
                "optim.encoder_lr_scale=20",
                "optim.epochs=4",
                f"memory.drift_limit={limit}",
                *more,
            ),
            tmp_path / str(limit),
        )
        with torch.no_grad():
            before = trainer.model.eval().encode_tiles(trainer.train.reader.read(0, range(20)))
        trainer.fit()
        far[limit], steps[limit] = moved(trainer, before), rows_of(tmp_path / str(limit), "step")
    assert far[0.3] < 0.2 * far[0]
    assert max(row["encoder_lr"] for row in steps[0.3]) < 0.1 * max(row["encoder_lr"] for row in steps[0])
    assert not rows_of(tmp_path / "0", "drift")
    found = rows_of(tmp_path / "0.3", "drift")
    assert found[0]["refresh"] <= 16
    assert max(row["refresh"] for row in found) == 20
    assert found[-1]["cycle"] < found[0]["cycle"]
    assert all(0 < row["factor"] <= 1 for row in found)


def test_a_guarded_run_resumes_as_it_was(tiny_cohort: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_cohort, *FAST, "optim.encoder_lr_scale=2", "memory.max_refresh=9")
    assert_resumes(config, tmp_path, step=5)
    assert rows_of(tmp_path / "a", "drift")


def test_an_encoder_at_rest_is_not_looked_at(tiny_cohort: Path, tmp_path: Path) -> None:
    Trainer(tiny_config(tiny_cohort, "optim.freeze_encoder=true"), tmp_path / "run").fit()
    assert not rows_of(tmp_path / "run", "drift")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["memory.drift_limit=-1"], r"memory\.drift_limit"),
        (["memory.drift_every=0"], r"memory\.drift_every"),
        (["memory.drift_tiles=0"], r"memory\.drift_tiles"),
        (["memory.refresh=9", "memory.max_refresh=8"], r"memory\.max_refresh=8: less than memory\.refresh=9"),
        (["memory.drift_limit=0", "memory.max_refresh=8"], r"memory\.max_refresh is for the drift guard"),
        (["memory.mode=exact", "memory.max_refresh=8"], r"no use with memory\.mode=exact"),
        (
            ["memory.mode=exact", "run.probe_every=2"],
            r"run\.probe_every compares a memory mode with the exact",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tiny_cohort: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tiny_cohort, *overrides).validate()


def test_a_run_draws_itself(tiny_cohort: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_cohort, *FAST, "run.pictures=true", "run.probe_every=3", "optim.epochs=2")
    Trainer(config, tmp_path / "run").fit()
    for name in ("curves.png", "staleness.png"):
        assert (tmp_path / "run" / name).stat().st_size > 10_000
