"""The numerics contract of the registered operations on the CPU, forward and every gradient, over the size grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.registry import ROW_COUNTS, SLOW_ROW_COUNTS
from dre_fast import reference
from dre_fast.ops import encode as ops
from error_rule import within_error_rule

SIZES = [(1, 1), (1, 384), (2, 7), (7, 33), (17, 1), (64, 385), (64, 384), (100, 150), (130, 513), (200, 64)]
LARGE = [(1024, 33), (3, 2048), (1024, 520), (1000, 2047)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [[0], [0, 0, 5, 0], [0, 200, 0, 300], [1] * 40, [500, 1, 2, 3, 500], [3, 5, 2]]


def make(lengths: list[int], words: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of about unit norm around random unit codewords, the codebook, the offsets."""
    codebook = normalize(torch.randn(words, dim), dim=1)
    rows = codebook[torch.randint(words, (sum(lengths),))] + torch.randn(sum(lengths), dim) / dim**0.5
    return rows.to(dtype), codebook, torch.tensor([0, *lengths]).cumsum(0)


def given_codes(x: Tensor, codebook: Tensor, cu: Tensor, codes: Tensor) -> Tensor:
    """V of rows with known codes as A^T X - diag(sum A) C, in the dtype of the arguments; differentiable."""
    bags, words = len(cu) - 1, codebook.shape[0]
    bag = torch.repeat_interleave(torch.arange(bags), cu.diff())
    hot = torch.zeros(len(x), bags * words, dtype=x.dtype)
    hot[torch.arange(len(x)), bag * words + codes] = 1
    sums = (hot.T @ x).view(bags, words, -1)
    return sums - hot.sum(0).view(bags, words, 1) * codebook


def check_hard(x: Tensor, codebook: Tensor, cu: Tensor, unit: bool = False) -> None:
    leaf, words = x.clone().requires_grad_(), codebook.clone().requires_grad_()
    V, counts, codes, distances = ops.hard_encode(leaf, words, cu, unit=unit, distances=True)
    again = ops.hard_encode(x, codebook, cu, unit=unit, distances=True)
    assert all(torch.equal(a, b) for a, b in zip((V, counts, codes, distances), again, strict=True))
    assert V.dtype == torch.float32
    grad = torch.randn_like(V)
    d_x, d_codebook = torch.autograd.grad(V, (leaf, words), grad)

    rows = reference.l2_normalize(x) if unit else x.float()
    assert torch.equal(codes, reference.hard_assign(rows, codebook)), "codes differ from the reference"
    results: list[tuple[Tensor, ...]] = []
    for dtype in (torch.float32, torch.float64):
        source, c = x.to(dtype).requires_grad_(), codebook.to(dtype).requires_grad_()
        used = reference.l2_normalize(source) if unit else source
        out = given_codes(used, c, cu, codes)
        results.append(
            (
                out.detach(),
                (used.detach() - c.detach()[codes]).square().sum(1),
                *torch.autograd.grad(out, (source, c), grad.to(dtype)),
            )
        )
    # a gradient of half precision is rounded to it: one unit in its last place
    eps = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0.0
    for name, got, plain, exact in zip(
        ("V", "distances", "d_x", "d_codebook"),
        (V.detach(), distances, d_x, d_codebook),
        *results,
        strict=True,
    ):
        slack = 1e-6 + (eps * float(exact.abs().max()) if name == "d_x" and exact.numel() else 0.0)
        within_error_rule(got, plain, exact, slack, name)


def check_soft(x: Tensor, codebook: Tensor, cu: Tensor, kind: str, unit: bool = False) -> None:
    words, dim = codebook.shape
    parameters = {
        "scale": (torch.rand(words) * 4 + 1, None, None),
        "weight": (None, 4 * codebook + 0.1 * torch.randn(words, dim), torch.randn(words)),
        "weight only": (None, 4 * codebook, None),
    }[kind]
    leaves = [x.clone(), codebook.clone(), *(p.clone() for p in parameters if p is not None)]
    results: list[list[Tensor]] = []
    grads: list[Tensor] = []
    for dtype in (None, torch.float32, torch.float64):
        given = [(leaf if dtype is None else leaf.to(dtype)).clone().requires_grad_() for leaf in leaves]
        rest = iter(given[2:])
        options = [None if p is None else next(rest) for p in parameters]
        if dtype is None:
            V, mass = ops.soft_encode(given[0], given[1], cu, *options, unit=unit)
            grads = [torch.randn_like(V), torch.randn_like(mass)]
            again = ops.soft_encode(given[0], given[1], cu, *options, unit=unit)
            assert torch.equal(V, again[0])
            assert torch.equal(mass, again[1])
        else:
            V, mass = reference.soft_encode(given[0], given[1], cu, *options, unit=unit)
        loss = (V * grads[0].to(V.dtype)).sum() + (mass * grads[1].to(V.dtype)).sum()
        # without rows nothing depends on the assignment
        found = torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)
        results.append([V.detach(), mass.detach(), *found])
    eps = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0.0
    names = ("V", "mass", "d_x", "d_codebook", "d_parameter 1", "d_parameter 2")
    for name, got, plain, exact in zip(names, *results):
        scale = float(exact.abs().max()) if exact.numel() else 0.0
        within_error_rule(got, plain, exact, 1e-6 * (1 + scale) + eps * scale * (name == "d_x"), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("words", "dim"), SIZES)
def test_hard_sizes(words: int, dim: int, dtype: torch.dtype) -> None:
    check_hard(*make([70, 0, 60], words, dim, dtype))
    check_hard(*make([70, 0, 60], words, dim, dtype), unit=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_hard_row_counts(rows: int, dtype: torch.dtype) -> None:
    check_hard(*make([rows], 16, 64, dtype))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_hard_bags(lengths: list[int]) -> None:
    check_hard(*make(lengths, 8, 48, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize(("words", "dim"), LARGE)
def test_hard_largest_sizes(words: int, dim: int) -> None:
    check_hard(*make([20, 15], words, dim, torch.float32))
    check_hard(*make([20, 15], words, dim, torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("rows", SLOW_ROW_COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_many_rows(rows: int, dtype: torch.dtype) -> None:
    check_hard(*make([rows - 40_000, 0, 40_000], 8, 24, dtype))


@pytest.mark.parametrize("kind", ["scale", "weight", "weight only"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("words", "dim"), SIZES[:8])
def test_soft_sizes(words: int, dim: int, dtype: torch.dtype, kind: str) -> None:
    check_soft(*make([70, 0, 60], words, dim, dtype), kind)
    check_soft(*make([70, 0, 60], words, dim, dtype), kind, unit=True)


@pytest.mark.parametrize("kind", ["scale", "weight"])
@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_soft_row_counts(rows: int, kind: str) -> None:
    check_soft(*make([rows], 16, 64, torch.float32), kind)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_soft_bags(lengths: list[int]) -> None:
    check_soft(*make(lengths, 8, 48, torch.float32), "scale")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scale", "weight"])
@pytest.mark.parametrize(("words", "dim"), LARGE)
def test_soft_largest_sizes(words: int, dim: int, kind: str) -> None:
    check_soft(*make([20, 15], words, dim, torch.float32), kind)


@pytest.mark.slow
@pytest.mark.parametrize("rows", SLOW_ROW_COUNTS)
def test_soft_many_rows(rows: int) -> None:
    check_soft(*make([rows - 40_000, 0, 40_000], 8, 24, torch.float32), "weight")
