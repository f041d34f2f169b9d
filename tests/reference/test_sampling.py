"""The keyed bijection and what sampling makes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dre_fast.reference.sampling import permute, retrieve_tiles, sample_tiles, visits_per_pass

M32 = 0xFFFFFFFF


def scalar_permute(position: int, n: int, seed: int, cycle: int, slide: int) -> int:
    """The formula of the module docstring on Python ints: what a kernel has to do for one position."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & M32
        x ^= x >> 15
        x = x * 0x846CA68B & M32
        return x ^ x >> 16

    h = 0x9E3779B9
    for value in (seed, cycle, slide):
        for word in (value & M32, value >> 32 & M32):
            h = mix(h + word & M32) + 0x9E3779B9 & M32
    keys = [mix(h + (i + 1) * 0x9E3779B9 & M32) for i in range(6)]
    bits = max((n - 1).bit_length(), 6)
    high = bits // 2
    low = bits - high
    y = position
    while n > 1:
        a, b = y >> low, y & (1 << low) - 1
        for i, key in enumerate(keys):
            if i % 2 == 0:
                b ^= mix(a + key & M32) & (1 << low) - 1
            else:
                a ^= mix(b + key & M32) & (1 << high) - 1
        y = a << low | b
        if y < n:
            break
    return y


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 31, 63, 64, 65, 1000, 1023, 1024, 1025, 65537])
@pytest.mark.parametrize("key", [(0, 0, 0), (7, 3, 11), (-1, 2**40, 2**33 + 5)])
def test_permute_is_a_bijection(n: int, key: tuple[int, int, int]) -> None:
    got = permute(torch.arange(n), n, *key)
    assert torch.equal(got.sort().values, torch.arange(n))


@settings(max_examples=60, deadline=None)
@given(
    n=st.one_of(st.integers(1, 300), st.integers(1, 2**32)),
    seed=st.integers(-(2**63), 2**64),
    cycle=st.integers(0, 2**50),
    slide=st.integers(0, 2**50),
    data=st.data(),
)
def test_permute_follows_the_written_formula(
    n: int, seed: int, cycle: int, slide: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4))
    got = permute(torch.tensor(positions), n, seed, cycle, slide).tolist()
    assert got == [scalar_permute(p, n, seed, cycle, slide) for p in positions]


def test_permute_golden_values() -> None:
    # Pinned: stored runs, loaders and kernels rely on these orders.
    assert permute(torch.arange(10), 10, 0, 0, 0).tolist() == [3, 5, 7, 1, 0, 8, 6, 2, 4, 9]
    assert permute(torch.arange(7), 7, 1, 2, 3).tolist() == [6, 1, 5, 4, 2, 0, 3]
    assert permute(torch.tensor([0, 1, 99_999]), 100_000, 42, 5, 17).tolist() == [80722, 75001, 13495]
    large = permute(torch.tensor([0, 2**31, 2**31 + 4]), 2**31 + 5, 123456789012345, 2, 3)
    assert large.tolist() == [577045477, 1688946391, 1564107133]
    assert permute(torch.tensor([0, M32]), 2**32, 9, 0, 1).tolist() == [2209190631, 1816615074]


def test_permute_large_n_is_injective_and_in_range() -> None:
    n = 2**31 + 11
    positions = torch.randint(0, n, (20_000,)).unique()
    got = permute(positions, n, 5, 1, 2)
    assert got.unique().numel() == positions.numel()
    assert int(got.min()) >= 0
    assert int(got.max()) < n


def test_every_part_of_the_key_changes_the_order() -> None:
    n, base = 1000, (3, 4, 5)
    orders = [permute(torch.arange(n), n, *base)]
    for i in range(3):
        for change in (1, 2**32):  # both words of every part count
            key = list(base)
            key[i] += change
            orders.append(permute(torch.arange(n), n, *key))
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 20  # two random orders agree in about one place


def test_permute_looks_uniform() -> None:
    keys = torch.arange(24_000)
    # every order of 5 elements about equally often: chi-square of 119 degrees of freedom, mean 119, sd 15.4
    orders = torch.stack([permute(torch.full_like(keys, p), 5, 1, keys, 9) for p in range(5)])
    ranks = (orders * (5 ** torch.arange(5))[:, None]).sum(0).unique(return_counts=True)[1].double()
    assert ranks.numel() == 120
    assert ((ranks - 200) ** 2 / 200).sum() < 119 + 6 * 15.4
    # the element at each place of a longer list, 99 degrees of freedom
    for position in (0, 1, 50, 99):
        at = torch.bincount(permute(torch.full_like(keys, position), 100, 1, 0, keys), minlength=100).double()
        assert ((at - 240) ** 2 / 240).sum() < 99 + 6 * 14.1


def test_permute_broadcasts_and_passes_other_positions_through() -> None:
    n = torch.tensor([[3], [10]])
    slide = torch.tensor([[0], [1]])
    positions = torch.tensor([[0, 1, -1], [9, 10, 4]])
    got = permute(positions, n, 0, 0, slide)
    assert got[0, 2] == -1
    assert got[1, 1] == 10
    assert got[1, 0] == permute(torch.tensor([9]), 10, 0, 0, 1)


@pytest.mark.parametrize(
    ("n", "m"), [(1, 4), (3, 4), (4, 4), (5, 4), (12, 4), (1000, 64), (1001, 64), (63, 1)]
)
def test_one_pass_visits_every_tile(n: int, m: int) -> None:
    lengths, slides = torch.tensor([n]), torch.tensor([6])
    visits = int(visits_per_pass(lengths, m))
    assert visits == -(-n // m)
    for start in (0, 5 * visits):
        seen = torch.cat([sample_tiles(lengths, slides, m, start + v, 0)[0] for v in range(visits)])
        assert torch.equal(seen[seen >= 0].unique(), torch.arange(n))


def test_a_visit_has_distinct_tiles_and_minus_one_beyond_the_slide() -> None:
    lengths, slides = torch.tensor([3, 10, 100]), torch.tensor([0, 1, 2])
    tiles = sample_tiles(lengths, slides, 8, torch.tensor([4, 1, 12]), 3)
    assert tiles[0, 3:].tolist() == [-1] * 5
    assert sorted(tiles[0, :3].tolist()) == [0, 1, 2]
    for row, n in zip(tiles[1:], (10, 100)):
        assert row.unique().numel() == 8
        assert int(row.min()) >= 0
        assert int(row.max()) < n


def test_passes_have_different_orders() -> None:
    lengths, slides = torch.tensor([64]), torch.tensor([0])
    first, second = (sample_tiles(lengths, slides, 64, v, 0) for v in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("n", "m", "r"), [(10, 4, 3), (10, 4, 6), (10, 4, 20), (3, 4, 5), (1000, 64, 100)])
def test_retrieved_tiles_never_meet_live_ones(n: int, m: int, r: int) -> None:
    lengths, slides = torch.tensor([n]), torch.tensor([2])
    for visit in range(12):
        live = sample_tiles(lengths, slides, m, visit, 1)[0]
        others = retrieve_tiles(lengths, slides, m, r, visit, 1)[0]
        live, found = live[live >= 0], others[others >= 0]
        assert found.numel() == max(min(r, n - m), 0)
        together = torch.cat([live, found])
        assert together.unique().numel() == together.numel()


def test_retrieved_tiles_are_the_next_live_ones() -> None:
    lengths, slides = torch.tensor([100]), torch.tensor([2])
    assert torch.equal(retrieve_tiles(lengths, slides, 10, 10, 3, 1), sample_tiles(lengths, slides, 10, 4, 1))


def test_a_batch_is_its_slides_one_by_one() -> None:
    lengths, slides, visits = torch.tensor([5, 77, 1000]), torch.tensor([9, 4, 4]), torch.tensor([0, 3, 70])
    together = sample_tiles(lengths, slides, 16, visits, 8)
    for i in range(3):
        alone = sample_tiles(lengths[i : i + 1], slides[i : i + 1], 16, int(visits[i]), 8)
        assert torch.equal(together[i : i + 1], alone)
