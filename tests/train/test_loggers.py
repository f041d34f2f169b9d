"""Live curves elsewhere: what they are told, that a resumed run goes on in the same one, faults at the start."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from train_cohort import interrupt, tiny_config

from dre_fast.train.config import ConfigError, load_config
from dre_fast.train.loggers import Loggers, loggers_of
from dre_fast.train.loop import Trainer
from dre_fast.train.state import read_metrics

ALONE = ("loss.contrastive=null", "data.reports=null", "optim.epochs=2", "loss.tasks=[{name: kind}]")


class FakeWandb(ModuleType):
    """Keeps what a run of Weights & Biases is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.starts: list[dict[str, Any]] = []
        self.rows: dict[str, list[dict[str, float]]] = {}
        self.ends: list[int] = []

    def init(self, **options: Any) -> Any:
        self.starts.append(options)
        name = options["id"] or f"run{len(self.starts)}"
        rows = self.rows.setdefault(name, [])
        return SimpleNamespace(
            id=name,
            define_metric=lambda *names, **options: None,
            log=rows.append,
            finish=lambda exit_code: self.ends.append(exit_code),
        )


class FakeMLflow(ModuleType):
    """Keeps what a tracking server is told; written late, as the real client's asynchronous calls are."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.entities = SimpleNamespace(Metric=lambda *parts: parts)
        self.MlflowClient = lambda: self
        self.runs: dict[str, dict[str, Any]] = {}
        self.waiting: list[tuple[str, Any]] = []

    def get_experiment_by_name(self, name: str) -> Any:
        return None if not self.runs else SimpleNamespace(experiment_id="7")

    def create_experiment(self, name: str) -> str:
        assert name == "dre_fast"
        return "7"

    def create_run(self, experiment: str, run_name: str) -> Any:
        assert experiment == "7"
        name = f"run{len(self.runs)}"
        self.runs[name] = {"name": run_name, "params": {}, "metrics": [], "status": "RUNNING"}
        return SimpleNamespace(info=SimpleNamespace(run_id=name))

    def log_param(self, run: str, key: str, value: Any) -> None:
        assert key not in self.runs[run]["params"]  # MLflow refuses to change one
        self.runs[run]["params"][key] = value

    def log_batch(self, run: str, metrics: Any, synchronous: bool) -> None:
        assert not synchronous
        self.waiting.append((run, metrics))

    def flush_async_logging(self) -> None:
        for run, metrics in self.waiting:
            self.runs[run]["metrics"] += metrics
        self.waiting.clear()

    def set_terminated(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status

    def update_run(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeWandb, FakeMLflow]:
    wandb, mlflow = FakeWandb(), FakeMLflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return wandb, mlflow


def numbers(out: Path) -> list[tuple[str, float]]:
    """All that a run's own log holds, as loggers name it."""
    return [
        (f"{row['kind']}/{key}", float(value))
        for row in read_metrics(out / "metrics.jsonl")
        for key, value in row.items()
        if isinstance(value, (int, float)) and key not in ("step", "epoch")
    ]


def test_a_resumed_run_goes_on_in_the_same_runs(tiny_cohort: Path, tmp_path: Path, fakes) -> None:
    wandb, mlflow = fakes
    config = tiny_config(tiny_cohort, *ALONE, "run.loggers=[wandb, mlflow]")
    interrupt(config, tmp_path / "a", 3)
    assert wandb.ends == [1]
    assert mlflow.runs["run0"]["status"] == "FAILED"
    Trainer(config, tmp_path / "a", resume=True).fit()

    first, second = wandb.starts
    assert (first["id"], first["resume"]) == (None, None)
    assert (second["id"], second["resume"]) == ("run1", "allow")
    assert (first["name"], first["project"], first["dir"]) == ("a", "dre_fast", str(tmp_path / "a"))
    assert first["config"]["model"]["codewords"] == 4
    assert wandb.ends == [1, 0]
    (run,) = mlflow.runs.values()
    assert run["status"] == "FINISHED"
    assert run["params"]["model.codewords"] == 4

    there = numbers(tmp_path / "a")
    told = [(key, value) for row in wandb.rows["run1"] for key, value in row.items() if key != "step"]
    assert set(there) <= set(told)
    assert set(there) <= {(key, value) for key, value, _, _ in run["metrics"]}
    steps = [row["step"] for row in wandb.rows["run1"] if "step/loss" in row]
    assert steps == [1, 2, 3, 4, 4, 5, 6]  # the checkpoint was of the first epoch's end, after three steps
    assert json.loads((tmp_path / "a" / "loggers.json").read_text()) == {"wandb": "run1", "mlflow": "run0"}

    again = tiny_config(tiny_cohort, *ALONE)  # and a run may be resumed without them
    Trainer(again, tmp_path / "a", resume=True).fit()
    assert len(wandb.starts) == 2


def test_odd_numbers_and_names(tmp_path: Path, fakes) -> None:
    wandb, mlflow = fakes
    loggers = Loggers(["wandb", "mlflow"], tmp_path, 0, load_config())
    loggers.log("epoch", {"epoch": 3, "a": float("nan"), "b": None, "c": "x", "val_auc_HER2+": 0.5}, 8)
    loggers.close(failed=False)
    assert wandb.rows["run1"] == [{"epoch/val_auc_HER2+": 0.5, "step": 8}]
    ((key, value, _, step),) = mlflow.runs["run0"]["metrics"]
    assert (key, value, step) == ("epoch/val_auc_HER2_", 0.5, 8)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_said_before_the_run(
    name: str, tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install {name}, or leave it out of run\.loggers"):
        Trainer(tiny_config(tiny_cohort, *ALONE, f"run.loggers=[{name}]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_service_that_refuses_closes_the_others(tmp_path: Path, fakes) -> None:
    wandb, mlflow = fakes
    mlflow.create_run = lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no server"))
    with pytest.raises(ValueError, match=r"run\.loggers: mlflow does not start the run: no server"):
        Loggers(["wandb", "mlflow"], tmp_path, 0, load_config())
    assert wandb.ends == [1]


def test_settings(tiny_cohort: Path) -> None:
    def names(*settings: str) -> list[str]:
        return loggers_of(tiny_config(tiny_cohort, *settings).validate().run)

    assert names() == []  # tiny_config turns TensorBoard off
    assert loggers_of(load_config().run) == ["tensorboard"]
    both = "run.loggers=[tensorboard, wandb]"
    assert names("run.tensorboard=true", both) == ["tensorboard", "wandb"]
    with pytest.raises(ConfigError, match=r"run\.tensorboard=false"):
        names(both)
    with pytest.raises(ConfigError, match=r"run\.loggers='comet': must be one of tensorboard, wandb, mlflow"):
        names("run.loggers=[comet]")


def test_tensorboard_is_told_the_same(tiny_cohort: Path, tmp_path: Path) -> None:
    Trainer(tiny_config(tiny_cohort, *ALONE, "run.tensorboard=true"), tmp_path / "a").fit()
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    there = numbers(tmp_path / "a")
    seen = {(tag, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert len(seen) == len(set(there))
    losses = [event.value for event in events.Scalars("step/loss")]
    assert losses == pytest.approx([value for key, value in there if key == "step/loss"])
    assert not (tmp_path / "a" / "loggers.json").exists()
