"""Fixed-point sums: associative, exact, reversible."""

from __future__ import annotations

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from dre_fast.reference.fixed_point import accumulate_, from_fixed, to_fixed


@given(st.floats(-1, 1, width=32))
def test_to_fixed_is_the_rounded_product(z: float) -> None:
    # Python's round of a Fraction is exact and half to even
    assert int(to_fixed(torch.tensor([z]))) == round(Fraction(z) * 2**24)


def test_ties_go_to_even_and_the_range_ends_are_exact() -> None:
    step = 2.0**-24
    z = torch.tensor(
        [0.5 * step, 1.5 * step, 2.5 * step, -0.5 * step, -1.5 * step, 1.0, -1.0], dtype=torch.float64
    )
    assert to_fixed(z).tolist() == [0, 2, 2, 0, -2, 2**24, -(2**24)]
    assert torch.equal(from_fixed(to_fixed(z[-2:])), z[-2:])


def test_error_is_at_most_half_a_step() -> None:
    z = torch.rand(10_000, dtype=torch.float64) * 2 - 1
    assert (from_fixed(to_fixed(z)) - z).abs().max() <= 2.0**-25


def test_order_does_not_matter_and_subtraction_undoes() -> None:
    rows, slide, code = (
        torch.randn(500, 9).clamp(-1, 1),
        torch.randint(0, 3, (500,)),
        torch.randint(0, 4, (500,)),
    )
    sums, counts = torch.zeros(3, 4, 9, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)
    accumulate_(sums, counts, slide, code, rows)

    shuffled, n = torch.zeros_like(sums), torch.zeros_like(counts)
    order = torch.randperm(500)
    for part in order.split(37):
        accumulate_(shuffled, n, slide[part], code[part].short(), rows[part])
    assert torch.equal(shuffled, sums)
    assert torch.equal(n, counts)
    assert int(n.sum()) == 500

    accumulate_(sums, counts, slide, code, rows, sign=-1)
    assert not sums.any()
    assert not counts.any()


def test_sums_beyond_2_to_31_do_not_wrap() -> None:
    sums, counts = torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    many = torch.zeros(1000, dtype=torch.int64)
    accumulate_(sums, counts, many, many, torch.ones(1000, 1))
    assert int(sums) == 1000 * 2**24
