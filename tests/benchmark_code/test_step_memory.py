"""The peak memory of a training step is the same on slides of 1,000 and of 100,000 tiles."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.memory import Job, Watcher, why_not
from dre_fast import DRESLCL, MemoryBank, SlideEncoder, SlideReportLoss
from dre_fast.train.exact import ExactBatch

MB = 1 << 20


class Encoder(nn.Module):
    """Some 10 MB of activations for 32 tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.head = nn.Linear(24, 64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(images.float() / 255))
        return self.head(x.mean((2, 3)))


def step(mode: str, tiles: int) -> Job:
    """One whole step: forward, loss, backward, write-back; the warm one on a small bank."""

    def prepared(tiles: int, chunk: int):  # type: ignore[no-untyped-def]
        torch.manual_seed(0)
        codebook = nn.functional.normalize(torch.randn(8, 64), dim=1)
        bank = MemoryBank([tiles, tiles], 64, codebook=codebook)
        features = torch.randn(1000, 64)
        for slide in range(2):
            for first in range(0, tiles, 1000):
                rows = torch.arange(first, min(first + 1000, tiles))
                bank.write(slide, rows, features[: len(rows)], step=0)
        memory = 256 if mode == "sampled" else "full"
        model = DRESLCL(Encoder(), bank, SlideEncoder(64, 8, width=32, report_dim=16), memory=memory)
        loss, reports = SlideReportLoss(), torch.randn(2, 16)
        slides = torch.tensor([0, 1])

        def run() -> None:
            if mode == "exact":
                images = torch.zeros(chunk, 3, 32, 32, dtype=torch.uint8)
                exact = ExactBatch(
                    model, [0, 1], lambda slide, ids: images[: len(ids)], [tiles, tiles], chunk=chunk
                )
                out = exact.forward()
                loss(out.report, reports, [0, 1]).backward()
                exact.backward()
                return
            chosen = bank.sample(slides, 32, cycle=3, seed=0)
            images = torch.randint(256, (2, 32, 3, 32, 32), dtype=torch.uint8)
            out = model(images, slides, chosen, visit=3)
            loss(out.report, reports, [0, 1]).backward()
            assert out.live is not None
            bank.write(slides.repeat_interleave(32), chosen.flatten(), out.live.flatten(0, 1), step=1)

        return run

    return Job(prepared(tiles, 64), prepared(1000 if mode != "exact" else 64, 64))


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [("full", (1_000, 100_000)), ("sampled", (1_000, 100_000)), ("exact", (1_000, 3_000))],
)
def test_the_peak_does_not_grow_with_the_slide(mode: str, sizes: tuple[int, int]) -> None:
    if why_not():
        pytest.skip(why_not())
    with Watcher() as watcher:
        small, large = (
            watcher.peak("tests.benchmark_code.test_step_memory:step", mode, size) for size in sizes
        )
    assert small > 4 * MB  # it sees the step at all
    assert large < small + 2 * MB  # 100,000 rows of 64 values more would be 24 MB in fp32
