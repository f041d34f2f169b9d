"""Which tile sizes the slide-report loss uses: a frozen table per GPU architecture, nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from dre_fast.kernels.config import Arch

MAX_DIM = 4096
DTYPES = (torch.float32, torch.bfloat16)
# Entries of the fp32 scratch [slides, reports of a chunk] of the backward: 16 MB, which stays in the L2 cache.
_SCRATCH = 1 << 22
_SLIDES = (32, 64)  # heights of a tile of slides


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
    """How slides meet reports of one (architecture, dtype, number of slides, T).

    operand: dtype of the products' factors. parts: pieces of it that an fp32 factor is split into. precision: of
    products of fp32 factors. dim: T rounded up to whole tiles. programs: how many a launch should have at least.
    products, sums: tiles of the products of slides with reports, and of the sums of weighted reports.
    """

    operand: torch.dtype
    parts: int
    precision: str
    dim: int
    programs: int
    products: Tile
    sums: Tile

    def padded(self, slides: int) -> int:
        """Slides rounded up to whole tiles."""
        return -(-slides // self.products.slides) * self.products.slides

    def ranges(self, reports: int, tiles: int, tile: Tile) -> tuple[int, int]:
        """(ranges, height): equal ranges of reports for ``tiles`` programs each, of whole tiles, none of them empty."""
        wanted = min(-(-self.programs // tiles), -(-reports // tile.reports))
        height = -(-reports // (wanted * tile.reports)) * tile.reports
        return -(-reports // height), height

    def chunk(self, slides: int, reports: int) -> int:
        """Reports whose weights lie in scratch at a time, in whole tiles."""
        size = self.products.reports
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
def plan(arch: Arch, dtype: torch.dtype, height: int, dim: int) -> ContrastPlan:
    """The frozen plan for reports of ``dtype`` [*, dim], slides in tiles of ``height`` (see :func:`height_of`)."""
    if dtype == torch.float32:
        width = min(max(32, 1 << (dim - 1).bit_length()), 64)
        products = Tile(64, 32, height, warps=8, stages=2)
        sums = Tile(32, width, height, warps=8, stages=2)
    else:
        width = min(max(64, 1 << (dim - 1).bit_length()), 128)
        stages = 2 if arch.shared < 120_000 else 3
        products = Tile(128, 64, height, warps=8, stages=stages)
        sums = Tile(64, width, height, warps=8, stages=stages)
    return ContrastPlan(
        # the interpreter misreads bf16: there the parts, which bf16 holds exactly, are fp32 numbers
        torch.float32 if arch.capability == 0 else dtype,
        parts=1 if dtype == torch.float32 else 3,
        precision="tf32x3",
        dim=-(-dim // width) * width,
        programs=arch.programs,
        products=products,
        sums=sums,
    )
