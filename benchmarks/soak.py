"""A training run watched for hours: memory, processes, threads, descriptors and files must stay as they are.

    python -m benchmarks.soak --hours 2 --out benchmarks/results/cpu-2-cores/soak

Trains on a small synthetic cohort with everything on that holds resources (a reader process, the bank's rows in a file,
checkpoints, validation, TensorBoard, the fidelity probe, the drift guard), looks at the processes every half minute,
interrupts the run at the end as Ctrl-C does, and looks at what is left. Writes soak.csv, soak.json and soak.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dre_fast.data.files import write_text_atomic
from dre_fast.eval.figures import new_figure, save_figure

CONFIG = """
data: {backend: openslide, stain: 0.2, workers: 1}
model: {encoder: conv-tiny, encoder_args: {dim: 32, width: 16}, codewords: 8, width: 64, depth: 1, heads: 4}
memory: {mode: full, live: 12, tier: file, cache: 2MB, refresh: 8}
loss:
  tasks: [{name: subtype}, {name: tumour}]
optim: {epochs: 1000000, batch_size: 8, encoder_lr_scale: 0.05, head_warmup_epochs: 0}
run: {checkpoint_every: 10, probe_every: 7, tensorboard: true, threads: 1}
"""
SETTLED = 0.2  # share of the time after which memory must not grow


def prepare(folder: Path) -> Path:
    """Cohort, tiles, reports and config; returns the config's file."""
    import yaml

    from dre_fast.cli import main
    from dre_fast.data.synthetic import make_cohort

    cohort = make_cohort(folder / "cohort", train=24, val=8, test=1, seed=0, size=(768, 640))
    tiles, reports, rows = folder / "tiles", folder / "reports.safetensors", folder / "rows"
    rows.mkdir()
    for command in (
        ["tile", str(cohort), "--out", str(tiles), "--tile-size", "64", "--mpp-out", "1.0"],
        ["embed-reports", str(cohort), "--out", str(reports)],
    ):
        if main(command):
            raise RuntimeError(f"dre-fast {command[0]} failed")
    tree = yaml.safe_load(CONFIG)
    tree["data"].update(cohort=str(cohort), tiles=str(tiles), reports=str(reports))
    tree["memory"]["folder"] = str(rows)
    write_text_atomic(folder / "config.yaml", yaml.safe_dump(tree))
    return folder / "config.yaml"


def family(root: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
    found = [root]
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return found


def look(root: int, folder: Path) -> dict[str, float]:
    """Resources held by a process and its children, and what lies in the run's folders."""
    totals = {"processes": 0, "rss_mb": 0.0, "main_rss_mb": 0.0, "threads": 0, "descriptors": 0}
    for pid in family(root):
        try:
            status = (Path("/proc") / str(pid) / "status").read_text()
            descriptors = len(list((Path("/proc") / str(pid) / "fd").iterdir()))
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        rss = int(fields.get("VmRSS", "0 kB").split()[0]) / 1024
        totals["processes"] += 1
        totals["rss_mb"] += rss
        totals["main_rss_mb"] += rss if pid == root else 0
        totals["threads"] += int(fields["Threads"])
        totals["descriptors"] += descriptors
    run = folder / "run"
    files = [path for path in run.rglob("*") if path.is_file()] if run.exists() else []
    logs = [path for path in files if path.name == "metrics.jsonl" or "tensorboard" in path.parts]
    lines = (
        (run / "metrics.jsonl").read_bytes().count(b'"kind": "step"')
        if (run / "metrics.jsonl").exists()
        else 0
    )
    return {
        **totals,
        "files": len(files),
        "log_mb": _mb(logs),
        "other_mb": _mb(files) - _mb(logs),
        "steps": lines,
    }


def _mb(files: list[Path]) -> float:
    total = 0
    for path in files:
        try:
            total += path.stat().st_size
        except OSError:  # replaced meanwhile
            continue
    return total / 2**20


def soak(hours: float, out: Path, every: float) -> dict[str, Any]:
    """Run, watch, interrupt; returns the summary that is also written."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dre_fast_soak") as name:
        folder = Path(name)
        config = prepare(folder)
        command = [sys.executable, "-m", "dre_fast.cli", "train", "--config", str(config)]
        with open(folder / "output.txt", "w") as output:
            process = subprocess.Popen(
                [*command, "--out", str(folder / "run")],
                stdout=output,
                stderr=subprocess.STDOUT,
                # in a job in the background Ctrl-C is ignored, and processes inherit that
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
            )
            rows = _watch(process, folder, hours, every)
            alive = process.poll() is None
            members = family(process.pid)
            process.send_signal(signal.SIGINT)
            code = process.wait(timeout=120)
        time.sleep(2)
        left = [pid for pid in members if (Path("/proc") / str(pid)).exists()]
        summary = _summary(rows, alive=alive, code=code, left=len(left))
        summary["rows_left"] = sorted(path.name for path in (folder / "rows").iterdir())
        summary["output"] = (folder / "output.txt").read_text().splitlines()[-3:]
    with open(out / "soak.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    write_text_atomic(out / "soak.json", json.dumps(summary, indent=2) + "\n")
    draw(rows, out / "soak.png")
    return summary


def _watch(process: subprocess.Popen, folder: Path, hours: float, every: float) -> list[dict[str, float]]:  # type: ignore[type-arg]
    started, rows = time.monotonic(), []
    while time.monotonic() - started < hours * 3600 and process.poll() is None:
        time.sleep(every)
        seen = {"seconds": round(time.monotonic() - started, 1), **look(process.pid, folder)}
        rows.append({key: round(value, 3) for key, value in seen.items()})
        print(", ".join(f"{key} {value:g}" for key, value in rows[-1].items()), file=sys.stderr, flush=True)
    return rows


def _summary(rows: list[dict[str, float]], *, alive: bool, code: int, left: int) -> dict[str, Any]:
    settled = rows[int(len(rows) * SETTLED) :]
    hours = np.array([row["seconds"] for row in settled]) / 3600
    growth = {
        key: float(np.polyfit(hours, [row[key] for row in settled], 1)[0])
        for key in ("main_rss_mb", "threads", "descriptors", "files", "other_mb")
    }
    return {
        "hours": rows[-1]["seconds"] / 3600,
        "steps": rows[-1]["steps"],
        "ran_to_the_end": alive,
        "exit_code_after_interrupt": code,
        "processes_left": left,
        "growth_per_hour": growth,
        "settled": {
            key: [min(row[key] for row in settled), max(row[key] for row in settled)]
            for key in ("main_rss_mb", "rss_mb", "processes", "threads", "descriptors", "files", "other_mb")
        },
    }


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Curves of what was seen."""
    names = {
        "main_rss_mb": "memory, MB",
        "descriptors": "open files",
        "threads": "threads",
        "files": "files in the run",
    }
    figure = new_figure(9, 5)
    minutes = [row["seconds"] / 60 for row in rows]
    for i, (key, title) in enumerate(names.items()):
        axes = figure.add_subplot(2, 2, i + 1)
        axes.plot(minutes, [row[key] for row in rows])
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("minutes")
    figure.tight_layout()
    save_figure(figure, path)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two looks")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    summary = soak(args.hours, args.out, args.every)
    print(json.dumps(summary, indent=2))
    return 0 if summary["ran_to_the_end"] and not summary["processes_left"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
