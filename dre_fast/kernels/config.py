"""Which tile sizes the encode kernels use: a frozen table per GPU architecture, nothing is tuned at run time.

One *plan* per (architecture, kind of rows, K, D). ``single`` plans read the rows from memory once; where the
accumulators (codewords x dim) do not fit one program's registers, or the codebook its shared memory, the plan is
``split``: one pass finds the codes, a second one adds the rows up, tile by tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

MAX_CODEWORDS = 1024
MAX_DIM = 2048
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Stored rows with a scale each; the kernels see e4m3 as the bytes it is.
SCALED_DTYPES = (torch.int8, torch.float8_e4m3fn)

# fp32 accumulators one program of 8 warps holds beside its addresses without spilling (96 of 255 registers each).
# Rows with weights pass through registers to become operands and their sums are two products: fewer.
_ACCUMULATORS = 24_576
_ACCUMULATORS_WEIGHTED = 16_384
_ACCUMULATORS_UNALIGNED = 8_192
_ACCUMULATORS_WEIGHTED_MMA = 8_192  # where operands of matrix products lie in registers too: sm_80 and sm_120
_ACCUMULATORS_UNALIGNED_WEIGHTED = 4_096


@dataclass(frozen=True)
class Arch:
    """One GPU generation: ``programs`` row ranges per launch (its multiprocessors), shared bytes one program may use."""

    capability: int
    programs: int
    shared: int


ARCHS = {
    80: Arch(80, programs=108, shared=166_912),
    90: Arch(90, programs=132, shared=232_448),
    100: Arch(100, programs=148, shared=232_448),
    120: Arch(120, programs=188, shared=101_376),
}
# The interpreter runs programs one after the other: a few are enough to exercise bags that span programs.
INTERPRETER = Arch(0, programs=5, shared=232_448)


@dataclass(frozen=True)
class Launch:
    """Tile sizes of one kernel: rows x dim x codewords per program, warps, software-pipeline stages."""

    rows: int
    dim: int
    codewords: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """How one (architecture, kind of rows, K, D) is encoded.

    Set are ``single`` alone, or ``assign`` and ``aggregate``, or ``aggregate`` alone where the codes are known.

    parts: 16-bit pieces each fp32 codeword is split into (1: fp32 rows, codewords are used as they are).
    dim, codewords: D and K rounded up to whole tiles; the prepared codebook has this shape.
    programs: row ranges per launch; a result depends on it, so it is fixed per architecture.
    """

    parts: int
    dim: int
    codewords: int
    programs: int
    single: Launch | None
    assign: Launch | None
    aggregate: Launch | None

    @property
    def passes_over_rows(self) -> int:
        """How many times the rows are requested; repeats within one pass are expected to hit the L2 cache."""
        if self.single is not None:
            return 1
        both = (launch for launch in (self.assign, self.aggregate) if launch is not None)
        return sum(self.codewords // launch.codewords for launch in both)


def arch_of(capability: tuple[int, int]) -> Arch:
    """The table entry for a device capability: its own, or the nearest older one.

    Raises ValueError below 8.0, for which no configuration is shipped.
    """
    wanted = capability[0] * 10 + capability[1]
    known = [number for number in ARCHS if number <= wanted]
    if not known:
        raise ValueError(
            f"the Triton kernels need compute capability 8.0 or newer, this device has {capability}"
        )
    return ARCHS[max(known)]


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _dim_tiles(dim: int) -> tuple[int, int]:
    """(tiles, width): one to three tiles of 64 or 128 that cover ``dim`` with the least padding; (0, 0) beyond 384."""
    options = [(n * w, n, w) for w in (64, 128) for n in (1, 2, 3) if n * w >= dim]
    return min(options)[1:] if options else (0, 0)


def covers(dtype: torch.dtype, codewords: int, dim: int) -> bool:
    """Whether the kernels take rows of this dtype and this K and D."""
    return dtype in DTYPES + SCALED_DTYPES and 1 <= codewords <= MAX_CODEWORDS and 1 <= dim <= MAX_DIM


def check(dtype: torch.dtype, codewords: int, dim: int) -> None:
    """Raise ValueError for a dtype, K or D outside what the kernels cover."""
    if dtype not in DTYPES + SCALED_DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES + SCALED_DTYPES)
        raise ValueError(f"rows must be one of {names} for the Triton kernels, not {dtype}")
    if not 1 <= codewords <= MAX_CODEWORDS:
        raise ValueError(f"the Triton kernels take 1 to {MAX_CODEWORDS} codewords, not {codewords}")
    if not 1 <= dim <= MAX_DIM:
        raise ValueError(f"the Triton kernels take feature dimensions 1 to {MAX_DIM}, not {dim}")


@cache
def plan(
    arch: Arch,
    dtype: torch.dtype,
    codewords: int,
    dim: int,
    aligned: bool,
    unit: bool = False,
    distances: bool = False,
    coded: bool = False,
) -> Plan:
    """The frozen plan for rows of ``dtype`` [*, dim] against ``codewords`` codewords on ``arch``.

    aligned: row starts are 16-byte aligned (address, stride and D), so that they load 16 bytes at a time. Without it
    every element is addressed alone and the addresses take the registers: smaller tiles, two passes sooner.
    unit: rows are normalised. distances: they are asked for. coded: the codes are known.

    Raises ValueError as ``check`` does.
    """
    check(dtype, codewords, dim)
    weighted = unit or dtype in SCALED_DTYPES
    if dtype == torch.float32:
        found = _plan_fp32(arch, codewords, dim)
    else:
        single = None if coded else _single_half(arch, codewords, dim, aligned, weighted, distances)
        found = single or _split_half(arch, codewords, dim, aligned, weighted, distances)
    # known codes leave only weights and distances to find before the sums
    return replace(found, assign=None) if coded and not unit and not distances else found


def _single_half(
    arch: Arch, codewords: int, dim: int, aligned: bool, weighted: bool, distances: bool
) -> Plan | None:
    # 64 codewords in two parts are 128 matrix rows: two warpgroups of wgmma with nothing computed twice.
    padded = _power_of_two(codewords, 64)
    tiles, width = _dim_tiles(dim)
    accumulators = padded * tiles * width
    if weighted and aligned:
        limit = _ACCUMULATORS_WEIGHTED_MMA if arch.capability in (80, 120) else _ACCUMULATORS_WEIGHTED
    elif weighted:
        limit = _ACCUMULATORS_UNALIGNED_WEIGHTED
    else:
        limit = _ACCUMULATORS if aligned else _ACCUMULATORS_UNALIGNED
    if not tiles or padded > 128 or accumulators > limit:
        return None
    # Without wgmma the operands pass through registers too: half as many rows at a time keeps them from spilling.
    tall = arch.capability == 100 and padded == 64 and not weighted and not distances
    most = 64 if arch.capability in (0, 90) or tall else 32
    for rows, stages in ((most, 2), (most, 1)):
        # weighted rows lie there twice: as they were read and as operands
        copies = stages + weighted
        shared = 2 * (2 * padded * tiles * width + copies * rows * tiles * width + rows * padded) + 4096
        if shared <= arch.shared:
            launch = Launch(rows, width, padded, warps=8, stages=stages)
            return Plan(2, tiles * width, padded, arch.programs, launch, None, None)
    return None


def _split_half(arch: Arch, codewords: int, dim: int, aligned: bool, weighted: bool, distances: bool) -> Plan:
    padded = _power_of_two(codewords, 64)
    # Rows that are addressed element by element and weighted take more registers: smaller tiles of them.
    small = (weighted or distances) and not aligned
    width = 64 if small else min(_power_of_two(dim, 64), 128)
    stages = 2 if arch.shared < 120_000 else 3
    # Each program reads the codebook's parts once more, from the L2 cache: twice the rows, half of that. The operands
    # of wgmma stay in shared memory, so it has the registers.
    if arch.capability == 90 and not small:
        assign = Launch(128, 64, 64, warps=8, stages=stages)
    else:
        assign = Launch(
            32 if small else 64, 64, 64, warps=4 if arch.capability == 80 and not small else 8, stages=stages
        )
    # weighted sums are two products at a time, whose operands lie in registers where there is no wgmma
    narrow = not aligned or (weighted and arch.capability in (80, 120))
    tile = 64 if narrow else min(padded, 128)
    aggregate = Launch(32 if small else 64, width, tile, warps=8, stages=stages)
    return Plan(2, -(-dim // width) * width, padded, arch.programs, None, assign, aggregate)


def _plan_fp32(arch: Arch, codewords: int, dim: int) -> Plan:
    padded = _power_of_two(codewords, 16)
    width = min(_power_of_two(dim, 16), 64)
    assign = Launch(64, min(width, 32), min(padded, 64), warps=8, stages=2)
    aggregate = Launch(32, width, min(padded, 64), warps=8, stages=2)
    return Plan(1, -(-dim // width) * width, padded, arch.programs, None, assign, aggregate)
