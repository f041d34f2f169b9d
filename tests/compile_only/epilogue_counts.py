"""Run as a program by test_epilogue_counts.py: how many kernels do runs over many lengths compile? No GPU is needed."""

from __future__ import annotations

import functools
import json
import sys
from importlib import import_module

import torch
import triton
from compile_counts import NoDevice
from triton.runtime.jit import JITFunction

normalize, gather, permute = (
    import_module(f"dre_fast.kernels.{name}") for name in ("normalize", "hard_backward", "permute")
)
STEPS = (True, False, True, 0.5, 1e-12)


def run(n: int) -> None:
    bags = 1 + n % 37
    V = torch.zeros(bags, 4, 32)
    normalize.normalize_residuals(V, *STEPS)
    normalize.normalize_residuals_backward(V, V, *STEPS)
    x, codes = torch.zeros(n, 32), torch.zeros(n, dtype=torch.int64)
    offsets = torch.zeros(bags + 1, dtype=torch.int64)
    gather.hard_encode_backward(V, codes, offsets)
    gather.hard_encode_backward(V, codes, offsets, x, None, True)
    ids = torch.zeros(bags, dtype=torch.int64)
    permute.bank_tiles(ids + n, ids, n % 5 * 64, 64, 64, ids, (n - 500) * 0x0123456789ABC)


def main() -> None:
    triton.runtime.driver.set_active(NoDevice())
    JITFunction.__getitem__ = lambda self, grid: functools.partial(self.warmup, grid=grid)
    modules = (normalize, gather, permute)
    kernels = [k for m in modules for k in vars(m).values() if isinstance(k, JITFunction)]
    counts = []
    for module in modules:
        module.INTERPRETED = True  # the launchers ask for a CUDA device otherwise
    for n in range(1, 1002):
        run(n)
        counts.append(sum(len(kernel.device_caches[0][0]) for kernel in kernels))
    json.dump({"first": counts[0], "last": counts[-1], "runs": len(counts)}, sys.stdout)


if __name__ == "__main__":
    main()
