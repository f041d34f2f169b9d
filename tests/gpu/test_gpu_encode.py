"""What only a GPU shows of hard encode: full sizes, int64 addressing, graphs, torch.compile, the registered op."""

from __future__ import annotations

import pytest
import torch

import dre_fast
from dre_fast import reference

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from benchmarks.registry import GPU_ENCODE, Encode, make
from dre_fast.kernels import hard_encode
from encode_check import check, make_bags, stored

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("codewords", "dim"), [(64, 384), (64, 1024), (16, 192), (128, 128), (1000, 2047), (7, 33)]
)
def test_one_big_and_many_small_bags(codewords: int, dim: int, dtype: torch.dtype) -> None:
    lengths = [20_000, 0, *range(1, 90), 3000]
    check(*make_bags(lengths, dim, codewords, dtype, "cuda"))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn],
    ids=str,
)
@pytest.mark.parametrize(
    ("codewords", "dim"), [(64, 384), (64, 256), (64, 1024), (128, 128), (1000, 2047), (7, 33)]
)
def test_every_source_of_rows(codewords: int, dim: int, dtype: torch.dtype) -> None:
    """Chosen rows of a wider store, some skipped, some read twice; as they are, as unit rows, with known codes."""
    rows, codebook, _ = make_bags([12_000], dim, codewords, torch.float32, "cuda")
    x, scale = stored(rows, dtype, padding=16)
    index = torch.randint(-1, 12_000, (20_000,), device="cuda")
    known = torch.randint(-1, codewords, (12_000,), dtype=torch.int16, device="cuda")
    bounds = torch.tensor([0, *range(1, 90), 4000, 4000, 19_000], device="cuda")
    for unit in (False, True):
        check(x, codebook, bounds, index, scale, unit=unit)
        check(x, codebook, bounds, index, scale, unit=unit, distances=True)
        check(x, codebook, bounds, index, scale, known, unit=unit)


def test_stored_rows_beyond_two_to_the_31_elements() -> None:
    rows, dim = 5_700_000, 384
    x = torch.randint(-127, 128, (rows, dim), device="cuda", dtype=torch.int8)
    scale = torch.rand(rows, device="cuda") / 127
    codebook = torch.randn(4, dim, device="cuda")
    index = torch.arange(rows - 100, rows, device="cuda")
    bounds = torch.tensor([0, 60, 100], device="cuda")
    V, counts, codes, _ = hard_encode(x, codebook, bounds, index, scale)
    last = reference.encode.hard_encode(x[-100:], codebook, bounds, None, scale[-100:])
    assert torch.equal(codes, last[2])
    assert torch.equal(counts, last[1])
    torch.testing.assert_close(V, last[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", GPU_ENCODE, ids=lambda shape: shape.id)
def test_benchmark_shapes(shape: Encode) -> None:
    """The very inputs that are timed, under the same contract."""
    V, *_ = check(*make(shape, "cuda"))
    assert V.isfinite().all()


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    rows, dim = 5_700_000, 384
    x = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16)
    codebook = torch.randn(4, dim, device="cuda")
    bounds = torch.tensor([0, rows - 50, rows], device="cuda")
    V, _, codes, _ = hard_encode(x, codebook, bounds)
    last = reference.hard_encode(x[-50:].double(), codebook.double(), torch.tensor([0, 50], device="cuda"))
    assert torch.equal(codes[-50:], last[2])
    torch.testing.assert_close(V[1].double(), last[0][0], rtol=1e-5, atol=1e-4)


def test_more_than_65535_bags() -> None:
    bags = 70_000
    x, codebook, _ = make_bags([bags], 16, 4, torch.float16, "cuda")
    check(x, codebook, torch.arange(bags + 1, device="cuda"))


def test_cuda_graph_replays_with_new_rows() -> None:
    x, codebook, bounds = make_bags([3000, 0, 1000], 384, 64, torch.bfloat16, "cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        hard_encode(x, codebook, bounds)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hard_encode(x, codebook, bounds)
    x.copy_(make_bags([4000], 384, 64, torch.bfloat16, "cuda")[0])
    bounds.copy_(torch.tensor([0, 10, 2500, 4000], device="cuda"))
    graph.replay()
    for replayed, eager in zip(captured, hard_encode(x, codebook, bounds), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registered_op(dtype: torch.dtype) -> None:
    x, codebook, bounds = make_bags([100, 0, 60], 64, 8, dtype, "cuda")
    torch.library.opcheck(torch.ops.dre_fast.hard_encode.default, (x, codebook, bounds))
    index = torch.tensor([3, -1, 5, 159, 3], device="cuda")
    limits = torch.tensor([0, 2, 5], device="cuda")
    options = {"unit": True, "distances": True}
    torch.library.opcheck(
        torch.ops.dre_fast.hard_encode.default, (x, codebook, limits, index, None, None), options
    )


def test_gradient_and_compile() -> None:
    x, codebook, bounds = make_bags([200, 0, 90], 64, 8, torch.float32, "cuda")

    def step(rows: torch.Tensor) -> torch.Tensor:
        return dre_fast.residual_encode(rows, codebook, cu_seqlens=bounds, normalize=("intra", "l2"))

    eager, compiled, exact = (x.detach().clone().requires_grad_() for _ in range(3))
    exact64 = exact.detach().double().requires_grad_()
    weight = torch.randn(3, 8, 64, device="cuda")
    (step(eager) * weight).sum().backward()
    (torch.compile(step, fullgraph=True)(compiled) * weight).sum().backward()
    V = dre_fast.residual_encode(exact64, codebook.double(), cu_seqlens=bounds, normalize=("intra", "l2"))
    (V * weight).sum().backward()
    for grad in (eager.grad, compiled.grad):
        torch.testing.assert_close(grad.double(), exact64.grad, rtol=1e-3, atol=1e-4)


def test_older_or_wrong_devices_are_refused() -> None:
    x, codebook, bounds = make_bags([8], 16, 4, torch.float32, "cuda")
    with pytest.raises(ValueError, match="device"):
        hard_encode(x, codebook.cpu(), bounds)
    with pytest.raises(ValueError, match="CUDA device"):
        hard_encode(x.cpu(), codebook.cpu(), bounds.cpu())
