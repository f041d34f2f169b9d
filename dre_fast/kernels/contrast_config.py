"""Which tile sizes the slide-report loss uses: a frozen table per GPU architecture, nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from dre_fast.kernels.config import Arch

MAX_DIM = 4096
DTYPES = (torch.float32, torch.bfloat16)
# Weights [slides, reports of a chunk] in the scratch of the backward: 16 MB in fp32, 24 MB in parts, mostly in the L2 cache.
_SCRATCH = 1 << 22
_SLIDES = (32, 64)  # heights of tiles of slides


@dataclass(frozen=True)
class Tile:
    """Tile sizes of one kernel: reports x dim x slides per program, warps, software-pipeline stages."""

    reports: int
    dim: int
    slides: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ContrastPlan:
    """How slides meet reports of one (architecture, dtype of reports, number of slides).

    operand: dtype of the products' factors. parts: pieces of it that an fp32 factor is split into. precision: of
    products of fp32 factors. programs: multiprocessors; a result depends on it, so it is fixed.
    forward, weights: tiles of the products of slides with reports, in the forward and in the backward.
    sums: tiles of the sums of weighted reports.
    """

    operand: torch.dtype
    parts: int
    precision: str
    programs: int
    forward: Tile
    weights: Tile
    sums: Tile

    def padded(self, slides: int) -> int:
        """Slides rounded up to whole tiles."""
        return -(-slides // self.weights.slides) * self.weights.slides

    def width(self, dim: int) -> int:
        """T rounded up to whole tiles."""
        return -(-dim // self.sums.dim) * self.sums.dim

    def ranges(self, reports: int, tiles: int, tile: Tile, together: int) -> tuple[int, int]:
        """(ranges, height): equal ranges of reports in whole tiles, none of them empty.

        tiles: programs of one range. together: programs that fit a multiprocessor; all of them are to run at once.
        """
        wanted = min(max(together * self.programs // tiles, 1), -(-reports // tile.reports))
        height = -(-reports // (wanted * tile.reports)) * tile.reports
        return -(-reports // height), height

    def chunk(self, slides: int, reports: int) -> int:
        """Reports whose weights lie in scratch at a time, in whole tiles."""
        size = self.weights.reports
        most = max(_SCRATCH // self.padded(slides) // size, 1)
        return min(most, -(-reports // size)) * size


def covers(slides: torch.Tensor, reports: torch.Tensor) -> bool:
    """Whether the kernels take slides [B, T] and reports [M, T] of these dtypes and sizes."""
    fits = 1 <= slides.shape[1] <= MAX_DIM and slides.shape[0] > 0 and reports.shape[0] > 0
    return fits and slides.dtype == torch.float32 and reports.dtype in DTYPES


@cache
def height_of(slides: int) -> int:
    """Slides of one tile: the smallest height that takes all of them, or the largest there is."""
    return next((height for height in _SLIDES if height >= slides), _SLIDES[-1])


@cache
def plan(arch: Arch, dtype: torch.dtype, height: int) -> ContrastPlan:
    """The frozen plan for reports of ``dtype``, slides in tiles of ``height`` (see :func:`height_of`)."""
    if dtype == torch.float32:
        forward, weights = (Tile(64, 32, slides, warps=8, stages=2) for slides in (_SLIDES[0], height))
        sums = Tile(32, 64, height, warps=8, stages=2)
    else:
        # without wgmma operands lie in registers too: fewer reports at a time keep them from spilling
        tall, stages = (64, 2) if arch.capability in (80, 120) else (128, 3)
        # what the forward keeps of each slide takes registers: fewer of them
        forward = Tile(tall, 64, _SLIDES[0], warps=8, stages=stages)
        # of 128 registers, which it is given to fit more programs, the small tile would spill on sm_120
        small = arch.capability == 120 and height == _SLIDES[0]
        weights = Tile(128 if small else tall, 64, height, warps=8, stages=stages)
        sums = Tile(32 if arch.capability == 120 else 64, 128, height, warps=8, stages=stages)
    return ContrastPlan(
        # the interpreter misreads bf16: there the parts, which bf16 holds exactly, are fp32 numbers
        torch.float32 if arch.capability == 0 else dtype,
        parts=1 if dtype == torch.float32 else 3,
        precision="tf32x3",
        programs=arch.programs,
        forward=forward,
        weights=weights,
        sums=sums,
    )
