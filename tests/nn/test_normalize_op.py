"""The normalisation of residuals as an operation: its contract with torch, and its gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dre_fast.ops.normalize import backend, normalize_residuals
from dre_fast.reference.encode import NORMALIZATIONS
from dre_fast.reference.encode import normalize_residuals as reference

OPS = torch.ops.dre_fast
CHOICES = [steps for n in range(4) for steps in itertools.combinations(NORMALIZATIONS, n)]
EPS = 1e-12


def residuals(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    V = torch.randn(shape, dtype=dtype)
    V[0, 1] = 0  # an empty codeword
    return V


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("steps", CHOICES, ids="+".join)
def test_opcheck(steps: tuple[str, ...], dtype: torch.dtype) -> None:
    V = residuals(3, 4, 5).to(dtype)
    chosen = [name in steps for name in NORMALIZATIONS]
    torch.library.opcheck(OPS.normalize_residuals.default, (V, *chosen, 0.5, EPS))
    grad = torch.randn(3, 4, 5).to(reference(V, steps).dtype)
    torch.library.opcheck(OPS.normalize_residuals_backward.default, (grad, V, *chosen, 0.5, EPS))


@pytest.mark.parametrize("power", [0.5, 0.8])
@pytest.mark.parametrize("steps", CHOICES, ids="+".join)
def test_values_and_gradients_are_the_references(steps: tuple[str, ...], power: float) -> None:
    V = residuals(3, 4, 5, dtype=torch.float64).requires_grad_()
    out = normalize_residuals(V, steps, power)
    torch.testing.assert_close(out, reference(V, steps, power=power))
    grad = torch.randn_like(V)
    expected = torch.autograd.grad(reference(V, steps, power=power), V, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(out, V, grad)[0], expected)


@pytest.mark.parametrize("steps", CHOICES[1:], ids="+".join)
def test_gradcheck(steps: tuple[str, ...]) -> None:
    V = (torch.rand(2, 3, 4, dtype=torch.float64) + 0.2) * torch.randn(
        2, 3, 4
    ).sign()  # away from the kink at 0
    V.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: normalize_residuals(t, steps, 0.7), V)


@pytest.mark.parametrize("steps", [("intra", "l2"), ("intra", "power", "l2")], ids="+".join)
def test_compiles_to_one_graph(steps: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda t: normalize_residuals(t, steps), fullgraph=True, dynamic=True, backend=counter
    )
    for shape in ((2, 3, 5), (7, 4, 9), (3, 8, 6)):
        V = residuals(*shape)
        grads = []
        for run in (compiled, lambda t: normalize_residuals(t, steps)):
            leaf = V.clone().requires_grad_()
            out = run(leaf)
            grads.append((out.detach(), torch.autograd.grad(out.sin().sum(), leaf)[0]))
        torch.testing.assert_close(grads[0], grads[1])
    # sizes are dynamic: nothing is compiled again; torch traces a frame with a float among its arguments twice
    assert counter.frame_count == 1 + ("power" in steps)


def test_dtypes_and_nothing_to_do() -> None:
    V = residuals(2, 3, 4)
    assert normalize_residuals(V, ()) is V
    assert normalize_residuals(V, "none") is V
    half = V.half().requires_grad_()
    out = normalize_residuals(half, "l2")
    assert out.dtype == torch.float32
    out.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.float16


def test_what_does_not_work_says_so() -> None:
    V = residuals(2, 3, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match="no vmap rule"):
        torch.func.vmap(lambda t: normalize_residuals(t, "l2"))(V[None])
    (first,) = torch.autograd.grad(normalize_residuals(V, "l2").sin().sum(), V, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()
    with pytest.raises(ValueError, match="unknown"):
        normalize_residuals(V, "l1")
    with pytest.raises(ValueError, match="above 0"):
        normalize_residuals(V, "power", power=0.0)
    with pytest.raises(ValueError, match="no normalisation"):
        backend("encode")


def test_backends() -> None:
    assert backend("normalize_residuals", "cuda") == "Triton"
    assert backend("normalize_residuals_backward", "cuda", torch.float64) == "reference"
    assert backend("normalize_residuals", "cpu") == "reference"
