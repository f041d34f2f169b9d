"""Row formats: scales, rounding, range, error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dre_fast.reference.quantize import DTYPES, dequantize, has_scale, padded_dim, quantize, row_dtype


def unit(n: int, d: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d), dim=1)


def test_int8_against_numpy_row_by_row() -> None:
    f = unit(50, 33)
    q, scale = quantize(f, torch.int8)
    for row, got, s in zip(f.numpy(), q.numpy(), scale.numpy()):
        expected = np.float32(np.abs(row).max()) / np.float32(127)
        assert s == expected
        # numpy's rint rounds half to even
        assert np.array_equal(got, np.clip(np.rint(row / expected), -127, 127).astype(np.int8))


def test_int8_rounds_half_to_even() -> None:
    f = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]]) / 128
    q, scale = quantize(f, torch.int8)
    assert float(scale) == 1 / 128
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -127]]


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("int8", 0.5 / 127),
        ("float8_e4m3fn", 2**-4),
        ("bfloat16", 2**-8),
        ("float16", 2**-11),
        ("float32", 0.0),
    ],
)
def test_error_is_within_the_format(name: str, bound: float) -> None:
    f = unit(200, 64)
    z = dequantize(*quantize(f, row_dtype(name)))
    assert z.dtype == torch.float32
    largest = f.abs().amax(1, keepdim=True)
    assert ((z - f).abs() <= bound * largest * 1.0001 + 1e-12).all()
    assert (z.abs() <= 1.0000001).all()


@pytest.mark.parametrize("name", list(DTYPES))
def test_zero_tiny_and_one_hot_rows(name: str) -> None:
    f = torch.zeros(4, 8)
    f[1, 3] = 1.0
    f[2] = 1e-40  # denormal
    f[3, 0], f[3, 1] = -1.0, 1e-30
    q, scale = quantize(f, row_dtype(name))
    z = dequantize(q, scale)
    assert torch.isfinite(z).all()
    assert not z[0].any()
    assert z[1].tolist() == f[1].tolist()
    assert z[3, 0] == -1.0
    assert scale.shape == ((4,) if has_scale(q.dtype) else (0,))


@pytest.mark.parametrize("name", list(DTYPES))
def test_stored_rows_are_a_fixed_point_of_the_plain_formats(name: str) -> None:
    q, scale = quantize(unit(20, 16), row_dtype(name))
    again, _ = quantize(dequantize(q, scale), q.dtype)
    assert torch.equal(again.float(), q.float())


@pytest.mark.parametrize("name", list(DTYPES))
@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (1, 4097)])
def test_odd_shapes(name: str, shape: tuple[int, int]) -> None:
    q, scale = quantize(unit(*shape), row_dtype(name))
    assert q.shape == shape
    assert dequantize(q, scale).shape == shape


@pytest.mark.parametrize(("name", "dim", "padded"), [("int8", 1, 16), ("int8", 384, 384), ("float16", 9, 16)])
def test_rows_fill_16_bytes(name: str, dim: int, padded: int) -> None:
    assert padded_dim(dim, row_dtype(name)) == padded


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ValueError, match="int4"):
        row_dtype("int4")
    with pytest.raises(ValueError, match=r"torch\.float64"):
        row_dtype(torch.float64)
