"""Runs against each other: what they were set to, how well and how fast they did."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dre_fast.data.cohort import Cohort
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.eval.grids import Cell, Grid
from dre_fast.eval.paired import paired_differences
from dre_fast.train.config import Config, ConfigError, load_config
from dre_fast.train.state import CONFIG, METRICS, read_metrics

# Files of predictions looked for in a run's folder, in this order.
PREDICTIONS = tuple(
    f"{name}.{suffix}" for name in ("predictions", "out_of_fold", "test") for suffix in ("safetensors", "h5")
)

Log = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """A run, or a cross-validation with a log for each fold.

    Attributes:
        name: distinct among the runs compared.
        logs: lines of each metrics.jsonl, at least one.
        predictions: file of predictions, None without one.
    """

    name: str
    folder: Path
    config: Config
    logs: tuple[Log, ...]
    predictions: Path | None


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Reads run folders (metrics.jsonl, config.yaml) or folders of cross-validations (config.yaml, fold-N/).

    Raises:
        ValueError: a folder that holds no run, one named twice, or a config that cannot be read; named.
    """
    return [
        _read_run(Path(folder), name) for folder, name in zip(folders, _names([Path(f) for f in folders]))
    ]


def _read_run(folder: Path, name: str) -> Run:
    files = [folder / METRICS] if (folder / METRICS).exists() else []
    if not files:
        files = sorted(folder.glob(f"fold-*/{METRICS}"), key=lambda file: int(file.parent.name[5:]))
    if not files or not (folder / CONFIG).exists():
        raise ValueError(
            f"{folder}: holds no training run ({METRICS} and {CONFIG}) and no cross-validation of such runs"
        )
    try:
        config = load_config(folder / CONFIG)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from error
    found = [folder / file for file in PREDICTIONS if (folder / file).exists()]
    return Run(name, folder, config, tuple(read_metrics(file) for file in files), found[0] if found else None)


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is named twice")
    depth = 1
    while True:
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
        depth += 1


def flatten(config: Config) -> dict[str, Cell]:
    """``section.key`` -> value; lists and dictionaries as JSON."""
    flat: dict[str, Cell] = {}
    for section, values in asdict(config).items():
        for key, value in values.items():
            plain = value is None or isinstance(value, (str, int, float))
            flat[f"{section}.{key}"] = value if plain else json.dumps(value)
    return flat


def settings_grid(runs: Sequence[Run]) -> Grid:
    """The settings in which runs differ, a line a setting, a column a run; "null" where a setting is none."""
    flat = [flatten(run.config) for run in runs]
    rows = [
        [key, *("null" if one[key] is None else str(one[key]) for one in flat)]
        for key in flat[0]
        if len({repr(one[key]) for one in flat}) > 1
    ]
    return Grid(["setting", *(run.name for run in runs)], rows)


def result_grid(runs: Sequence[Run]) -> Grid:
    """What the runs came to, a line a quantity, a column a run; of a cross-validation the means over its folds."""
    found = [[results(log) for log in run.logs] for run in runs]
    keys = list(dict.fromkeys(key for logs in found for one in logs for key in one))
    rows: list[list[Cell]] = [
        [key, *(_mean([one.get(key) for one in logs]) for logs in found)] for key in keys
    ]
    return Grid(
        ["result", *(run.name for run in runs)], [row for row in rows if any(c is not None for c in row[1:])]
    )


def results(log: Log) -> dict[str, float | int | None]:
    """What a run came to, from its log.

    Validation scores are those of the epoch whose model was kept. ``live tiles/s`` counts the tiles with gradient.
    """
    steps, epochs = _of(log, "step"), _of(log, "epoch")
    validated = [line for line in epochs if line.get("val_score") is not None]
    best = max(
        validated, key=lambda line: line["val_score"], default=None
    )  # the first of equals, as in training
    found: dict[str, float | int | None] = {
        "epochs": len(epochs),
        "steps": len(steps),
        "best epoch": None if best is None else best["epoch"] + 1,
    }
    for key in scores_first(key for line in validated for key in line if key.startswith("val_")):
        found[key] = None if best is None else best.get(key)
    found["train_loss, last epoch"] = epochs[-1]["train_loss"] if epochs else None
    seconds = float(np.mean([line["seconds"] for line in steps])) if steps else None
    found["seconds a step"] = seconds
    counted = [line for line in steps if "tiles" in line]
    spent = sum(line["seconds"] for line in counted)
    found["live tiles/s"] = sum(line["tiles"] for line in counted) / spent if spent else None
    fills = _of(log, "prefill")
    found["pre-fill tiles/s"] = (
        fills[0]["tiles"] / fills[0]["seconds"] if fills and fills[0]["seconds"] else None
    )
    found["minutes in all"] = sum(line.get("seconds", 0.0) for line in log) / 60
    for kind, key, title in (
        ("fidelity", "embedding", "cosine of the embedding with the exact"),
        ("fidelity", "gradient", "cosine of the gradient with the exact"),
    ):
        values = [line[key] for line in _of(log, kind) if line.get(key) is not None]
        found[title] = float(np.mean(values)) if values else None
    found["age of rows, steps"] = epochs[-1].get("bank_age_mean") if epochs else None
    drift = _of(log, "drift")
    found["factor on the encoder's rate"] = drift[-1]["factor"] if drift else None
    return found


def scores_first(keys: Iterable[str]) -> list[str]:
    """Distinct keys of validation: the score that decides, those of tasks, then losses."""
    return sorted(dict.fromkeys(keys), key=lambda key: (key != "val_score", key.startswith("val_loss")))


def paired_grid(
    runs: Sequence[Run],
    files: Sequence[str | Path],
    cohort: Cohort,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Grid:
    """Paired differences in AUC between every two runs that have predictions; see `paired_differences`.

    Args:
        files: of predictions, one a run.

    Raises:
        ValueError: two runs predict no slide of the cohort in common; named.
    """
    loaded = [SlideEmbeddings.load(file) for file in files]
    rows: list[list[Cell]] = []
    for i, j in combinations(range(len(runs)), 2):
        try:
            found = paired_differences(loaded[i], loaded[j], cohort, bootstrap=bootstrap, seed=seed)
        except ValueError as error:
            raise ValueError(f"{files[i]} and {files[j]}: {error}") from error
        rows += [
            [
                *(runs[i].name, runs[j].name, one.task, one.column, one.first, one.second),
                *(one.difference, one.low, one.high, one.samples, one.cases, one.note),
            ]
            for one in found
        ]
    header = [
        "A",
        "B",
        "task",
        "column",
        "AUC of A",
        "AUC of B",
        "A - B",
        "low",
        "high",
        "slides",
        "cases",
        "note",
    ]
    return Grid(header, rows)


def _of(log: Log, kind: str) -> Log:
    return [line for line in log if line.get("kind") == kind]


def _mean(values: list[float | int | None]) -> float | int | None:
    there = [value for value in values if value is not None]
    if len(there) == 1:
        return there[0]
    return float(np.mean(there)) if there else None
