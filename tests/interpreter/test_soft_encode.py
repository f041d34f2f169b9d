"""The Triton soft encode against the float64 reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from dre_fast.kernels import config, soft_config, soft_encode
from encode_check import make_bags, stored
from soft_check import KINDS, check, parameters, source

SCALED = (torch.int8, torch.float8_e4m3fn)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, *SCALED)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 128 fp32 rows for up to 16 codewords, of 32 others for up to 64."""
    monkeypatch.setattr(soft_config, "_SCRATCH", 128 * 16)
    soft_config.plan.cache_clear()
    yield
    soft_config.plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("codewords", "dim"), [(1, 1), (1, 64), (5, 1), (5, 33), (5, 130), (64, 33), (64, 64), (70, 130)]
)
def test_sizes(codewords: int, dim: int, dtype: torch.dtype, kernel_device: str) -> None:
    x, codebook, bounds = make_bags([40, 33], dim, codewords, dtype, kernel_device)
    kind = "scale" if (codewords + dim) % 2 else "weight and bias"
    check(x, codebook, bounds, parameters(kind, codebook))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sources_of_rows(kind: str, dtype: torch.dtype, kernel_device: str) -> None:
    """Padded rows by index, some skipped and some read twice; as they are and as unit rows."""
    x, codebook, bounds, index, scale = source(50, [30, 0, 21, 1], 48, 7, dtype, kernel_device, padding=16)
    given = parameters(kind, codebook)
    for unit in (False,) if kind == "weight" else (False, True):
        check(x, codebook, bounds, given, index, scale, unit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_rows_in_order(dtype: torch.dtype, kernel_device: str) -> None:
    x, codebook, bounds, _, scale = source(90, [30, 60], 33, 5, dtype, kernel_device)
    for unit in (False, True):
        check(x, codebook, bounds, parameters("scale", codebook), None, scale, unit)


@pytest.mark.parametrize(
    "lengths", [[0], [1], [0, 0, 5, 0], [0, 150, 0, 0, 120, 0], [1] * 20, [64] * 4, [300, 1, 2, 3, 90]]
)
def test_ragged_and_empty_bags(lengths: list[int], kernel_device: str) -> None:
    x, codebook, bounds = make_bags(lengths, 24, 6, torch.float16, kernel_device)
    given = parameters("weight and bias", codebook)
    V, mass = check(x, codebook, bounds, given)
    empty = torch.tensor(lengths, device=V.device) == 0
    assert (V[empty] == 0).all()
    assert (mass[empty] == 0).all()
    torch.testing.assert_close(mass.sum(1), bounds.diff().float(), atol=0, rtol=1e-5)
    for one, other in zip(
        soft_encode(x, codebook, bounds.int(), **given),
        soft_encode(x, codebook, bounds, **given),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_rows_of_no_bag(kernel_device: str) -> None:
    x, codebook, _ = make_bags([80], 24, 5, torch.float16, kernel_device)
    given = parameters("scale", codebook)
    for bounds in ([0, 50, 70], [0, 64], [0, 0], [0]):
        cu_seqlens = torch.tensor(bounds, device=kernel_device)
        V, mass = check(x, codebook, cu_seqlens, given)
        inside = soft_encode(x[: bounds[-1]], codebook, cu_seqlens, **given)
        torch.testing.assert_close(V, inside[0])
        torch.testing.assert_close(mass, inside[1])
    V, mass = soft_encode(x[:0], codebook, torch.tensor([0, 0], device=kernel_device), **given)
    assert (V == 0).all()
    assert V.shape == (1, 5, 24)
    assert (mass == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_chunks(dtype: torch.dtype, kernel_device: str, small_chunks: None) -> None:
    """Bags that span several chunks, chunks that hold several bags, rows in order and by index."""
    lengths = [3, 290, 0, 20] if dtype == torch.float32 else [3, 70, 0, 5, 4]
    x, codebook, bounds, index, scale = source(sum(lengths), lengths, 16, 5, dtype, kernel_device)
    given = parameters("scale", codebook)
    assert soft_config.plan(config.INTERPRETER, dtype, 5, 16).chunk < sum(lengths) / 2
    check(x, codebook, bounds, given, None, scale, unit=True)
    check(x, codebook, bounds, given, index, scale)


def test_layouts(kernel_device: str) -> None:
    """A strided, a transposed and an unaligned view give what their contiguous copy gives."""
    x, codebook, bounds = make_bags([30, 40], 32, 5, torch.float16, kernel_device)
    given = parameters("weight", codebook)
    expected = check(x, codebook, bounds, given)
    wide = torch.cat([x, x], 1)[:, :32]
    padded = torch.cat([x, torch.full_like(x, float("nan"))], 1)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    for view in (wide, padded, x.T.contiguous().T, shifted):
        for one, other in zip(soft_encode(view, codebook, bounds, **given), expected, strict=True):
            assert torch.equal(one, other)
    every_second = torch.stack([x, x + 1], 1).view(-1, 32)[::2]
    for one, other in zip(soft_encode(every_second, codebook, bounds, **given), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("unit", [False, True])
def test_rows_that_are_not_finite_stay_in_their_bag(bad: float, unit: bool, kernel_device: str) -> None:
    for dtype, kind in ((torch.float32, "scale"), (torch.float16, "weight")):
        x, codebook, bounds = make_bags([30, 40, 50], 24, 6, dtype, kernel_device)
        given = parameters(kind, codebook)
        clean = soft_encode(x, codebook, bounds, **given, unit=unit)
        x[35, 3] = bad
        V, mass = soft_encode(x, codebook, bounds, **given, unit=unit)
        assert V[1].isnan().all()
        assert mass[1].isnan().all()
        assert torch.equal(V[[0, 2]], clean[0][[0, 2]])
        assert torch.equal(mass[[0, 2]], clean[1][[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("kind", ["scale", "weight and bias"])
def test_large_logits(kind: str, dtype: torch.dtype, kernel_device: str) -> None:
    """Assignments near 0 and 1, logits of some thousands: nothing overflows."""
    x, codebook, bounds, index, scale = source(40, [30, 20], 24, 5, dtype, kernel_device)
    V, mass = check(x, codebook, bounds, parameters(kind, codebook, 1e3), index, scale)
    assert V.isfinite().all()
    assert (mass >= 0).all()


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(3e4, torch.float16), (1e4, torch.float32), (1e17, torch.float32), (1e-9, torch.float32)],
    ids=str,
)
def test_huge_and_tiny_rows(size: float, dtype: torch.dtype, kernel_device: str) -> None:
    x, codebook, bounds = make_bags([30, 40], 24, 5, dtype, kernel_device)
    x[::2] *= size
    V, _ = check(x, codebook, bounds, parameters("scale", codebook))
    assert V.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e4, 2e37])
def test_unit_rows_of_any_size(size: float, kernel_device: str) -> None:
    x, codebook, bounds = make_bags([30, 40], 24, 5, torch.float32, kernel_device)
    x[::2] *= size
    x[5] = 0
    for kind in ("scale", "weight"):
        check(x, codebook, bounds, parameters(kind, codebook), unit=True)
    if size <= 1e4:
        check(x.half(), codebook, bounds, parameters("scale", codebook), unit=True)


@pytest.mark.parametrize("dtype", SCALED, ids=str)
@pytest.mark.parametrize("scaled_by", [1e-3, 1.0, 1000.0])
def test_scales(dtype: torch.dtype, scaled_by: float, kernel_device: str) -> None:
    """Scales from those of the smallest rows up to 16, beside a zero row, which has scale 0."""
    rows, codebook, bounds = make_bags([40, 30], 64, 5, torch.float32, kernel_device)
    rows[7] = 0
    x, scale = stored(rows, dtype, scaled_by=scaled_by)
    assert scale is not None
    assert scale[7] == 0
    given = parameters("scale", codebook, 1 / max(scaled_by, 1) ** 2)
    check(x, codebook * scaled_by, bounds, given, None, scale)
    check(x, codebook, bounds, parameters("weight and bias", codebook), None, scale, unit=True)


def test_indices_outside_the_rows_are_not_followed(kernel_device: str) -> None:
    x, codebook, bounds, index, scale = source(40, [30, 60], 24, 5, torch.int8, kernel_device)
    given = parameters("scale", codebook)
    outside = torch.where(index < 0, torch.tensor([-7, 40, 2**40] * 30, device=kernel_device), index)
    for one, other in zip(
        soft_encode(x, codebook, bounds, **given, index=outside, row_scale=scale),
        soft_encode(x, codebook, bounds, **given, index=index, row_scale=scale),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_bad_arguments_are_named(kernel_device: str) -> None:
    x, codebook, bounds = make_bags([8], 16, 4, torch.float32, kernel_device)
    scale, weight = torch.ones(4, device=kernel_device), torch.ones(4, 16, device=kernel_device)
    with pytest.raises(ValueError, match="float64"):
        soft_encode(x.double(), codebook, bounds, scale)
    for given in ({}, {"scale": scale, "weight": weight}, {"scale": scale, "bias": scale}):
        with pytest.raises(ValueError, match="either scale, or weight"):
            soft_encode(x, codebook, bounds, **given)
    with pytest.raises(ValueError, match="scale must be"):
        soft_encode(x, codebook, bounds, scale[:3])
    with pytest.raises(ValueError, match="weight must be"):
        soft_encode(x, codebook, bounds, None, weight[:, :8])
    with pytest.raises(ValueError, match="bias must be"):
        soft_encode(x, codebook, bounds, None, weight, weight)
    with pytest.raises(ValueError, match="index must be int64"):
        soft_encode(x, codebook, bounds, scale, index=bounds.int())
    with pytest.raises(ValueError, match="row_scale"):
        soft_encode(x.to(torch.int8), codebook, bounds, scale)
    with pytest.raises(ValueError, match="P >= D"):
        soft_encode(x[:, :8], codebook, bounds, scale)
    with pytest.raises(ValueError, match="cu_seqlens"):
        soft_encode(x, codebook, bounds.float(), scale)
