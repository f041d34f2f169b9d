"""The public residual_encode and ResidualEncoding: layouts, gradients, errors, precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import dre_fast
from dre_fast import ResidualEncoding, reference, residual_encode
from dre_fast.ops import native

SOFT = {"assignment": "soft", "scale": torch.tensor([0.5, 1.0, 2.0, 0.1])}
OPTIONS = [{}, SOFT]


@pytest.fixture
def codebook() -> Tensor:
    return torch.randn(4, 6)


@pytest.mark.parametrize("options", OPTIONS, ids=["hard", "soft"])
def test_layouts_agree(codebook: Tensor, options: dict) -> None:
    bags = [torch.randn(n, 6) for n in (5, 0, 9, 1)]
    cu = torch.tensor([0, 5, 5, 14, 15])
    flat = torch.cat(bags)
    expected = torch.cat([residual_encode(bag, codebook, **options) for bag in bags])
    assert expected.shape == (4, 4, 6)
    assert not expected[1].any()

    def same(out: Tensor) -> None:
        torch.testing.assert_close(out, expected)

    same(residual_encode(flat, codebook, cu_seqlens=cu, **options))
    same(residual_encode(flat, codebook, cu_seqlens=cu.int(), **options))
    padded = torch.full((4, 9, 6), torch.nan)  # what is masked may hold anything
    mask = torch.zeros(4, 9, dtype=torch.bool)
    index = torch.full((4, 9), -1)
    for b, bag in enumerate(bags):
        places = torch.randperm(9)[: len(bag)].sort().values  # holes in the middle as well
        padded[b, places], mask[b, places] = bag, True
        index[b, places] = torch.arange(int(cu[b]), int(cu[b + 1]))
    same(residual_encode(padded, codebook, mask=mask, **options))
    same(residual_encode(flat, codebook, index=index, **options))
    same(residual_encode(flat, codebook, index=index.flatten(), cu_seqlens=torch.arange(5) * 9, **options))
    shuffled = torch.randperm(15)
    same(residual_encode(flat[shuffled], codebook, index=shuffled.argsort(), cu_seqlens=cu, **options))
    full = torch.randn(3, 7, 6)
    one_by_one = torch.cat([residual_encode(bag, codebook, **options) for bag in full])
    torch.testing.assert_close(residual_encode(full, codebook, **options), one_by_one)
    torch.testing.assert_close(
        residual_encode(full.transpose(0, 1).contiguous().transpose(0, 1), codebook, **options), one_by_one
    )


@pytest.mark.parametrize("normalize", [(), ("intra",), ("power",), ("l2",), ("intra", "power", "l2")])
@pytest.mark.parametrize("kind", ["hard", "scale", "weight"])
def test_gradcheck(kind: str, normalize: tuple[str, ...]) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, codebook, cu = leaf(8, 2), leaf(3, 2), torch.tensor([0, 2, 2, 8])
    names = {"hard": [], "scale": ["scale"], "weight": ["weight", "bias"]}[kind]
    shapes = {"scale": (3,), "weight": (3, 2), "bias": (3,)}

    def encode(x: Tensor, codebook: Tensor, *parameters: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return residual_encode(
            x,
            codebook,
            cu_seqlens=cu,
            assignment="hard" if kind == "hard" else "soft",
            normalize=normalize,
            return_counts=kind != "hard",
            **dict(zip(names, parameters, strict=True)),
        )

    assert gradcheck(encode, (x, codebook, *(leaf(*shapes[name]) for name in names)))


@pytest.mark.parametrize("options", OPTIONS, ids=["hard", "soft"])
def test_gradients_through_mask_and_index(options: dict) -> None:
    codebook = torch.randn(4, 2, dtype=torch.float64)
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    x = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    assert gradcheck(lambda x: residual_encode(x, codebook, mask=mask, **options), (x,))
    store = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[3, -1, 0], [3, 3, 7]])  # row 3 three times, -1 skipped
    assert gradcheck(lambda x: residual_encode(x, codebook, index=index, **options), (store,))
    grad = torch.autograd.grad(residual_encode(x, codebook, mask=mask, **options).sum(), x)[0]
    assert not grad[~mask].any()


def test_counts(codebook: Tensor) -> None:
    x, cu = torch.randn(20, 6), torch.tensor([0, 8, 20])
    _, counts = residual_encode(x, codebook, cu_seqlens=cu, return_counts=True)
    assert counts.dtype == torch.int64
    assert counts.sum(dim=1).tolist() == [8, 12]
    _, mass = residual_encode(x, codebook, cu_seqlens=cu, return_counts=True, **SOFT)
    torch.testing.assert_close(mass.sum(dim=1), torch.tensor([8.0, 12.0]))


def test_empty_codewords_and_bags_give_zero_and_pass_no_gradient() -> None:
    far = torch.full((1, 6), 1e3)
    codebook = torch.cat([torch.randn(3, 6), far]).requires_grad_()
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(10, 6).to(dtype).requires_grad_()
        out = residual_encode(
            x, codebook, cu_seqlens=torch.tensor([0, 10, 10]), normalize=("intra", "power", "l2")
        )
        assert not out[1].any()
        assert not out[0, 3].any()
        d_x, d_codebook = torch.autograd.grad(out.square().sum() + out.sum(), [x, codebook])
        assert d_x.dtype == dtype
        assert torch.isfinite(d_x).all()
        assert torch.isfinite(d_codebook).all()
        assert not d_codebook[3].any()


@pytest.mark.parametrize("options", OPTIONS, ids=["hard", "soft"])
def test_no_rows_at_all(codebook: Tensor, options: dict) -> None:
    x = torch.empty(0, 6).requires_grad_()
    for out in (
        residual_encode(x, codebook, normalize=("intra", "l2"), **options),
        residual_encode(x, codebook, cu_seqlens=torch.tensor([0, 0]), **options),
        residual_encode(x, codebook, index=torch.full((1, 3), -1), **options),
        residual_encode(x.view(1, 0, 6), codebook, **options),
    ):
        assert torch.equal(out, torch.zeros(1, 4, 6))
    assert torch.autograd.grad(residual_encode(x, codebook, **options).sum(), x)[0].shape == (0, 6)
    assert residual_encode(x, codebook, cu_seqlens=torch.tensor([0]), **options).shape == (0, 4, 6)


def test_fewer_rows_than_codewords() -> None:
    codebook = torch.randn(100, 6)
    out, counts = residual_encode(codebook[[7, 50]] + 1e-3, codebook, return_counts=True)
    assert counts[0].nonzero()[:, 0].tolist() == [7, 50]
    torch.testing.assert_close(out[0, 7], torch.full((6,), 1e-3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=["hard", "soft"])
@pytest.mark.parametrize("backend", ["this machine's", "reference"])
def test_autocast_changes_nothing(
    codebook: Tensor, options: dict, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(300, 6)

    def run() -> tuple[Tensor, ...]:
        leaves = {"x": x, "codebook": codebook} | {k: v for k, v in options.items() if isinstance(v, Tensor)}
        leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
        out = residual_encode(**{**options, **leaves}, normalize=("intra", "l2"))
        return out.detach(), *torch.autograd.grad(out.sin().sum(), list(leaves.values()))

    if backend == "reference":  # what installs without a compiler run
        monkeypatch.setattr(native, "provides", lambda op: False)
    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run()
    assert mixed[0].dtype == torch.float32
    for one, other in zip(plain, mixed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=["hard", "soft"])
def test_half_precision_rows(codebook: Tensor, options: dict, dtype: torch.dtype) -> None:
    x = torch.randn(300, 6).to(dtype)
    exact = residual_encode(
        x.double(),
        codebook.double(),
        **{k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()},
    )
    leaf = x.clone().requires_grad_()
    out = residual_encode(leaf, codebook, **options)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-3)
    assert torch.autograd.grad(out.sum(), leaf)[0].dtype == dtype


# ----------------------------------------------------------------------------------------------------- errors


def test_bad_rows_are_named(codebook: Tensor) -> None:
    x, cu = torch.randn(20, 6), torch.tensor([0, 8, 8, 20])
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = x.clone()
        bad[11, 3] = value
        for options in OPTIONS:
            with pytest.raises(ValueError, match="row 3 of bag 2 holds NaN or Inf"):
                residual_encode(bad, codebook, cu_seqlens=cu, **options)
            with pytest.raises(ValueError, match="row 11 of bag 0"):
                residual_encode(bad, codebook, **options)
            with pytest.raises(ValueError, match="row 1 of bag 1"):
                residual_encode(bad.view(2, 10, 6), codebook, **options)
            with pytest.raises(ValueError, match="row 2 of bag 1"):
                residual_encode(bad, codebook, index=torch.tensor([[1, 2, 3], [-1, 4, 11]]), **options)
            assert torch.isfinite(residual_encode(bad, codebook, index=torch.arange(11), **options)).all()
        assert not torch.isfinite(residual_encode(bad, codebook, check=False)).all()
    broken = codebook.clone()
    broken[2, 0] = torch.nan
    with pytest.raises(ValueError, match="row 2 of codebook"):
        residual_encode(x, broken)
    with pytest.raises(ValueError, match="row 3 of scale"):
        residual_encode(x, codebook, assignment="soft", scale=torch.tensor([1.0, 1, 1, torch.nan]))
    with pytest.raises(ValueError, match="overflow"):
        residual_encode(torch.full((2, 6), 3e38), codebook)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cu_seqlens": torch.tensor([0, 3])}, "ascend from 0 to the number of rows, 10; got"),
        ({"cu_seqlens": torch.tensor([1, 10])}, "ascend"),
        ({"cu_seqlens": torch.tensor([0, 7, 4, 10])}, "ascend"),
        ({"cu_seqlens": torch.tensor([0.0, 10.0])}, "int32 or int64"),
        ({"mask": torch.ones(10, dtype=torch.bool)}, r"mask belongs to x \[B, N, D\]"),
        ({"index": torch.tensor([0, 10])}, "index holds 10"),
        ({"index": torch.tensor([-2, 1])}, "index holds -2"),
        ({"index": torch.tensor([1.0])}, "int64"),
        (
            {"index": torch.zeros(2, 2, dtype=torch.int64), "cu_seqlens": torch.tensor([0, 4])},
            "leave cu_seqlens",
        ),
        ({"assignment": "medium"}, "'hard' or 'soft'"),
        ({"assignment": "soft"}, "either scale"),
        ({"assignment": "soft", "scale": torch.ones(4), "weight": torch.ones(4, 6)}, "either scale"),
        ({"assignment": "soft", "scale": torch.ones(4), "bias": torch.ones(4)}, "bias goes with weight"),
        ({"assignment": "soft", "scale": torch.ones(5)}, r"scale must be \(4,\)"),
        ({"assignment": "soft", "scale": torch.tensor([1.0, 2, 0, 1])}, "codeword 2 is not"),
        ({"assignment": "soft", "weight": torch.ones(6, 4)}, r"weight must be \(4, 6\)"),
        ({"scale": torch.ones(4)}, "belong to assignment='soft'"),
        ({"normalize": ("l2", "intra")}, "order is intra, power, l2"),
    ],
)
def test_bad_arguments(codebook: Tensor, arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        residual_encode(torch.randn(10, 6), codebook, **arguments)


def test_what_is_not_a_tensor_is_named(codebook: Tensor) -> None:
    x = torch.randn(4, 6)
    for name, value in (
        ("cu_seqlens", [0, 4]),
        ("index", (0, 1)),
        ("mask", True),
        ("scale", 1.0),
        ("codebook", None),
    ):
        arguments = {"x": x, "codebook": codebook, name: value}
        with pytest.raises(TypeError, match=rf"{name} must be a torch\.Tensor, got {type(value).__name__}"):
            residual_encode(**arguments)


def test_rows_that_have_no_gradient_are_refused(codebook: Tensor) -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"floating point: float32, .* got {dtype}"):
            residual_encode(torch.ones(3, 6).to(dtype), codebook)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_codeword_that_is_not_finite_is_named(codebook: Tensor, bad: float) -> None:
    broken = codebook.clone()
    broken[2, 3] = bad
    for options in OPTIONS:
        with pytest.raises(ValueError, match="row 2 of codebook holds NaN or Inf"):
            residual_encode(torch.randn(9, 6), broken, **options)


def test_the_gradient_of_half_rows_may_pass_outside_their_range() -> None:
    """A loss scale of 2^16 over rows of norm 80, and tiny gradients over small rows: fp16 holds the quotients."""
    codebook = torch.randn(4, 16)
    for size, grad_size in ((20.0, 65536.0), (1e-2, 1e-8)):
        x = (torch.randn(16, 16) * size).half()
        grad = grad_size * torch.randn(1, 4, 16)
        found = []
        for rows in (x, x.double()):
            leaf = rows.clone().requires_grad_()
            V = residual_encode(
                leaf, codebook.to(torch.float64 if rows is not x else torch.float32), normalize_rows=True
            )
            V.backward(grad.to(V.dtype))
            found.append(leaf.grad)
        assert found[0].dtype == torch.float16
        torch.testing.assert_close(found[0].double(), found[1], rtol=2e-3, atol=1e-7)


def test_gradients_of_a_row_taken_twice_are_added_before_they_are_rounded() -> None:
    x = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    V = residual_encode(x, torch.zeros(1, 2), index=torch.tensor([0, 0]), cu_seqlens=torch.tensor([0, 1, 2]))
    V.backward(torch.tensor([[[7e4, 1.0]], [[-7e4, 1.0]]]))
    assert x.grad.tolist() == [[0.0, 2.0]]


@pytest.mark.parametrize("steps", ["l2", ("intra", "l2")], ids=str)
@pytest.mark.parametrize("size", [(64, 1024), (256, 384)], ids=str)
def test_one_bag_gives_the_same_bits_for_any_number_of_threads(size: tuple[int, int], steps: str) -> None:
    x, codebook = torch.randn(500, size[1]), torch.randn(size)
    weight, found, threads = torch.randn(1, *size), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            V = residual_encode(leaf, codebook, normalize=steps)
            V.backward(weight)
            found.append((V.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("assignment", ["soft", "netvlad"])
def test_fit_finds_the_same_sharpness_far_from_the_origin(assignment: str) -> None:
    rows = torch.randn(2000, 16)
    found = []
    for offset in (0.0, 1e4):
        module = ResidualEncoding(16, 6, assignment)
        module.fit(rows + offset)
        found.append(
            module.scale[0] if assignment == "soft" else module.weight.norm() / module.codebook.norm() / 2
        )
    assert float(found[0] / found[1]) == pytest.approx(1, rel=0.1)  # k-means ends elsewhere


def test_bad_shapes(codebook: Tensor) -> None:
    with pytest.raises(ValueError, match=r"features come last: pass x\.transpose\(1, 2\)"):
        residual_encode(torch.randn(2, 6, 9), codebook)
    with pytest.raises(ValueError, match=r"\[N, D\] or \[B, N, D\]"):
        residual_encode(torch.randn(2, 2, 2, 6), codebook)
    with pytest.raises(ValueError, match=r"\[N, D\] or \[B, N, D\]"):
        residual_encode(torch.tensor(1.0), codebook)
    with pytest.raises(ValueError, match="D=5"):
        residual_encode(torch.randn(3, 5), codebook)
    with pytest.raises(ValueError, match="K >= 1"):
        residual_encode(torch.randn(3, 6), torch.empty(0, 6))
    with pytest.raises(ValueError, match="floating point"):
        residual_encode(torch.ones(3, 6, dtype=torch.int64), codebook)
    with pytest.raises(ValueError, match="mask must be bool"):
        residual_encode(torch.randn(2, 3, 6), codebook, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="takes only a mask"):
        residual_encode(torch.randn(2, 3, 6), codebook, cu_seqlens=torch.tensor([0, 6]))


def test_double_backward_and_vmap_say_so(codebook: Tensor) -> None:
    for options in OPTIONS:
        x = torch.randn(5, 6, requires_grad=True)
        for rows, of_result in ((x, torch.square), (x * 2, torch.sum)):
            V = residual_encode(rows, codebook, **options, normalize="l2")
            (grad,) = torch.autograd.grad(of_result(V).sum(), rows, create_graph=True)
            with pytest.raises(RuntimeError, match="differentiable once"):
                grad.square().sum().backward()
        for check in (False, True):
            with pytest.raises(NotImplementedError, match="no vmap rule: pass all bags in one call"):
                torch.vmap(lambda bag, o=options, c=check: residual_encode(bag, codebook, check=c, **o))(
                    torch.randn(2, 5, 6)
                )
    x = torch.randn(5, 6)
    for name, batch in (("index", torch.zeros(2, 5, dtype=torch.int64)), ("scale", torch.ones(2, 4))):
        o = {"assignment": "soft"} if name == "scale" else {}
        with pytest.raises(NotImplementedError, match="no vmap rule"):
            torch.vmap(lambda t, n=name, o=o: residual_encode(x, codebook, **o, **{n: t}))(batch)


def test_the_kernel_leaves_out_rows_of_no_bag(kernel_device: str) -> None:
    """Rows past the last offset: every backend must ignore them."""
    kernels = pytest.importorskip("dre_fast.kernels", reason="needs triton")
    x, codebook = torch.randn(70, 16), torch.randn(8, 16)
    cu = torch.tensor([0, 20, 20, 41])
    out = kernels.hard_encode(x.to(kernel_device), codebook.to(kernel_device), cu.to(kernel_device))
    expected = reference.hard_encode(x, codebook, cu)
    torch.testing.assert_close(out[0].cpu(), expected[0], rtol=1e-5, atol=1e-4)
    assert torch.equal(out[1].cpu(), expected[1])


# ----------------------------------------------------------------------------------------------------- module


@pytest.mark.parametrize("assignment", ["hard", "soft", "netvlad"])
def test_module(assignment: str) -> None:
    rows = reference.l2_normalize(torch.randn(2000, 8))
    module = ResidualEncoding(8, 16, assignment)
    assert list(module.parameters()) == []
    inertia = module.fit(rows)
    assert inertia < rows.square().sum() * 0.9
    out = module(rows, cu_seqlens=torch.tensor([0, 500, 2000]))
    assert out.shape == (2, 16, 8)
    torch.testing.assert_close(out.flatten(1).norm(dim=1), torch.ones(2))
    copy = ResidualEncoding(8, 16, assignment)
    copy.load_state_dict(module.state_dict())
    assert torch.equal(copy(rows), module(rows))
    assert assignment in repr(module)
    if assignment != "hard":  # fitted to be clear but soft: the mean of the gap of logits is ln 100
        _, mass = module(rows, return_counts=True)
        parameters = (
            {"scale": module.scale}
            if assignment == "soft"
            else {"weight": module.weight, "bias": module.bias}
        )
        a = reference.soft_assign(rows, module.codebook, **parameters)
        best = a.log().topk(2, dim=1).values
        torch.testing.assert_close(
            (best[:, 0] - best[:, 1]).mean(), torch.tensor(100.0).log(), rtol=1e-3, atol=0
        )
        torch.testing.assert_close(mass.sum(), torch.tensor(2000.0))


@pytest.mark.parametrize("assignment", ["hard", "soft", "netvlad"])
def test_module_learns_when_asked(assignment: str) -> None:
    module = ResidualEncoding(8, 4, assignment, normalize=("intra", "l2"), learnable=True)
    module.fit(torch.randn(100, 8))
    names = {name for name, _ in module.named_parameters()}
    assert (
        names
        == {"codebook"} | {"hard": set(), "soft": {"log_scale"}, "netvlad": {"weight", "bias"}}[assignment]
    )
    module(torch.randn(3, 30, 8)).sin().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_module_errors() -> None:
    with pytest.raises(ValueError, match="netvlad"):
        ResidualEncoding(8, 4, "firm")
    with pytest.raises(ValueError, match="at least 1"):
        ResidualEncoding(0, 4)
    with pytest.raises(ValueError, match="order"):
        ResidualEncoding(8, 4, normalize=("l2", "power"))
    with pytest.raises(ValueError, match="D=5, not 8"):
        ResidualEncoding(8, 4).fit(torch.randn(10, 5))


def test_public_names() -> None:
    assert dre_fast.residual_encode is residual_encode
    assert dre_fast.reference.residual_encode is reference.residual_encode
