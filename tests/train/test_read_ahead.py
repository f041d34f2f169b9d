"""Reading ahead: order, the same bits with any number of processes, slow and dead ones, slides that cannot be read."""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_cohort import tiny_config

from dre_fast.data.slides import SlideError
from dre_fast.train.config import ConfigError
from dre_fast.train.loop import Trainer
from dre_fast.train.read_ahead import ReadAhead, chunks_of, read_jobs
from dre_fast.train.state import read_metrics


class Reader:
    """Tiles that hold their own numbers; some are slow, broken or deadly."""

    def __init__(self, slow: int = -1, broken: int = -1, deadly: int = -1) -> None:
        self.slow, self.broken, self.deadly = slow, broken, deadly

    def read(self, slide: int, tiles: torch.Tensor) -> torch.Tensor:
        if slide == self.slow:
            time.sleep(0.4)
        if slide == self.broken:
            raise SlideError(f"slide s{slide}, tile {int(tiles[0])}: damaged")
        if slide == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return (tiles + 10 * slide).to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


def read(reader: Any, workers: int, slow: float = 60.0) -> list[Any]:
    jobs = chunks_of([5, 0, 3, 4], 2)
    return list(read_jobs(reader, jobs, [f"s{i}" for i in range(4)], workers=workers, slow=slow))


@pytest.mark.parametrize("workers", [0, 2])
def test_jobs_come_in_order_with_their_errors(workers: int) -> None:
    found = read(Reader(broken=2), workers)
    values = [item if isinstance(item, ValueError) else item[:, 0, 0, 0].tolist() for item in found]
    assert [v for v in values if not isinstance(v, ValueError)] == [[0, 1], [2, 3], [4], [30, 31], [32, 33]]
    assert [str(v) for v in values if isinstance(v, ValueError)] == [
        "slide s2, tile 0: damaged",
        "slide s2, tile 2: damaged",
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_slide_is_named_while_it_is_waited_for(workers: int) -> None:
    with pytest.warns(UserWarning, match=r"waiting for tiles of slide s2 for more than 0\.1 s"):
        found = read(Reader(slow=2), workers, slow=0.1)
    assert len(found) == 7


def test_time_waited_is_measured() -> None:
    ahead = ReadAhead([0.0, 0.3, 0.0], str, workers=0, slow=60.0, batches=[[0], [1], [2]], collate=_sleep)  # type: ignore[arg-type]
    waited = []
    for _ in ahead:
        waited.append(ahead.seconds)
    assert waited[1] >= 0.3
    assert waited[0] < 0.2


def _sleep(items: list[float]) -> float:
    time.sleep(items[0])
    return items[0]


def test_a_process_that_is_killed_gives_one_sentence() -> None:
    with pytest.raises(
        OSError, match=r"a process that reads tiles died while slide s\d was waited for.*memory"
    ) as found:
        read(Reader(deadly=2), 1)
    assert found.value.__cause__ is None


def test_a_process_that_is_killed_stops_nothing_but_the_wait_for_its_tiles() -> None:
    """torch's handler of SIGCHLD would raise here, in the midst of somebody's step."""
    ahead = iter(
        read_jobs(
            Reader(deadly=2), chunks_of([5, 0, 3, 4], 2), [f"s{i}" for i in range(4)], workers=1, slow=60
        )
    )
    next(ahead)
    until = time.monotonic() + 1.0
    while time.monotonic() < until:  # the process dies meanwhile
        sum(range(1000))
    with pytest.raises(OSError, match="a process that reads tiles died"):
        list(ahead)


def rows(out: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == kind]


def test_the_same_run_with_and_without_processes(tiny_cohort: Path, tmp_path: Path) -> None:
    logs = []
    for workers in (0, 2):
        config = tiny_config(tiny_cohort, f"data.workers={workers}", "data.stain=0.2", "optim.epochs=2")
        Trainer(config, tmp_path / str(workers)).fit()
        clocks = {"seconds", "data_seconds"}
        logs.append(
            [
                {k: v for k, v in row.items() if k not in clocks}
                for row in read_metrics(tmp_path / str(workers) / "metrics.jsonl")
            ]
        )
        assert all(row["data_seconds"] >= 0 for row in rows(tmp_path / str(workers), "step"))
    assert logs[0] == logs[1]


@pytest.fixture
def damaged(tiny_cohort: Path, tmp_path: Path) -> Path:
    """The cohort with a training slide and a validation slide cut short."""
    root = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, root)
    for name in ("s1", "s8"):
        pixels = np.load(root / f"{name}.npy")
        np.save(root / f"{name}.npy", pixels[: len(pixels) // 2])
    return root


def test_slides_that_cannot_be_read_stop_a_run(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s1"):
        Trainer(tiny_config(damaged), tmp_path / "stop").fit()
    with pytest.raises(ValueError, match="s1"):  # a sixth of the tiles
        Trainer(tiny_config(damaged, "data.on_error=skip"), tmp_path / "few").fit()


@pytest.mark.parametrize("workers", [0, 1])
def test_slides_that_cannot_be_read_are_left_out(damaged: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "run"
    config = tiny_config(
        damaged,
        "data.on_error=skip",
        "data.max_failing=0.3",
        f"data.workers={workers}",
        "memory.refresh=3",
        "optim.batch_size=1",
        "optim.epochs=2",
        "run.probe_every=1",
    )
    trainer = Trainer(config, out)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit()
    words = [str(warning.message) for warning in said]
    assert any("tiles left out of the bank" in w and "s1" in w for w in words)
    assert sum("left out of this step" in w and "s1" in w for w in words) == 2
    assert any(w.startswith("left out:") and "s8" in w for w in words)
    assert [row["skipped_slides"] for row in rows(out, "epoch")] == [1, 1]
    assert [row["loss"] is None for row in rows(out, "step")].count(True) == 2  # alone in its step
    for epoch in rows(out, "epoch"):
        losses = [row["loss"] for row in rows(out, "step") if row["epoch"] == epoch["epoch"]]
        assert epoch["train_loss"] == pytest.approx(sum(filter(None, losses)) / 5)
    probed = rows(out, "fidelity")
    assert {row["slide"] for row in probed if row["embedding"] is None} == {"s1"}
    assert len(probed) == 12
    assert sum(w.startswith("fidelity not measured: slide s1") for w in words) == 2
    assert not trainer.model.bank.written(1).any()
    assert trainer.model.bank.written(0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = Trainer(config, out, resume=True)
        again.fit()
    assert again.step == 12


def test_settings_that_make_no_sense_are_refused(tiny_cohort: Path) -> None:
    for override, message in (
        ("data.on_error=retry", r"data\.on_error='retry': must be one of stop, skip"),
        ("data.max_failing=1.5", r"data\.max_failing=1\.5"),
        ("data.slow_seconds=0", r"data\.slow_seconds"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny_config(tiny_cohort, override).validate()
    with pytest.raises(ConfigError, match="needs every tile"):
        tiny_config(tiny_cohort, "data.on_error=skip", "memory.mode=exact").validate()
