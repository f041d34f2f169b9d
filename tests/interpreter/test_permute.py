"""The Triton permutation sampling gives the reference's tile ids, bit for bit."""

from __future__ import annotations

import warnings

import pytest
import torch

from dre_fast.reference.sampling import tiles_at

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from dre_fast.kernels.permute import bank_tiles

SEEDS = (0, -1, -(1 << 63), (1 << 63) - 1, 0x0123456789ABCDEF)


def check(
    lengths: torch.Tensor,
    slides: torch.Tensor,
    first: int,
    count: int,
    m: int,
    cycle: torch.Tensor,
    seed: int,
) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # wrapping products must not look like an accident
        tiles = bank_tiles(lengths, slides, first, count, m, cycle, seed)
    assert tiles.dtype == torch.int64
    assert torch.equal(tiles, tiles_at(lengths, slides, first, count, m, cycle, seed))
    return tiles


@pytest.mark.parametrize("seed", SEEDS)
def test_every_small_slide(seed: int, kernel_device: str) -> None:
    """n = 0 .. 70 in one call: below, at and above the smallest domain of the bijection."""
    n = torch.arange(71, device=kernel_device)
    slides = torch.randint(-(1 << 62), 1 << 62, n.shape).to(kernel_device)
    visits = torch.randint(0, 1 << 40, n.shape).to(kernel_device)
    for first, count, m in ((0, 5, 5), (5, 40, 5), (0, 1, 1), (64, 16, 64)):
        check(n, slides, first, count, m, visits, seed)


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_random_slides(seed: int, kernel_device: str) -> None:
    n = (2.0 ** (32 * torch.rand(60, dtype=torch.float64))).long().clamp(1, 1 << 32).to(kernel_device)
    slides = torch.randint(0, 1 << 20, n.shape).to(kernel_device)
    visits = torch.randint(0, 1 << 50, n.shape).to(kernel_device)
    check(n, slides, 0, 16, 16, visits, seed)
    check(n, slides, 64, 200, 64, visits, seed)


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_sizes_around_powers_of_two(shift: int, kernel_device: str) -> None:
    n = torch.tensor([(1 << b) + shift for b in range(1, 32)], device=kernel_device)
    n = torch.cat([n, n.new_tensor([(1 << 32) - 1, 1 << 32, 1])])
    visit = torch.arange(len(n), device=kernel_device)
    check(n, visit * 3, 0, 33, 33, visit, -5)
    # the last visits of a pass wrap around, and the next pass has another order
    last = (n + 32) // 33 - 1
    for visit in (last, last + 1):
        check(n, visit * 0 + 9, 0, 40, 33, visit, 12)


def test_a_pass_visits_every_tile_once(kernel_device: str) -> None:
    n, m = 257, 16
    visits = torch.arange(-(-n // m), device=kernel_device)
    tiles = check(torch.full_like(visits, n), torch.full_like(visits, 4), 0, m, m, visits, 3)
    assert sorted(tiles.flatten()[:n].tolist()) == list(range(n))


def test_negative_visits_round_down(kernel_device: str) -> None:
    visits = torch.arange(-9, 9, device=kernel_device)
    check(torch.full_like(visits, 20), visits, 0, 8, 8, visits, 1)


def test_slides_shorter_than_asked_for(kernel_device: str) -> None:
    n = torch.tensor([0, 1, 3, 10], device=kernel_device)
    tiles = check(n, n, 0, 8, 8, n * 0 + 2, 5)
    assert (tiles >= 0).sum(1).tolist() == [0, 1, 3, 8]
    retrieved = check(n, n, 8, 8, 8, n * 0 + 2, 5)
    assert (retrieved >= 0).sum(1).tolist() == [0, 0, 0, 2]


def test_nothing_to_do(kernel_device: str) -> None:
    n = torch.tensor([5, 6], device=kernel_device)
    assert bank_tiles(n, n, 0, 0, 4, n, 0).shape == (2, 0)
    assert bank_tiles(n[:0], n[:0], 0, 3, 4, n[:0], 0).shape == (0, 3)


def test_views_and_wrong_arguments(kernel_device: str) -> None:
    n = torch.arange(40, device=kernel_device)
    strided = n.repeat_interleave(2)[::2]
    check(strided, n[:1].expand(40), 0, 4, 4, n[3:4].expand(40), 8)
    with pytest.raises(ValueError, match="lengths must be int64"):
        bank_tiles(n.int(), n, 0, 4, 4, n, 0)
    with pytest.raises(ValueError, match="cycle must be int64"):
        bank_tiles(n, n, 0, 4, 4, n[:3], 0)
    with pytest.raises(ValueError, match="m >= 1"):
        bank_tiles(n, n, 0, 4, 0, n, 0)
