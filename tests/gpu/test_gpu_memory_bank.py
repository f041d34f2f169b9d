"""The memory bank on the GPU holds what the one on the CPU holds."""

from __future__ import annotations

import pytest
import torch

from dre_fast import MemoryBank

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float16", "float32", "float8_e4m3fn"])
def test_writes_agree_with_the_cpu(dtype: str) -> None:
    codebook = torch.nn.functional.normalize(torch.randn(8, 48), dim=1)
    banks = [
        MemoryBank([70, 1, 200], 48, codebook=codebook, dtype=dtype, device=device)
        for device in ("cpu", "cuda")
    ]
    for step in range(4):
        slides = torch.randint(0, 3, (90,))
        tiles = torch.randint(0, 200, (90,)) % torch.tensor([70, 1, 200])[slides]
        tiles[::11] = -1
        features = torch.randn(90, 48)
        for bank in banks:
            bank.write(slides, tiles, features, step=step)
    cpu, gpu = banks
    for slide, length in enumerate((70, 1, 200)):
        every = torch.arange(length)
        here, there = (bank.read(torch.full((length,), slide), every).cpu() for bank in banks)
        # A row on the edge between two int8 or fp8 values may round either way.
        torch.testing.assert_close(
            there, here, rtol=0, atol=2e-2 if dtype in ("int8", "float8_e4m3fn") else 1e-3
        )
        assert torch.equal(gpu.ages(slide).cpu(), cpu.ages(slide))
        assert (gpu.codes(slide).cpu() == cpu.codes(slide)).float().mean() > 0.98
        assert gpu.counts(slide).sum().item() == cpu.counts(slide).sum().item()


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_running_sums_equal_a_rebuild_bit_for_bit(dtype: str) -> None:
    codebook = torch.nn.functional.normalize(torch.randn(5, 33), dim=1)
    bank = MemoryBank([64, 300], 33, codebook=codebook, dtype=dtype, device="cuda")
    for step in range(6):
        slides = torch.randint(0, 2, (120,))
        tiles = torch.randint(0, 300, (120,)) % torch.tensor([64, 300])[slides]
        bank.write(slides.cuda(), tiles.cuda(), torch.randn(120, 33, device="cuda"), step=step)
    before = [(bank.sums(slide).clone(), bank.counts(slide).clone()) for slide in (0, 1)]
    bank.rebuild()
    for slide, (sums, counts) in enumerate(before):
        assert torch.equal(bank.sums(slide), sums)
        assert torch.equal(bank.counts(slide), counts)


def test_a_whole_slide_step_is_captured_and_replayed() -> None:
    """Sampling, encoding and writing as one CUDA graph: new features through the same launches, nothing waits."""
    lengths = [300, 40, 120]
    codebook = torch.nn.functional.normalize(torch.randn(8, 48), dim=1)
    captured, eager = (MemoryBank(lengths, 48, codebook=codebook, device="cuda") for _ in range(2))
    for bank in (captured, eager):
        torch.manual_seed(0)
        for slide, n in enumerate(lengths):
            bank.write(slide, torch.arange(n), torch.randn(n, 48), step=0)
    slides = torch.arange(3, device="cuda")
    live = torch.nn.functional.normalize(torch.randn(3, 16, 48, device="cuda"), dim=2)

    def step(bank: MemoryBank, rows: torch.Tensor) -> torch.Tensor:
        tiles = bank.sample(slides, 16, 2, 0)
        V = bank.encode(slides, tiles, rows, memory="full")
        bank.write(slides.repeat_interleave(16), tiles.reshape(-1), rows.reshape(-1, 48), step=1)
        return V

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(captured, live)
        step(eager, live)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        V = step(captured, live)
    for _ in range(3):
        live.copy_(torch.nn.functional.normalize(torch.randn_like(live), dim=2))
        graph.replay()
        assert torch.equal(V, step(eager, live))
    for name, table in captured.state_dict().items():
        assert torch.equal(table.float(), getattr(eager, name).float()), name
