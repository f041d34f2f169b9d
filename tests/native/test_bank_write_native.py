"""The C++ bank write against the reference: same stored rows, codes, sums, ages and drift."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dre_fast.ops import native
from dre_fast.reference import bank as reference
from dre_fast.reference.fixed_point import accumulate_
from dre_fast.reference.quantize import DTYPES, has_scale, padded_dim

if not native.available():
    pytest.skip(f"needs the C++ ops: {native.why_not()}", allow_module_level=True)

write = torch.ops.dre_fast_native.bank_write.default
Bank = dict[str, Tensor]
SLIDES, TILES = 4, 300


def make_bank(dtype: torch.dtype, dim: int, codewords: int, tiles: int = TILES, seed: int = 0) -> Bank:
    rows = SLIDES * tiles
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(codewords, dim, generator=generator)
    return {
        "payload": torch.zeros(rows, padded_dim(dim, dtype), dtype=dtype),
        "scale": torch.zeros(rows if has_scale(dtype) else 0),
        "code": torch.full((rows,), -1, dtype=torch.int16),
        "age": torch.full((rows,), -1, dtype=torch.int32),
        "drift": torch.zeros(rows),
        "sums": torch.zeros(SLIDES, codewords, dim, dtype=torch.int64),
        "counts": torch.zeros(SLIDES, codewords, dtype=torch.int64),
        "codebook": codebook / codebook.norm(dim=1, keepdim=True),
        "start": torch.arange(SLIDES) * tiles,
    }


def copy_of(bank: Bank) -> Bank:
    return {name: t.clone() for name, t in bank.items()}


def entries(count: int, dim: int, seed: int, lowest: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Random entries with skips (where ``lowest`` is -1) and, for large counts, many duplicates."""
    generator = torch.Generator().manual_seed(seed)
    slide = torch.randint(lowest, SLIDES, (count,), generator=generator)
    tile = torch.randint(lowest, TILES, (count,), generator=generator)
    return slide, tile, torch.randn(count, dim, generator=generator) * 3


def raw(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


def assert_same(got: Bank, expected: Bank) -> None:
    for name in expected:
        assert torch.equal(raw(got[name]), raw(expected[name])), name


def rebuilt(bank: Bank) -> tuple[Tensor, Tensor]:
    """Sums and counts recomputed from the stored rows and codes."""
    sums, counts = torch.zeros_like(bank["sums"]), torch.zeros_like(bank["counts"])
    rows = (bank["code"] >= 0).nonzero().squeeze(1)
    z = reference.read(bank["payload"], bank["scale"], rows, bank["sums"].shape[2])
    slide = torch.searchsorted(bank["start"], rows, right=True) - 1
    accumulate_(sums, counts, slide, bank["code"][rows], z)
    return sums, counts


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("dim", "codewords"), [(1, 2), (37, 5), (64, 0), (384, 64)])
@pytest.mark.parametrize("count", [0, 1, 63, 1000])
def test_same_as_reference(dtype: torch.dtype, dim: int, codewords: int, count: int) -> None:
    got = make_bank(dtype, dim, codewords)
    expected = copy_of(got)
    for step in range(3):  # first writes, then rewrites of some of the rows
        batch = entries(count, dim, seed=step)
        write(*got.values(), *batch, step)
        reference.write(*expected.values(), *batch, step)
    assert_same(got, expected)
    sums, counts = rebuilt(got)
    assert torch.equal(got["sums"], sums)
    assert torch.equal(got["counts"], counts)
    if count == 1000:
        assert (got["age"] >= 0).sum() > 100
        assert got["drift"].max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_features_of_any_finite_size(dtype: torch.dtype) -> None:
    got = make_bank(dtype, 48, 7)
    expected = copy_of(got)
    x = torch.randn(8, 48)
    x *= torch.tensor([1e38, 1e-38, 1e-44, 1.0, 1e20, 1e-20, 1.0, 0.0])[:, None]
    x[3, 1:] = 0  # one component is the whole row
    x[6, ::2] *= 1e-6  # far below the scale: subnormal, or rounds to zero
    batch = torch.zeros(8, dtype=torch.int64), torch.arange(8), x
    write(*got.values(), *batch, 3)
    reference.write(*expected.values(), *batch, 3)
    for name in ("payload", "scale", "age", "drift"):
        assert torch.equal(raw(got[name]), raw(expected[name])), name
    # rows that stay near zero are equally far from unit codewords, within round-off: their codes may differ
    plain = [0, 3, 4, 6]
    assert torch.equal(got["code"][plain], expected["code"][plain])
    assert torch.equal(got["sums"], rebuilt(got)[0])


def test_every_value_of_the_small_formats_survives() -> None:
    """Writing what was read stores it again: each float16, bfloat16, int8 and e4m3 value is a fixed point."""
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        if has_scale(dtype):
            numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
            largest = 448.0 if dtype == torch.float8_e4m3fn else 127.0
            numbers = numbers[numbers.abs() <= largest]
        else:
            numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
            numbers = numbers[numbers.abs() < 0.9]
        # one large component makes the row's norm 1 (or sets its scale), the others are the values to test
        small = numbers * (1e-4 if has_scale(dtype) else 1.0)
        dim = 1 + 1
        rows = numbers.shape[0]
        bank = make_bank(dtype, dim, 0, tiles=rows)
        x = torch.stack([small, (1 - small.double() ** 2).sqrt().float()], 1)
        batch = torch.zeros(rows, dtype=torch.int64), torch.arange(rows), x
        write(*bank.values(), *batch, 0)
        expected = make_bank(dtype, dim, 0, tiles=rows)
        reference.write(*expected.values(), *batch, 0)
        assert_same(bank, expected)


def test_last_duplicate_wins_as_if_alone() -> None:
    bank = make_bank(torch.int8, 24, 6)
    write(*bank.values(), *entries(200, 24, seed=5), 0)
    alone = copy_of(bank)
    x = torch.randn(5, 24)
    slide = torch.tensor([1, 2, 1, -1, 1])
    tile = torch.tensor([7, 7, 7, 7, 7])
    write(*bank.values(), slide, tile, x, 4)
    keep = torch.tensor([1, 4])
    write(*alone.values(), slide[keep], tile[keep], x[keep], 4)
    assert_same(bank, alone)
    assert bank["age"][[1 * TILES + 7, 2 * TILES + 7]].tolist() == [4, 4]


def test_skipped_entries_change_nothing() -> None:
    bank = make_bank(torch.float16, 24, 6)
    before = copy_of(bank)
    slide = torch.tensor([-1, 0, -1])
    tile = torch.tensor([3, -1, -1])
    write(*bank.values(), slide, tile, torch.full((3, 24), float("nan")), 4)
    assert_same(bank, before)


def test_a_row_does_not_depend_on_its_place_in_the_batch() -> None:
    slide, tile, x = entries(500, 40, seed=1, lowest=0)
    first = make_bank(torch.int8, 40, 33)
    write(*first.values(), slide, tile, x, 0)
    last = {int(row): i for i, row in enumerate(slide * TILES + tile)}  # dicts keep the last of equal keys
    order = torch.tensor(list(last.values()))[torch.randperm(len(last))]
    one_by_one = make_bank(torch.int8, 40, 33)
    for i in order.split(3):
        write(*one_by_one.values(), slide[i], tile[i], x[i], 0)
    assert_same(one_by_one, first)


def test_thread_count_does_not_show() -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            bank = make_bank(torch.int8, 96, 3)  # three codewords: threads meet in the same cells
            for step in range(3):
                write(*bank.values(), *entries(2000, 96, seed=step), step)
            results.append(bank)
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_ties_go_to_the_lowest_codeword() -> None:
    bank = make_bank(torch.float32, 16, 9)
    bank["codebook"][:] = bank["codebook"][4].clone()
    write(*bank.values(), *entries(50, 16, seed=2, lowest=0), 0)
    assert set(bank["code"].tolist()) == {-1, 0}


def test_rows_without_a_codebook_join_the_sums_once_there_is_one() -> None:
    bank = make_bank(torch.int8, 32, 0)
    batch = entries(100, 32, seed=0, lowest=0)
    write(*bank.values(), *batch, 0)
    assert (bank["code"] == -1).all()
    other = make_bank(torch.int8, 32, 5)
    for name in ("codebook", "sums", "counts"):
        bank[name] = other[name]
    write(*bank.values(), *batch, 1)
    assert torch.equal(bank["sums"], rebuilt(bank)[0])
    assert bank["counts"].sum() == (bank["code"] >= 0).sum() == (bank["age"] == 1).sum()


def test_far_rows_are_addressed_in_64_bits() -> None:
    dim = 4096
    row = (1 << 31) // dim + 5  # the last rows lie beyond 2^31 elements
    bank = make_bank(torch.int8, dim, 2, tiles=1)
    bank["payload"] = torch.zeros(row + 1, dim, dtype=torch.int8)
    bank["scale"] = torch.zeros(row + 1)
    bank["code"] = torch.full((row + 1,), -1, dtype=torch.int16)
    bank["age"] = torch.full((row + 1,), -1, dtype=torch.int32)
    bank["drift"] = torch.zeros(row + 1)
    bank["start"] = torch.tensor([0, row - 1, row, row])
    write(*bank.values(), torch.tensor([1]), torch.tensor([1]), torch.ones(1, dim), 9)
    assert bank["age"][row] == 9
    assert (bank["payload"][row] == 127).all()
    assert (bank["age"] >= 0).sum() == 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("payload", lambda t: t.double(), "float8_e4m3fn"),
        ("scale", lambda t: t[:-1], "scale must have 1200 entries"),
        ("code", lambda t: t.int(), "code must be int16"),
        ("age", lambda t: t[:5], "one entry for each of the 1200 rows"),
        ("sums", lambda t: t[:, :, :-1], "sums must be contiguous"),
        ("counts", lambda t: t[:-1], "counts"),
        ("codebook", lambda t: t[:, :8].contiguous(), "codebook has 8 columns"),
    ],
)
def test_bad_arguments_are_named(name: str, change, message: str) -> None:
    bank = make_bank(torch.int8, 16, 4)
    bank[name] = change(bank[name])
    with pytest.raises(RuntimeError, match=message):
        write(*bank.values(), *entries(3, 16, seed=0), 0)


@pytest.mark.parametrize(
    ("slide", "tile", "message"), [(SLIDES, 0, "slide 4 does not exist"), (3, 300, "tile 300 of slide 3")]
)
def test_rows_outside_the_bank_are_refused_before_anything_is_written(
    slide: int, tile: int, message: str
) -> None:
    bank = make_bank(torch.int8, 16, 4)
    before = copy_of(bank)
    with pytest.raises(RuntimeError, match=message):
        write(*bank.values(), torch.tensor([0, slide]), torch.tensor([0, tile]), torch.ones(2, 16), 0)
    assert_same(bank, before)


_LEVEL = """
import hashlib, json, torch
from dre_fast.ops import native
torch.manual_seed(0)
out = {"level": native.cpu_level()}
for name in ("int8", "float16", "bfloat16", "float32", "float8_e4m3fn"):
    dtype = getattr(torch, name)
    d, k, n = 200, 31, 400
    codebook = torch.nn.functional.normalize(torch.randn(k, d), dim=1)
    bank = [torch.zeros(n, 208, dtype=dtype), torch.zeros(n if dtype.itemsize == 1 else 0),
            torch.full((n,), -1, dtype=torch.int16), torch.full((n,), -1, dtype=torch.int32), torch.zeros(n),
            torch.zeros(1, k, d, dtype=torch.int64), torch.zeros(1, k, dtype=torch.int64), codebook,
            torch.zeros(1, dtype=torch.int64)]
    for step in range(2):
        ids = torch.zeros(n, dtype=torch.int64), torch.randperm(n)
        torch.ops.dre_fast_native.bank_write(*bank, *ids, torch.randn(n, d), step)
    out[name] = [hashlib.sha1(t.view(torch.uint8).numpy().tobytes()).hexdigest() for t in bank[:7]]
print(json.dumps(out))
"""


@pytest.mark.slow
def test_instruction_sets_agree() -> None:
    """AVX-512 and AVX2 give the same bits; without fused multiply-adds this data still does."""
    found = {}
    for level in ("avx512", "avx2", "default"):
        done = subprocess.run(
            [sys.executable, "-c", _LEVEL],
            env={**os.environ, "DRE_FAST_CPU": level, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        result = json.loads(done.stdout)
        found[result.pop("level")] = result
    assert "default" in found
    if len(found) == 1:
        pytest.skip("this processor has no AVX2: there is one instruction set to run")
    first = next(iter(found.values()))
    assert all(result == first for result in found.values())
