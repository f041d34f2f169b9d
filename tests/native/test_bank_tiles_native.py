"""The C++ permutation sampling gives the reference's tile ids, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dre_fast.ops import bank, native
from dre_fast.reference.sampling import tiles_at

if not native.available():
    pytest.skip(f"needs the C++ ops: {native.why_not()}", allow_module_level=True)

SEEDS = (0, -1, -(1 << 63), (1 << 63) - 1, 0x0123456789ABCDEF)


def check(lengths: Tensor, slides: Tensor, first: int, count: int, m: int, cycle: Tensor, seed: int) -> None:
    tiles = torch.ops.dre_fast_native.bank_tiles.default(lengths, slides, first, count, m, cycle, seed)
    assert tiles.dtype == torch.int64
    assert torch.equal(tiles, tiles_at(lengths, slides, first, count, m, cycle, seed))


def test_it_is_what_runs_on_the_cpu() -> None:
    assert bank.backend("bank_tiles") == "C++"


@pytest.mark.parametrize("seed", SEEDS)
def test_every_small_slide(seed: int) -> None:
    """n = 0 .. 70: below, at and above the smallest domain; visits before 0 too, whose quotient rounds down."""
    n = torch.arange(71)
    slides = torch.randint(-(1 << 62), 1 << 62, n.shape)
    for visits in (torch.randint(0, 1 << 40, n.shape), torch.randint(-1000, 0, n.shape)):
        for first, count, m in ((0, 5, 5), (5, 40, 5), (0, 1, 1), (64, 16, 64), (0, 0, 3), (90, 4, 2)):
            check(n, slides, first, count, m, visits, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_large_slides(seed: int) -> None:
    """Around every power of two to 2^32, the most a slide can have."""
    powers = torch.tensor([1 << b for b in range(1, 33)])
    n = torch.cat([powers - 1, powers, powers[:-1] + 1])
    slides = torch.randint(0, 1 << 40, n.shape)
    visits = torch.randint(0, 1 << 50, n.shape)
    check(n, slides, 0, 33, 33, visits, seed)
    check(n, slides, 64, 200, 64, visits, seed)


def test_lengths_below_zero_have_no_tiles_wherever_one_begins() -> None:
    """Their difference to the first position is more than an int64 holds."""
    n = torch.tensor([torch.iinfo(torch.int64).min, -5, 4])
    check(n, torch.arange(3), 1, 2, 1, torch.arange(3), 5)
    check(n, torch.arange(3), (1 << 63) - 9, 2, 1, torch.arange(3), 5)


def test_strided_arguments() -> None:
    lengths, slides, visits = (
        torch.arange(30, 36).repeat_interleave(2),
        torch.arange(12),
        torch.arange(12) * 5,
    )
    found = bank.tiles(lengths[::2], slides[::2], 3, 9, 3, visits[::2], 11)
    assert torch.equal(found, tiles_at(lengths[::2], slides[::2], 3, 9, 3, visits[::2], 11))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 0}, "m >= 1; got 0, 4 and 0"),
        ({"first": -1}, "first and count must be >= 0"),
        ({"cycle": torch.zeros(2, dtype=torch.int64)}, "one entry for each of the 3 slides"),
        ({"lengths": torch.ones(3)}, "lengths must be int64"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    three = torch.full((3,), 9)
    arguments = {"lengths": three, "slides": three, "first": 0, "count": 4, "m": 2, "cycle": three, "seed": 1}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dre_fast_native.bank_tiles.default(*(arguments | change).values())
