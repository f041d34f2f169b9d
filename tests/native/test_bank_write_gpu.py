"""The CUDA bank write against the CPU one: the same rows, up to one rounding, and sums that fit them exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dre_fast.ops import native
from dre_fast.reference import bank as reference
from dre_fast.reference.fixed_point import accumulate_
from dre_fast.reference.quantize import DTYPES, has_scale, padded_dim

pytestmark = pytest.mark.gpu

SLIDES, TILES = 3, 400
Bank = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _needs_the_cuda_part() -> None:
    if not native.cuda_available():
        pytest.fail(f"a GPU is here, but not the CUDA ops: {native.why_not('cuda')}")


def make_bank(dtype: torch.dtype, dim: int, codewords: int) -> Bank:
    rows = SLIDES * TILES
    codebook = torch.nn.functional.normalize(torch.randn(codewords, dim), dim=1)
    bank = {
        "payload": torch.zeros(rows, padded_dim(dim, dtype), dtype=dtype),
        "scale": torch.zeros(rows if has_scale(dtype) else 0),
        "code": torch.full((rows,), -1, dtype=torch.int16),
        "age": torch.full((rows,), -1, dtype=torch.int32),
        "drift": torch.zeros(rows),
        "sums": torch.zeros(SLIDES, codewords, dim, dtype=torch.int64),
        "counts": torch.zeros(SLIDES, codewords, dtype=torch.int64),
        "codebook": codebook,
        "start": torch.arange(SLIDES) * TILES,
    }
    return {name: t.cuda() for name, t in bank.items()}


def write(bank: Bank, slide: Tensor, tile: Tensor, x: Tensor, step: int) -> None:
    torch.ops.dre_fast_native.bank_write.default(*bank.values(), slide.cuda(), tile.cuda(), x.cuda(), step)


def entries(count: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randint(-1, SLIDES, (count,)), torch.randint(-1, TILES, (count,)), torch.randn(count, dim)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("dim", "codewords"), [(1, 2), (37, 5), (64, 0), (384, 64), (1536, 70), (4096, 9)])
def test_against_the_reference(dtype: torch.dtype, dim: int, codewords: int) -> None:
    got = make_bank(dtype, dim, codewords)
    expected = {name: t.cpu() for name, t in got.items()}
    for step in range(3):
        batch = entries(700, dim)
        write(got, *batch, step)
        reference.write(*expected.values(), *batch, step)
    got = {name: t.cpu() for name, t in got.items()}
    assert torch.equal(got["age"], expected["age"])
    rows = torch.arange(SLIDES * TILES)
    z = reference.read(got["payload"], got["scale"], rows, dim)
    reference_z = reference.read(expected["payload"], expected["scale"], rows, dim)
    apart = (z - reference_z).abs()
    assert (
        apart == 0
    ).float().mean() > 0.999  # both normalise in float64: a rounding differs once in a while
    assert (apart <= 7e-2 * reference_z.abs() + 8e-3).all()  # and then by one step of e4m3 or int8
    torch.testing.assert_close(got["drift"], expected["drift"], atol=2e-3, rtol=1e-3)
    if codewords:
        assert (got["code"] != expected["code"]).float().mean() < 5e-3
        sums, counts = torch.zeros_like(got["sums"]), torch.zeros_like(got["counts"])
        coded = (got["code"] >= 0).nonzero().squeeze(1)
        accumulate_(sums, counts, coded // TILES, got["code"][coded], z[coded])
        assert torch.equal(got["sums"], sums)
        assert torch.equal(got["counts"], counts)


def test_two_runs_are_equal_and_the_last_duplicate_wins() -> None:
    slide, tile, x = entries(5000, 96)
    tile %= 7  # hundreds of entries a row
    banks = []
    for _ in range(2):
        torch.manual_seed(1)
        bank = make_bank(torch.int8, 96, 16)
        write(bank, slide, tile, x, 0)
        banks.append(bank)
    for name, t in banks[0].items():
        assert torch.equal(t, banks[1][name]), name
    keep = reference.last_of_each(slide * TILES + tile, (slide >= 0) & (tile >= 0))
    torch.manual_seed(1)
    alone = make_bank(torch.int8, 96, 16)
    write(alone, slide[keep], tile[keep], x[keep], 0)
    for name, t in banks[0].items():
        assert torch.equal(t, alone[name]), name


def test_captured_in_a_graph() -> None:
    bank = make_bank(torch.int8, 64, 8)
    eager = {name: t.clone() for name, t in bank.items()}
    slide, tile, x = (t.cuda() for t in entries(300, 64))
    write({name: t.clone() for name, t in bank.items()}, slide, tile, x, 3)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write(bank, slide, tile, x, 3)
    graph.replay()
    write(eager, slide, tile, x, 3)
    for name, t in eager.items():
        assert torch.equal(t, bank[name]), name
