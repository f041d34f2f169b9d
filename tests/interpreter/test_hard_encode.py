"""The Triton hard encode against the float64 reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from dre_fast import reference

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from benchmarks.registry import ROW_COUNTS, SLOW_ROW_COUNTS
from dre_fast.kernels import hard_encode
from encode_check import check, make_bags

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_row_counts(rows: int, dtype: torch.dtype, kernel_device: str) -> None:
    check(*make_bags([rows], 64, 16, dtype, kernel_device))


@pytest.mark.slow
@pytest.mark.parametrize("rows", SLOW_ROW_COUNTS)
def test_many_rows(rows: int, kernel_device: str) -> None:
    check(*make_bags([rows - 40_000, 0, 40_000], 24, 8, torch.float16, kernel_device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("codewords", "dim"),
    [
        (1, 1),
        (1, 384),
        (2, 7),
        (7, 33),
        (17, 1),
        (64, 385),
        (64, 384),
        (100, 150),
        (65, 200),
        (130, 513),
        (200, 64),
    ],
)
def test_odd_sizes(codewords: int, dim: int, dtype: torch.dtype, kernel_device: str) -> None:
    check(*make_bags([70, 60], dim, codewords, dtype, kernel_device))


@pytest.mark.slow
@pytest.mark.parametrize(("codewords", "dim"), [(1024, 33), (3, 2048), (1024, 520)])
def test_largest_sizes(codewords: int, dim: int, kernel_device: str) -> None:
    check(*make_bags([20, 15], dim, codewords, torch.float16, kernel_device))


@pytest.mark.parametrize(
    "lengths",
    [
        [0],
        [0, 0, 5, 0],
        [0, 200, 0, 0, 300, 0],
        [1] * 40,
        [64, 64, 64, 64, 64],
        [500, 1, 2, 3, 500],
        [640, 640],
        [3, 5, 2],
    ],
)
def test_ragged_and_empty_bags(lengths: list[int], kernel_device: str) -> None:
    V, counts, *_ = check(*make_bags(lengths, 48, 8, torch.float16, kernel_device))
    empty = torch.tensor(lengths, device=V.device) == 0
    assert (V[empty] == 0).all()
    assert (counts[empty] == 0).all()
    assert (V[counts == 0] == 0).all()  # codewords without rows


def test_no_bags_and_int32_offsets(kernel_device: str) -> None:
    x, codebook, bounds = make_bags([20, 30], 16, 4, torch.float32, kernel_device)
    V, counts, codes, _ = hard_encode(x[:0], codebook, bounds[:1])
    assert V.shape == (0, 4, 16)
    assert counts.shape == (0, 4)
    assert codes.shape == (0,)
    for a, b in zip(hard_encode(x, codebook, bounds.int()), hard_encode(x, codebook, bounds), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dim", [64, 513])
def test_rows_past_the_last_bag(dim: int, kernel_device: str) -> None:
    x, codebook, _ = make_bags([400], dim, 7, torch.float16, kernel_device)
    for bounds in ([0, 90, 300], [0, 64], [0, 0], [0]):
        cu_seqlens = torch.tensor(bounds, device=kernel_device)
        V, counts, codes, _ = hard_encode(x, codebook, cu_seqlens)
        inside = hard_encode(x[: bounds[-1]], codebook, cu_seqlens)
        assert (codes[bounds[-1] :] == -1).all()
        assert torch.equal(codes[: bounds[-1]], inside[2])
        assert torch.equal(counts, inside[1])
        torch.testing.assert_close(V, inside[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_take_the_lowest_codeword(dtype: torch.dtype, kernel_device: str) -> None:
    x, codebook, bounds = make_bags([90], 32, 5, dtype, kernel_device)
    twice = torch.cat([codebook, codebook])
    _, _, codes, _ = check(x, twice, bounds)
    assert (codes < 5).all()
    # Codewords 64 apart meet in different tiles of a two-pass plan.
    far = torch.cat([codebook, codebook[:1].repeat(195, 1) * 0 + 9, codebook])
    assert (hard_encode(x, far, bounds)[2] < 5).all()
    # Whole numbers: the distances to both codewords are equal exactly.
    middle = torch.zeros(3, 32, dtype=dtype, device=kernel_device)
    pair = torch.zeros(2, 32, device=kernel_device)
    pair[0, 0], pair[1, 1] = 2.0, 2.0
    assert (hard_encode(middle, pair, torch.tensor([0, 3], device=kernel_device))[2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype, kernel_device: str) -> None:
    """A strided, a transposed, an expanded and an unaligned view give what their contiguous copy gives."""
    x, codebook, bounds = make_bags([70, 80], 64, 9, dtype, kernel_device)
    wide = torch.cat([x, x], 1)[:, :64]
    transposed = x.T.contiguous().T
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    for view in (wide, transposed, shifted):
        for a, b in zip(check(view, codebook, bounds), check(view.clone(), codebook, bounds), strict=True):
            torch.testing.assert_close(a, b)
    check(x[:1].expand(150, 64), codebook, bounds)
    check(x, codebook.T.contiguous().T, bounds)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_codebook_scale_does_not_matter(scale: float, kernel_device: str) -> None:
    """The half-precision parts are scaled per codeword: no underflow of small, no overflow of large ones."""
    x, codebook, bounds = make_bags([120], 40, 12, torch.float16, kernel_device)
    check((x * scale).half(), codebook * scale, bounds)


def test_close_codewords_are_told_apart(kernel_device: str) -> None:
    """Codewords closer than fp16 and bf16 can express: one rounded part would mix them up, two do not."""
    base = normalize(torch.randn(1, 64), dim=1)
    codebook = (base + 2e-4 * torch.randn(16, 64)).to(kernel_device)
    for dtype in (torch.float16, torch.bfloat16):
        x = (base + 2e-2 * torch.randn(300, 64)).to(dtype).to(kernel_device)
        _, _, codes, _ = check(x, codebook, torch.tensor([0, 300], device=kernel_device))
        nearest = torch.cdist(x.double(), codebook.double()).argmin(1)
        assert (codes == nearest).float().mean() > 0.98


def test_nan_rows_stay_in_their_bag(kernel_device: str) -> None:
    x, codebook, bounds = make_bags([70, 80, 90], 24, 6, torch.float32, kernel_device)
    clean = hard_encode(x, codebook, bounds)
    x[75] = float("nan")
    V, counts, codes, _ = hard_encode(x, codebook, bounds)
    assert codes[75] == 0
    assert V[1].isnan().any()
    assert torch.equal(V[[0, 2]], clean[0][[0, 2]])
    assert torch.equal(counts[[0, 2]], clean[1][[0, 2]])
    assert counts[1].sum() == 80


def test_agrees_with_the_reference(kernel_device: str) -> None:
    x, codebook, bounds = make_bags([300, 0, 40], 96, 10, torch.float32, kernel_device, noise=0.3)
    expected = reference.encode.hard_encode(x.double(), codebook.double(), bounds)
    V, counts, codes, _ = hard_encode(x, codebook, bounds)
    assert torch.equal(codes, expected[2])
    assert torch.equal(counts, expected[1])
    torch.testing.assert_close(V.double(), expected[0], rtol=0, atol=1e-5)


def test_bad_arguments_are_named(kernel_device: str) -> None:
    x, codebook, bounds = make_bags([8], 16, 4, torch.float32, kernel_device)
    with pytest.raises(ValueError, match="P >= D"):
        hard_encode(x[:, :8], codebook, bounds)
    with pytest.raises(ValueError, match="float64"):
        hard_encode(x.double(), codebook, bounds)
    with pytest.raises(ValueError, match="cu_seqlens"):
        hard_encode(x, codebook, bounds.float())
    with pytest.raises(ValueError, match="codewords"):
        hard_encode(x, codebook.repeat(300, 1), bounds)
    with pytest.raises(ValueError, match="dimensions"):
        hard_encode(x.repeat(1, 200), codebook.repeat(1, 200), bounds)


@pytest.mark.parametrize("rows", [10, 700])
@pytest.mark.parametrize("bounds", [[0, 2.0], [0, 0.4, 2.0], [0, 1.2, 3.0], [-0.3, 1.0], [0, 0.7]])
@pytest.mark.parametrize("codewords", [4, 200])
def test_offsets_are_clamped_to_the_rows(
    bounds: list[float], rows: int, codewords: int, kernel_device: str
) -> None:
    """Nobody checks them under torch.compile: they must not lead outside the tensors."""
    x, codebook, _ = make_bags([rows], 16, codewords, torch.float32, kernel_device)
    cu = torch.tensor([int(b * rows) for b in bounds], device=x.device)
    V, counts, codes, _ = hard_encode(x, codebook, cu)
    expected = reference.hard_encode(x, codebook, cu.clamp(0, rows))
    torch.testing.assert_close(V, expected[0], atol=1e-4, rtol=0)
    assert torch.equal(counts, expected[1])
    assert torch.equal(codes, expected[2])
