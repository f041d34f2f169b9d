"""What only a GPU shows of soft encode: full sizes, int64 addressing, graphs, torch.compile, the registered op."""

from __future__ import annotations

import pytest
import torch

import dre_fast

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from dre_fast.kernels import soft_backward_kernels, soft_encode, soft_encode_backward, soft_kernels
from encode_check import make_bags
from soft_check import KINDS, check, check_backward, parameters, source

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
SIZES = ((64, 384), (64, 1024), (128, 128), (7, 33))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("codewords", "dim"), SIZES)
def test_one_big_and_many_small_bags(codewords: int, dim: int, dtype: torch.dtype) -> None:
    lengths = [20_000, 0, *range(1, 60), 3000]
    x, codebook, bounds, _, scale = source(sum(lengths), lengths, dim, codewords, dtype, "cuda")
    for kind in KINDS:
        given = parameters(kind, codebook)
        check(x, codebook, bounds, given, None, scale)
        check_backward(x, codebook, bounds, given, None, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("codewords", "dim"), SIZES)
def test_every_source_of_rows(codewords: int, dim: int, dtype: torch.dtype) -> None:
    """Chosen rows of a wider store, some skipped, some read twice; as they are and as unit rows."""
    lengths = [9000, 0, *range(1, 60), 800]
    x, codebook, bounds, index, scale = source(6000, lengths, dim, codewords, dtype, "cuda", padding=16)
    given = parameters("scale", codebook)
    for unit in (False, True):
        check(x, codebook, bounds[:-1], given, index, scale, unit)
        check_backward(x, codebook, bounds[:-1], given, index, scale, unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_codewords(dtype: torch.dtype) -> None:
    x, codebook, bounds = make_bags([3000, 0, 500], 2047, 1000, dtype, "cuda")
    given = parameters("scale", codebook)
    check(x, codebook, bounds, given, unit=True)
    check_backward(x, codebook, bounds, given, unit=True)


def test_stored_rows_beyond_two_to_the_31_elements() -> None:
    rows, dim = 5_700_000, 384
    x = torch.randint(-127, 128, (rows, dim), device="cuda", dtype=torch.int8)
    row_scale = torch.rand(rows, device="cuda") / 127
    codebook = torch.randn(4, dim, device="cuda")
    given = parameters("scale", codebook, 0.01)
    index = torch.arange(rows - 100, rows, device="cuda")
    bounds = torch.tensor([0, 60, 100], device="cuda")
    by_index = soft_encode(x, codebook, bounds, **given, index=index, row_scale=row_scale)
    last = soft_encode(x[-100:], codebook, bounds, **given, row_scale=row_scale[-100:])
    for one, other in zip(by_index, last, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    rows, dim = 5_700_000, 384
    x = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16)
    codebook = torch.randn(4, dim, device="cuda")
    bounds = torch.tensor([0, rows - 50, rows], device="cuda")
    given = parameters("weight", codebook)
    V, mass = soft_encode(x, codebook, bounds, **given)
    last = soft_encode(x[-50:].clone(), codebook, torch.tensor([0, 50], device="cuda"), **given)
    torch.testing.assert_close(V[1], last[0][0], rtol=1e-5, atol=1e-4)
    grad = torch.randn(2, 4, dim, device="cuda")
    d_rows = soft_encode_backward(grad, mass, x, codebook, bounds, mass, **given)[0]
    one = torch.tensor([0, 50], device="cuda")
    tail = soft_encode_backward(grad[1:], mass[1:], x[-50:].clone(), codebook, one, mass[1:], **given)[0]
    torch.testing.assert_close(d_rows[-50:], tail)


def test_more_than_65535_bags() -> None:
    bags = 70_000
    x, codebook, _ = make_bags([bags], 16, 4, torch.float16, "cuda")
    bounds = torch.arange(bags + 1, device="cuda")
    given = parameters("scale", codebook)
    V, mass = soft_encode(x, codebook, bounds, **given)
    a = dre_fast.reference.soft_assign(x.double(), codebook.double(), given["scale"].double())
    torch.testing.assert_close(mass.double(), a, rtol=0, atol=1e-5)
    residuals = x.double()[:, None] - codebook.double()
    torch.testing.assert_close(V.double(), a[:, :, None] * residuals, rtol=0, atol=1e-5)
    grad = torch.randn(V.shape, device="cuda")
    d_rows = soft_encode_backward(grad, mass, x, codebook, bounds, mass, **given)[0]
    few = slice(bags - 100, bags)
    tail = torch.arange(101, device="cuda")
    alone = soft_encode_backward(grad[few], mass[few], x[few].clone(), codebook, tail, mass[few], **given)[0]
    torch.testing.assert_close(d_rows[few], alone)


@pytest.mark.parametrize("kind", ["scale", "weight and bias"])
def test_cuda_graph_replays_with_new_rows(kind: str) -> None:
    x, codebook, bounds = make_bags([3000, 0, 1000], 384, 64, torch.bfloat16, "cuda")
    given = parameters(kind, codebook)
    grad = torch.randn(3, 64, 384, device="cuda")

    def both() -> tuple[torch.Tensor, ...]:
        V, mass = soft_encode(x, codebook, bounds, **given, unit=True)
        return V, mass, *soft_encode_backward(grad, mass, x, codebook, bounds, mass, **given, unit=True)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        both()  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    x.copy_(make_bags([4000], 384, 64, torch.bfloat16, "cuda")[0])
    bounds.copy_(torch.tensor([0, 10, 2500, 4000], device="cuda"))
    graph.replay()
    for replayed, eager in zip(captured, both(), strict=True):
        assert torch.equal(replayed, eager)


def test_a_thousand_lengths_compile_nothing_new() -> None:
    modules = (soft_kernels, soft_backward_kernels)
    kernels = [k for module in modules for k in vars(module).values() if hasattr(k, "device_caches")]

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    x, codebook, _ = make_bags([2000], 64, 8, torch.bfloat16, "cuda")
    given = parameters("scale", codebook)
    counts = []
    for rows in [2000, 1, 16, *range(17, 1017)]:
        bounds = torch.linspace(0, rows, 2 + rows % 37, device="cuda").long()
        mass = soft_encode(x[:rows], codebook, bounds, **given)[1]
        grad = torch.ones(len(bounds) - 1, 8, 64, device="cuda")
        soft_encode_backward(grad, mass, x[:rows], codebook, bounds, mass, **given)
        counts.append(compiled())
    assert len(counts) > 1000
    # short batches need no sum of partials, so the first one, of 2000 rows, has compiled everything
    assert counts[0] == counts[-1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registered_op(dtype: torch.dtype) -> None:
    x, codebook, bounds = make_bags([100, 0, 60], 64, 8, dtype, "cuda")
    for kind in KINDS:
        given = {"scale": None, "weight": None, "bias": None, **parameters(kind, codebook)}
        arguments = (x, codebook, bounds, given["scale"], given["weight"], given["bias"])
        torch.library.opcheck(torch.ops.dre_fast.soft_encode.default, arguments)


def test_gradient_and_compile() -> None:
    x, codebook, bounds = make_bags([200, 0, 90], 64, 8, torch.float32, "cuda")
    slopes = parameters("scale", codebook)["scale"]

    def step(rows: torch.Tensor) -> torch.Tensor:
        return dre_fast.residual_encode(
            rows, codebook, cu_seqlens=bounds, assignment="soft", scale=slopes, normalize=("intra", "l2")
        )

    eager, compiled = (x.detach().clone().requires_grad_() for _ in range(2))
    weight = torch.randn(3, 8, 64, device="cuda")
    (step(eager) * weight).sum().backward()
    (torch.compile(step, fullgraph=True)(compiled) * weight).sum().backward()
    exact = x.detach().double().requires_grad_()
    V = dre_fast.residual_encode(
        exact,
        codebook.double(),
        cu_seqlens=bounds,
        assignment="soft",
        scale=slopes.double(),
        normalize=("intra", "l2"),
    )
    (V * weight).sum().backward()
    for grad in (eager.grad, compiled.grad):
        torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-3, atol=1e-4)


def test_wrong_devices_are_refused() -> None:
    x, codebook, bounds = make_bags([8], 16, 4, torch.float32, "cuda")
    scale = torch.ones(4, device="cuda")
    with pytest.raises(ValueError, match="device"):
        soft_encode(x, codebook.cpu(), bounds, scale)
    with pytest.raises(ValueError, match="CUDA device"):
        soft_encode(x.cpu(), codebook.cpu(), bounds.cpu(), scale.cpu())
