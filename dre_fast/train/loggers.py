"""Live curves of a run elsewhere: TensorBoard, Weights & Biases, MLflow. The first process alone writes them."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dre_fast.data.files import write_text_atomic

if TYPE_CHECKING:
    from dre_fast.train.config import Config, RunConfig

LOGGERS = ("tensorboard", "wandb", "mlflow")
_RUNS = "loggers.json"  # in the run's folder: under which ids its curves go on elsewhere
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_REMEDIES = {
    "tensorboard": "pip install 'dre_fast[train]', or set run.tensorboard=false",
    "wandb": "pip install wandb, or leave it out of run.loggers",
    "mlflow": "pip install mlflow, or leave it out of run.loggers",
}

Values = Mapping[str, float]


class Logger(Protocol):
    """Takes the numbers of a run as they come."""

    def log(self, values: Values, step: int) -> None:
        """``kind/name`` -> finite number, after so many steps."""

    def close(self, *, failed: bool) -> None:
        """The run has ended: as it should, or with an error."""


def loggers_of(run: RunConfig) -> list[str]:
    """Names of the loggers that a configuration asks for, each once."""
    return list(dict.fromkeys([*(["tensorboard"] if run.tensorboard else []), *run.loggers]))


def check_loggers(names: Sequence[str]) -> None:
    """Import what the loggers need, so that a missing package stops a run before it begins.

    Raises:
        ModuleNotFoundError: says which package is missing, and what to do.
    """
    for name in names:
        _module(name)


class Loggers:
    """The loggers of a run. A resumed run goes on in the same run of Weights & Biases and of MLflow.

    Steps that a killed run had logged past its checkpoint are logged again by the resumed one, at the same place.

    Args:
        names: of :data:`LOGGERS`.
        out: folder of the run; its name is that of the run elsewhere.
        step: of the checkpoint that the run goes on from, or 0.
        config: shown beside the curves.

    Raises:
        ModuleNotFoundError: as :func:`check_loggers`.
        ValueError: a service refuses: no key, a wrong address, ...; names it and what it says.
    """

    def __init__(self, names: Sequence[str], out: Path, step: int, config: Config) -> None:
        file = out / _RUNS
        known = json.loads(file.read_text(encoding="utf-8")) if step and file.exists() else {}
        self._open: list[Logger] = []
        try:
            for name in names:
                if name == "tensorboard":
                    self._open.append(TensorBoard(out, step))
                    continue
                try:
                    logger = (Wandb if name == "wandb" else MLflow)(out, config, known.get(name))
                except Exception as error:
                    raise ValueError(f"run.loggers: {name} does not start the run: {error}") from error
                self._open.append(logger)
                known[name] = logger.id
        except BaseException:
            self.close(failed=True)
            raise
        if known:
            write_text_atomic(file, json.dumps(known, indent=1) + "\n")

    def log(self, kind: str, fields: Mapping[str, Any], step: int) -> None:
        """The numbers of a line of the metrics log; text, None, NaN and infinity are left out."""
        values = {
            f"{kind}/{name}": float(value)
            for name, value in fields.items()
            if isinstance(value, (int, float)) and name not in ("step", "epoch") and math.isfinite(value)
        }
        for logger in self._open:
            logger.log(values, step)

    def close(self, *, failed: bool) -> None:
        """Write what is left, and say how the run ended."""
        while self._open:
            self._open.pop().close(failed=failed)


class TensorBoard:
    """Event files in ``out/tensorboard``; what a killed run wrote past its checkpoint is dropped."""

    def __init__(self, out: Path, step: int) -> None:
        writer = _module("tensorboard").SummaryWriter
        self._writer = writer(str(out / "tensorboard"), purge_step=step or None)

    def log(self, values: Values, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases. Its own variables hold: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY, ...

    Args:
        id: of the run to go on with; None: a new one.
    """

    def __init__(self, out: Path, config: Config, id: str | None) -> None:
        self._run = _module("wandb").init(
            project=os.environ.get("WANDB_PROJECT") or "dre_fast",
            name=os.environ.get("WANDB_NAME") or out.name,
            dir=str(out),
            config=asdict(config),
            id=id,
            resume=None if id is None else "allow",
        )
        self.id: str = self._run.id
        # the x of every curve is the run's step: lines of several kinds fall on one, and a resumed run repeats some
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Values, step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow. Its own variables hold: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME (default here: dre_fast).

    Args:
        id: of the run to go on with; None: a new one.
    """

    def __init__(self, out: Path, config: Config, id: str | None) -> None:
        self._mlflow = _module("mlflow")
        self._client = self._mlflow.MlflowClient()
        if id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "dre_fast"
            experiment = self._client.get_experiment_by_name(name)
            number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
            self.id: str = self._client.create_run(number, run_name=out.name).info.run_id
            for section, values in asdict(config).items():
                for key, value in values.items():
                    self._client.log_param(self.id, f"{section}.{key}", value)
        else:
            self.id = id
            self._client.update_run(self.id, status="RUNNING")

    def log(self, values: Values, step: int) -> None:
        now, metric = int(time.time() * 1000), self._mlflow.entities.Metric
        # a task may be called "HER2+", and MLflow refuses such names
        metrics = [
            metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step) for name, value in values.items()
        ]
        # not waited for: a server takes longer than many a step
        self._client.log_batch(self.id, metrics=metrics, synchronous=False)

    def close(self, *, failed: bool) -> None:
        self._mlflow.flush_async_logging()
        self._client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


def _module(name: str) -> Any:
    module = _MODULES[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the run is to be logged by {name}, which does not import ({error}): {_REMEDIES[name]}",
            name=module,
        ) from error
