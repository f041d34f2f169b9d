"""The bank's registered operations: schemas, fakes, torch.compile, each backend against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dre_fast.nn.bank import MemoryBank
from dre_fast.ops import bank as ops
from dre_fast.reference import bank as reference
from dre_fast.reference.quantize import DTYPES
from dre_fast.reference.sampling import sample_tiles

D, K = 12, 5
TABLES = (
    "payload",
    "scale",
    "code",
    "age",
    "drift",
    "slide_sums",
    "slide_counts",
    "codebook",
    "start",
)


@pytest.fixture(params=["chosen", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that would be chosen here, and the reference behind the same operation."""
    if request.param == "reference":
        monkeypatch.setattr(ops, "backend", lambda name, device="cpu": "reference")
    return request.param


def bank_of(dtype: str = "int8", lengths: tuple[int, ...] = (7, 40, 3)) -> MemoryBank:
    bank = MemoryBank(list(lengths), D, codebook=torch.randn(K, D) * 0.4, dtype=dtype)
    bank.write(1, torch.arange(20), torch.randn(20, D), step=0)
    return bank


def write_arguments(bank: MemoryBank) -> tuple[Any, ...]:
    ids = torch.tensor([1, 0, -1, 1, 2]), torch.tensor([3, 6, 0, 3, -1])
    return (*(getattr(bank, name) for name in TABLES), *ids, torch.randn(5, D), 3)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_opcheck_write(dtype: str, backend: str) -> None:
    torch.library.opcheck(torch.ops.dre_fast.bank_write.default, write_arguments(bank_of(dtype)))


def test_opcheck_reads(backend: str) -> None:
    bank = bank_of()
    torch.library.opcheck(
        torch.ops.dre_fast.bank_read.default, (bank.payload, bank.scale, torch.tensor([3, -1, 9]), D)
    )
    rest = [getattr(bank, name) for name in ("payload", "scale", "code", "slide_sums", "slide_counts")]
    ids = torch.tensor([1, 0]), torch.tensor([[3, -1], [0, 2]])
    torch.library.opcheck(
        torch.ops.dre_fast.bank_rest.default, (*rest, bank.codebook, bank.start, *ids, False)
    )
    torch.library.opcheck(
        torch.ops.dre_fast.bank_tiles.default,
        (bank.length, torch.arange(3), 0, 4, 4, torch.tensor([0, 1, 2]), 7),
    )


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_chosen_backend_writes_what_the_reference_writes(dtype: str) -> None:
    a, b = (
        MemoryBank([7, 40, 3], D, codebook=torch.ones(K, D) * torch.arange(K)[:, None] / 9, dtype=dtype)
        for _ in "ab"
    )
    for step in range(12):
        n = int(torch.randint(0, 9, ()))
        slides = torch.randint(-1, 3, (n,))
        tiles = (torch.rand(n) * torch.tensor([7, 40, 3])[slides]).long()
        x = torch.randn(n, D) * 10.0 ** torch.randint(-3, 4, (n, 1))
        ops.write(*(getattr(a, name) for name in TABLES), slides, tiles, x, step)
        reference.write(*(getattr(b, name) for name in TABLES), slides, tiles, x, step)
    for name in TABLES:
        if name == "drift":
            assert torch.allclose(a.drift, b.drift, atol=1e-6)
        else:
            assert torch.equal(getattr(a, name).float(), getattr(b, name).float()), name


def test_sampling_through_the_operation_is_the_reference() -> None:
    lengths, slides = torch.tensor([7, 40, 3]), torch.arange(3)
    for seed in (0, -1, 2**63, 2**64 - 1, 2**64 + 5):
        got = ops.tiles(lengths, slides, 0, 6, 6, 5, seed)
        assert torch.equal(got, sample_tiles(lengths, slides, 6, 5, seed))
    assert torch.equal(
        ops.tiles(lengths, slides, 0, 6, 6, 5, -1), ops.tiles(lengths, slides, 0, 6, 6, 5, 2**64 - 1)
    )


def test_backend_names() -> None:
    for name in ops.NAMES:
        assert ops.backend(name, "cpu") in ("C++", "reference")
        assert ops.backend(name, "cuda") in ("CUDA", "Triton", "reference")
    with pytest.raises(ValueError, match="bank_erase"):
        ops.backend("bank_erase")


# ---------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def test_write_compiles_whole_and_does_not_recompile_for_a_step(backend: str) -> None:
    eager, compiled = bank_of(), bank_of()
    compiled.load_state_dict(eager.state_dict())
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def write(slides: Tensor, tiles: Tensor, x: Tensor, step: int) -> None:
        compiled.write(slides, tiles, x, step=step)

    for step in range(6):
        slides, tiles, x = torch.tensor([1, 0, -1, 1]), torch.tensor([step, 2, 0, 30]), torch.randn(4, D)
        eager.write(slides, tiles, x, step=step)
        write(slides, tiles, x, step)
    for name, table in eager.state_dict().items():
        assert torch.equal(table, getattr(compiled, name)), name
    assert counter.frame_count <= 2  # once for step 0, once for any step


@pytest.mark.parametrize("memory", ["full", 6, "none"])
def test_encode_and_write_compile_whole_forward_and_backward(memory: str | int) -> None:
    bank = bank_of()
    weight = torch.randn(D, D, requires_grad=True)

    def step(x: Tensor, slides: Tensor, tiles: Tensor, visit: Tensor) -> Tensor:
        live = torch.nn.functional.normalize(x @ weight, dim=-1)
        out = bank.encode(slides, tiles, live, memory, cycle=visit, seed=3)
        assert isinstance(out, Tensor)
        return out.square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for b, m in ((2, 4), (3, 5)):
        slides, visit = torch.arange(b), torch.arange(b)
        tiles, x = bank.sample(slides, m, visit, 3), torch.randn(b, m, D)
        expected = step(x, slides, tiles, visit)
        got = compiled(x, slides, tiles, visit)
        assert torch.allclose(got, expected, rtol=1e-5)
        (a,) = torch.autograd.grad(expected, weight)
        (c,) = torch.autograd.grad(got, weight)
        assert torch.allclose(a, c, rtol=1e-4, atol=1e-5)
