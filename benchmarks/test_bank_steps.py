"""The bank's part of a training step with rows in memory and in a file, which is read from the disk, not from its cache.

16 slides of 10,000 tiles in 4 steps: sample, encode with the other rows, write back; the encoder's share of a step is
a pause, in which reading ahead goes on. The cache holds three of the four batches.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from dre_fast import MemoryBank
from dre_fast.ops import native

SLIDES, TILES, DIM, WORDS, BATCH, LIVE = 16, 10_000, 384, 64, 4, 64
PAUSE = 0.05  # seconds a step


def make_bank(folder: Path | None) -> MemoryBank:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(WORDS, DIM, generator=generator) * 0.05
    cache = 3 * BATCH * TILES * DIM
    where = {"tier": "file", "folder": folder, "cache": cache} if folder else {}
    bank = MemoryBank([TILES] * SLIDES, DIM, codebook=codebook, **where)
    features = torch.randn(TILES, DIM, generator=generator)
    for slide in range(SLIDES):
        bank.write(slide, torch.arange(TILES), features, step=0)
    return bank


def epoch(bank: MemoryBank, memory: str | int, ahead: bool, live: torch.Tensor) -> None:
    order = torch.arange(SLIDES)
    for first in range(0, SLIDES, BATCH):
        slides = order[first : first + BATCH]
        if ahead:
            bank.prefetch(order[first : first + 3 * BATCH])
        tiles = bank.sample(slides, LIVE, cycle=0, seed=0)
        V = bank.encode(slides, tiles, live, memory=memory, cycle=0, seed=0)
        assert isinstance(V, torch.Tensor)
        V.sum().backward()
        time.sleep(PAUSE)
        bank.write(slides.repeat_interleave(LIVE), tiles.reshape(-1), live.detach().flatten(0, 1), step=1)


@pytest.mark.parametrize("memory", ["full", 4096])
@pytest.mark.parametrize("way", ["memory", "file, read ahead", "file"])
def test_bank_in_steps(benchmark, tmp_path: Path, memory: str | int, way: str) -> None:
    if way != "memory" and native.why_not("host"):
        pytest.skip(f"needs the compiled host part: {native.why_not('host')}")
    bank = make_bank(None if way == "memory" else tmp_path)
    live = torch.randn(BATCH, LIVE, DIM, requires_grad=True)

    def from_the_disk() -> None:
        file = bank._placement.file
        if file is not None:
            file.ring.clear()
            descriptor = file._file.fileno()
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    benchmark.group = (
        f"bank in a step, memory={memory}, {SLIDES // BATCH} steps of {BATCH} slides x {TILES:,} rows"
    )
    benchmark.pedantic(
        lambda: epoch(bank, memory, way == "file, read ahead", live),
        setup=from_the_disk,
        rounds=5,
        warmup_rounds=1,
    )
    found = bank.cache_statistics()
    benchmark.extra_info.update(
        implementation=way, pause_seconds=PAUSE, threads=torch.get_num_threads(), **found
    )
    if found:  # never less than what the slides of an epoch hold
        assert found["bytes_read"] >= 6 * SLIDES * TILES * found["row_bytes"]
    bank.close()
