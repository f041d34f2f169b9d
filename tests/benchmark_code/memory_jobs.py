"""Jobs of known size for the tests of benchmarks/memory.py."""

from __future__ import annotations

import torch

from benchmarks.memory import Job

_MB = 1 << 20


def allocate(*megabytes: int) -> Job:
    """Allocate and fill tensors of so many MB one after the other, each freed before the next; keep the last."""

    def run() -> torch.Tensor:
        kept = torch.empty(0)
        for size in megabytes:
            del kept
            kept = torch.ones(size * _MB, dtype=torch.uint8)
        return kept

    return Job(run, lambda: torch.ones(8))


def fail() -> Job:
    """A job that cannot be made."""
    raise ValueError("no such shape")


def leave() -> Job:
    """A job that ends the process."""
    raise SystemExit(3)
