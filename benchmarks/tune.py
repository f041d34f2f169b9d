"""Times other tile sizes than the frozen ones of dre_fast/kernels/*config.py on a GPU, to choose the tables by.

    python -m benchmarks.tune --out FILE.json [--match TEXT]

Each candidate changes one launch of the frozen plan. Candidates compile first, side by side in worker processes; then
every one is timed, and how far its results are from those of the frozen plan is told. Prints the quickest of each work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import retrieval, test_contrast, test_soft
from benchmarks.gpu_sections import time_ms
from benchmarks.registry import GPU_CONTRAST, GPU_ENCODE, GPU_RETRIEVAL, GPU_SOFT, make
from dre_fast.kernels import config, contrast_config, soft_config

Run = Callable[[], Any]


@dataclass(frozen=True)
class Candidate:
    """What to change in the frozen plan that ``module`` gives for a work."""

    work: str
    label: str
    module: Any
    change: Callable[[Any], Any]


def _launches(work: str, module: Any, field: str, grid: dict[str, tuple[int, ...]]) -> Iterator[Candidate]:
    for values in product(*grid.values()):
        numbers = dict(zip(grid, values, strict=True))
        label = " ".join([field, *(f"{name}={value}" for name, value in numbers.items())])
        yield Candidate(work, label, module, partial(_with_launch, field=field, numbers=numbers))


def _with_launch(plan: Any, field: str, numbers: dict[str, int]) -> Any:
    """The plan with one launch changed; ``times`` and ``programs`` are the plan's own."""
    numbers = dict(numbers)
    times = numbers.pop("times", 1)
    plan = replace(plan, programs=plan.programs * times)
    if numbers:
        plan = replace(plan, **{field: replace(getattr(plan, field), **numbers)})
    return plan


def candidates() -> Iterator[Candidate]:
    """Everything that is tried."""
    both, dims = (4, 8), (64, 128)
    tall = {"rows": (64, 128), "warps": both}
    sums = {"rows": (32, 64, 128), "dim": dims, "warps": both, "stages": (4,), "times": (1, 2, 4)}
    yield from _launches("P1", config, "single", {"rows": (32, 64, 128), "warps": both, "stages": (1, 2, 3)})
    yield from _launches("P2", config, "assign", {**tall, "rows": (64, 128, 256), "dim": dims})
    yield from _launches("P2", config, "aggregate", {**sums, "dim": (64, 128, 256)})
    yield from _launches("P3", config, "aggregate", sums)
    yield from _launches("P4", soft_config, "products", {**tall, "stages": (2, 3)})
    yield from _launches("P4", soft_config, "sums", {**sums, "rows": (32, 64), "stages": (3,)})
    yield from _launches("P4", soft_config, "rows", {**tall, "dim": dims})
    for work in ("all-32-bf16", "all-512-bf16"):
        for field in ("forward", "weights", "sums"):
            yield from _launches(work, contrast_config, field, {"dim": dims, "warps": both, "stages": (3, 4)})


def works(small: bool) -> dict[str, Callable[[], Run]]:
    """By name what makes the call that is timed; ``small``: few rows, which compile the same kernels."""
    encode = {shape.id: replace(shape, rows=1000) if small else shape for shape in GPU_ENCODE}
    soft = replace(GPU_SOFT[0], rows=1000) if small else GPU_SOFT[0]
    contrast = {shape.id: replace(shape, reports=1000) if small else shape for shape in GPU_CONTRAST}
    stored = replace(GPU_RETRIEVAL[0], tiles=600, retrieved=300) if small else GPU_RETRIEVAL[0]

    def hard(name: str) -> Run:
        x, codebook, bounds = make(encode[name], "cuda")
        return lambda: torch.ops.dre_fast.hard_encode.default(x, codebook, bounds)

    def retrieve() -> Run:
        given = retrieval.fill(stored, "cuda")
        return partial(retrieval.op, given, rows=given.rows)

    def soft_step() -> Run:
        return partial(test_soft.step, test_soft.inputs(soft, "cuda", "Deep-TEN"), "dre_fast")

    def loss(name: str) -> Run:
        given = test_contrast.inputs(contrast[name], "cuda")
        return partial(test_contrast.step, given, test_contrast.ways(contrast[name], "cuda")[0])

    return {
        "P1": partial(hard, "P1"),
        "P2": partial(hard, "P2"),
        "P3": retrieve,
        "P4": soft_step,
        "all-32-bf16": partial(loss, "all-32-bf16"),
        "all-512-bf16": partial(loss, "all-512-bf16"),
    }


class Planned:
    """While entered, a module's plans are a candidate's."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate, self.frozen = candidate, candidate.module.plan

    def __enter__(self) -> None:
        self.candidate.module.plan = lambda *args, **kwargs: self.candidate.change(
            self.frozen(*args, **kwargs)
        )

    def __exit__(self, *_: object) -> None:
        self.candidate.module.plan = self.frozen


def compile_part(chosen: list[Candidate], part: int, parts: int) -> None:
    """Every ``parts``-th candidate once, at a small size, so that its kernels lie in Triton's cache."""
    made: dict[str, Run] = {}
    build = works(small=True)
    for candidate in chosen[part::parts]:
        if candidate.work not in made:
            made[candidate.work] = build[candidate.work]()
        try:
            with Planned(candidate):
                made[candidate.work]()
            torch.cuda.synchronize()
        except Exception as problem:  # too much shared memory, a tile that does not divide: not a candidate
            print(f"{candidate.work} {candidate.label}: {type(problem).__name__}", file=sys.stderr)


def _tensors(found: Any) -> list[torch.Tensor]:
    found = [found] if isinstance(found, torch.Tensor) else found
    return [t for t in found if t.is_floating_point()]


def measure(chosen: list[Candidate], write: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Milliseconds of every candidate, and how far its results are from those of the frozen plan."""
    rows: list[dict[str, Any]] = []
    for work, build in works(small=False).items():
        mine = [candidate for candidate in chosen if candidate.work == work]
        if not mine:
            continue
        run = build()
        expected = [t.double() for t in _tensors(run())]
        rows.append({"work": work, "plan": "frozen", "ms": time_ms(run, "cuda", rep=100)})
        for candidate in mine:
            row: dict[str, Any] = {"work": work, "plan": candidate.label}
            try:
                with Planned(candidate):
                    found = _tensors(run())
                    pairs = zip(found, expected, strict=True)
                    row["off"] = max(float((f - e).norm() / e.norm().clamp_min(1e-30)) for f, e in pairs)
                    row["ms"] = time_ms(run, "cuda", rep=20)
            except Exception as problem:
                row["error"] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}"
                if "CUDA error" in row["error"]:  # nothing after it can be trusted
                    rows.append(row)
                    write(rows)
                    raise
            rows.append(row)
        write(rows)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--match", default="", help="only works and plans whose name contains TEXT", metavar="TEXT"
    )
    parser.add_argument("--best", type=int, default=6, help="how many of each work are printed")
    parser.add_argument("--compile-part", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache, time nothing")
    arguments = parser.parse_args()
    chosen = [c for c in candidates() if arguments.match in f"{c.work} {c.label}"]
    if arguments.compile_part:
        compile_part(chosen, *arguments.compile_part)
        return 0
    count = max(1, (os.cpu_count() or 1) - 2)
    command = [
        sys.executable,
        "-m",
        "benchmarks.tune",
        "--out",
        str(arguments.out),
        "--match",
        arguments.match,
    ]
    workers = [subprocess.Popen([*command, "--compile-part", str(i), str(count)]) for i in range(count)]
    for worker in workers:
        worker.wait()
    if arguments.compile_only:
        return 0

    def write(rows: list[dict[str, Any]]) -> None:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")

    rows = measure(chosen, write)
    for work in dict.fromkeys(row["work"] for row in rows):
        timed = sorted((r for r in rows if r["work"] == work and "ms" in r), key=lambda r: r["ms"])
        for row in timed[: arguments.best] + [r for r in timed[arguments.best :] if r["plan"] == "frozen"]:
            print(f"{work:13} {row['ms']:.4f} ms  {row['plan']}  off {row.get('off', 0):.1e}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
