"""The Triton normalisation of residuals and its backward against the float64 reference, by the error rule."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dre_fast.reference.encode import NORMALIZATIONS
from dre_fast.reference.encode import normalize_residuals as reference
from dre_fast.reference.normalize import normalize_residuals_backward as reference_backward

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from dre_fast.kernels.normalize import layout, normalize_residuals, normalize_residuals_backward
from error_rule import within_error_rule

EPS = 1e-12
STEPS = [steps for steps in itertools.product((False, True), repeat=3) if any(steps)]
DEFAULT = (True, False, True)


def names(steps: tuple[bool, bool, bool]) -> list[str]:
    return [name for name, on in zip(NORMALIZATIONS, steps, strict=True) if on]


def residuals(bags: int, codewords: int, dim: int, device: str, size: float = 3.0) -> Tensor:
    """Random V with an empty codeword in every other bag, and the last bag empty."""
    V = size * torch.randn(bags, codewords, dim)
    V[::2, codewords // 2] = 0
    V[-1:] = 0
    return V.to(device)


def check(V: Tensor, steps: tuple[bool, bool, bool], exponent: float = 0.5) -> tuple[Tensor, Tensor]:
    out = normalize_residuals(V, *steps, exponent, EPS)
    assert torch.equal(out, normalize_residuals(V, *steps, exponent, EPS))
    within_error_rule(
        out,
        reference(V, names(steps), EPS, exponent),
        reference(V.double(), names(steps), EPS, exponent),
        name="forward",
    )
    grad = torch.randn_like(V)
    d_V = normalize_residuals_backward(grad, V, *steps, exponent, EPS)
    assert torch.equal(d_V, normalize_residuals_backward(grad, V, *steps, exponent, EPS))
    leaf = V.clone().requires_grad_()
    plain = torch.autograd.grad(reference(leaf, names(steps), EPS, exponent), leaf, grad)[0]
    exact = reference_backward(grad.double(), V.double(), *steps, exponent, EPS)
    within_error_rule(d_V, plain, exact, name="backward")
    return out, d_V


@pytest.mark.parametrize("exponent", [0.5, 0.3, 2.0])
@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: "+".join(names(steps)))
def test_every_choice_of_steps(steps: tuple[bool, bool, bool], exponent: float, kernel_device: str) -> None:
    if not steps[1] and exponent != 0.5:
        pytest.skip("without the power the exponent is not used")
    out, d_V = check(residuals(5, 6, 21, kernel_device), steps, exponent)
    assert (out[-1] == 0).all()
    assert (out[::2, 3] == 0).all()
    if steps != (
        False,
        False,
        True,
    ):  # the gradient of an entry that is 0 by itself is not 0 under the global norm
        assert (d_V[::2, 3] == 0).all()
    assert (d_V[-1] == 0).all()


@pytest.mark.parametrize(
    ("codewords", "dim"),
    [(1, 1), (1, 384), (2, 7), (7, 33), (17, 1), (64, 384), (100, 150), (65, 200), (63, 257), (3, 2048)],
)
def test_sizes(codewords: int, dim: int, kernel_device: str) -> None:
    V = residuals(3, codewords, dim, kernel_device)
    check(V, DEFAULT)
    check(V, (True, True, False))
    check(V, (False, True, True), 0.7)


@pytest.mark.parametrize("steps", [DEFAULT, (True, True, True), (False, False, True)], ids=str)
@pytest.mark.parametrize(
    ("codewords", "dim", "kinds"),
    [(40, 300, "tile bag"), (64, 768, "bag split"), (70, 1025, "split split")],
)
def test_every_layout(
    codewords: int, dim: int, kinds: str, steps: tuple[bool, bool, bool], kernel_device: str
) -> None:
    kinds_found = [layout(codewords, dim, steps[1], True, backward).kind for backward in (False, True)]
    assert " ".join(kinds_found) == (kinds if not steps[1] else kinds.replace("tile", "bag"))
    V = residuals(3, codewords, dim, kernel_device)
    V[0] *= torch.logspace(-3, 3, codewords, device=V.device)[:, None]  # blocks of very different sizes
    check(V, steps)


@pytest.mark.slow
def test_the_largest_bag(kernel_device: str) -> None:
    check(residuals(1, 1024, 2048, kernel_device), DEFAULT)


@pytest.mark.parametrize("steps", [DEFAULT, (False, False, True), (False, True, True)], ids=str)
@pytest.mark.parametrize("dim", [48, 2048])
def test_huge_and_tiny_values(steps: tuple[bool, bool, bool], dim: int, kernel_device: str) -> None:
    """Squares of the first bag overflow, the second lies just above eps, the third below it."""
    V = torch.randn(3, 40, dim).clamp(-3, 3).to(kernel_device)
    V *= torch.tensor([1e38, 1e-10, 1e-14 / dim], device=V.device)[:, None, None]
    grad = torch.randn_like(V)
    # gradients are of the size 1 / V: each bag is judged by its own
    for got, plain, exact in (
        (
            normalize_residuals(V, *steps, 0.5, EPS),
            reference(V, names(steps), EPS),
            reference(V.double(), names(steps), EPS),
        ),
        (
            normalize_residuals_backward(grad, V, *steps, 0.5, EPS),
            reference_backward(grad, V, *steps, 0.5, EPS),
            reference_backward(grad.double(), V.double(), *steps, 0.5, EPS),
        ),
    ):
        for bag in range(3):
            size = exact[bag].abs().max().clamp(min=1e-300)
            assert got[bag].isfinite().all()
            within_error_rule(got[bag].double() / size, plain[bag].double() / size, exact[bag] / size)


@pytest.mark.parametrize("exponent", [0.1, 0.3, 0.5, 0.9, 1.0, 1.7, 3.0])
def test_powers_are_accurate_everywhere(exponent: float, kernel_device: str) -> None:
    """Relative errors, over all magnitudes whose power is a normal number."""
    a = 2.0 ** torch.linspace(-39, min(120, 120 / exponent), 4000, dtype=torch.float64)
    a = torch.cat([a, torch.tensor([1.0, 0.5, 2.0, 0.70710677, 0.7071068, 1.4142135, 1.4142137])])
    V = a.float()[None, None, :2000].to(kernel_device), a.float()[None, None, 2000:].to(kernel_device)
    for part in V:
        got = normalize_residuals(part, False, True, False, exponent, EPS).double()
        exact = part.double() ** float(torch.tensor(exponent))  # the exponent is fp32 too
        assert ((got - exact).abs() <= 3 * max(1.0, exponent) * 2.0**-24 * exact).all()
        assert torch.equal(normalize_residuals(-part, False, True, False, exponent, EPS).double(), -got)


def test_powers_of_nothing_and_infinity(kernel_device: str) -> None:
    V = torch.tensor([0.0, -0.0, 1e-13, -1e-13, float("inf"), float("-inf")], device=kernel_device)[
        None, None
    ]
    for exponent in (0.5, 0.3):
        out = normalize_residuals(V, False, True, False, exponent, EPS)
        assert torch.equal(out, reference(V, "power", EPS, exponent))
        d_V = normalize_residuals_backward(torch.ones_like(V), V, False, True, False, exponent, EPS)
        assert (d_V[..., :4] == 0).all()


def test_nan_stays_in_its_bag(kernel_device: str) -> None:
    V = residuals(4, 5, 16, kernel_device)
    clean = normalize_residuals(V, *DEFAULT, 0.5, EPS)
    V[1, 2, 3] = float("nan")
    out = normalize_residuals(V, *DEFAULT, 0.5, EPS)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])


def test_the_reference_backward_is_the_gradient(kernel_device: str) -> None:
    V = residuals(3, 4, 5, kernel_device).double().requires_grad_()
    grad = torch.randn_like(V)
    for steps, exponent in itertools.product(STEPS, (0.5, 0.8)):
        expected = torch.autograd.grad(reference(V, names(steps), EPS, exponent), V, grad)[0]
        got = reference_backward(grad, V.detach(), *steps, exponent, EPS)
        torch.testing.assert_close(got, expected)


def test_layouts_of_the_tensors_and_no_bags(kernel_device: str) -> None:
    V, grad = residuals(3, 8, 24, kernel_device), torch.randn(3, 8, 24, device=kernel_device)
    for view in (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), lambda t: t[:1].expand(3, 8, 24)):
        one, other = view(V), view(grad)
        for a, b in (
            (
                normalize_residuals(one, *DEFAULT, 0.5, EPS),
                normalize_residuals(one.clone(), *DEFAULT, 0.5, EPS),
            ),
            (
                normalize_residuals_backward(other, one, *DEFAULT, 0.5, EPS),
                normalize_residuals_backward(other.clone(), one.clone(), *DEFAULT, 0.5, EPS),
            ),
        ):
            assert torch.equal(a, b)
    assert normalize_residuals(V[:0], *DEFAULT, 0.5, EPS).shape == (0, 8, 24)


@pytest.mark.gpu
def test_more_bags_than_a_grid_dimension_holds_and_two_to_the_31_entries() -> None:
    V = torch.randn(1, 64, 384, device="cuda").repeat(90_000, 1, 1)
    V[-1] *= 2
    out = normalize_residuals(V, *DEFAULT, 0.5, EPS)
    expected = reference(V[-2:], names(DEFAULT), EPS)
    torch.testing.assert_close(out[-2:], expected)
    assert torch.equal(out[0], out[70_000])


def test_bad_arguments_are_named(kernel_device: str) -> None:
    V = torch.randn(2, 4, 8, device=kernel_device)
    with pytest.raises(ValueError, match="float32"):
        normalize_residuals(V.double(), *DEFAULT, 0.5, EPS)
    with pytest.raises(ValueError, match="codewords"):
        normalize_residuals(V[:, :1].expand(2, 2000, 8), *DEFAULT, 0.5, EPS)
    with pytest.raises(ValueError, match="above 0"):
        normalize_residuals(V, *DEFAULT, 0.0, EPS)
    with pytest.raises(ValueError, match="like the residuals"):
        normalize_residuals_backward(V[:1], V, *DEFAULT, 0.5, EPS)
