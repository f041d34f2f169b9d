"""Rows by index, stored rows and normalisation on load: the encodings of the rows they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dre_fast import reference
from dre_fast.reference import encode, soft
from dre_fast.reference import rows as row_sources
from dre_fast.reference.quantize import dequantize, has_scale, quantize
from dre_fast.reference.rows import l2_normalize, l2_normalize_backward

K, D = 6, 10
INDEX = torch.tensor([3, -1, 19, 3, 0, 7, -1, 8, 12, 5])
CU = torch.tensor([0, 4, 4, 9])  # the last entry is in no bag
SOFT: dict[str, dict[str, Tensor]] = {
    "scale": {"scale": torch.rand(K).double() + 0.2},
    "weight": {"weight": torch.randn(K, D).double()},
    "weight+bias": {"weight": torch.randn(K, D).double(), "bias": torch.randn(K).double()},
}


def plain_bags(rows: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
    """The rows INDEX and CU name, written out one after the other, and their offsets."""
    taken = [[i for i in INDEX[a:b].tolist() if i >= 0] for a, b in ((0, 4), (4, 4), (4, 9))]
    flat = rows[torch.tensor([i for bag in taken for i in bag])]
    return l2_normalize(flat) if unit else flat, torch.tensor([0, 3, 3, 7])


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sources, "_CHUNK_SCORES", 3 * K)
    monkeypatch.setattr(soft, "_CHUNK_ENTRIES", 3 * max(K, D))


@pytest.mark.parametrize("unit", [False, True])
def test_hard_rows_by_index(unit: bool) -> None:
    x, codebook = torch.randn(20, D).double(), torch.randn(K, D).double()
    V, counts, codes, distances = reference.hard_encode(x, codebook, CU, INDEX, unit=unit, distances=True)
    flat, cu = plain_bags(x, unit)
    expected = reference.hard_encode(flat, codebook, cu)
    torch.testing.assert_close(V, expected[0])
    assert torch.equal(counts, expected[1])
    read = (INDEX >= 0) & (torch.arange(10) < 9)
    assert torch.equal(codes[read], expected[2])
    assert (codes[~read] == -1).all()
    torch.testing.assert_close(distances[read], (flat - codebook[expected[2]]).square().sum(1))
    assert (distances[~read] == 0).all()
    assert expected[3].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32], ids=str)
def test_stored_rows(dtype: torch.dtype) -> None:
    q, scale = quantize(l2_normalize(torch.randn(20, D)), dtype)
    rows = dequantize(q, scale)
    padded = torch.cat([q, q[:, :6]], 1) if dtype != torch.float8_e4m3fn else torch.cat([q, q], 1)
    row_scale = scale if has_scale(dtype) else None
    codebook = torch.randn(K, D)
    for index, cu in ((INDEX, CU), (None, torch.tensor([0, 5, 20]))):
        expected = reference.hard_encode(rows, codebook, cu, index, distances=True)
        found = reference.hard_encode(padded, codebook, cu, index, row_scale, distances=True)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        parameters = (torch.rand(K) + 0.2, None, None)
        for one, other in zip(
            reference.soft_encode(padded, codebook, cu, *parameters, index, row_scale),
            reference.soft_encode(rows, codebook, cu, *parameters, index),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_known_codes_are_used_and_minus_one_skips() -> None:
    x, codebook = torch.randn(20, D), torch.randn(K, D)
    row_codes = torch.arange(20, dtype=torch.int16) % K
    row_codes[3] = -1
    V, counts, codes, _ = reference.hard_encode(x, codebook, CU, INDEX, row_codes=row_codes)
    assert codes.tolist() == [-1, -1, 19 % K, -1, 0, 1, -1, 2, 0, -1]
    assert counts.sum(1).tolist() == [1, 0, 4]
    torch.testing.assert_close(V[0, 19 % K], x[19] - codebook[19 % K])
    torch.testing.assert_close(V[2, 0], x[0] + x[12] - 2 * codebook[0])


def test_an_empty_store_with_every_row_skipped() -> None:
    codebook, index = torch.randn(K, D), torch.full((4,), -1)
    V, counts, codes, distances = reference.hard_encode(
        torch.randn(0, D), codebook, torch.tensor([0, 4]), index, None, torch.zeros(0).short(), True, True
    )
    assert not V.any()
    assert not counts.any()
    assert (codes == -1).all()
    assert not distances.any()


@pytest.mark.parametrize("unit", [False, True])
def test_hard_gradient(unit: bool) -> None:
    x = torch.randn(20, D, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(K, D).double()
    V, _, codes, _ = reference.hard_encode(x, codebook, CU, INDEX, unit=unit)
    grad = torch.randn_like(V)
    wanted = torch.autograd.grad(V, x, grad)[0]
    with torch.no_grad():
        d_rows = encode.hard_encode_backward(grad, codes, CU, x, INDEX, unit)
    found = torch.zeros_like(x).index_add_(0, INDEX.clamp(min=0), d_rows)
    torch.testing.assert_close(found, wanted)
    assert (d_rows[codes < 0] == 0).all()


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("kind", SOFT)
def test_soft_rows_by_index_and_gradients(kind: str, unit: bool) -> None:
    x = torch.randn(20, D, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(K, D, dtype=torch.float64, requires_grad=True)
    p: dict[str, Any] = {name: value.clone().requires_grad_() for name, value in SOFT[kind].items()}
    V, mass = reference.soft_encode(x, codebook, CU, **p, index=INDEX, unit=unit)
    flat, cu = plain_bags(x, unit)
    expected = reference.soft_encode(flat, codebook, cu, **p)
    for one, other in zip((V, mass), expected, strict=True):
        torch.testing.assert_close(one, other)
    grads = torch.randn_like(V), torch.randn_like(mass)
    wanted = torch.autograd.grad([V, mass], [x, codebook, *p.values()], grads)
    with torch.no_grad():
        found = list(encode.soft_encode_backward(*grads, x, codebook, CU, mass, **p, index=INDEX, unit=unit))
        rowless = encode.soft_encode_backward(
            *grads, x, codebook, CU, mass, **p, index=INDEX, unit=unit, rows=False
        )
    assert rowless[0].shape == (0,)
    assert all(torch.equal(one, other) for one, other in zip(rowless[1:], found[1:], strict=True))
    found[0] = torch.zeros_like(x).index_add_(0, INDEX.clamp(min=0), found[0])
    for one, other in zip([g for g in found if g.numel()], wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", [0.0, 1e-13, 2e-12, 1e-3, 1.0, 1e30])
def test_gradient_of_the_row_norm(size: float) -> None:
    x = (l2_normalize(torch.randn(5, D).double()) * size).requires_grad_()
    grad = torch.randn(5, D).double()
    wanted = torch.autograd.grad(l2_normalize(x), x, grad)[0]
    torch.testing.assert_close(l2_normalize_backward(grad, x.detach()), wanted, rtol=1e-6, atol=0)
