"""A bank in any tier is the same bank: rows in a file, with a cache that holds few slides, against rows in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dre_fast import fit_codebook
from dre_fast.nn import bank_checks, bank_tiers
from dre_fast.nn.bank import MemoryBank
from dre_fast.nn.bank_tiers import choose_tier, to_bytes
from dre_fast.ops import native
from dre_fast.reference.quantize import DTYPES

if native.why_not("host"):
    pytest.skip(f"needs the compiled host part: {native.why_not('host')}", allow_module_level=True)

D, K = 24, 5
LENGTHS = [40, 3, 77, 12, 30, 1, 55, 18]
ROW = {"int8": 32, "float8_e4m3fn": 32, "bfloat16": 48, "float16": 48, "float32": 96}  # bytes, padded to 16


def pair(folder: Path, dtype: str = "int8", rows: int = 140, **more: Any) -> tuple[MemoryBank, MemoryBank]:
    """The same bank with rows in memory, and in a file with a cache of ``rows`` rows."""
    codebook = torch.randn(K, D) * 0.4
    there = {"tier": "file", "folder": folder, "cache": rows * ROW[dtype]}
    return (
        MemoryBank(LENGTHS, D, codebook=codebook, dtype=dtype, **more),
        MemoryBank(LENGTHS, D, codebook=codebook, dtype=dtype, **there, **more),
    )


def assert_same(a: MemoryBank, b: MemoryBank) -> None:
    mine, theirs = a.state_dict(), b.state_dict()  # the file is brought up to date by this
    for name, table in mine.items():
        assert table.dtype == theirs[name].dtype
        assert torch.equal(table.float(), theirs[name].float()), name


def some_rows(generator: torch.Generator, slides: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """m rows a slide, with repeats and skips."""
    s = slides.repeat_interleave(m)
    tiles = (torch.rand(len(s), generator=generator) * torch.tensor(LENGTHS)[s]).long()
    tiles[torch.rand(len(s), generator=generator) < 0.1] = -1
    return s, tiles, torch.randn(len(s), D, generator=generator)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_training_steps_give_the_same_bits(tmp_path: Path, dtype: str) -> None:
    memory, file = pair(tmp_path, dtype)
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        slides = torch.randperm(len(LENGTHS), generator=generator)[:2]
        file.prefetch(torch.cat([slides, torch.randperm(len(LENGTHS), generator=generator)[:2]]).unique())
        batch = some_rows(generator, slides, 9)
        live_tiles = memory.sample(slides, 4, cycle=step, seed=3)
        found = []
        for bank in (memory, file):
            live = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(step), requires_grad=True)
            full = bank.encode(slides, live_tiles, live, memory="full")
            some = bank.encode(slides, live_tiles, live, memory=6, cycle=step, seed=3)
            (full.square().sum() + some.square().sum()).backward()
            bank.write(*batch, step=step)
            found.append((full.detach(), some.detach(), live.grad, bank.read(*batch[:2])))
        for a, b in zip(*found):
            assert torch.equal(a, b)
        if step == 6:  # codes change everywhere, those of slides in the cache too
            for bank in (memory, file):
                bank.set_codebook(torch.randn(K, D, generator=torch.Generator().manual_seed(9)))
    assert_same(memory, file)
    assert file.cache_statistics()["evicted"] > 0
    assert memory.cache_statistics() == {}
    assert [bank.tier for bank in (memory, file)] == ["device", "file"]
    assert "tier=file" in repr(file)
    file.close()


def filled(folder: Path, dtype: str = "int8") -> tuple[MemoryBank, MemoryBank]:
    banks = pair(folder, dtype)
    for slide, n in enumerate(LENGTHS):
        features = torch.randn(n, D)
        for bank in banks:
            bank.write(slide, torch.arange(n), features, step=0)
    return banks


def test_passes_over_all_rows_see_what_is_in_the_cache(tmp_path: Path) -> None:
    memory, file = filled(tmp_path)
    assert torch.equal(torch.cat(list(memory.iter_rows(50))), torch.cat(list(file.iter_rows(50))))
    a, b = fit_codebook(memory, 3, iterations=4), fit_codebook(file, 3, iterations=4)
    assert torch.equal(a[0], b[0])
    sums = file.slide_sums.clone()
    file.rebuild()
    assert torch.equal(file.slide_sums, sums)
    assert memory.statistics(step=3)["age_mean"] == file.statistics(step=3)["age_mean"]
    file.close()


def test_files_and_state_dicts_are_those_of_any_other_bank(tmp_path: Path) -> None:
    memory, file = filled(tmp_path)
    memory.save(tmp_path / "a.safetensors")
    file.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    there = {"tier": "file", "folder": tmp_path, "cache": "10kB"}
    assert_same(memory, MemoryBank.load(tmp_path / "a.safetensors", **there))
    half = MemoryBank.load(tmp_path / "a.safetensors", dtype="float16", **there)
    assert_same(MemoryBank.load(tmp_path / "b.safetensors", dtype="float16"), half)
    for smaller in ([1], LENGTHS):  # another size, and the same
        other = MemoryBank(smaller, D, codebook=torch.randn(K, D), **there)
        other.write(0, [0], torch.ones(1, D), step=1)
        other.load_state_dict(memory.state_dict())
        assert_same(memory, other)
        live = torch.randn(1, 2, D)
        ids = torch.tensor([3]), torch.tensor([[0, 5]])
        assert torch.equal(other.encode(*ids, live), memory.encode(*ids, live))
    again = MemoryBank([1], D)
    again.load_state_dict(file.state_dict())
    assert_same(memory, again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_loading_chooses_a_tier_by_the_size_of_the_file(tmp_path: Path) -> None:
    memory, file = filled(tmp_path)
    file.close()
    memory.save(tmp_path / "a.safetensors")
    where = {"tier": "auto", "folder": tmp_path, "cache": "10kB"}
    for budget, tier in (("1kB", "file"), ("1GB", "device")):
        loaded = MemoryBank.load(tmp_path / "a.safetensors", budget=budget, **where)
        assert loaded.tier == tier
        assert_same(memory, loaded)
        loaded.close()


def test_slides_are_added_and_removed(tmp_path: Path) -> None:
    memory, file = filled(tmp_path)
    for bank in (memory, file):
        torch.manual_seed(0)
        bank.prefetch([2, 4])
        bank.remove_slide(2)
        assert bank.add_slides([70, 100]) == [8, 9]
        bank.write(8, torch.arange(70), torch.randn(70, D), step=4)
        bank.write(9, torch.arange(100), torch.randn(100, D), step=5)
        bank.write([4, 9], [0, 99], torch.randn(2, D), step=6)
        for call in (lambda b=bank: b.prefetch([2]), lambda b=bank: b.read([2], [0])):
            with pytest.raises(ValueError, match=r"slide 2.*was removed"):
                call()
        with pytest.raises(ValueError, match="no slide 10"):
            bank.prefetch([0, 10])
    assert_same(memory, file)
    file.rebuild()
    assert_same(memory, file)
    file.close()


def test_more_slides_than_the_cache_holds_are_refused_with_the_numbers(tmp_path: Path) -> None:
    _, file = filled(tmp_path)
    everything = torch.arange(len(LENGTHS))
    with pytest.raises(
        ValueError, match=r"slides of this call \(8\) have 236 rows, the cache in memory holds 140"
    ):
        file.encode(everything, torch.zeros(8, 1, dtype=torch.int64), torch.randn(8, 1, D))
    file.encode(everything[:3], torch.zeros(3, 1, dtype=torch.int64), torch.randn(3, 1, D))
    file.close()


def test_reading_ahead_makes_hits(tmp_path: Path) -> None:
    _, file = filled(tmp_path)
    before = file.cache_statistics()
    for slides in ([0, 1], [2], [3, 4], [6]):
        assert file.prefetch(slides) == len(slides)
        for slab in file._placement.file.ring.slabs.values():
            file._placement.file._file.wait(slab.read)
        file.read(slides, [0] * len(slides))
    found = file.cache_statistics()
    assert found["hits"] - before["hits"] == 6
    assert found["misses"] == before["misses"]
    assert found["bytes_read"] > before["bytes_read"]
    assert found["row_bytes"] == 32
    file.close()
    with pytest.raises(RuntimeError, match="closed"):
        file.read([5], [0])


def test_what_cannot_be_done_with_a_file_says_so(tmp_path: Path) -> None:
    _, file = filled(tmp_path)
    with pytest.raises(TypeError, match="cannot be copied; save the bank"):
        copy.deepcopy(file)
    with pytest.raises(RuntimeError, match="rows in a file stay with the device"):
        file.to("meta")
    assert file.half().dtype == torch.int8
    file.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tier": "ram"}, "tier must be one of device, host, file, auto, got 'ram'"),
        ({"tier": "file"}, "tier='file' needs folder="),
        ({"folder": "."}, "folder= and cache= are for tier='file' or 'auto', not for tier='device'"),
        ({"tier": "host", "cache": "1MB"}, "not for tier='host'"),
        ({"budget": "1MB"}, "budget= is for tier='auto', not for tier='device'"),
        ({"tier": "file", "folder": ".", "cache": "lots"}, "a size in bytes such as"),
        ({"tier": "file", "folder": ".", "cache": 31}, "a cache of 31 bytes holds no row of 32 bytes"),
    ],
)
def test_bad_placements_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryBank([3], D, **arguments)


def test_a_disk_without_room_is_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = lambda folder: SimpleNamespace(free=3_000_000_000)  # noqa: E731
    monkeypatch.setattr(bank_tiers.shutil, "disk_usage", usage)
    with pytest.raises(
        ValueError, match=r"20,000,000 rows x 384 int8 need 7.7 GB of disk; 3.0 GB free in .*another folder"
    ):
        MemoryBank([20_000_000], 384, tier="file", folder=tmp_path, cache="1MB")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"folder= names no folder.*nowhere"):
        MemoryBank([2], 384, tier="file", folder=tmp_path / "nowhere")


def test_the_first_tier_that_holds_the_bank_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free = {"cuda": 80e9, "cpu": 200e9}
    monkeypatch.setattr(bank_checks, "free_bytes", lambda device: int(free[device.type]))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")

    def chosen(rows: float, device: torch.device = cuda, budget: Any = None, folder: Any = "/scratch") -> str:
        return choose_tier(int(rows), 384, torch.int8, 1000, 64, device, budget, folder)

    assert chosen(1e8) == "device"
    assert chosen(1e8, budget="20 GB") == "host"
    assert chosen(4e8) == "host"
    assert chosen(6e8) == "file"
    assert chosen(6e8, device=cpu) == "file"
    assert chosen(1e8, device=cpu) == "device"
    with pytest.raises(
        ValueError, match=r"do not fit into host memory, nor into the 80.0 GB .*on cuda: give folder="
    ):
        chosen(6e8, folder=None)
    with pytest.raises(
        ValueError, match=r"995.3 MB do not fit into the 500.0 MB that the bank may take on cpu: give folder="
    ):
        choose_tier(2_500_000, 384, torch.int8, 10, 8, cpu, "0.5GB", None)
    assert MemoryBank([100], D, tier="auto", folder=tmp_path, cache="1MB", budget="1GB").tier == "device"
    free["cpu"] = 10_000
    bank = MemoryBank([100, 200], D, tier="auto", folder=tmp_path)
    assert bank.tier == "file"
    bank.close()


def test_a_cache_too_small_for_a_slide_or_too_large_for_the_memory_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"tier": "file", "folder": tmp_path}
    message = r"cache= holds 10 rows, the largest slide has 77: it needs at least 2.5 kB"
    with pytest.raises(ValueError, match=message):
        MemoryBank(LENGTHS, D, cache=320, **where)
    bank = MemoryBank([10], D, cache=320, **where)
    with pytest.raises(ValueError, match="the largest slide has 11"):
        bank.add_slide(11)
    assert bank.num_slides == 1
    with pytest.raises(RuntimeError, match="the largest slide has 77"):
        bank.load_state_dict(MemoryBank(LENGTHS, D).state_dict())
    assert bank.num_slides == 1
    monkeypatch.setattr(bank_checks, "free_bytes", lambda device: 10**9)
    with pytest.raises(ValueError, match=r"cache= of 2.0 GB; 1.0 GB of memory are free"):
        MemoryBank([10], D, cache="2GB", **where)


@pytest.mark.parametrize(
    ("text", "size"),
    [(5, 5), ("8GB", 8e9), ("1.5 TB", 1.5e12), ("500 MB", 5e8), ("7k", 7e3), ("3K", 3e3), ("12B", 12)],
)
def test_sizes(text: Any, size: float) -> None:
    assert to_bytes(text) == int(size)


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "1.2.3", "5 PB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="a size in bytes such as"):
        to_bytes(text)


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["host", "file"])
def test_kernels_read_and_write_over_the_bus(tmp_path: Path, tier: str) -> None:
    codebook = torch.randn(K, D) * 0.4
    there = {"tier": tier, **({"folder": tmp_path, "cache": 140 * 32} if tier == "file" else {})}
    banks = [
        MemoryBank(LENGTHS, D, codebook=codebook, device="cuda"),
        MemoryBank(LENGTHS, D, codebook=codebook, device="cuda", **there),
    ]
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        slides = torch.randperm(len(LENGTHS), generator=generator)[:2]
        batch = some_rows(generator, slides, 9)
        found = []
        for bank in banks:
            live = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(step)).cuda().requires_grad_()
            tiles = bank.sample(slides, 4, cycle=step, seed=3)
            full = bank.encode(slides, tiles, live, memory="full")
            some = bank.encode(slides, tiles, live, memory=6, cycle=step, seed=3)
            (full.square().sum() + some.square().sum()).backward()
            bank.write(*batch[:2], batch[2].cuda(), step=step)
            found.append((full.detach(), some.detach(), live.grad, bank.read(*batch[:2])))
        for a, b in zip(*found):
            assert torch.equal(a, b)
    first, second = (bank.state_dict() for bank in banks)
    for name, table in first.items():
        assert torch.equal(table.cpu().float(), second[name].cpu().float()), name
    banks[1].close()
