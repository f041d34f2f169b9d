"""Runs of a study: each trained once, its outcome kept as one line of a file; a study goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.memory import forget_peak, highest, why_not
from dre_fast.data.files import write_text_atomic
from dre_fast.progress import progress
from dre_fast.train.config import config_from_dict
from dre_fast.train.loop import Trainer
from dre_fast.train.state import read_metrics


@dataclass(frozen=True)
class Run:
    """One training run: what it is called, its seed, and the settings in which it differs from the study's base."""

    name: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)


def train_once(run: Run, base: Mapping[str, Any], folder: Path, outcomes: Path) -> dict[str, Any]:
    """Train a run, unless ``outcomes`` has it; append and return its outcome.

    Args:
        base: a config as nested dicts.
        folder: the run's folder is made in it, and removed when its outcome is written.
        outcomes: JSON lines.
    """
    for line in read_outcomes(outcomes):
        if (line["name"], line["seed"]) == (run.name, run.seed):
            return line
    tree = json.loads(json.dumps(base))
    tree["run"]["seed"] = run.seed
    for key, value in run.settings.items():
        section, name = key.split(".")
        tree[section][name] = value
    out = folder / f"{run.name}-{run.seed}".replace(" ", "_")
    shutil.rmtree(out, ignore_errors=True)
    before = 0 if why_not() else forget_peak()
    began = time.perf_counter()
    trainer = Trainer(config_from_dict(tree), out)
    trainer.fit()
    log = read_metrics(out / "metrics.jsonl")
    outcome = {
        "name": run.name,
        "seed": run.seed,
        "settings": dict(run.settings),
        "seconds": time.perf_counter() - began,
        "step_seconds": sum(row["seconds"] for row in log if row["kind"] == "step"),
        "peak_mb": None if why_not() else (highest() - before) / 2**20,
        "steps": trainer.step,
        "log": [_rounded(row) for row in log if row["kind"] != "step"],
    }
    with open(outcomes, "a") as file:
        file.write(json.dumps(outcome) + "\n")
    shutil.rmtree(out)
    return outcome


def read_outcomes(path: Path) -> list[dict[str, Any]]:
    """All outcomes so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def study(
    description: str,
    plan: Callable[[int], list[Run]],
    prepare: Callable[[Path, int], Path],
    base: Callable[[Path], Mapping[str, Any]],
    table: Callable[[list[dict[str, Any]]], str],
    draw: Callable[[list[dict[str, Any]], Path], None],
) -> int:
    """The command line of a study: trains its runs, writes runs.jsonl, table.md and figure.png.

    Args:
        plan: seed -> its runs.
        prepare: (folder, seed) -> the seed's data, made when missing.
        base: data -> the config that all runs share.
        table: outcomes -> Markdown.
        draw: (outcomes, file).
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="of the slides and runs")
    parser.add_argument("--work", type=Path, help="folder for slides and runs (default: a temporary one)")
    parser.add_argument("--only", default="", help="runs whose name begins so")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes = args.out / "runs.jsonl"
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        # a run of every seed before the next one: what is there early is there for all seeds
        runs = [run for several in zip(*map(plan, seeds)) for run in several]
        chosen = [run for run in runs if run.name.startswith(args.only)]
        for run in progress(chosen, "study", unit="run"):
            train_once(run, base(prepare(work, run.seed)), work, outcomes)
    found = read_outcomes(outcomes)
    write_text_atomic(args.out / "table.md", table(found))
    draw(found, args.out / "figure.png")
    print(table(found))
    return 0


def last(outcome: Mapping[str, Any], key: str) -> float:
    """What a run's last epoch says."""
    rows = [row for row in outcome["log"] if row["kind"] == "epoch" and row.get(key) is not None]
    return float(rows[-1][key])


def mean_and_range(values: Iterable[float]) -> str:
    """``0.912 (0.903 to 0.921)``, of the seeds."""
    found = sorted(values)
    return f"{sum(found) / len(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})"


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
