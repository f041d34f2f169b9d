"""The C++ soft encoding against the float64 reference: the error rule, odd inputs, threads, every instruction set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from dre_fast.ops import native
from dre_fast.reference import soft as reference

if not native.available():
    pytest.skip(f"needs the C++ ops: {native.why_not()}", allow_module_level=True)
pytest.importorskip("triton", reason="soft_check needs triton: pip install triton (Linux only)")

import soft_check
from encode_check import make_bags, stored
from soft_check import KINDS, parameters, source

_NATIVE = torch.ops.dre_fast_native
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
STORED = [torch.int8, torch.float8_e4m3fn]


def encode(
    x: Tensor, codebook: Tensor, cu_seqlens: Tensor, *, unit: bool = False, **given: Tensor | None
) -> tuple[Tensor, ...]:
    options = [given.get(name) for name in ("scale", "weight", "bias", "index", "row_scale")]
    return _NATIVE.soft_encode(x, codebook, cu_seqlens, *options, unit)


def backward(
    *tensors: Tensor, unit: bool = False, rows: bool = True, **given: Tensor | None
) -> tuple[Tensor, ...]:
    options = [given.get(name) for name in ("scale", "weight", "bias", "index", "row_scale")]
    return _NATIVE.soft_encode_backward(*tensors, *options, unit, rows)


check = partial(soft_check.check, encode=encode)
check_backward = partial(soft_check.check_backward, backward=backward)


def both(*arguments: object, **options: object) -> tuple[Tensor, ...]:
    check(*arguments, **options)
    return tuple(check_backward(*arguments, **options).values())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("words", "dim"), [(1, 1), (2, 7), (17, 1), (64, 384), (33, 385), (130, 48), (1024, 16), (5, 2048)]
)
def test_sizes(words: int, dim: int, kind: str, dtype: torch.dtype) -> None:
    """Rows of several blocks and segments, and fewer rows than codewords.

    Five bags, since the largest rounding error of one may be thrice that of another, in plain torch as well.
    """
    for lengths in ([300, 7, 260, 290, 310], [3]):
        x, codebook, cu = make_bags(lengths, dim, words, dtype, "cpu")
        both(x, codebook, cu, parameters(kind, codebook))


@pytest.mark.parametrize("dtype", [*FLOATS, *STORED], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sources_of_rows(kind: str, dtype: torch.dtype) -> None:
    """Padded rows by index, some skipped and some read twice, some past the last bag; as they are and as unit rows."""
    lengths = [0, 210, 0, 40, 1, 300]
    x, codebook, cu, index, scale = source(400, lengths, 48, 7, dtype, "cpu", padding=16)
    index[210:250] = -1  # a bag that skips all
    given = parameters(kind, codebook)
    for unit in (False, True):
        both(x, codebook, cu, given, index, scale, unit)
        both(x, codebook, cu[:-1], given, index, scale, unit)
        both(x, codebook, torch.tensor([0, 100, 400]), given, None, scale, unit)


@pytest.mark.parametrize(
    "lengths",
    [[0], [1], [0, 0, 5, 0], [0, 1500, 0, 0, 120, 0], [1] * 90, [64] * 40, [3000, 1, 2, 3, 900], []],
)
@pytest.mark.parametrize("kind", ["scale", "weight and bias"])
def test_ragged_and_empty_bags(kind: str, lengths: list[int]) -> None:
    x, codebook, cu = make_bags([*lengths, 2], 24, 6, torch.float32, "cpu")
    cu = cu[:-1]  # two rows are in no bag
    given = parameters(kind, codebook)
    V, mass = check(x, codebook, cu, given)
    empty = cu.diff() == 0
    assert not V[empty].any()
    assert not mass[empty].any()
    if lengths:
        found = check_backward(x, codebook, cu, given)
        assert not found["rows"][-2:].any()
    else:
        d_rows, *parts = backward(V, mass, x, codebook, cu, mass, **given)
        assert not any(t.any() for t in (d_rows, *parts))


def test_without_the_gradient_of_rows() -> None:
    x, codebook, cu, index, scale = source(50, [30, 40], 20, 5, torch.int8, "cpu")
    given = parameters("scale", codebook)
    V, mass = encode(x, codebook, cu, index=index, row_scale=scale, **given)
    arguments = (torch.randn_like(V), torch.randn_like(mass), x, codebook, cu, mass)
    options = {"index": index, "row_scale": scale, **given}
    with_rows, without = (backward(*arguments, **options, rows=rows) for rows in (True, False))
    assert without[0].shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(with_rows[1:], without[1:], strict=True))


def test_strided_tensors() -> None:
    x, codebook, cu = make_bags([200, 140], 32, 8, torch.float32, "cpu")
    given = parameters("weight and bias", codebook)
    V, mass = encode(x, codebook, cu, **given)
    grads = (torch.randn_like(V), torch.randn_like(mass))
    expected = backward(*grads, x, codebook, cu, mass, **given)
    strided = {name: torch.stack([t, t], -1)[..., 0] for name, t in given.items()}
    for view in (torch.cat([x, x], 1)[:, :32], x.repeat_interleave(3, 0)[::3], x.T.contiguous().T):
        for words in (codebook.T.contiguous().T, codebook.double()):
            assert torch.equal(encode(view, words, cu, **strided)[0], V)
            got = backward(grads[0].mT.contiguous().mT, grads[1], view, words, cu, mass, **strided)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    one = x[:1].expand(340, 32)
    torch.testing.assert_close(encode(one, codebook, cu, **given)[1].sum(1), torch.tensor([200.0, 140.0]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("kind", ["scale", "weight"])
def test_rows_that_are_not_finite_stay_in_their_bag(kind: str, unit: bool, bad: float) -> None:
    x, codebook, cu = make_bags([130, 240, 150], 24, 6, torch.float32, "cpu")
    given = parameters(kind, codebook)
    clean = encode(x, codebook, cu, **given, unit=unit)
    grads = [torch.randn_like(t) for t in clean]
    d_clean = backward(*grads, x, codebook, cu, clean[1], **given, unit=unit)[0]
    x[235, 3] = bad
    V, mass = encode(x, codebook, cu, **given, unit=unit)
    assert V[1].isnan().all()
    assert mass[1].isnan().all()
    assert torch.equal(V[[0, 2]], clean[0][[0, 2]])
    assert torch.equal(mass[[0, 2]], clean[1][[0, 2]])
    d_rows, _, *parts = backward(*grads, x, codebook, cu, mass, **given, unit=unit)
    assert not d_rows[235].isfinite().any()
    d_rows[235] = d_clean[235] = 0
    assert torch.equal(d_rows, d_clean)
    assert all(t.isnan().all() for t in parts if t.numel())


def test_a_gradient_that_is_not_finite_stays_in_its_bag() -> None:
    """As under a loss scale that is too large: fp16 training looks for such gradients."""
    x, codebook, cu = make_bags([130, 240, 150], 24, 6, torch.float32, "cpu")
    given = parameters("scale", codebook)
    V, mass = encode(x, codebook, cu, **given)
    grads = [torch.randn_like(V), torch.randn_like(mass)]
    clean = backward(*grads, x, codebook, cu, mass, **given)[0]
    grads[0][1, 2, 3] = torch.inf
    d_rows, d_codebook, d_scale, _, _ = backward(*grads, x, codebook, cu, mass, **given)
    assert not d_rows[130:370].isfinite().all()
    assert torch.equal(d_rows[:130], clean[:130])
    assert torch.equal(d_rows[370:], clean[370:])
    assert not d_codebook.isfinite().all()
    assert not d_scale.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("kind", ["scale", "weight and bias"])
def test_large_logits(kind: str, dtype: torch.dtype) -> None:
    """Assignments near 0 and 1, logits of some thousands: nothing overflows."""
    x, codebook, cu, index, scale = source(40, [30, 20], 24, 5, dtype, "cpu")
    V, mass = check(x, codebook, cu, parameters(kind, codebook, 1e3), index, scale)
    assert V.isfinite().all()
    assert (mass >= 0).all()


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e4, 1e17])
def test_huge_and_tiny_rows(size: float) -> None:
    x, codebook, cu = make_bags([30, 40], 24, 5, torch.float32, "cpu")
    x[::2] *= size
    x[5] = 0
    V, _ = check(x, codebook, cu, parameters("scale", codebook))
    assert V.isfinite().all()
    both(x, codebook, cu, parameters("weight", codebook), unit=True)


@pytest.mark.parametrize("kind", ["scale", "weight"])
def test_what_all_rows_share_takes_no_digits(kind: str) -> None:
    """Features far from the origin: the usual form |x|^2 - 2 x.c + |c|^2 loses nine of ten digits here."""
    x, codebook, cu = make_bags([300, 40], 64, 8, torch.float32, "cpu")
    x, codebook, given = x + 1000, codebook + 1000, parameters("scale", codebook)
    if kind == "weight":  # logits that do not see the offset
        given = {"weight": torch.randn(8, 64)}
        given["weight"] -= given["weight"].mean(1, keepdim=True)
    V, mass = encode(x, codebook, cu, **given)
    double = {name: t.double() for name, t in given.items()}
    exact = reference.soft_encode(x.double(), codebook.double(), cu, **double)
    limit = 1e-5 if kind == "scale" else 1e-3  # of weights, the sums are rounded to 2^-24 of a thousand
    assert float((V - exact[0]).norm() / exact[0].norm()) < limit
    assert float((mass - exact[1]).norm() / exact[1].norm()) < limit


@pytest.mark.parametrize("logit", [0.0, 1e-3, 1.0, 20.0, 86.0, 87.2, 87.4, 100.0, 1e30])
def test_softmax_of_two(logit: float) -> None:
    """One row and two codewords: the mass is (1, e^-logit) / (1 + e^-logit), down to the least normal number."""
    bias = torch.tensor([0.0, -logit])
    mass = encode(
        torch.ones(1, 1), torch.zeros(2, 1), torch.tensor([0, 1]), weight=torch.zeros(2, 1), bias=bias
    )[1]
    expected = bias.double().softmax(0)
    torch.testing.assert_close(mass[0].double(), expected, rtol=3e-7, atol=1.2e-38)


def test_fp16_gradients_beyond_the_format_become_infinite() -> None:
    x, codebook, cu = make_bags([20], 8, 3, torch.float16, "cpu")
    given = {"weight": torch.zeros(3, 8)}  # a row's gradient is then the mean of that of its bag
    V, mass = encode(x, codebook, cu, **given)
    d_rows = backward(torch.full_like(V, 1e6), torch.zeros_like(mass), x, codebook, cu, mass, **given)[0]
    assert d_rows.dtype == torch.float16
    assert d_rows.isinf().all()


def test_many_bags_of_one_row() -> None:
    x = torch.randn(70_000, 5)
    codebook, weight = torch.randn(3, 5), torch.randn(3, 5)
    V, mass = encode(x, codebook, torch.arange(70_001), weight=weight)
    a = (x @ weight.T).softmax(1)
    torch.testing.assert_close(mass, a)
    torch.testing.assert_close(V, a[..., None] * (x[:, None] - codebook), atol=1e-5, rtol=1e-4)
    grad = torch.randn_like(V)
    got = backward(grad, torch.zeros_like(mass), x, codebook, torch.arange(70_001), mass, weight=weight)
    torch.testing.assert_close(got[1], -(mass[..., None] * grad).sum(0), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["scale", "weight and bias"])
def test_any_number_of_threads_gives_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    x, codebook, cu = make_bags([10, 7000, 0, 1900, 40], 48, 20, dtype, "cpu")
    given = parameters(kind, codebook)
    threads, found = torch.get_num_threads(), []
    grads = (torch.randn(5, 20, 48), torch.randn(5, 20))
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            V, mass = encode(x, codebook, cu, **given)
            found.append((V, mass, *backward(*grads, x, codebook, cu, mass, **given)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_long_bags_follow_the_error_rule() -> None:
    for lengths in ([40_000], [1, 30_000, 500, 9_499]):
        x, codebook, cu = make_bags(lengths, 64, 24, torch.float32, "cpu")
        both(x, codebook, cu, parameters("scale", codebook, 5.0))
        both(x, codebook, cu, parameters("weight and bias", codebook))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.zeros(2_100_000, 1024, dtype=torch.int8)
    codebook = torch.randn(3, 1024) / 32
    index = torch.tensor([0, 2_099_999, -1, 2_097_152])
    x[2_099_999], x[2_097_152] = 3, -2
    scale = torch.full((2_100_000,), 0.5)
    few, few_index = x[index.clamp(min=0)], torch.tensor([0, 1, -1, 3])
    given = parameters("scale", codebook, 0.01)
    cu = torch.tensor([0, 4])
    expected = check(few, codebook, cu, given, few_index, scale[:4])
    found = encode(x, codebook, cu, **given, index=index, row_scale=scale)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 3, 2])}, "ascend"),
        ({"cu_seqlens": torch.tensor([0, 11])}, "ascend"),
        ({"index": torch.tensor([0, 10])}, "below the 10 rows"),
        ({"row_scale": torch.ones(9)}, "row_scale must be"),
        ({"codebook": torch.ones(4, 9)}, "x has 8 columns"),
        ({"codebook": torch.ones(0, 8)}, "at least one codeword"),
        ({"x": torch.ones(10, 8, dtype=torch.int32)}, "x must be float32"),
        ({"scale": None}, "either scale, or weight"),
        ({"weight": torch.ones(4, 8)}, "either scale, or weight"),
        ({"bias": torch.ones(4)}, "bias goes with weight"),
        ({"scale": torch.ones(5)}, "scale must have 4"),
        ({"scale": None, "weight": torch.ones(4, 7)}, r"weight must be \[4, 8\]"),
        ({"scale": None, "weight": torch.ones(4, 8), "bias": torch.ones(3)}, "bias must have 4"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    arguments = {
        "x": torch.randn(10, 8),
        "codebook": torch.randn(4, 8),
        "cu_seqlens": torch.tensor([0, 2]),
        "scale": torch.ones(4),
    }
    with pytest.raises(RuntimeError, match=message):
        encode(**{**arguments, **change})


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        (((1, 4, 7), (1, 4), (1, 4)), r"grad must be \[1, 4, 8\]"),
        (((2, 4, 8), (1, 4), (1, 4)), r"grad must be \[1, 4, 8\]"),
        (((1, 4, 8), (1, 5), (1, 4)), "grad_mass and mass"),
        (((1, 4, 8), (1, 4), (4,)), "grad_mass and mass"),
    ],
)
def test_wrong_gradients_are_refused(grads: tuple[tuple[int, ...], ...], message: str) -> None:
    grad, grad_mass, mass = map(torch.ones, grads)
    arguments = (grad, grad_mass, torch.randn(10, 8), torch.randn(4, 8), torch.tensor([0, 2]), mass)
    with pytest.raises(RuntimeError, match=message):
        backward(*arguments, scale=torch.ones(4))


def test_8_bit_rows_need_their_scale_for_a_gradient() -> None:
    x, _ = stored(torch.randn(10, 8), torch.int8)
    arguments = (
        torch.ones(1, 4, 8),
        torch.ones(1, 4),
        x,
        torch.randn(4, 8),
        torch.tensor([0, 2]),
        torch.ones(1, 4),
    )
    with pytest.raises(RuntimeError, match="need row_scale"):
        backward(*arguments, scale=torch.ones(4))


_LEVEL = """
import json, sys, torch
sys.path[:0] = json.loads(sys.argv[1])
import test_soft_native as t
from dre_fast.ops import native
from dre_fast.reference import soft as reference
for words, dim in ((2, 7), (64, 384), (33, 385), (130, 48)):
    for kind in t.KINDS:
        torch.manual_seed(0)
        for dtype in t.FLOATS:
            x, codebook, cu = t.make_bags([300, 0, 7], dim, words, dtype, "cpu")
            t.both(x, codebook, cu, t.parameters(kind, codebook))
print(native.cpu_level())
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["avx2", "default"])
def test_lower_instruction_sets(level: str) -> None:
    folders = json.dumps([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
    done = subprocess.run(
        [sys.executable, "-c", _LEVEL, folders],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DRE_FAST_CPU": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (level, "default")  # a processor without AVX2 has the default alone
