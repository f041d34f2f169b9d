"""The C++ hard encoding against the reference: exact codes, the error rule, odd inputs, every instruction set."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dre_fast import reference
from dre_fast.ops import native
from dre_fast.reference.hard import hard_encode as specification
from dre_fast.reference.hard import hard_encode_backward as specification_backward
from dre_fast.reference.quantize import quantize
from error_rule import within_error_rule

if not native.available():
    pytest.skip(f"needs the C++ ops: {native.why_not()}", allow_module_level=True)

encode = torch.ops.dre_fast_native.hard_encode.default
backward = torch.ops.dre_fast_native.hard_encode_backward.default
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
STORED = [torch.int8, torch.float8_e4m3fn]
LENGTHS = {
    "ragged": [70, 0, 5, 300, 1, 0],
    "one": [700],
    "single": [1] * 90,
    "empty": [0, 0, 0],
    "none": [],
}
SIZES = [(1, 1), (2, 7), (17, 1), (64, 384), (33, 385), (130, 48), (1024, 16), (5, 2048)]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def make(count: int, words: int, dim: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rows around random unit codewords, and these."""
    codebook = normalize(torch.randn(words, dim), dim=1)
    return codebook[torch.randint(words, (count,))] + noise * torch.randn(count, dim) / dim**0.5, codebook


def nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    """argmin of float64 distances formed from differences, ties to the lowest codeword."""
    wide, parts = codebook.double(), rows.split(max(1, (1 << 22) // max(1, codebook.numel())))
    return torch.cat([(part.double()[:, None] - wide).square().sum(2).argmin(1) for part in parts])


def given_codes(rows: Tensor, codebook: Tensor, bag: Tensor, codes: Tensor, bags: int) -> Tensor:
    """V of known codes as A^T X - diag(sum A) C in the dtype of the arguments; codes of -1 are left out."""
    hot = rows.new_zeros(len(rows), bags * len(codebook))
    taken = (codes >= 0).nonzero()[:, 0]
    hot[taken, bag[taken] * len(codebook) + codes[taken]] = 1
    sums, counts = (hot.T @ rows).view(bags, *codebook.shape), hot.sum(0).view(bags, len(codebook), 1)
    return sums - counts * codebook


def check(x: Tensor, codebook: Tensor, cu: Tensor, **options: Tensor | bool | None) -> tuple[Tensor, ...]:
    """The whole contract on one input; returns V, counts, codes, distances."""
    got = encode(x, codebook, cu, distances=True, **options)
    again = encode(x, codebook, cu, distances=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    V, counts, codes, distances = got
    expected, counted, expected_codes, squares = specification(x, codebook, cu, distances=True, **options)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(counts, counted)

    index, scale, bags = options.get("index"), options.get("row_scale"), len(cu) - 1
    taken = torch.arange(len(x)) if index is None else index
    rows = x[taken.clamp(min=0), : codebook.shape[1]].float()
    if isinstance(scale, Tensor):
        rows = rows * scale[taken.clamp(min=0), None]
    bag = torch.bucketize(torch.arange(len(taken)), cu[1:], right=True)
    for name, result, of_rows in (
        ("V", V, lambda r, c: given_codes(r, c, bag, codes, bags)),
        ("distances", distances, lambda r, c: (r - c[codes]).square().sum(1).where(codes >= 0, 0)),
    ):
        plain, exact = (
            of_rows(reference.l2_normalize(r) if options.get("unit") else r, codebook.to(r.dtype))
            for r in (rows, rows.double())
        )
        within_error_rule(
            result, plain, exact, 1e-6 * (1 + float(exact.abs().max()) if exact.numel() else 1), name
        )
    torch.testing.assert_close(V, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(distances, squares, rtol=1e-4, atol=1e-5)
    return got


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("words", "dim"), SIZES)
@pytest.mark.parametrize("bags", LENGTHS)
def test_float_rows(bags: str, words: int, dim: int, dtype: torch.dtype) -> None:
    cu = offsets(LENGTHS[bags])
    rows, codebook = make(int(cu[-1]), words, dim)
    check(rows.to(dtype), codebook, cu)
    check(rows.to(dtype) * 3, codebook, cu, unit=True)


@pytest.mark.parametrize("dtype", [*FLOATS, *STORED], ids=str)
@pytest.mark.parametrize("dim", [20, 64])
def test_chosen_rows_of_wider_ones(dim: int, dtype: torch.dtype) -> None:
    rows, codebook = make(400, 9, dim)
    scale = None
    if dtype in STORED:
        q, scale = quantize(normalize(rows, dim=1), dtype)
        x = torch.zeros(400, dim + 12, dtype=torch.uint8).view(dtype)
        x.view(torch.uint8)[:, :dim] = q.view(torch.uint8)[:, :dim]
    else:
        x = torch.full((400, dim + 12), torch.nan, dtype=dtype)
        x[:, :dim] = rows.to(dtype)
    index = torch.randint(-1, 400, (777,))
    index[:50] = -1
    for cu in (offsets([50, 0, 600, 100]), offsets([777]), offsets([0, 3])):
        for unit in (False, True):
            check(x, codebook, cu, index=index, row_scale=scale, unit=unit)
    known = torch.randint(-1, 9, (400,), dtype=torch.int16)
    check(x, codebook, offsets([700]), index=index, row_scale=scale, row_codes=known)
    check(x, codebook, offsets([100, 300]), row_scale=scale, row_codes=known)


def test_strided_rows_and_parameters() -> None:
    rows, codebook = make(500, 8, 32)
    cu = offsets([100, 350])
    expected = encode(rows, codebook, cu)
    for x in (
        torch.cat([rows, rows], 1)[:, :32],
        rows.repeat_interleave(3, 0)[::3],
        rows.T.contiguous().T,
    ):
        for words in (codebook, codebook.T.contiguous().T, codebook.double()):
            assert all(torch.equal(a, b) for a, b in zip(encode(x, words, cu), expected, strict=True))
    one = rows[:1].expand(500, 32)
    assert encode(one, codebook, cu)[1].sum() == 450


BEYOND_FP32_SCORES = (20, 37)  # powers of ten at which the reference's fp32 scores overflow


def _adversaries() -> dict[str, tuple[Tensor, Tensor]]:
    """Rows and codewords between which fp32 scores cannot choose."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base, lattice = normal(1, 48), torch.randint(-2, 3, (300, 16), generator=generator).float()
    close = base.repeat(40, 1)
    close[torch.arange(40), torch.arange(40)] = torch.nextafter(base[0, :40], torch.tensor(torch.inf))
    duplicated = normal(12, 48).repeat(3, 1)
    symmetric = torch.cat([normal(20, 48), torch.zeros(1, 48)])
    cases = {
        "one unit in the last place apart": (base + normal(300, 48), close),
        "on the codewords": (close.repeat(8, 1), close),
        "duplicated": (normal(300, 48), duplicated),
        "integers": (lattice, torch.randint(-2, 3, (70, 16), generator=generator).float()),
        "plus and minus": (torch.zeros(30, 48), torch.cat([symmetric, -symmetric])),
        "far from the origin": (1e4 + normal(300, 48), 1e4 + normal(40, 48)),
        "far from the codewords": (1e5 * normal(300, 48), normal(40, 48)),
        "one long codeword": (normal(300, 48), torch.cat([normal(30, 48) * 1e-6, normal(1, 48) * 1e6])),
        "zeros": (torch.zeros(20, 48), torch.zeros(5, 48)),
    }
    for exponent in (-44, -38, -20, -10, 10, 17, *BEYOND_FP32_SCORES):
        cases[f"times 1e{exponent}"] = (normal(200, 48) * 10.0**exponent, normal(40, 48) * 10.0**exponent)
    return cases


ADVERSARIES = _adversaries()


def overflows(name: str) -> bool:
    return name in [f"times 1e{exponent}" for exponent in BEYOND_FP32_SCORES]


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_exact(name: str, dtype: torch.dtype) -> None:
    rows, codebook = ADVERSARIES[name]
    rows = rows.to(dtype)
    codes = encode(rows, codebook, offsets([len(rows)]))[2]
    assert torch.equal(codes, nearest(rows.float(), codebook))
    if not overflows(name):
        assert torch.equal(codes, reference.hard_assign(rows, codebook))
    alone = torch.cat([encode(row[None], codebook, offsets([1]))[2] for row in rows[:20]])
    assert torch.equal(alone, codes[:20]), "the code of a row depends on the rows beside it"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bad_rows_stay_in_their_bag(bad: float, dtype: torch.dtype) -> None:
    rows, codebook = make(300, 16, 64)
    cu = offsets([100, 100, 100])
    clean = encode(rows.to(dtype), codebook, cu)
    rows[150, 3] = bad
    for x, options in ((rows.to(dtype), {}), (rows.to(dtype), {"unit": True})):
        V, counts, codes, _ = encode(x, codebook, cu, **options)
        assert codes[150] == 0
        assert not torch.isfinite(V[1, 0]).all()
        assert torch.isfinite(V[[0, 2]]).all()
        assert torch.isfinite(V[1, 1:]).all()
        assert (counts.sum(1) == 100).all()
        if not options:
            assert torch.equal(V[[0, 2]], clean[0][[0, 2]])
            assert torch.equal(codes[:150], clean[2][:150])
    broken = codebook.clone()
    broken[5, 0] = torch.nan
    assert not torch.isfinite(encode(rows[:100].to(dtype), broken, offsets([100]))[0]).all()


def test_many_bags_of_one_row() -> None:
    rows, codebook = make(70_000, 3, 5)
    V, counts, codes, _ = encode(rows, codebook, torch.arange(70_001))
    assert torch.equal(V.sum(1), rows - codebook[codes])
    assert torch.equal(counts, torch.nn.functional.one_hot(codes, 3))


def test_exact_sums_where_rows_lie_on_codewords() -> None:
    codebook = torch.randn(4, 32)
    codes = torch.randint(4, (5000,))
    V, counts, found, _ = encode(codebook[codes], codebook, offsets([4000, 1000]))
    assert torch.equal(found, codes)
    assert not V.any()
    assert counts.sum() == 5000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    rows, codebook = make(9_000, 20, 48)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(encode(rows.to(dtype), codebook, offsets([10, 7000, 0, 1900, 40]), distances=True))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_long_bags_follow_the_error_rule() -> None:
    rows, codebook = make(40_000, 24, 64, noise=0.5)
    for lengths in ([40_000], [1, 30_000, 500, 9_499]):
        check(rows, codebook, offsets(lengths))
        check(rows.bfloat16(), codebook, offsets(lengths))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.zeros(2_100_000, 1024, dtype=torch.int8)
    codebook = torch.randn(3, 1024) / 32
    index = torch.tensor([0, 2_099_999, -1, 2_097_152])
    x[2_099_999], x[2_097_152] = 3, -2
    scale = torch.full((2_100_000,), 0.5)
    V, _, codes, _ = encode(x, codebook, offsets([4]), index, scale)
    rows = x[index.clamp(min=0)].float() * 0.5
    expected = reference.hard_assign(rows, codebook)
    expected[2] = -1
    assert torch.equal(codes, expected)
    kept = torch.tensor([0, 1, 3])
    torch.testing.assert_close(V[0].sum(0), (rows[kept] - codebook[codes[kept]]).sum(0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [1, 24, 385])
def test_backward(dim: int, dtype: torch.dtype) -> None:
    lengths = [70, 0, 130, 1]
    x, grad = torch.randn(230, dim).to(dtype), torch.randn(4, 6, dim).to(dtype)
    x[7] = 0
    codes = torch.randint(-1, 6, (230,))
    index = torch.randint(-1, 230, (230,))
    cu = offsets(lengths)
    plain = backward(grad, codes, cu)
    assert torch.equal(plain, specification_backward(grad, codes, cu))
    strided = backward(grad[:, :1, :].expand(4, 6, dim), codes, cu)
    assert torch.equal(strided, specification_backward(grad[:, :1, :].expand(4, 6, dim), codes, cu))
    for options in ((x, None), (x, index)):
        got = backward(grad, codes, cu, *options, True)
        assert got.dtype == dtype
        exact = specification_backward(grad.double(), codes, cu, options[0].double(), options[1], True)
        eager = specification_backward(grad, codes, cu, *options, True)
        within_error_rule(got, eager, exact, 1e-6 * float(1 + exact.abs().max()))
        assert not got[201:].any()  # past the last bag


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 3, 2])}, "ascend"),
        ({"cu_seqlens": torch.tensor([0, 11])}, "ascend"),
        ({"cu_seqlens": torch.tensor([1, 5])}, "ascend"),
        ({"index": torch.tensor([0, 10])}, "below the 10 rows"),
        ({"row_codes": torch.full((10,), 4, dtype=torch.int16)}, "below the 4 codewords"),
        ({"row_scale": torch.ones(9)}, "row_scale must be"),
        ({"codebook": torch.ones(4, 9)}, "x has 8 columns"),
        ({"x": torch.ones(10, 8, dtype=torch.int32)}, "x must be float32"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.randn(10, 8), "codebook": torch.randn(4, 8), "cu_seqlens": torch.tensor([0, 2])}
    with pytest.raises(RuntimeError, match=message):
        encode(**{**arguments, **change})


_LEVEL = """
import json, sys, torch
sys.path[:0] = json.loads(sys.argv[1])
import test_encode_native as t
results = []
for name, (rows, codebook) in t.ADVERSARIES.items():
    for dtype in t.FLOATS:
        x = rows.clamp(-6e4, 6e4).to(dtype)
        V, counts, codes, distances = t.encode(x, codebook, t.offsets([len(x)]), distances=True)
        right = t.nearest(x.float(), codebook)
        assert torch.equal(codes, right), (name, dtype)
        results += [V, counts, codes, distances]
torch.manual_seed(1)
for words, dim in ((2, 7), (64, 384), (33, 385), (500, 16), (16, 64), (48, 80)):
    for dtype in t.FLOATS:
        rows, codebook = t.make(1500, words, dim)
        for unit in (False, True):
            found = t.encode(rows.to(dtype), codebook, t.offsets([400, 0, 1100]), unit=unit, distances=True)
            if not unit:
                assert torch.equal(found[2], t.reference.hard_assign(rows.to(dtype), codebook)), (words, dim)
            results += found
import hashlib
print(hashlib.sha1(b"".join(r.numpy().tobytes() for r in results)).hexdigest())
"""


@pytest.mark.slow
def test_instruction_sets_agree() -> None:
    """Every level that this processor has gives the same bits, and the codes of the reference."""
    found = set()
    folders = json.dumps([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
    for level in (None, "avx512", "avx2", "default"):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("DRE_FAST_CPU", None)
        if level:
            environment["DRE_FAST_CPU"] = level
        done = subprocess.run(
            [sys.executable, "-c", _LEVEL, folders],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{level}: {done.stderr}"
        found.add(done.stdout)
    assert len(found) == 1
