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


def main() -> None:
    triton.runtime.driver.set_active(NoDevice())
    JITFunction.__getitem__ = lambda self, grid: functools.partial(self.warmup, grid=grid)
    kernels = [value for value in vars(module).values() if isinstance(value, JITFunction)]
    counts = []
    words, dim = 16, 64
    plan = config.plan(config.ARCHS[90], torch.bfloat16, words, dim, aligned=True)
    x, codebook = torch.zeros(5000, dim, dtype=torch.bfloat16), torch.zeros(words, dim)
    for rows in [1, 16, 17, *range(18, 1018)]:
        bags = 1 + rows % 37
        V = torch.zeros(bags, words, dim)
        members = torch.zeros(bags, words, dtype=torch.int64)
        codes = torch.zeros(rows, dtype=torch.int64)
        bounds = torch.zeros(bags + 1, dtype=torch.int64)
        module._launch(x[:rows], codebook, bounds, plan, V, members, codes)
        counts.append(sum(len(kernel.device_caches[0][0]) for kernel in kernels))
    json.dump({"first": counts[0], "last": counts[-1], "runs": len(counts)}, sys.stdout)


if __name__ == "__main__":
    main()
