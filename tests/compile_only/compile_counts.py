"""Run as a program by test_triton_compile.py: how many kernels does a run over many bag lengths compile?

No GPU is needed: a driver that only names a target stands in for the real one, and launches stop after compiling.
"""

from __future__ import annotations

import functools
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dre_fast.kernels import config, hard_encode

module = sys.modules[hard_encode.__module__]
WORDS, DIM, MOST = 16, 64, 5000


class NoDevice:
    """What the JIT asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def encode(dtype: torch.dtype, rows: int, read: int, bags: int, unit: bool, coded: bool) -> None:
    """Compile what encoding ``read`` of ``rows`` stored rows launches: by index unless all are read in order."""
    plan = config.plan(config.ARCHS[90], dtype, WORDS, DIM, aligned=True, unit=unit, coded=coded)
    chosen = torch.zeros(MOST, dtype=torch.int64)[:read] if read != rows else None
    scale = torch.zeros(MOST)[:rows] if dtype in config.SCALED_DTYPES else None
    known = torch.zeros(MOST, dtype=torch.int16)[:rows] if coded else None
    V = torch.zeros(bags, WORDS, DIM)
    members = torch.zeros(bags, WORDS, dtype=torch.int64)
    codes = torch.zeros(read, dtype=torch.int64)
    bounds = torch.zeros(bags + 1, dtype=torch.int64)
    x = torch.zeros(MOST, DIM, dtype=dtype)[:rows]
    codebook = torch.zeros(WORDS, DIM)
    module._launch(x, codebook, bounds, chosen, scale, known, unit, plan, V, members, codes, None)


def main() -> None:
    triton.runtime.driver.set_active(NoDevice())
    JITFunction.__getitem__ = lambda self, grid: functools.partial(self.warmup, grid=grid)
    kernels = [value for value in vars(module).values() if isinstance(value, JITFunction)]
    counts = []
    for rows in [1, 16, 17, *range(18, 1018)]:
        bags = 1 + rows % 37
        encode(torch.bfloat16, rows, rows, bags, unit=False, coded=False)
        encode(torch.bfloat16, rows, 2 * rows, bags, unit=True, coded=False)
        encode(torch.int8, 3 * rows, rows, bags, unit=False, coded=False)
        encode(torch.int8, 3 * rows, rows + 1, bags, unit=False, coded=True)
        counts.append({kernel.__name__: len(kernel.device_caches[0][0]) for kernel in kernels})
    json.dump({"first": counts[0], "last": counts[-1], "runs": len(counts)}, sys.stdout)


if __name__ == "__main__":
    main()
