"""The C++ reads of the bank against the reference: equal, value by value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dre_fast.ops import native
from dre_fast.reference import bank as reference
from dre_fast.reference.quantize import DTYPES, has_scale, padded_dim

if not native.available():
    pytest.skip(f"needs the C++ ops: {native.why_not()}", allow_module_level=True)

rest = torch.ops.dre_fast_native.bank_rest.default
read = torch.ops.dre_fast_native.bank_read.default
Bank = dict[str, Tensor]
SLIDES, TILES = 4, 90
TABLES = ("payload", "scale", "code", "sums", "counts", "codebook", "start")


def make_bank(dtype: torch.dtype, dim: int, codewords: int) -> Bank:
    """Slides of 90 tiles, two thirds of them written."""
    rows = SLIDES * TILES
    bank = {
        "payload": torch.zeros(rows, padded_dim(dim, dtype), dtype=dtype),
        "scale": torch.zeros(rows if has_scale(dtype) else 0),
        "code": torch.full((rows,), -1, dtype=torch.int16),
        "age": torch.full((rows,), -1, dtype=torch.int32),
        "drift": torch.zeros(rows),
        "sums": torch.zeros(SLIDES, codewords, dim, dtype=torch.int64),
        "counts": torch.zeros(SLIDES, codewords, dtype=torch.int64),
        "codebook": torch.randn(codewords, dim),
        "start": torch.arange(SLIDES) * TILES,
    }
    chosen = torch.randperm(rows)[: 2 * rows // 3]
    reference.write(*bank.values(), chosen // TILES, chosen % TILES, torch.randn(len(chosen), dim), 0)
    return bank


def tables(bank: Bank) -> list[Tensor]:
    return [bank[name] for name in TABLES]


def some_tiles(bags: int, live: int) -> Tensor:
    """Distinct tiles of each slide, some left out."""
    tiles = torch.stack([torch.randperm(TILES)[:live] for _ in range(bags)])
    return torch.where(torch.rand(bags, live) < 0.1, -1, tiles)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("dim", "codewords"), [(1, 2), (7, 5), (64, 1), (384, 64), (1025, 17)])
@pytest.mark.parametrize("live", [0, 1, 64])
def test_rest_equals_the_reference(dtype: torch.dtype, dim: int, codewords: int, live: int) -> None:
    bank = make_bank(dtype, dim, codewords)
    slides = torch.tensor([2, 0, 2, 3, 1])
    tiles = some_tiles(5, live)
    for accurate in (True, False):
        got, n = rest(*tables(bank), slides, tiles, accurate)
        expected, expected_n = reference.rest(*tables(bank), slides, tiles, accurate)
        assert got.dtype == (torch.float64 if accurate else torch.float32)
        assert torch.equal(got, expected)
        assert torch.equal(n, expected_n)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 16, 384, 1025])
@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_read_equals_the_reference(dtype: torch.dtype, dim: int, rows: int) -> None:
    bank = make_bank(dtype, dim, 2)
    index = torch.randint(-1, SLIDES * TILES, (rows,))
    got = read(bank["payload"], bank["scale"], index, dim)
    assert torch.equal(got, reference.read(bank["payload"], bank["scale"], index, dim))


def test_nothing_at_all() -> None:
    bank = make_bank(torch.int8, 8, 3)
    none = torch.zeros(0, dtype=torch.int64)
    V, n = rest(*tables(bank), none, torch.zeros(0, 4, dtype=torch.int64), False)
    assert V.shape == (0, 3, 8)
    assert n.shape == (0, 3)
    bare = make_bank(torch.int8, 8, 0)
    V, n = rest(*tables(bare), torch.tensor([1]), torch.tensor([[2]]), True)
    assert V.shape == (1, 0, 8)


def test_thread_count_does_not_show() -> None:
    bank = make_bank(torch.int8, 96, 40)
    slides, tiles = torch.tensor([0, 1, 2, 3, 3]), some_tiles(5, 30)
    index = torch.randint(-1, SLIDES * TILES, (5000,))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(
                (*rest(*tables(bank), slides, tiles, False), read(bank["payload"], bank["scale"], index, 96))
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("payload", lambda t: t.double(), "float8_e4m3fn"),
        ("scale", lambda t: t[:-1], "bank_rest: scale must have 360 entries"),
        ("code", lambda t: t.int(), "code must be int16"),
        ("sums", lambda t: t[:, :, :-1], "sums must be contiguous"),
        ("counts", lambda t: t[:-1], "counts"),
        ("codebook", lambda t: t[0], "codebook must have 2 dimensions"),
        ("start", lambda t: t.float(), "start must be int64"),
    ],
)
def test_bad_tables_are_named(name: str, change, message: str) -> None:
    bank = make_bank(torch.int8, 16, 4)
    bank[name] = change(bank[name])
    with pytest.raises(RuntimeError, match=message):
        rest(*tables(bank), torch.tensor([0]), torch.tensor([[1]]), False)


def test_rows_outside_the_bank_are_refused() -> None:
    bank = make_bank(torch.int8, 16, 4)
    for slide, tile, message in (
        (4, 0, "slide 4 does not exist"),
        (-1, 0, "slide -1"),
        (3, 90, "tile 90 of slide 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            rest(*tables(bank), torch.tensor([slide]), torch.tensor([[tile]]), False)
    with pytest.raises(RuntimeError, match="tiles must have one line for each of the 1 slides"):
        rest(*tables(bank), torch.tensor([0]), torch.zeros(2, 3, dtype=torch.int64), False)
    with pytest.raises(RuntimeError, match="row 360 is outside the bank's 360"):
        read(bank["payload"], bank["scale"], torch.tensor([0, 360]), 16)
    with pytest.raises(RuntimeError, match="rows have 17 values, payload 16"):
        read(bank["payload"], bank["scale"], torch.tensor([0]), 17)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("dim", "codewords", "live"), [(1, 2, 3), (37, 5, 64), (384, 64, 64), (1536, 70, 90), (16, 3, 0)]
)
def test_the_gpu_gives_the_same_bits(dtype: torch.dtype, dim: int, codewords: int, live: int) -> None:
    bank = make_bank(dtype, dim, codewords)
    slides, tiles = torch.tensor([2, 0, 2, 3, 1]), some_tiles(5, live)
    there = [t.cuda() for t in tables(bank)]
    for accurate in (True, False):
        got = rest(*there, slides.cuda(), tiles.cuda(), accurate)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, rest(*tables(bank), slides, tiles, accurate)))
    index = torch.randint(-1, SLIDES * TILES, (777,))
    got_rows = read(there[0], there[1], index.cuda(), dim)
    assert torch.equal(got_rows.cpu(), read(bank["payload"], bank["scale"], index, dim))


@pytest.mark.gpu
def test_many_bags_and_many_live_rows() -> None:
    """More bags than a grid has lines, and more live rows than a block looks through at a time."""
    bank = make_bank(torch.int8, 8, 3)
    there = [t.cuda() for t in tables(bank)]
    slides = torch.randint(SLIDES, (70_000,))
    tiles = torch.randint(TILES, (70_000, 1))
    got = rest(*there, slides.cuda(), tiles.cuda(), False)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, rest(*tables(bank), slides, tiles, False)))
    tiles = torch.full((1, 3000), -1)
    tiles[0, torch.randperm(3000)[:TILES]] = torch.randperm(TILES)
    got = rest(*there, torch.tensor([1]).cuda(), tiles.cuda(), True)
    assert all(
        torch.equal(a.cpu(), b) for a, b in zip(got, rest(*tables(bank), torch.tensor([1]), tiles, True))
    )
