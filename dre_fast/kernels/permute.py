"""Per-slide permutation sampling in Triton: tile ids by position, one launch, bit for bit those of the reference.

The bijection of [0, n) keyed by (seed, pass, slide), in uint32 arithmetic throughout, is written down at the top of
:mod:`dre_fast.reference.sampling`: six Feistel rounds over the bits of n - 1, walked until the value is below n.
Nothing of size n is read or written: 24 bytes a slide come in, 8 bytes a tile go out.
"""

# Kernel arguments are Triton's own kinds of values, which annotations other than constexpr cannot name.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from dre_fast.kernels import config
from dre_fast.kernels.case import Case

_GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B9)
_ROUNDS: tl.constexpr = tl.constexpr(6)
_MIN_BITS: tl.constexpr = tl.constexpr(6)
_WARPS = 4


@triton.jit
def _mix(x):
    """mix() of the reference; the products wrap on purpose, which the interpreter would report."""
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def _absorb(h, word):
    return tl.add(_mix(tl.add(h, word, sanitize_overflow=False)), _GOLDEN, sanitize_overflow=False)


@triton.jit
def _absorb_int64(h, value):
    """Both 32-bit words of an int64, the low one first."""
    return _absorb(_absorb(h, value.to(tl.uint32)), (value >> 32).to(tl.uint32))


@triton.jit
def _feistel(y, key, high, low):
    """One bijection of [0, 2^(high + low)) for each key; y uint32, ``high`` and ``low`` the bits of its halves."""
    one = low * 0 + 1
    high_mask = (one << high) - 1
    low_mask = (one << low) - 1
    h = y >> low
    l = y & low_mask
    for i in tl.static_range(_ROUNDS):
        k = _mix(tl.add(key, ((i + 1) * 0x9E3779B9) & 0xFFFFFFFF, sanitize_overflow=False))
        if i % 2 == 0:
            l = l ^ (_mix(tl.add(h, k, sanitize_overflow=False)) & low_mask)
        else:
            h = h ^ (_mix(tl.add(l, k, sanitize_overflow=False)) & high_mask)
    return (h << low) | l


@triton.jit(do_not_specialize=["B", "first", "count", "m", "seed_low", "seed_high"])
def _tiles_kernel(lengths_ptr, slides_ptr, cycle_ptr, tiles_ptr, B, first, count, m, seed_low, seed_high,
                  SLIDES: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """SLOTS of the ``count`` tiles of SLIDES slides."""
    blocks = (count + SLOTS - 1) // SLOTS
    program = tl.program_id(0).to(tl.int64)
    at = (program // blocks) * SLIDES + tl.arange(0, SLIDES)
    slot = ((program % blocks) * SLOTS + tl.arange(0, SLOTS))[None, :]
    known = at < B
    n = tl.load(lengths_ptr + at, mask=known, other=0)
    slide = tl.load(slides_ptr + at, mask=known, other=0)
    visit = tl.load(cycle_ptr + at, mask=known, other=0)

    visits = tl.maximum((n + (m - 1)) // m, 1)
    cycle = visit // visits
    start = visit - cycle * visits
    # the quotient was rounded towards zero, the reference rounds down
    cycle = tl.where(start < 0, cycle - 1, cycle)
    start = tl.where(start < 0, start + visits, start) * m

    h = tl.full((SLIDES,), 0, tl.uint32) + _GOLDEN
    h = _absorb(h, seed_low.to(tl.uint32))
    h = _absorb(h, seed_high.to(tl.uint32))
    h = _absorb_int64(h, cycle)
    h = _absorb_int64(h, slide)

    last = tl.maximum(n - 1, 0).to(tl.uint32)
    bits = tl.sum(((last[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) > 0).to(tl.int32), 1)
    bits = tl.maximum(bits, _MIN_BITS)
    high = (bits // 2).to(tl.uint32)
    low = bits.to(tl.uint32) - high

    offset = first.to(tl.int64) + slot
    asked = known[:, None] & (slot < count)
    live = (offset < n[:, None]) & asked
    position = start[:, None] + offset
    position = tl.where(position >= n[:, None], position - n[:, None], position)  # both were below n
    y = tl.where(live, position, 0).to(tl.uint32)
    walking = live & (n > 1)[:, None]
    while tl.max(tl.max(walking.to(tl.int32), 1), 0) > 0:
        y = tl.where(walking, _feistel(y, h[:, None], high[:, None], low[:, None]), y)
        walking = walking & (y > last[:, None])
    tl.store(tiles_ptr + at[:, None] * count + slot, tl.where(live, y.to(tl.int64), -1), mask=asked)


INTERPRETED = not isinstance(_tiles_kernel, triton.JITFunction)
# Tiles one program computes: one a thread. The interpreter runs programs one after the other and likes fewer.
_BLOCK = 4096 if INTERPRETED else 128
_FEWEST, _MOST = 4, 128  # of one slide: the number asked for, rounded up to a power of two within these


def _slots(count: int) -> int:
    return min(max(triton.next_power_of_2(count), _FEWEST), _MOST)


def _signed(word: int) -> int:
    """The low 32 bits as a signed integer, so that every seed has one Triton type."""
    return ((word + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def bank_tiles(
    lengths: torch.Tensor,
    slides: torch.Tensor,
    first: int,
    count: int,
    m: int,
    cycle: torch.Tensor,
    seed: int,
) -> torch.Tensor:
    """Tiles at positions (v mod P) m + first .. + count - 1, modulo n, of each slide's permutation.

    Equal, bit for bit, to :func:`dre_fast.reference.sampling.tiles_at`. One launch, no host synchronisation.

    Args:
        lengths: int64 [B], tiles n of each slide, 0 to 2^32.
        slides: int64 [B], slide ids (part of the key).
        first: positions after the first live one, >= 0.
        count: tiles a slide, >= 0.
        m: live tiles a visit, >= 1; P = ceil(n / m).
        cycle: int64 [B], visit number v of each slide.
        seed: int, taken modulo 2^64.

    Returns:
        int64 [B, count]; slots whose offset from the first live position reaches n are -1.

    Raises:
        ValueError: wrong shape, dtype, device, or a negative ``first`` or ``count`` or ``m`` below 1.
    """
    _check(lengths, slides, first, count, m, cycle)
    bags = slides.shape[0]
    tiles = slides.new_empty((bags, count))
    if tiles.numel() == 0:
        return tiles
    slots = _slots(count)
    grid = (triton.cdiv(bags, _BLOCK // slots) * triton.cdiv(count, slots),)
    seeds = (_signed(seed), _signed(seed >> 32))
    with torch.cuda.device_of(slides):
        _tiles_kernel[grid](
            lengths.contiguous(),
            slides.contiguous(),
            cycle.contiguous(),
            tiles,
            bags,
            first,
            count,
            m,
            *seeds,
            _BLOCK // slots,
            slots,
            num_warps=_WARPS,
        )
    return tiles


def _check(
    lengths: torch.Tensor, slides: torch.Tensor, first: int, count: int, m: int, cycle: torch.Tensor
) -> None:
    for name, values in (("lengths", lengths), ("slides", slides), ("cycle", cycle)):
        if values.dtype != torch.int64 or values.shape != slides.shape or values.dim() != 1:
            raise ValueError(f"bank_tiles: {name} must be int64 [B], not {values.dtype} {list(values.shape)}")
        if values.device != slides.device:
            raise ValueError(f"bank_tiles: {name} is on {values.device}, slides on {slides.device}")
    if first < 0 or count < 0 or m < 1:
        raise ValueError(f"bank_tiles: first and count must be >= 0 and m >= 1; got {first}, {count} and {m}")
    if slides.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"the Triton kernels need a CUDA device, not {slides.device} (TRITON_INTERPRET=1 interprets them)"
        )


def cases(arch: config.Arch) -> Iterator[Case]:
    """Every shape of a program."""
    pointers = {name: "*i64" for name in ("lengths_ptr", "slides_ptr", "cycle_ptr", "tiles_ptr")}
    scalars = {name: "i32" for name in ("B", "first", "count", "m", "seed_low", "seed_high")}
    types = tuple({**pointers, **scalars}.items())
    slots = _FEWEST
    while slots <= _MOST:
        constants = (("SLIDES", _BLOCK // slots), ("SLOTS", slots))
        label = f"tiles x{slots}"
        yield Case(arch.capability, _tiles_kernel, label, "i64", 0, 0, types, constants, _WARPS, arch.shared)
        slots *= 2
