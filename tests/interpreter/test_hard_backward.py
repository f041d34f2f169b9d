"""The Triton backward of hard encoding against the reference: exact for plain rows, by the error rule for unit rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dre_fast.reference.hard import hard_encode_backward as expected_backward

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from dre_fast.kernels.hard_backward import hard_encode_backward
from error_rule import within_error_rule

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(
    lengths: list[int], words: int, dim: int, dtype: torch.dtype, device: str, past: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, codes with some rows skipped (``past`` rows after the last bag have codes too), cu_seqlens."""
    rows = sum(lengths) + past
    codes = torch.randint(-1, words, (rows,))
    grad = torch.randn(len(lengths), words, dim).to(dtype)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return grad.to(device), codes.to(device), bounds.to(device)


def check_plain(grad: Tensor, codes: Tensor, bounds: Tensor) -> Tensor:
    got = hard_encode_backward(grad, codes, bounds)
    assert got.dtype == grad.dtype
    assert torch.equal(got, expected_backward(grad, codes, bounds))
    assert torch.equal(got, hard_encode_backward(grad, codes, bounds))
    return got


def check_unit(grad: Tensor, codes: Tensor, bounds: Tensor, x: Tensor, index: Tensor | None = None) -> Tensor:
    got = hard_encode_backward(grad, codes, bounds, x, index, True)
    assert got.dtype == grad.dtype
    assert torch.equal(got, hard_encode_backward(grad, codes, bounds, x, index, True))
    plain = expected_backward(grad, codes, bounds, x, index, True)
    exact = expected_backward(grad.double(), codes, bounds, x.double(), index, True)
    within_error_rule(got, plain, exact)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 64, 384, 513, 2048])
@pytest.mark.parametrize("words", [1, 5])
def test_sizes(words: int, dim: int, dtype: torch.dtype, kernel_device: str) -> None:
    grad, codes, bounds = make([11, 0, 18], words, dim, dtype, kernel_device)
    check_plain(grad, codes, bounds)
    x = torch.randn(29, dim).to(dtype).to(kernel_device)
    check_unit(grad, codes, bounds, x)


@pytest.mark.parametrize(
    "lengths", [[0], [0, 0, 5, 0], [0, 200, 0, 0, 300, 0], [1] * 40, [64] * 5, [500, 1, 2, 3, 500], [1023]]
)
def test_ragged_and_empty_bags(lengths: list[int], kernel_device: str) -> None:
    grad, codes, bounds = make(lengths, 6, 24, torch.float32, kernel_device)
    check_plain(grad, codes, bounds)
    check_plain(grad, codes, bounds.int())
    check_unit(grad, codes, bounds, torch.randn(len(codes), 24).to(kernel_device))


def test_rows_of_no_bag(kernel_device: str) -> None:
    grad, codes, bounds = make([20, 30], 4, 16, torch.float32, kernel_device, past=37)
    got = check_plain(grad, codes, bounds)
    assert (got[50:] == 0).all()
    assert (got[codes == -1] == 0).all()
    assert (hard_encode_backward(grad[:0], codes, bounds[:1]) == 0).all()
    assert hard_encode_backward(grad, codes[:0], bounds).shape == (0, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_by_index(dtype: torch.dtype, kernel_device: str) -> None:
    """Wider rows, taken in any order and more than once, some of them skipped."""
    grad, codes, bounds = make([50, 0, 60], 5, 40, dtype, kernel_device, past=9)
    x = torch.randn(30, 48).to(dtype).to(kernel_device)
    index = torch.randint(-1, 30, codes.shape).to(kernel_device)
    codes = torch.where(index < 0, -1, codes)
    got = check_unit(grad, codes, bounds, x, index)
    assert (got[index < 0] == 0).all()
    assert torch.equal(check_plain(grad, codes, bounds), hard_encode_backward(grad, codes, bounds, x, index))
    check_unit(grad, codes, bounds, x[:, ::1][:, 3:43], index)  # rows that do not start at 16 bytes
    check_unit(grad, codes, bounds, x.T.contiguous().T, index)


def test_unit_rows_of_any_size(kernel_device: str) -> None:
    grad, codes, bounds = make([6], 3, 20, torch.float32, kernel_device)
    codes = codes.clamp(min=0)
    x = torch.randn(6, 20).to(kernel_device)
    x[0] *= 3e37  # its square overflows
    x[1] *= 1e-10
    x[2] = 0
    x[3] *= 1e-14
    x[4, 3], x[5, 4] = float("nan"), float("inf")
    got = hard_encode_backward(grad, codes, bounds, x, None, True)
    expected = expected_backward(grad, codes, bounds, x, None, True)
    exact = expected_backward(grad.double(), codes, bounds, x.double(), None, True)
    assert (got[2:] == 0).all()
    assert (expected[2:] == 0).all()
    scale = torch.tensor([[1e37], [1e-10]], device=x.device)  # each row by its own size
    within_error_rule(got[:2] * scale, expected[:2] * scale, exact[:2] * scale)


def test_agrees_with_autograd(kernel_device: str) -> None:
    from dre_fast.reference.rows import l2_normalize

    grad, codes, bounds = make([40, 25], 7, 33, torch.float32, kernel_device)
    codes = codes.clamp(min=0)
    x = torch.randn(65, 33, dtype=torch.float64, device=kernel_device, requires_grad=True)
    bag = torch.repeat_interleave(torch.arange(2, device=x.device), bounds.diff())
    (l2_normalize(x) * grad.double()[bag, codes]).sum().backward()
    got = hard_encode_backward(grad, codes, bounds, x.detach().float(), None, True)
    assert x.grad is not None
    torch.testing.assert_close(got, x.grad.float(), atol=1e-6, rtol=1e-5)


def test_more_bags_than_a_grid_dimension_holds(kernel_device: str) -> None:
    """70,000 bags, of which the rows lie in a few; the interpreter would take minutes over as many rows."""
    grad = torch.randn(70_000, 1, 3).to(kernel_device)
    lengths = torch.zeros(70_000, dtype=torch.int64)
    lengths[[0, 34_567, 69_998, 69_999]] = torch.tensor([3, 90, 1, 2])
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(kernel_device)
    check_plain(grad, torch.zeros(96, dtype=torch.int64, device=kernel_device), bounds)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    rows, dim = (1 << 31) // 1024 + 4096, 1024
    grad, _, bounds = make([5, rows - 5], 64, dim, torch.bfloat16, "cuda")
    codes = torch.randint(-1, 64, (rows,), device="cuda")
    got = hard_encode_backward(grad, codes, bounds)
    tail = slice(rows - 4096, rows)
    assert torch.equal(got[tail], torch.where(codes[tail, None] >= 0, grad[1, codes[tail].clamp(min=0)], 0.0))


def test_bad_arguments_are_named(kernel_device: str) -> None:
    grad, codes, bounds = make([8], 4, 16, torch.float32, kernel_device)
    x = torch.randn(8, 16, device=kernel_device)
    with pytest.raises(ValueError, match="cu_seqlens"):
        hard_encode_backward(grad, codes, bounds[:1])
    with pytest.raises(ValueError, match="codes must be int64"):
        hard_encode_backward(grad, codes.int(), bounds)
    with pytest.raises(ValueError, match="need x"):
        hard_encode_backward(grad, codes, bounds, None, None, True)
    with pytest.raises(ValueError, match="need x"):
        hard_encode_backward(grad, codes, bounds, x[:, :8], None, True)
    with pytest.raises(ValueError, match="no index"):
        hard_encode_backward(grad, codes, bounds, x[:4], None, True)
    with pytest.raises(ValueError, match="float64"):
        hard_encode_backward(grad.double(), codes, bounds)
