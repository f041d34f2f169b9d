"""The Triton backward of soft encoding against the float64 reference: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dre_fast.reference import soft as reference

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from dre_fast.kernels import config, soft_config, soft_encode_backward
from encode_check import make_bags, read_rows, stored
from soft_check import GRADIENTS, KINDS, check_backward, parameters, source

SCALED = (torch.int8, torch.float8_e4m3fn)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, *SCALED)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 128 fp32 rows for up to 16 codewords, of 32 others for up to 64."""
    monkeypatch.setattr(soft_config, "_SCRATCH", 128 * 16)
    soft_config.plan.cache_clear()
    yield
    soft_config.plan.cache_clear()


def gradients(
    x: torch.Tensor,
    codebook: torch.Tensor,
    bounds: torch.Tensor,
    given: dict[str, torch.Tensor],
    **options: object,
) -> dict[str, torch.Tensor]:
    """The kernel's gradients for random gradients of V and mass, the same ones for every call on as many bags."""
    fixed = torch.Generator().manual_seed(3)
    bags, (words, dim) = len(bounds) - 1, codebook.shape
    grad = torch.randn(bags, words, dim, generator=fixed).to(x.device)
    grad_mass = torch.randn(bags, words, generator=fixed).to(x.device)
    mass = torch.rand(bags, words, generator=fixed).to(x.device)
    found = soft_encode_backward(grad, grad_mass, x, codebook, bounds, mass, **given, **options)
    return dict(zip(GRADIENTS, found, strict=True))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name in GRADIENTS:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("codewords", "dim"), [(1, 1), (1, 64), (5, 1), (5, 33), (5, 130), (64, 33), (64, 64), (70, 130)]
)
def test_sizes(codewords: int, dim: int, dtype: torch.dtype, kernel_device: str) -> None:
    x, codebook, bounds = make_bags([25, 18], dim, codewords, dtype, kernel_device)
    x = (x.float() * (torch.rand(43, 1) + 0.5).to(x.device)).to(dtype)  # of several lengths, also where D = 1
    kind = "weight and bias" if (codewords + dim) % 2 else "scale"
    check_backward(x, codebook, bounds, parameters(kind, codebook))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sources_of_rows(kind: str, dtype: torch.dtype, kernel_device: str) -> None:
    """Padded rows by index, some skipped and some read twice; as they are and as unit rows."""
    x, codebook, bounds, index, scale = source(40, [20, 0, 17, 1], 48, 7, dtype, kernel_device, padding=16)
    given = parameters(kind, codebook)
    for unit in (False,) if kind == "weight" else (False, True):
        found = check_backward(x, codebook, bounds, given, index, scale, unit)
        assert (found["rows"][index < 0] == 0).all()


@pytest.mark.parametrize(
    "lengths", [[0], [0, 0, 5, 0], [0, 90, 0, 0, 70, 0], [1] * 12, [64, 64], [130, 1, 2, 3]]
)
def test_ragged_and_empty_bags(lengths: list[int], kernel_device: str) -> None:
    x, codebook, bounds = make_bags(lengths, 24, 6, torch.float16, kernel_device)
    given = parameters("weight and bias", codebook)
    check_backward(x, codebook, bounds, given)
    same(gradients(x, codebook, bounds, given), gradients(x, codebook, bounds.int(), given))


def test_rows_of_no_bag(kernel_device: str) -> None:
    x, codebook, _ = make_bags([80], 24, 5, torch.float16, kernel_device)
    given = parameters("scale", codebook)
    for bounds in ([0, 50, 70], [0, 64], [0, 0]):
        cu_seqlens = torch.tensor(bounds, device=kernel_device)
        found = check_backward(x, codebook, cu_seqlens, given)
        assert (found["rows"][bounds[-1] :] == 0).all()
    none = gradients(x, codebook, torch.tensor([0], device=kernel_device), given)
    assert all((none[name] == 0).all() for name in GRADIENTS)
    assert none["rows"].shape == (80, 24)
    empty = gradients(x[:0], codebook, torch.tensor([0, 0], device=kernel_device), given)
    assert empty["rows"].shape == (0, 24)
    assert (empty["scale"] == 0).all()
    assert not (empty["codebook"] == 0).all()  # of the mass that was passed in


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_chunks(dtype: torch.dtype, kernel_device: str, small_chunks: None) -> None:
    """Bags that span several chunks, chunks that hold several bags, rows in order and by index."""
    lengths = [3, 290, 0, 20] if dtype == torch.float32 else [3, 70, 0, 5, 4]
    x, codebook, bounds, index, scale = source(sum(lengths), lengths, 16, 5, dtype, kernel_device)
    assert soft_config.plan(config.INTERPRETER, dtype, 5, 16).chunk < sum(lengths) / 2
    given = parameters("scale", codebook)
    check_backward(x, codebook, bounds, given, None, scale, unit=True)
    check_backward(x, codebook, bounds, given, index, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_without_the_rows_gradient(dtype: torch.dtype, kernel_device: str) -> None:
    x, codebook, bounds, index, scale = source(20, [20, 30], 24, 5, dtype, kernel_device)
    for kind in ("scale", "weight and bias"):
        given, options = parameters(kind, codebook), {"index": index, "row_scale": scale, "unit": True}
        found = gradients(x, codebook, bounds, given, **options)
        without = gradients(x, codebook, bounds, given, **options, rows=False)
        assert without["rows"].shape == (0,)
        same({**found, "rows": without["rows"]}, without)


def test_layouts(kernel_device: str) -> None:
    x, codebook, bounds = make_bags([30, 20], 32, 5, torch.float16, kernel_device)
    given = parameters("scale", codebook)
    expected = gradients(x, codebook, bounds, given, unit=True)
    padded = torch.cat([x, torch.full_like(x, float("nan"))], 1)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    every_second = torch.stack([x, x + 1], 1).view(-1, 32)[::2]
    for view in (padded, x.T.contiguous().T, shifted, every_second):
        same(gradients(view, codebook, bounds, given, unit=True), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("unit", [False, True])
def test_rows_that_are_not_finite(bad: float, unit: bool, kernel_device: str) -> None:
    """Their own gradient and those of the parameters are not finite; every other row's is untouched."""
    for dtype, kind in ((torch.float32, "scale"), (torch.float16, "weight and bias")):
        x, codebook, bounds = make_bags([20, 30], 24, 6, dtype, kernel_device)
        given = parameters(kind, codebook)
        clean = gradients(x, codebook, bounds, given, unit=unit)
        x[25, 3] = bad
        found = gradients(x, codebook, bounds, given, unit=unit)
        others = torch.arange(50, device=x.device) != 25
        assert torch.equal(found["rows"][others], clean["rows"][others])
        assert unit or not found["rows"][25].isfinite().any()
        for name in given:
            assert not found[name].isfinite().any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["scale", "weight and bias"])
def test_large_logits(kind: str, dtype: torch.dtype, kernel_device: str) -> None:
    x, codebook, bounds, index, scale = source(40, [30, 20], 24, 5, dtype, kernel_device)
    found = check_backward(x, codebook, bounds, parameters(kind, codebook, 1e3), index, scale)
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("size", [1e-9, 1e4, 2e37])
def test_unit_rows_of_any_size(size: float, kernel_device: str) -> None:
    """The gradient of a row is 1 / its norm as large, so rows of each size are compared by themselves."""
    x, codebook, bounds = make_bags([20, 30], 24, 5, torch.float32, kernel_device)
    x *= size
    x[5] = 0
    x[6] *= 1e-13 / size
    given = parameters("scale", codebook)
    found = gradients(x, codebook, bounds, given, unit=True)
    assert (found["rows"][5:7] == 0).all()
    ones = x / size
    ones[5] = 0
    ones[6] = x[6]
    unscaled = gradients(ones, codebook, bounds, given, unit=True)
    torch.testing.assert_close(found["rows"] * size, unscaled["rows"], rtol=1e-5, atol=1e-5)
    for name in ("codebook", "scale"):
        torch.testing.assert_close(found[name], unscaled[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", SCALED, ids=str)
@pytest.mark.parametrize("scaled_by", [1e-3, 100.0])
def test_scales(dtype: torch.dtype, scaled_by: float, kernel_device: str) -> None:
    rows, codebook, bounds = make_bags([30, 20], 64, 5, torch.float32, kernel_device)
    rows[7] = 0
    x, scale = stored(rows, dtype, scaled_by=scaled_by)
    assert scale is not None
    assert scale[7] == 0
    given = parameters("scale", codebook, 1 / max(scaled_by, 1) ** 2)
    check_backward(x, codebook * scaled_by, bounds, given, None, scale)
    found = check_backward(x, codebook, bounds, parameters("weight", codebook), None, scale, unit=True)
    assert (found["rows"][7] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, *SCALED], ids=str)
@pytest.mark.parametrize("kind", ["scale", "weight"])
def test_documented_error_of_the_rows_gradient(kind: str, dtype: torch.dtype, kernel_device: str) -> None:
    """Entry by entry about 2^-11 of the terms it is the sum of, then the rounding to the rows' dtype."""
    x, codebook, bounds, _, scale = source(50, [50], 40, 6, dtype, kernel_device)
    given = parameters(kind, codebook)
    rows = read_rows(x, 40, None, scale, False, torch.float64)
    words, double = codebook.double(), {name: t.double() for name, t in given.items()}
    grad, mass = torch.randn(1, 6, 40, device=x.device), torch.ones(1, 6, device=x.device)
    got = soft_encode_backward(grad, mass, x, codebook, bounds, mass, **given, row_scale=scale)[0]
    exact = reference.soft_encode_backward(
        grad.double(), mass.double(), rows, words, bounds, mass.double(), **double
    )[0]
    a = reference.soft_assign(rows, words, **double)
    e = rows @ grad[0].double().T - (grad[0].double() * words).sum(1) + 1
    d = (a * (e - (a * e).sum(1, keepdim=True))).abs()
    if kind == "scale":
        terms = 2 * (double["scale"] * d) @ words.abs() + 2 * (double["scale"] * d).sum(1, True) * rows.abs()
    else:
        terms = d @ double["weight"].abs()
    terms += a @ grad[0].double().abs()
    stored_to = 2.0**-11 * exact.abs() if dtype == torch.float16 else 0
    assert ((got.double() - exact).abs() <= 2.0**-10 * terms + stored_to + 1e-6).all()


def test_bad_arguments_are_named(kernel_device: str) -> None:
    x, codebook, bounds = make_bags([8], 16, 4, torch.float32, kernel_device)
    scale, mass = torch.ones(4, device=kernel_device), torch.ones(1, 4, device=kernel_device)
    grad = torch.ones(1, 4, 16, device=kernel_device)
    with pytest.raises(ValueError, match="float64"):
        soft_encode_backward(grad, mass, x.double(), codebook, bounds, mass, scale)
    with pytest.raises(ValueError, match="grad, grad_mass and mass"):
        soft_encode_backward(grad[:, :3], mass, x, codebook, bounds, mass, scale)
    with pytest.raises(ValueError, match="grad, grad_mass and mass"):
        soft_encode_backward(grad, mass, x, codebook, bounds, mass[:, :3], scale)
    with pytest.raises(ValueError, match="either scale, or weight"):
        soft_encode_backward(grad, mass, x, codebook, bounds, mass)
