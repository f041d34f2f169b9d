"""Run as a program by test_contrast_counts.py: how many kernels do many cohorts compile? Without a GPU."""

from __future__ import annotations

import functools
import json
import sys
from importlib import import_module

import torch
import triton
from compile_counts import NoDevice
from triton.runtime.jit import JITFunction

from dre_fast.kernels import config, contrast_config

forward, backward = (
    import_module(f"dre_fast.kernels.{name}") for name in ("contrast_forward", "contrast_backward")
)
MOST = 2500
REPORTS = torch.zeros(MOST, 1024, dtype=torch.bfloat16)
CASES = torch.zeros(MOST, dtype=torch.int64)
SCALE = torch.ones(())


def run(reports: int, slides: int, dim: int) -> None:
    """Both losses, forward and backward, of one cohort and batch."""
    x, grad = torch.zeros(slides, dim), torch.zeros(slides)
    given = (x, REPORTS[:reports, :dim], CASES[:slides], CASES[:reports], SCALE)
    forward.info_nce_rows(*given)
    backward.info_nce_rows_backward(grad, *given, grad, CASES[:slides])
    forward.siglip_rows(*given, SCALE)
    backward.siglip_rows_backward(grad, *given, SCALE)


def main() -> None:
    triton.runtime.driver.set_active(NoDevice())
    JITFunction.__getitem__ = lambda self, grid: functools.partial(self.warmup, grid=grid)
    forward.INTERPRETED = True  # the launchers ask for a CUDA device otherwise
    config.INTERPRETER = config.ARCHS[90]
    contrast_config._SCRATCH = 64 * 1024  # so that some take several chunks
    named = {
        name: k for m in (forward, backward) for name, k in vars(m).items() if isinstance(k, JITFunction)
    }
    counts = []
    for reports in [1000, 1, 16, 17, *range(18, 1015), MOST]:
        run(reports, 1 + reports % 32, 16 * (1 + reports % 60))  # up to 32 slides are one tile
        counts.append({name: len(kernel.device_caches[0][0]) for name, kernel in named.items()})
    json.dump({"first": counts[0], "last": counts[-1], "runs": len(counts)}, sys.stdout)


if __name__ == "__main__":
    main()
