"""The reference encoding against the definition written out over N x K x D."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dre_fast import reference
from dre_fast.reference import encode, soft
from dre_fast.reference import rows as row_sources


def bags_of(cu: Tensor) -> list[tuple[int, int]]:
    offsets = cu.tolist()
    return list(itertools.pairwise(offsets))


def written_out(x: Tensor, codebook: Tensor, cu: Tensor, assignment: Tensor) -> Tensor:
    """V_bk = sum_i a_ik (x_i - c_k) with every residual formed."""
    weighted = assignment[:, :, None] * (x[:, None, :] - codebook[None])
    return torch.stack([weighted[a:b].sum(dim=0) for a, b in bags_of(cu)])


def one_hot(x: Tensor, codebook: Tensor) -> Tensor:
    distance = (x[:, None, :] - codebook[None]).square().sum(dim=2)
    return torch.nn.functional.one_hot(distance.argmin(dim=1), len(codebook)).to(x.dtype)


@pytest.mark.parametrize("rows", [0, 1, 63, 1000, 1023])
@pytest.mark.parametrize("words", [1, 7, 64])
def test_hard_encode_is_the_definition(rows: int, words: int) -> None:
    x, codebook = torch.randn(rows, 5).double(), torch.randn(words, 5).double()
    cu = torch.tensor([0, rows // 3, rows // 3, rows])
    residuals, counts, codes, _ = reference.hard_encode(x, codebook, cu)
    a = one_hot(x, codebook)
    torch.testing.assert_close(residuals, written_out(x, codebook, cu, a), rtol=0, atol=1e-10)
    assert codes.dtype == counts.dtype == torch.int64
    assert torch.equal(codes, a.argmax(dim=1))
    assert torch.equal(counts, torch.stack([a[s:e].sum(dim=0) for s, e in bags_of(cu)]).long())
    assert torch.equal(residuals[1], torch.zeros(words, 5).double())


@pytest.mark.slow
def test_hard_encode_of_a_large_bag() -> None:
    x = reference.l2_normalize(torch.randn(65_537, 32))
    codebook = x[:64].clone()
    cu = torch.tensor([0, 65_537])
    residuals, counts, codes, _ = reference.hard_encode(x, codebook, cu)
    exact, exact_counts, exact_codes, _ = reference.hard_encode(x.double(), codebook.double(), cu)
    assert torch.equal(codes, exact_codes)
    assert torch.equal(counts, exact_counts)
    assert counts.sum() == 65_537
    plain = torch.nn.functional.one_hot(codes, 64).float()
    gemm = plain.T @ x - plain.sum(dim=0)[:, None] * codebook
    error = (residuals[0] - exact[0]).abs().max()
    assert error <= 2 * (gemm - exact[0]).abs().max() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_dtype_and_accuracy(dtype: torch.dtype) -> None:
    x = torch.randn(500, 24).to(dtype)
    codebook = torch.randn(9, 24)
    cu = torch.tensor([0, 500])
    residuals, _, codes, _ = reference.hard_encode(x, codebook, cu)
    exact, _, exact_codes, _ = reference.hard_encode(x.double(), codebook.double(), cu)
    assert residuals.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(codes, exact_codes)
    torch.testing.assert_close(residuals.double(), exact, rtol=1e-5, atol=1e-4)


def test_ties_and_duplicate_codewords_go_to_the_lowest_k() -> None:
    x = torch.randn(400, 48)
    words = torch.randn(33, 48)
    codebook = torch.cat([words, words, words[:31]])  # 97 columns: a product of this width has a ragged edge
    assert int(reference.hard_assign(x, codebook).max()) < 33
    axis = torch.eye(6).repeat(2, 1)
    assert torch.equal(reference.hard_assign(torch.zeros(3, 6), axis), torch.zeros(3, dtype=torch.int64))
    between = torch.tensor([[0.0, 1.0]])
    assert reference.hard_assign(between, torch.tensor([[5.0, 5.0], [1.0, 1.0], [-1.0, 1.0]])).tolist() == [1]


def test_the_code_of_a_row_does_not_depend_on_its_neighbours() -> None:
    codebook = torch.randn(50, 64)
    middle = (
        codebook[torch.arange(0, 49)] + codebook[torch.arange(1, 50)]
    ) / 2  # all but exactly between two
    x = torch.cat([middle, torch.randn(951, 64) * 0.1])
    together = reference.hard_assign(x, codebook)
    alone = torch.cat([reference.hard_assign(row[None], codebook) for row in x])
    assert torch.equal(together, alone)
    order = torch.randperm(len(x))
    assert torch.equal(reference.hard_assign(x[order], codebook), together[order])


def test_codes_are_exact_where_fp32_scores_are_not() -> None:
    # a common offset of 1000 leaves nothing of the differences in |c|^2/2 - x.c in fp32
    codebook = 1000 + torch.randn(20, 16)
    x = codebook[torch.randint(20, (300,))] + 0.01 * torch.randn(300, 16)
    expected = (x.double()[:, None] - codebook.double()[None]).square().sum(dim=2).argmin(dim=1)
    assert torch.equal(reference.hard_assign(x, codebook), expected)


def test_rows_of_no_bag_are_left_out() -> None:
    x, codebook = torch.randn(30, 4), torch.randn(3, 4)
    x[25] = torch.nan
    cu = torch.tensor([0, 10, 20])
    residuals, counts, codes, _ = reference.hard_encode(x, codebook, cu)
    expected, expected_counts, _, _ = reference.hard_encode(x[:20], codebook, cu)
    assert torch.equal(residuals, expected)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(codes[20:], torch.full((10,), -1))
    back = encode.hard_encode_backward(torch.ones_like(residuals), codes, cu)
    assert torch.equal(back[:20], torch.ones(20, 4))
    assert torch.equal(back[20:], torch.zeros(10, 4))


def test_strides_do_not_matter() -> None:
    x, codebook = torch.randn(200, 6), torch.randn(5, 6)
    cu = torch.tensor([0, 80, 200])
    expected = reference.hard_encode(x, codebook, cu)[0]
    sliced = torch.randn(400, 12)
    sliced[::2, ::2] = x
    for other in (sliced[::2, ::2], x.T.contiguous().T):
        assert not other.is_contiguous()
        assert torch.equal(reference.hard_encode(other, codebook.T.contiguous().T, cu)[0], expected)


def soft_parameters(kind: str, words: int, dim: int) -> dict[str, Tensor]:
    if kind == "scale":
        return {"scale": torch.rand(words).double() + 0.1}
    both = {"weight": torch.randn(words, dim).double(), "bias": torch.randn(words).double()}
    return both if kind == "weight+bias" else {"weight": both["weight"]}


@pytest.mark.parametrize("kind", ["scale", "weight+bias", "weight"])
@pytest.mark.parametrize("rows", [0, 1, 63, 1000])
def test_soft_encode_is_the_definition(kind: str, rows: int) -> None:
    x, codebook = torch.randn(rows, 5).double(), torch.randn(7, 5).double()
    cu = torch.tensor([0, rows // 3, rows // 3, rows])
    p = soft_parameters(kind, 7, 5)
    if kind == "scale":
        logits = -p["scale"] * (x[:, None] - codebook[None]).square().sum(dim=2)
    else:
        logits = torch.einsum("nd,kd->nk", x, p["weight"]) + p.get("bias", torch.zeros(7).double())
    a = logits.softmax(dim=1)
    residuals, mass = reference.soft_encode(x, codebook, cu, **p)
    torch.testing.assert_close(reference.soft_assign(x, codebook, **p), a)
    torch.testing.assert_close(residuals, written_out(x, codebook, cu, a), rtol=0, atol=1e-10)
    torch.testing.assert_close(mass, torch.stack([a[s:e].sum(dim=0) for s, e in bags_of(cu)]))


@pytest.mark.parametrize("kind", ["scale", "weight+bias", "weight"])
def test_soft_backward_is_what_autograd_finds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft, "_CHUNK_ENTRIES", 7 * 16)  # several chunks a bag
    x = torch.randn(100, 5, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    p = {name: value.requires_grad_() for name, value in soft_parameters(kind, 7, 5).items()}
    cu = torch.tensor([0, 37, 37, 90])
    residuals, mass = encode.soft_encode(x, codebook, cu, **p)
    grad, grad_mass = torch.randn_like(residuals), torch.randn_like(mass)
    wanted = torch.autograd.grad([residuals, mass], [x, codebook, *p.values()], [grad, grad_mass])
    with torch.no_grad():
        found = encode.soft_encode_backward(grad, grad_mass, x, codebook, cu, mass, **p)
    for one, other in zip(wanted, [g for g in found if g.numel()], strict=True):
        torch.testing.assert_close(other, one)


class _Largest(TorchFunctionMode):
    """The largest number of elements any torch function returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("assignment", ["hard", "soft"])
def test_no_product_of_rows_and_codewords_is_kept(assignment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sources, "_CHUNK_SCORES", 128 * 64)
    monkeypatch.setattr(soft, "_CHUNK_ENTRIES", 128 * 64)
    rows, words, dim = 4096, 64, 4
    x, codebook, cu = torch.randn(rows, dim), torch.randn(words, dim), torch.tensor([0, rows])
    with _Largest() as largest:
        if assignment == "hard":
            reference.hard_encode(x, codebook, cu)
        else:
            out = reference.soft_encode(x, codebook, cu, scale=torch.ones(words))
            encode.soft_encode_backward(*out, x, codebook, cu, out[1], scale=torch.ones(words))
    assert 0 < largest.elements <= rows * dim


def test_two_runs_give_the_same_bits() -> None:
    x, codebook, cu = torch.randn(5000, 16), torch.randn(8, 16), torch.tensor([0, 1000, 5000])
    first, second = (reference.hard_encode(x, codebook, cu)[0] for _ in range(2))
    assert torch.equal(first, second)


# ---------------------------------------------------------------------------------------------- normalisation


def test_normalisations_are_their_formulas() -> None:
    v = torch.randn(2, 3, 4).double()
    intra = v / v.norm(dim=2, keepdim=True)
    power = v.sign() * v.abs().sqrt()
    torch.testing.assert_close(reference.normalize_residuals(v, ("intra",)), intra)
    torch.testing.assert_close(reference.normalize_residuals(v, "power"), power)
    torch.testing.assert_close(
        reference.normalize_residuals(v, ("power",), power=0.3), v.sign() * v.abs() ** 0.3
    )
    whole = reference.normalize_residuals(v, ("l2",))
    torch.testing.assert_close(whole, v / v.flatten(1).norm(dim=1)[:, None, None])
    chained = (intra.sign() * intra.abs().sqrt()).flatten(1)
    chained = (chained / chained.norm(dim=1, keepdim=True)).view_as(v)
    torch.testing.assert_close(reference.normalize_residuals(v, ("intra", "power", "l2")), chained)
    assert torch.equal(reference.normalize_residuals(v, ()), v)
    assert torch.equal(reference.normalize_residuals(v, "none"), v)


@pytest.mark.parametrize("steps", [("intra",), ("power",), ("l2",), ("intra", "power", "l2")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_normalising_zeros_is_zero_with_zero_gradient(steps: tuple[str, ...], dtype: torch.dtype) -> None:
    v = torch.randn(3, 4, 5).to(dtype)
    v[0, 1] = 0  # an empty codeword
    v[2] = 0  # an empty bag
    v.requires_grad_()
    out = reference.normalize_residuals(v, steps)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not out[0, 1].any()
    assert not out[2].any()
    (grad,) = torch.autograd.grad(out.sum(), v)
    assert torch.isfinite(grad).all()
    assert not grad[2].any()
    if "intra" in steps or "power" in steps:
        assert not grad[0, 1].any()
    assert grad[1].any()


@pytest.mark.parametrize(
    "steps", [("l2", "intra"), ("intra", "intra"), ("L2",), ("sqrt", "l2"), ("none", "l2")]
)
def test_wrong_normalisations_are_refused(steps: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="normalize"):
        reference.normalize_residuals(torch.randn(1, 2, 3), steps)


def test_l2_normalize() -> None:
    x = torch.randn(6, 8)
    x[2] = 0
    x[3] *= 1e-6
    out = reference.l2_normalize(x)
    torch.testing.assert_close(out.norm(dim=1), torch.tensor([1.0, 1, 0, 1, 1, 1]))
    assert reference.l2_normalize(x.half()).dtype == torch.float32
    tiny = torch.full((1, 4), 1e-14)
    torch.testing.assert_close(reference.l2_normalize(tiny), tiny / 1e-12)
    y = x[[0, 2]].double().requires_grad_()
    (grad,) = torch.autograd.grad(reference.l2_normalize(y)[:, 0].sum(), y)
    assert not grad[1].any()
    assert torch.autograd.gradcheck(reference.l2_normalize, (x[:1].double().requires_grad_(),))


def test_reference_residual_encode_follows_autograd() -> None:
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 3, 7])
    for options in ({}, {"assignment": "soft", "scale": torch.ones(3).double()}):
        assert torch.autograd.gradcheck(
            lambda a, c, options=options: reference.residual_encode(
                a, c, cu_seqlens=cu, normalize=("intra", "l2"), **options
            ),
            (x, codebook),
        )
    with pytest.raises(ValueError, match="assignment"):
        reference.residual_encode(x, codebook, assignment="fuzzy")


@pytest.mark.parametrize("largest", [1e15, 1e25, 1e38])
def test_l2_normalize_of_large_rows(largest: float) -> None:
    x = torch.tensor([[3.0, -4.0], [1.0, 0.0]])
    big = (x / 4 * largest).requires_grad_()
    torch.testing.assert_close(reference.l2_normalize(big), reference.l2_normalize(x))
    reference.l2_normalize(big)[0, 0].backward()
    assert torch.isfinite(big.grad).all()
    wide = (100 * torch.randn(4, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(reference.l2_normalize, (wide,))


def test_every_setting_of_the_matmul_precision_is_understood() -> None:
    """Programs set it through torch.set_float32_matmul_precision or through torch.backends, not both."""
    program = """
import torch
from dre_fast import reference
x, codebook, cu = torch.randn(300, 64), torch.randn(5, 64), torch.tensor([0, 300])
before = reference.hard_encode(x, codebook, cu)[2]
{setting}
assert encode_is_careful() is {careful}
assert torch.equal(before, reference.hard_encode(x, codebook, cu)[2])
"""
    helper = "from dre_fast.reference.hard import _reduced_products\n"
    helper += "def encode_is_careful(): return _reduced_products(torch.zeros(1))\n"
    for setting, careful in (
        ("torch.set_float32_matmul_precision('medium')", True),
        ("torch.set_float32_matmul_precision('highest')", False),
        ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", False),
        ("torch.backends.fp32_precision = 'tf32'", True),
    ):
        code = helper + program.format(setting=setting, careful=careful)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, f"{setting}: {done.stderr}"
