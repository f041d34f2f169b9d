"""Run as a program by test_soft_counts.py: how many kernels does soft encoding of many lengths compile? Without a GPU."""

from __future__ import annotations

import functools
import json
import sys
from importlib import import_module

import torch
import triton
from compile_counts import NoDevice
from triton.runtime.jit import JITFunction

forward, backward = (import_module(f"dre_fast.kernels.{name}") for name in ("soft_encode", "soft_backward"))
WORDS, DIM = 16, 64
X = torch.zeros(4000, DIM, dtype=torch.int8)
SCALES = torch.ones(4000)


def run(rows: int) -> None:
    """Unit rows by index out of a store that grows as well, and rows in order; forward and backward."""
    bags = 1 + rows % 37
    bounds = torch.zeros(bags + 1, dtype=torch.int64)
    codebook, slopes = torch.zeros(WORDS, DIM), torch.zeros(WORDS)
    grad, mass = torch.zeros(bags, WORDS, DIM), torch.zeros(bags, WORDS)
    stored = (X[: 3 * rows], codebook, bounds)
    options = {"index": torch.zeros(rows, dtype=torch.int64), "row_scale": SCALES[: 3 * rows], "unit": True}
    forward.soft_encode(*stored, slopes, **options)
    backward.soft_encode_backward(grad, mass, *stored, mass, slopes, **options)
    plain = (X[:rows].half(), codebook, bounds)
    forward.soft_encode(*plain, None, codebook, slopes)
    backward.soft_encode_backward(grad, mass, *plain, mass, None, codebook, slopes)


def main() -> None:
    triton.runtime.driver.set_active(NoDevice())
    JITFunction.__getitem__ = lambda self, grid: functools.partial(self.warmup, grid=grid)
    forward.INTERPRETED = True  # the launchers ask for a CUDA device otherwise
    named = {
        name: k for m in (forward, backward) for name, k in vars(m).items() if isinstance(k, JITFunction)
    }
    counts = []
    for rows in [1000, 1, 16, 17, *range(18, 1018)]:
        run(rows)
        counts.append({name: len(kernel.device_caches[0][0]) for name, kernel in named.items()})
    json.dump({"first": counts[0], "last": counts[-1], "runs": len(counts)}, sys.stdout)


if __name__ == "__main__":
    main()
