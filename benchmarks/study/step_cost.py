"""What a step of the rare-witness yardstick costs in each memory mode, on an otherwise idle machine.

    python -m benchmarks.study.step_cost --out benchmarks/results/cpu-2-cores/rare_witness

One epoch of 120 steps each, the encoder moving from the first; writes cost.json: milliseconds a step, one thread, the
mean after the first 20 steps, in each of which the drift guard looks (later in every tenth), and a step's part of making
the epoch's plan, which is where guided runs score the bank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.study import rare_witness
from dre_fast.data.files import write_text_atomic
from dre_fast.train.config import config_from_dict
from dre_fast.train.cost import hardware
from dre_fast.train.loop import Trainer
from dre_fast.train.planner import Planner
from dre_fast.train.samplers import EpochPlan
from dre_fast.train.state import read_metrics

SLIDES = {"train": 960, "val": 2, "test": 8}
FIRST = 20
MODES = ("none", "sampled", "sampled guided", "full", "full guided", "exact")


def timed(planner: Planner) -> list[float]:
    """Have a planner note the seconds of each plan it makes in the list returned."""
    seconds: list[float] = []
    plan = planner.plan

    def noted(epoch: int) -> EpochPlan:
        began = time.perf_counter()
        made = plan(epoch)
        seconds.append(time.perf_counter() - began)
        return made

    planner.plan = noted  # type: ignore[method-assign]
    return seconds


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = rare_witness.prepare(Path(folder), seed=0, slides=SLIDES)
        for mode in MODES:
            tree = rare_witness.base(data)
            tree["memory"]["mode"] = mode.split()[0]
            if "guided" in mode:
                tree["memory"] |= {key.split(".")[1]: value for key, value in rare_witness.GUIDED.items()}
            tree["optim"] |= {"epochs": 1, "head_warmup_epochs": 0}
            tree["run"]["validate_every"] = 1
            out = Path(folder) / mode.replace(" ", "_")
            trainer = Trainer(config_from_dict(tree), out)
            planning = timed(trainer.planner)
            trainer.fit()
            steps = [row["seconds"] for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "step"]
            found[mode] = round(1e3 * (statistics.mean(steps[FIRST:]) + sum(planning) / len(steps)), 2)
        found["hardware"] = hardware(trainer.device)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(args.out / "cost.json", json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
