"""What residual_encode returns on request, and rows normalised as they are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from dre_fast import ResidualEncoding, residual_encode
from dre_fast.reference import l2_normalize

SOFT = {"assignment": "soft", "scale": torch.tensor([0.5, 1.0, 2.0, 0.1])}


@pytest.fixture
def codebook() -> Tensor:
    return torch.randn(4, 6)


def nearest(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    distance = (x[..., None, :] - codebook).square().sum(-1)
    return distance.argmin(-1), distance.amin(-1)


def test_codes_and_distances_have_the_shape_of_the_rows(codebook: Tensor) -> None:
    x = torch.randn(15, 6)
    V, codes, distances = residual_encode(x, codebook, return_codes=True, return_distances=True)
    assert V.shape == (1, 4, 6)
    assert torch.equal(codes, nearest(x, codebook)[0])
    torch.testing.assert_close(distances, nearest(x, codebook)[1])

    padded, mask = torch.randn(3, 5, 6), torch.rand(3, 5) > 0.3
    V, counts, codes = residual_encode(padded, codebook, mask=mask, return_counts=True, return_codes=True)
    assert torch.equal(codes, torch.where(mask, nearest(padded, codebook)[0], -1))
    assert torch.equal(counts.sum(1), mask.sum(1))
    index = torch.tensor([[3, -1, 4], [-1, 3, 3]])
    V, distances = residual_encode(x, codebook, index=index, return_distances=True)
    expected = nearest(x, codebook)[1][index.clamp(min=0)]
    torch.testing.assert_close(distances, torch.where(index >= 0, expected, 0.0))
    assert not distances.requires_grad


def test_inertia_is_the_sum_of_distances(codebook: Tensor) -> None:
    x, cu = torch.randn(15, 6), torch.tensor([0, 4, 4, 15])
    distances = residual_encode(x, codebook, cu_seqlens=cu, return_distances=True)[1]
    inertia = torch.segment_reduce(distances, "sum", offsets=cu)
    expected = [float(nearest(x[a:b], codebook)[1].sum()) for a, b in ((0, 4), (4, 4), (4, 15))]
    torch.testing.assert_close(inertia, torch.tensor(expected))


def test_soft_assignment_has_neither(codebook: Tensor) -> None:
    for asked in ("return_codes", "return_distances"):
        with pytest.raises(ValueError, match="belong to assignment='hard'"):
            residual_encode(torch.randn(3, 6), codebook, **SOFT, **{asked: True})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("layout", ["plain", "ragged", "mask", "index"])
def test_rows_normalised_as_they_are_read(codebook: Tensor, options: dict[str, Any], layout: str) -> None:
    rows = torch.randn(4, 5, 6) * 7
    x = (rows if layout == "mask" else rows.view(20, 6)).clone().requires_grad_()
    arguments: dict[str, Any] = {
        "plain": {},
        "ragged": {"cu_seqlens": torch.tensor([0, 3, 20])},
        "mask": {"mask": torch.rand(4, 5) > 0.4},
        "index": {"index": torch.tensor([[3, 3, -1, 19], [0, 1, 3, -1]])},
    }[layout]
    grads = []
    outs = []
    for given, flag in ((x, True), (l2_normalize(x), False)):
        out = residual_encode(given, codebook, normalize_rows=flag, **arguments, **options)
        outs.append(out.detach())
        grads.append(torch.autograd.grad(out.sin().sum(), x)[0])
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["hard", "scale", "weight"])
@pytest.mark.parametrize("layout", ["plain", "mask", "index"])
def test_gradcheck_through_the_row_norm(kind: str, layout: str) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x = leaf(2, 5, 3) if layout == "mask" else leaf(10, 3)
    arguments: dict[str, Any] = {
        "plain": {},
        "mask": {"mask": torch.rand(2, 5) > 0.3},
        "index": {"index": torch.tensor([0, 0, -1, 4, 9, 7])},
    }[layout]
    parameters = {"hard": [], "scale": [torch.rand(4).double().add(0.3).requires_grad_()]}.get(
        kind, [leaf(4, 3), leaf(4)]
    )
    names = {"hard": [], "scale": ["scale"]}.get(kind, ["weight", "bias"])
    options: dict[str, Any] = {} if kind == "hard" else {"assignment": "soft"}

    def encode(x: Tensor, codebook: Tensor, *given: Tensor) -> Tensor:
        return residual_encode(  # type: ignore[no-any-return]
            x,
            codebook,
            normalize=("intra", "l2"),
            normalize_rows=True,
            **arguments,
            **options,
            **dict(zip(names, given)),
        )

    assert gradcheck(encode, (x, leaf(4, 3), *parameters))


def test_module_normalises_rows_in_fit_and_forward() -> None:
    rows = torch.randn(200, 6) * torch.rand(200, 1) * 9
    module = ResidualEncoding(6, 5, normalize_rows=True)
    other = ResidualEncoding(6, 5)
    assert module.fit(rows) == pytest.approx(other.fit(l2_normalize(rows)))
    few = rows[:37]  # of all rows the residuals to a fitted codebook sum to nothing but rounding
    torch.testing.assert_close(module(few), other(l2_normalize(few)))
    assert "normalize_rows=True" in repr(module)
