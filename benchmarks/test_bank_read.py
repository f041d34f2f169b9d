"""Reads of the bank: a whole-slide step from the running sums at growing slide sizes (P5), and rows by index (P7).

The step is forward and backward of ``MemoryBank.encode(..., memory="full")``. Beside it, what one would write by hand:
the same running sums in plain torch, and all rows of the slides dequantised and put through a GEMM form.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from dre_fast import MemoryBank
from dre_fast.reference import bank as reference

SLIDES, LIVE, DIM, WORDS = 32, 64, 384, 64
SIZES = (1_000, 4_000, 16_000, 64_000)  # tiles a slide
ROWS = 131_072  # of P7


def make_bank(tiles: int, slides: int, dtype: str) -> MemoryBank:
    """A bank whose rows are written; large slides repeat the features of 4,000 tiles."""
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(
        [tiles] * slides, DIM, codebook=torch.randn(WORDS, DIM, generator=generator) * 0.05, dtype=dtype
    )
    features = torch.randn(4000, DIM, generator=generator)
    for slide in range(slides):
        for first in range(0, tiles, 4000):
            ids = torch.arange(first, min(first + 4000, tiles))
            bank.write(slide, ids, features[: len(ids)], step=0)
    return bank


def whole_slide(bank: MemoryBank, slides: Tensor, tiles: Tensor, live: Tensor) -> Tensor:
    V = bank.encode(slides, tiles, live, memory="full")
    assert isinstance(V, Tensor)
    return V


def sums_in_torch(bank: MemoryBank, slides: Tensor, tiles: Tensor, live: Tensor) -> Tensor:
    tables = (
        bank.payload,
        bank.scale,
        bank.code,
        bank.slide_sums,
        bank.slide_counts,
        bank.codebook,
        bank.start,
    )
    others, _ = reference.rest(*tables, slides, tiles, False)
    bounds = torch.arange(len(slides) + 1) * LIVE
    return others + peers.GEMM_FORMS["index_add"](live.reshape(-1, DIM), bank.codebook, bounds)


def all_rows(bank: MemoryBank, slides: Tensor, tiles: Tensor, live: Tensor) -> Tensor:
    n = int(bank.length[0])
    row = (bank.start[slides, None] + torch.arange(n)).reshape(-1)
    code = bank.code.index_select(0, row).long()
    code = code.view(len(slides), n).scatter(
        1, tiles, peers.nearest(live.reshape(-1, DIM).detach(), bank.codebook).view_as(tiles)
    )
    x = bank.payload.index_select(0, row)[:, :DIM].float() * bank.scale.index_select(0, row)[:, None]
    x = x.view(len(slides), n, DIM).scatter(1, tiles[:, :, None].expand(-1, -1, DIM), live)
    return peers.SUMS["index_add"](
        x.view(-1, DIM), code.view(-1), bank.codebook, torch.arange(len(slides) + 1) * n
    )


NAMES = {
    whole_slide: "MemoryBank.encode",
    sums_in_torch: "running sums in plain torch",
    all_rows: "all rows, GEMM form",
}


@pytest.mark.parametrize(
    "way", [whole_slide, sums_in_torch, all_rows], ids=["dre_fast", "sums in torch", "all rows"]
)
@pytest.mark.parametrize("tiles", SIZES)
def test_bank_full(benchmark, tiles: int, way) -> None:
    if way is all_rows and tiles > 4000:
        pytest.skip("the rows of 32 such slides as fp32 take more than 24 GB")
    bank = make_bank(tiles, SLIDES, "int8")
    slides = torch.arange(SLIDES)
    chosen = bank.sample(slides, LIVE, cycle=0, seed=0)
    live = torch.nn.functional.normalize(torch.randn(SLIDES, LIVE, DIM), dim=2).requires_grad_()
    grad = torch.randn(SLIDES, WORDS, DIM)
    torch.testing.assert_close(
        way(bank, slides, chosen, live), whole_slide(bank, slides, chosen, live), atol=2e-3, rtol=1e-4
    )

    def step() -> None:
        live.grad = None
        way(bank, slides, chosen, live).backward(grad)

    benchmark.group = (
        f"P5 whole-slide step, int8, {SLIDES} slides of {tiles:,} tiles, {LIVE} live, forward and backward"
    )
    benchmark.extra_info.update(
        implementation=NAMES[way], ours=way is whole_slide, tiles=tiles, threads=torch.get_num_threads()
    )
    benchmark.pedantic(step, rounds=30 if way is not all_rows else 5, warmup_rounds=3)


def test_bank_full_is_flat(benchmark) -> None:
    """The same step on slides of 1,000 and of 64,000 tiles, in turn, so that both see the same machine."""
    steps, times = {}, {n: [] for n in SIZES}
    grad = torch.randn(SLIDES, WORDS, DIM)
    for n in SIZES:
        bank, slides = make_bank(n, SLIDES, "int8"), torch.arange(SLIDES)
        live = torch.nn.functional.normalize(torch.randn(SLIDES, LIVE, DIM), dim=2).requires_grad_()
        given = bank, slides, bank.sample(slides, LIVE, cycle=0, seed=0), live
        steps[n] = partial(lambda given: whole_slide(*given).backward(grad), given)

    def in_turn() -> None:
        for n, step in steps.items():
            start = time.perf_counter()
            step()
            times[n].append(time.perf_counter() - start)

    benchmark.group = (
        f"P5 whole-slide steps of 32 slides of {', '.join(f'{n:,}' for n in SIZES)} tiles, one of each"
    )
    benchmark.pedantic(in_turn, rounds=60, warmup_rounds=5)
    medians = {n: statistics.median(of[5:]) for n, of in times.items()}
    ratio = medians[SIZES[-1]] / medians[SIZES[0]]
    benchmark.extra_info.update(
        implementation="MemoryBank.encode",
        ours=True,
        variant=f"64,000 over 1,000 tiles: {ratio:.2f}",
        calls=len(SIZES),
        median_ms={str(n): 1e3 * t for n, t in medians.items()},
        ratio=ratio,
    )
    assert ratio < 2  # rows grew 64 times


def bank_read(bank: MemoryBank, row: Tensor, slides: Tensor, tiles: Tensor) -> Tensor:
    return bank.read(slides, tiles)


def index_select(bank: MemoryBank, row: Tensor, slides: Tensor, tiles: Tensor) -> Tensor:
    x = bank.payload.index_select(0, row)[:, :DIM].float()
    return x if not len(bank.scale) else x.mul_(bank.scale.index_select(0, row)[:, None])


@pytest.mark.parametrize("way", [bank_read, index_select], ids=["dre_fast", "torch"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_bank_read(benchmark, dtype: str, way) -> None:
    bank = make_bank(10_000, SLIDES, dtype)
    slides, tiles = torch.randint(SLIDES, (ROWS,)), torch.randint(10_000, (ROWS,))
    row = bank.start[slides] + tiles
    assert torch.equal(way(bank, row, slides, tiles), bank.read(slides, tiles))
    benchmark.group = f"P7 {ROWS:,} rows x {DIM} of the bank as fp32, {dtype}"
    benchmark.extra_info.update(
        implementation="MemoryBank.read" if way is bank_read else "index_select, dequantise",
        ours=way is bank_read,
        threads=torch.get_num_threads(),
    )
    benchmark.pedantic(lambda: way(bank, row, slides, tiles), rounds=15, warmup_rounds=2)
