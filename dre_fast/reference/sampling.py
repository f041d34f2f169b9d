"""Per-slide permutation sampling: every tile is refreshed once per ceil(n/m) visits, without a stored order.

A keyed bijection of [0, n) plays the shuffled list. It uses nothing but 32-bit unsigned arithmetic, so a
kernel can evaluate any position on its own; here uint32 is emulated in int64. dre_fast's own extension of
DRE-SLCL, which draws the live tiles of every visit independently.

The bijection, all arithmetic modulo 2^32:

    mix(x):   x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16
    key:      h = 0x9E3779B9
              for w in (seed_lo, seed_hi, pass_lo, pass_hi, slide_lo, slide_hi):  h = mix(h + w) + 0x9E3779B9
    round i:  k_i = mix(h + (i + 1) * 0x9E3779B9),  i = 0..5
    Feistel over b = max(bit_length(n - 1), 6) bits, high part H of b // 2 bits, low part L of the rest:
              even i:  L ^= mix(H + k_i) mod 2^|L|      odd i:  H ^= mix(L + k_i) mod 2^|H|
    walk:     y = feistel(position);  while y >= n:  y = feistel(y)
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 6
MIN_BITS = 6  # six rounds over fewer bits reach some orders three times as often as others
MAX_ROWS = 1 << 32
_GOLDEN = 0x9E3779B9
_U32 = 0xFFFFFFFF


def _mul32(x: Tensor, c: int) -> Tensor:
    # in two halves: the full product of two uint32 would overflow int64
    return (x * (c & 0xFFFF) + (((x * (c >> 16)) & 0xFFFF) << 16)) & _U32


def _mix(x: Tensor) -> Tensor:
    x = _mul32(x ^ (x >> 16), 0x7FEB352D)
    x = _mul32(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def _words(value: Tensor) -> tuple[Tensor, Tensor]:
    return value & _U32, (value >> 32) & _U32


def _key(seed: int, cycle: Tensor, slide: Tensor) -> Tensor:
    lo, hi = seed & _U32, (seed >> 32) & _U32
    words = [torch.full_like(slide, lo), torch.full_like(slide, hi), *_words(cycle), *_words(slide)]
    h = torch.full_like(slide, _GOLDEN)
    for word in words:
        h = (_mix((h + word) & _U32) + _GOLDEN) & _U32
    return h


def _as_index(value: Tensor | int, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.int64, device=like.device)


def permute(
    positions: Tensor, n: Tensor | int, seed: int, cycle: Tensor | int, slide: Tensor | int
) -> Tensor:
    """The elements at ``positions`` of a permutation of [0, n) keyed by (seed, cycle, slide).

    A bijection of [0, n) for every key. Formula: module docstring.

    Args:
        positions: int64, any shape, each in [0, n). Other values (negative ones, say) come back unchanged.
        n: length of the permutation, 1 .. 2^32; int, or int64 that broadcasts against ``positions``.
        seed: any int, taken modulo 2^64.
        cycle: number of the pass over the slide, int or broadcastable int64.
        slide: slide id, int or broadcastable int64.

    Returns:
        int64, the broadcast shape.
    """
    positions, size, passes, slides = torch.broadcast_tensors(
        positions, _as_index(n, positions), _as_index(cycle, positions), _as_index(slide, positions)
    )
    y = positions.clone()
    inside = (positions >= 0) & (positions < size) & (size > 1)  # one element: nothing to walk
    walking = inside.nonzero(as_tuple=True)
    size, key = size[walking], _key(seed, passes[walking], slides[walking])
    bits = ((size - 1)[:, None] >> torch.arange(33, device=size.device) > 0).sum(-1).clamp(min=MIN_BITS)
    at = y[walking]
    while at.numel():
        at = _feistel(at, bits, key)
        y[walking] = at
        out = at >= size  # only these walk on
        walking = tuple(index[out] for index in walking)
        at, size, bits, key = at[out], size[out], bits[out], key[out]
    return y


def _feistel(y: Tensor, bits: Tensor, key: Tensor) -> Tensor:
    high = bits // 2
    low = bits - high
    high_mask, low_mask = (1 << high) - 1, (1 << low) - 1
    h, l = y >> low, y & low_mask
    for i in range(ROUNDS):
        k = _mix((key + (i + 1) * _GOLDEN) & _U32)
        if i % 2 == 0:
            l = l ^ (_mix((h + k) & _U32) & low_mask)
        else:
            h = h ^ (_mix((l + k) & _U32) & high_mask)
    return (h << low) | l


def visits_per_pass(n: Tensor, m: int) -> Tensor:
    """P = ceil(n / m), at least 1: the visits after which every tile of a slide of n tiles was live once."""
    return torch.div(n + (m - 1), m, rounding_mode="floor").clamp(min=1)


def sample_tiles(lengths: Tensor, slides: Tensor, m: int, cycle: Tensor | int, seed: int) -> Tensor:
    """The live tiles of visit v: the next m of the permutation keyed by (seed, v // P, slide).

    P = ceil(n / m); positions (v mod P) m .. (v mod P) m + m - 1. On the last visit of a pass they wrap
    modulo n, so a visit always has min(m, n) distinct tiles.

    Args:
        lengths: int64 [B], tiles n of each slide.
        slides: int64 [B], slide ids (part of the key).
        m: live tiles a slide.
        cycle: visit number v of each slide, counted from 0; int or int64 [B].
        seed: any int.

    Returns:
        int64 [B, m] tile ids; slots beyond n are -1.
    """
    return tiles_at(lengths, slides, 0, m, m, cycle, seed)


def retrieve_tiles(lengths: Tensor, slides: Tensor, m: int, r: int, cycle: Tensor | int, seed: int) -> Tensor:
    """The r tiles after the live ones of :func:`sample_tiles` (same m, cycle, seed), never overlapping them.

    Positions continue modulo n.

    Returns:
        int64 [B, r] tile ids; at most n - m of a slide, further slots are -1.
    """
    return tiles_at(lengths, slides, m, r, m, cycle, seed)


def tiles_at(
    lengths: Tensor, slides: Tensor, first: int, count: int, m: int, cycle: Tensor | int, seed: int
) -> Tensor:
    """Tiles at positions (v mod P) m + first .. + count - 1, modulo n: int64 [B, count].

    Slots whose offset from the first live position reaches n are -1. Arguments as in :func:`sample_tiles`.
    """
    n = lengths.to(torch.int64)[:, None]
    offsets = torch.arange(first, first + count, device=slides.device)
    visit = _as_index(cycle, slides).expand_as(slides)[:, None]
    visits = visits_per_pass(n, m)
    positions = torch.where(offsets < n, ((visit % visits) * m + offsets) % n.clamp(min=1), -1)
    tiles = permute(positions, n, seed, torch.div(visit, visits, rounding_mode="floor"), slides[:, None])
    return torch.where(positions >= 0, tiles, -1)


def hashed_uniform(first: int, count: int, seed: int, stream: int | Tensor = 0) -> Tensor:
    """Uniform numbers of the rows first .. first + count - 1: float64 [count] in [0, 1), multiples of 2^-32.

    A function of row, seed and stream alone, so rows may come in chunks of any size. On the CPU.

    Args:
        stream: an int; or int64 [B], for numbers [B, count] of as many streams.
    """
    rows = torch.arange(first, first + count)
    start = torch.as_tensor(stream, dtype=torch.int64)[..., None]
    key = _key(seed, start, torch.zeros_like(start))
    lo, hi = _words(rows)
    return _mix((_mix((lo + key) & _U32) + hi * _GOLDEN + key) & _U32).double() / 2.0**32
