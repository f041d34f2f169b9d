"""A bank of more than 2^31 elements: its last rows are written, read and encoded like its first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dre_fast.nn.bank import MemoryBank
from dre_fast.nn.bank_checks import free_bytes
from dre_fast.ops import native

D, K, M = 2048, 3, 8
SMALL, LARGE = 1000, (1 << 31) // D + 1000  # the large slide crosses 2^31 elements

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif((free_bytes(torch.device("cpu")) or 1 << 40) < 4 << 30, reason="needs 4 GB of memory"),
]


@pytest.mark.parametrize("tier", ["device", "file"])
def test_the_last_rows_are_like_the_first(tier: str, tmp_path: Path) -> None:
    if tier == "file" and native.why_not("host"):
        pytest.skip(f"needs the compiled host part: {native.why_not('host')}")
    where = {"tier": "file", "folder": tmp_path, "cache": "2.3GB"} if tier == "file" else {}
    codebook = torch.randn(K, D) * 0.1
    large = MemoryBank(
        [LARGE, SMALL], D, codebook=codebook, **where
    )  # rows of zeros take no memory until written
    small = MemoryBank([SMALL], D, codebook=codebook)
    assert large.payload.numel() > 1 << 31

    rows = torch.randn(M, D)
    shift = LARGE - SMALL
    tiles = torch.tensor([SMALL - 1, 3, 500, 0, 1, 999 - 1, 10, 11])
    small.write(0, tiles, rows, step=4)
    large.write(0, tiles + shift, rows, step=4)  # the end of a large slide
    large.write(1, tiles, rows, step=4)  # a slide beyond 2^31
    expected = small.read(0, tiles)
    assert torch.equal(large.read(0, tiles + shift), expected)
    assert torch.equal(large.read(1, tiles), expected)
    for slide in (0, 1):
        assert torch.equal(large.sums(slide), small.sums(0))
        assert torch.equal(large.counts(slide), small.counts(0))

    live = torch.nn.functional.normalize(torch.randn(1, 4, D), dim=2)
    full = small.encode([0], tiles[None, :4], live)
    assert torch.equal(large.encode([0], tiles[None, :4] + shift, live), full)
    assert torch.equal(large.encode([1], tiles[None, :4], live), full)
    # all other rows of the last slide by permutation: what the running sums hold, less what is live
    chosen = large.sample([1], 4, cycle=0, seed=0)
    sampled = large.encode([1], chosen, live, SMALL - 4, cycle=0, seed=0)
    torch.testing.assert_close(sampled, large.encode([1], chosen, live), atol=1e-5, rtol=1e-5)
    assert (large.age[large.start[1] :] >= 0).sum() == M
    found = large.statistics(step=5)
    assert found["written"] == 2 * M
    large.close()
