"""How much memory a call takes beyond what was there before it, its results included.

On a GPU the allocator counts it. On a CPU a process of its own calls the implementation and reads from Linux by how
much its resident memory rose at most: that sees everything, allocations of libraries and threads too. In that
process every allocation above 64 KB is handed back when freed, so that no earlier one is used again unseen. What
is loaded or compiled at a first call is left out: the implementation runs at a small size, or (compiled ones) at the
same size, before it is watched.

    with Watcher() as watcher:
        watcher.peak("benchmarks.test_encode:job", "P10-384", "cpu", "dre_fast")    # bytes

A job is a function of JSON-able arguments that returns :class:`Job`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Job:
    """A call to watch, its inputs bound, and a call that loads everything it needs."""

    run: Callable[[], Any]
    warm: Callable[[], Any]


def why_not() -> str:
    """Why resident memory cannot be watched here, or "" where it can."""
    try:
        _CLEAR.write_text("5")
        _status("VmHWM")
    except (OSError, KeyError) as problem:
        return f"the peak of resident memory needs Linux and a writable {_CLEAR}: {problem}"
    return ""


def peak_on_gpu(run: Callable[[], Any]) -> int:
    """Bytes a call allocates at most beyond what was there. Needs a CUDA device."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return int(torch.cuda.max_memory_allocated() - before)


def peak_here(job: Job) -> int:
    """Bytes by which resident memory rises at most during ``job.run``. Meant for a process started for it."""
    job.warm()
    before = forget_peak()
    result = job.run()
    peak = highest()
    del result
    return max(0, peak - before)


def forget_peak() -> int:
    """Forget the highest resident size of this process so far; returns the present one, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    return _status("VmRSS")


def highest() -> int:
    """Highest resident size of this process since :func:`forget_peak`, in bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    """A size in bytes from /proc/self/status."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


class Watcher:
    """A process that runs jobs and reports their peaks, started at the first question."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()  # closes its input, at which it ends

    def peak(self, job: str, *arguments: object) -> int:
        """Bytes that ``job`` ("module:function", called with the arguments) takes at most.

        Raises RuntimeError, with what the process said, where it failed.
        """
        if self._process is None:
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
                "MALLOC_MMAP_THRESHOLD_": "65536",
                "MALLOC_TRIM_THRESHOLD_": "65536",
                "MALLOC_ARENA_MAX": "1",
                "MKL_DISABLE_FAST_MM": "1",
            }
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.memory"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=ROOT,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([job, *arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"the memory process ended with status {self._process.wait()} at {job} {arguments}"
            )
        reply = json.loads(answer)
        if "error" in reply:
            raise RuntimeError(f"{job} {arguments}: {reply['error']}")
        return int(reply["peak"])


def _serve() -> None:
    """Answer each line of input, a JSON list [job, argument, ...], with a line {"peak": bytes} or {"error": text}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what jobs print does not mix with the answers
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        module, function = name.split(":")
        try:
            reply: dict[str, Any] = {
                "peak": peak_here(getattr(importlib.import_module(module), function)(*arguments))
            }
        except Exception as problem:
            reply = {"error": f"{type(problem).__name__}: {problem}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
