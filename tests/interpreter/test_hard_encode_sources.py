"""Hard encode over every source of rows: chosen, stored in 8 bits, normalised on load, with known codes; distances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from benchmarks.registry import ROW_COUNTS, SLOW_ROW_COUNTS
from dre_fast import reference
from dre_fast.kernels import hard_encode
from encode_check import check, make_bags, stored

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
SCALED = (torch.int8, torch.float8_e4m3fn)
# One of each way of computing: interpreted, bf16 is fp32; e4m3 differs from int8 in its first step alone.
INTERPRETED = (torch.float32, torch.float16, torch.int8)
# K and D of every kind of plan: one pass, two passes, tiles that do not fill, several tiles of codewords.
SIZES = [(1, 1), (2, 7), (7, 33), (8, 64), (64, 385), (64, 384), (65, 200), (130, 513), (200, 64)]


def source(
    rows: int, dim: int, codewords: int, dtype: torch.dtype, device: str, padding: int = 0
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(x, row_scale, codebook, index): half as many reads again as rows, some twice, every ninth skipped."""
    x, codebook, _ = make_bags([rows], dim, codewords, torch.float32, device)
    payload, scale = stored(x, dtype, padding)
    index = torch.randint(0, max(rows, 1), (rows + rows // 2,))
    index[::9] = -1
    return payload, scale, codebook, index.to(device)


def bounds_of(count: int, device: str) -> Tensor:
    """Bags of all sizes, an empty one among them, over all but the last few of the reads."""
    return torch.tensor([0, count // 5, count // 5, count - count // 7], device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_chosen_rows(rows: int, dtype: torch.dtype, kernel_device: str) -> None:
    x, scale, codebook, index = source(rows, 64, 16, dtype, kernel_device)
    check(x, codebook, bounds_of(len(index), kernel_device), index, scale, unit=rows % 2 == 1, distances=True)


@pytest.mark.slow
@pytest.mark.parametrize("rows", SLOW_ROW_COUNTS)
def test_many_chosen_rows(rows: int, kernel_device: str) -> None:
    x, scale, codebook, index = source(rows * 2 // 3 + 1, 24, 8, torch.int8, kernel_device)
    check(x, codebook, bounds_of(len(index), kernel_device), index, scale, unit=True, distances=True)


@pytest.mark.parametrize("dtype", INTERPRETED, ids=str)
@pytest.mark.parametrize(("codewords", "dim"), SIZES)
def test_sizes(codewords: int, dim: int, dtype: torch.dtype, kernel_device: str) -> None:
    """By index with a weight for each row, from rows wider than D."""
    x, scale, codebook, index = source(90, dim, codewords, dtype, kernel_device, padding=5)
    check(x, codebook, bounds_of(len(index), kernel_device), index, scale, unit=scale is None, distances=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codewords", "dim", "dtype"),
    [
        (1024, 33, torch.float16),
        (1024, 33, torch.float32),
        (3, 2048, torch.float16),
        (3, 2048, torch.int8),
        (1024, 520, torch.int8),
    ],
)
def test_largest_sizes(codewords: int, dim: int, dtype: torch.dtype, kernel_device: str) -> None:
    x, scale, codebook, index = source(24, dim, codewords, dtype, kernel_device)
    check(x, codebook, bounds_of(len(index), kernel_device), index, scale, unit=scale is None, distances=True)


@pytest.mark.parametrize(("dtype", "dim"), [*((dtype, 64) for dtype in DTYPES), (torch.int8, 513)])
def test_without_index(dim: int, dtype: torch.dtype, kernel_device: str) -> None:
    x, scale, codebook, _ = source(200, dim, 12, dtype, kernel_device)
    bounds = bounds_of(200, kernel_device)
    check(x, codebook, bounds, None, scale)
    for unit in (False, True):
        check(x, codebook, bounds, None, scale, unit=unit, distances=True)


@pytest.mark.parametrize("lengths", [[0], [0, 0, 5, 0], [1] * 40, [500, 1, 2, 3, 500], [640, 640]])
def test_ragged_and_empty_bags(lengths: list[int], kernel_device: str) -> None:
    x, codebook, bounds = make_bags(lengths, 48, 8, torch.float32, kernel_device)
    payload, scale = stored(x, torch.int8)
    order = torch.randperm(len(x)).to(kernel_device)
    V, counts, _, _ = check(payload, codebook, bounds, order, scale, distances=True)
    assert (V[counts == 0] == 0).all()
    for a, b in zip(
        hard_encode(payload, codebook, bounds.int(), order, scale),
        hard_encode(payload, codebook, bounds, order, scale),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_choosing_equals_gathering_bit_for_bit(kernel_device: str) -> None:
    for dtype in INTERPRETED:
        x, scale, codebook, index = source(100, 48, 9, dtype, kernel_device)
        index = index[index >= 0]
        gathered = None if scale is None else scale[index]
        bounds = bounds_of(len(index), kernel_device)
        for unit in (False, True):
            for a, b in zip(
                hard_encode(x, codebook, bounds, index, scale, unit=unit, distances=True),
                hard_encode(x[index], codebook, bounds, None, gathered, unit=unit, distances=True),
                strict=True,
            ):
                assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 48), (torch.float16, 48), (torch.float16, 513)])
def test_layouts(dim: int, dtype: torch.dtype, kernel_device: str) -> None:
    """A strided, a transposed and an unaligned view give what their contiguous copy gives."""
    x, codebook, bounds = make_bags([70, 80], dim, 9, dtype, kernel_device)
    index = torch.randperm(150).to(kernel_device)
    wide = torch.cat([x, x], 1)[:, :dim]
    transposed = x.T.contiguous().T
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    strided = torch.stack([index, index], 1)[:, 0]
    expected = check(x, codebook, bounds, index, unit=True)
    for view in (wide, transposed, shifted):
        for a, b in zip(check(view, codebook, bounds, strided, unit=True), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", INTERPRETED, ids=str)
@pytest.mark.parametrize(("codewords", "dim"), [(8, 64), (130, 33)])
def test_known_codes(codewords: int, dim: int, dtype: torch.dtype, kernel_device: str) -> None:
    """Codes of the stored rows are taken as they are: whatever is nearest, -1 skips the row."""
    x, scale, codebook, index = source(200, dim, codewords, dtype, kernel_device)
    codes = torch.randint(-1, codewords, (200,), dtype=torch.int16).to(kernel_device)
    check(x, codebook, bounds_of(200, kernel_device), None, scale, codes)
    for unit, distances in ((False, False), (True, False), (False, True), (True, True)):
        check(x, codebook, bounds_of(len(index), kernel_device), index, scale, codes, unit, distances)


@pytest.mark.parametrize("dtype", [*INTERPRETED, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("unit", [False, True])
def test_skipped_rows_are_never_read(dtype: torch.dtype, unit: bool, kernel_device: str) -> None:
    """What lies in a row without a code, or of no read, may be anything."""
    x, scale, codebook, index = source(150, 40, 6, dtype, kernel_device)
    bounds = bounds_of(len(index), kernel_device)
    codes = torch.randint(0, 6, (150,), dtype=torch.int16).to(kernel_device)
    codes[50:] = -1
    index = torch.where(index >= 50, -1, index)
    spoilt, spoilt_scale = x.clone(), None if scale is None else scale.clone()
    if dtype != torch.int8:
        spoilt[50:] = torch.tensor(float("nan"), device=kernel_device).to(dtype)
    if spoilt_scale is not None:
        spoilt_scale[50:] = float("inf")
    for distances in (False, True):
        for chosen, known in ((index, None), (None, codes), (index, codes)):
            limits = bounds if chosen is not None else bounds_of(150, kernel_device)
            clean = hard_encode(x, codebook, limits, chosen, scale, known, unit, distances)
            dirty = hard_encode(spoilt, codebook, limits, chosen, spoilt_scale, known, unit, distances)
            for a, b in zip(clean, dirty, strict=True):
                assert torch.equal(a, b)


def test_indices_outside_the_rows_are_not_followed(kernel_device: str) -> None:
    x, scale, codebook, index = source(60, 40, 6, torch.int8, kernel_device)
    bounds = bounds_of(len(index), kernel_device)
    codes = torch.zeros(60, dtype=torch.int16, device=kernel_device)
    outside = torch.where(index < 0, torch.tensor([-7, 60, 2**40] * 30, device=kernel_device), index)
    for known in (None, codes):
        for a, b in zip(
            hard_encode(x, codebook, bounds, outside, scale, known, distances=True),
            hard_encode(x, codebook, bounds, index, scale, known, distances=True),
            strict=True,
        ):
            assert torch.equal(a, b)
    none = index.new_full((20,), -1)
    V, counts, found, _ = hard_encode(x[:0], codebook, bounds.clamp(max=20), none, scale[:0])
    assert (V == 0).all()
    assert (counts == 0).all()
    assert (found == -1).all()


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e4, 1e18, 2e37])
@pytest.mark.parametrize(("codewords", "dim"), [(8, 64), (70, 100)])
def test_unit_rows_of_any_size(size: float, codewords: int, dim: int, kernel_device: str) -> None:
    """Squares neither overflow nor, above the documented 1e-12, underflow; one bag holds rows of all sizes."""
    x, codebook, bounds = make_bags([50, 30], dim, codewords, torch.float32, kernel_device)
    x[::2] *= size
    check(x, codebook, bounds, unit=True, distances=True)
    if size <= 1e4:
        check(x.half(), codebook, bounds, unit=True, distances=True)


def test_unit_of_zero_and_of_tiny_rows(kernel_device: str) -> None:
    x, codebook, bounds = make_bags([40], 64, 5, torch.float32, kernel_device)
    x[3] = 0
    x[4] *= 1e-13
    for dtype in (torch.float32, torch.float16):
        V, *_ = check(x.to(dtype), codebook, bounds, unit=True, distances=True)
        assert V.isfinite().all()


@pytest.mark.parametrize("dtype", SCALED, ids=str)
@pytest.mark.parametrize("scaled_by", [1e-3, 1.0, 100.0, 1000.0])
def test_scales_within_the_bound(dtype: torch.dtype, scaled_by: float, kernel_device: str) -> None:
    """Scales from those of the smallest rows up to 16, beside a zero row, which has scale 0."""
    rows, codebook, bounds = make_bags([90, 30], 384, 12, torch.float32, kernel_device)
    rows[7] = 0
    x, scale = stored(rows, dtype, scaled_by=scaled_by)
    assert scale is not None
    assert scale.max() < 16
    check(x, codebook * scaled_by, bounds, None, scale, distances=True)
    check(x, codebook, bounds, None, scale, unit=True, distances=True)


@pytest.mark.parametrize("dtype", SCALED, ids=str)
def test_every_stored_value_is_exact(dtype: torch.dtype, kernel_device: str) -> None:
    """One row for each of the 256 bytes, scale a power of two: sums are the values themselves."""
    values = torch.arange(256, dtype=torch.uint8, device=kernel_device).view(dtype)
    x = values[:, None].expand(256, 16).contiguous()
    codebook = torch.zeros(1, 16, device=kernel_device)
    bounds = torch.arange(257, device=kernel_device)
    scale = torch.full((256,), 0.125, device=kernel_device)
    V, *_ = hard_encode(x, codebook, bounds, None, scale)
    expected = values.float()[:, None, None].expand(256, 1, 16) * 0.125
    torch.testing.assert_close(V, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("codewords", [6, 70])
def test_rows_that_are_not_finite_stay_in_their_bag(
    bad: float, unit: bool, codewords: int, kernel_device: str
) -> None:
    for dtype in (torch.float32, torch.float16):
        x, codebook, bounds = make_bags([70, 80, 90], 24, codewords, dtype, kernel_device)
        clean = hard_encode(x, codebook, bounds, unit=unit, distances=True)
        x[75, 3] = bad
        V, counts, codes, distances = hard_encode(x, codebook, bounds, unit=unit, distances=True)
        assert not V[1].isfinite().all()
        assert not distances[75].isfinite()
        assert counts[1].sum() == 80
        others = torch.arange(240, device=x.device) != 75
        assert torch.equal(codes[others], clean[2][others])
        assert torch.equal(distances[others], clean[3][others])
        assert torch.equal(V[[0, 2]], clean[0][[0, 2]])
        assert torch.equal(counts[[0, 2]], clean[1][[0, 2]])


@pytest.mark.parametrize("dtype", INTERPRETED, ids=str)
def test_ties_take_the_lowest_codeword(dtype: torch.dtype, kernel_device: str) -> None:
    x, scale, codebook, index = source(90, 32, 5, dtype, kernel_device)
    bounds = bounds_of(len(index), kernel_device)
    for unit in (False, True):
        codes = check(x, torch.cat([codebook, codebook]), bounds, index, scale, unit=unit)[2]
        assert (codes < 5).all()
        far = torch.cat([codebook, codebook[:1].repeat(195, 1) * 0 + 9, codebook])
        assert (hard_encode(x, far, bounds, index, scale, unit=unit)[2] < 5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distance_to_a_row_that_is_a_codeword_is_zero(dtype: torch.dtype, kernel_device: str) -> None:
    """Cancellation leaves no more than documented, and nothing below zero."""
    rows = normalize(torch.randn(6, 48), dim=1).to(kernel_device)
    x, scale = stored(rows, dtype)
    codebook = x.float() if scale is None else x.float() * scale[:, None]
    *_, codes, distances = check(
        x, codebook, torch.tensor([0, 6], device=kernel_device), None, scale, distances=True
    )
    assert torch.equal(codes, torch.arange(6, device=kernel_device))
    assert (distances < 1e-5).all()


def test_agrees_with_the_reference(kernel_device: str) -> None:
    x, scale, codebook, index = source(300, 96, 10, torch.int8, kernel_device, padding=16)
    bounds = bounds_of(len(index), kernel_device)
    for unit in (False, True):
        expected = reference.encode.hard_encode(
            x, codebook.double(), bounds, index, scale, unit=unit, distances=True
        )
        V, counts, codes, distances = hard_encode(
            x, codebook, bounds, index, scale, unit=unit, distances=True
        )
        assert torch.equal(codes, expected[2])
        assert torch.equal(counts, expected[1])
        torch.testing.assert_close(V, expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(distances, expected[3], rtol=0, atol=1e-5)


def test_bad_sources_are_named(kernel_device: str) -> None:
    x, codebook, bounds = make_bags([8], 16, 4, torch.float32, kernel_device)
    scale = torch.ones(8, device=kernel_device)
    with pytest.raises(ValueError, match="index must be int64"):
        hard_encode(x, codebook, bounds, index=bounds.int())
    with pytest.raises(ValueError, match="row_scale"):
        hard_encode(x, codebook, bounds, row_scale=scale)
    with pytest.raises(ValueError, match="row_scale"):
        hard_encode(x.to(torch.int8), codebook, bounds)
    with pytest.raises(ValueError, match=r"row_scale must be torch\.float32 \[8\]"):
        hard_encode(x.to(torch.int8), codebook, bounds, row_scale=scale[:7])
    with pytest.raises(ValueError, match=r"row_codes must be torch\.int16"):
        hard_encode(x, codebook, bounds, row_codes=torch.zeros(8, dtype=torch.int32, device=kernel_device))
