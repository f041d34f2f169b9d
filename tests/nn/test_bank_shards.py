"""A bank saved by several ranks loads at any other number of them, bit for bit, or says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dre_fast.nn.bank import MemoryBank
from dre_fast.reference.quantize import DTYPES

D, K = 12, 5
LENGTHS = {7: 30, 0: 4, 3: 55, 12: 9, 5: 17, 20: 1, 4: 26}  # cohort-wide number -> tiles


def filled(numbers: list[int], codebook: Tensor | None, dtype: str = "int8") -> MemoryBank:
    """The slides of these numbers; rows depend on the number alone."""
    bank = MemoryBank([LENGTHS[i] for i in numbers], D, codebook=codebook, dtype=dtype)
    bank.set_numbers(torch.tensor(numbers, dtype=torch.int64))
    for slide, number in enumerate(numbers):
        generator = torch.Generator().manual_seed(number)
        n = LENGTHS[number]
        for step in range(3):
            tiles = torch.randperm(n, generator=generator)[: max(1, n // 2)]
            bank.write(slide, tiles, torch.randn(len(tiles), D, generator=generator), step=step)
    return bank


def save(
    folder: Path, split: list[list[int]], dtype: str = "int8", k: int = K, save_id: str = "step-7"
) -> None:
    codebook = torch.randn(k, D, generator=torch.Generator().manual_seed(1)) if k else None
    for shard, numbers in enumerate(split):
        filled(numbers, codebook, dtype).save_shard(
            folder, shard=shard, shards=len(split), slides=numbers, save_id=save_id
        )


def assert_equal(a: MemoryBank, b: MemoryBank) -> None:
    for name, table in a.state_dict().items():
        other = getattr(b, name)
        assert table.dtype == other.dtype
        assert torch.equal(table.float(), other.float()), name


SPLIT = [[7, 0], [3, 12, 5, 20], [4]]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("k", [0, K])
def test_other_numbers_of_ranks(tmp_path: Path, dtype: str, k: int) -> None:
    save(tmp_path, SPLIT, dtype, k)
    codebook = torch.randn(k, D, generator=torch.Generator().manual_seed(1)) if k else None
    everything, numbers = MemoryBank.load_shards(tmp_path)
    assert numbers.tolist() == sorted(LENGTHS)
    assert_equal(everything, filled(sorted(LENGTHS), codebook, dtype))
    for wanted in ([20, 4, 7], [3], []):
        part, numbers = MemoryBank.load_shards(tmp_path, slides=wanted)
        assert numbers.tolist() == wanted
        assert_equal(part, filled(wanted, codebook, dtype))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"bank-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]


@pytest.mark.parametrize("target", list(DTYPES))
def test_another_row_format_is_that_of_load(tmp_path: Path, target: str) -> None:
    save(tmp_path, SPLIT)
    loaded, _ = MemoryBank.load_shards(tmp_path, dtype=target)
    filled(sorted(LENGTHS), loaded.codebook).save(tmp_path / "whole.safetensors")
    assert_equal(loaded, MemoryBank.load(tmp_path / "whole.safetensors", dtype=target))
    sums = loaded.slide_sums.clone()
    loaded.rebuild()
    assert torch.equal(sums, loaded.slide_sums)


def test_into_a_file_and_on(tmp_path: Path) -> None:
    save(tmp_path, SPLIT)
    bank, _ = MemoryBank.load_shards(tmp_path, tier="file", folder=tmp_path, cache="100kB")
    other, _ = MemoryBank.load_shards(tmp_path)
    for each in (bank, other):
        each.write([0, 3], [2, 1], torch.ones(2, D), step=9)
    assert torch.equal(bank.read([0, 3], [2, 1]), other.read([0, 3], [2, 1]))
    assert torch.equal(bank.slide_sums, other.slide_sums)
    bank.close()


def test_a_rank_without_slides_has_its_shard(tmp_path: Path) -> None:
    save(tmp_path, [[], [7, 0], []])
    loaded, numbers = MemoryBank.load_shards(tmp_path)
    assert numbers.tolist() == [0, 7]
    assert_equal(loaded, filled([0, 7], loaded.codebook))


def test_removed_slides_are_left_out(tmp_path: Path) -> None:
    bank = filled([7, 0, 3], torch.randn(K, D))
    bank.remove_slide(1)
    bank.save_shard(tmp_path, shard=0, shards=1, slides=[7, 7, 3], save_id="a")
    loaded, numbers = MemoryBank.load_shards(tmp_path)
    assert numbers.tolist() == [3, 7]
    assert torch.equal(loaded.sums(1), bank.sums(0))
    loaded.save_shard(tmp_path, shard=0, shards=1, slides=numbers, save_id="b")


def test_bad_arguments(tmp_path: Path) -> None:
    bank = filled([7, 0], None)
    for arguments, message in (
        ({"shard": 2, "shards": 2, "slides": [1, 2]}, r"shard 2 of 2: shards are 0\.\.1"),
        ({"shard": 0, "shards": 2, "slides": [1]}, "1 slide numbers for the 2 slides"),
        ({"shard": 0, "shards": 2, "slides": [4, 4]}, "two slides of this bank have the number 4"),
        ({"shard": 0, "shards": 2, "slides": [4, -2]}, "count from 0, got -2"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.save_shard(tmp_path, save_id="x", **arguments)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="no shards of a memory bank"):
        MemoryBank.load_shards(tmp_path)
    save(tmp_path, SPLIT)
    with pytest.raises(ValueError, match="no shard has slide 6"):
        MemoryBank.load_shards(tmp_path, slides=[7, 6])
    with pytest.raises(ValueError, match="slide 7 is asked for twice"):
        MemoryBank.load_shards(tmp_path, slides=[7, 3, 7])


def test_incomplete_and_mixed_saves_are_refused(tmp_path: Path) -> None:
    save(tmp_path, SPLIT)
    second = tmp_path / "bank-00002-of-00003.safetensors"
    kept = second.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            MemoryBank.load_shards(tmp_path)
        second.write_bytes(kept)

    second.unlink()
    refused("shard 2 of 3 is missing")
    second.write_bytes(kept[: len(kept) // 2])
    refused(r"bank-00002-of-00003\.safetensors: cut short")
    changed = bytearray(kept)
    changed[-3] ^= 1
    second.write_bytes(bytes(changed))
    refused(r"bank-00002-of-00003\.safetensors: damaged: the bytes of")
    second.write_bytes(b"no bank" * 9)
    refused("not a memory bank")
    codebook = torch.randn(K, D, generator=torch.Generator().manual_seed(1))
    again = {"shard": 1, "shards": 3, "save_id": "step-7"}
    filled([3, 12], codebook).save_shard(tmp_path, **{**again, "slides": [3, 12], "save_id": "step-8"})
    refused("of the save 'step-8', but bank-00001-of-00003.safetensors is of 'step-7'")
    filled([3, 0], codebook).save_shard(tmp_path, **again, slides=[3, 0])
    refused(r"slide 0 is in bank-00001-of-00003\.safetensors and in bank-00002-of-00003")
    filled([3], torch.randn(K, D)).save_shard(tmp_path, **again, slides=[3])
    refused("another row format or codebook")
    filled([3], codebook, "float16").save_shard(tmp_path, **again, slides=[3])
    refused("another row format or codebook")
    filled([3], codebook).save(second)
    refused("a memory bank, but not a shard of one")
    save(tmp_path, [[7], [0]])
    refused("shards of different saves, of 2 and of 3")


# ------------------------------------------------------------------------------------- torch.distributed.checkpoint


def test_distributed_checkpoint_in_one_process(tmp_path: Path) -> None:
    bank = filled(sorted(LENGTHS), torch.randn(K, D))
    dcp.save({"bank": bank.state_dict()}, checkpoint_id=tmp_path / "a")
    other = MemoryBank([LENGTHS[i] for i in sorted(LENGTHS)], D, codebook=torch.zeros(K, D))
    state = {"bank": other.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "a")
    other.load_state_dict(state["bank"])
    assert_equal(bank, other)
    live = torch.randn(1, 2, D)
    ids = torch.tensor([2]), torch.tensor([[1, 3]])
    assert torch.equal(bank.encode(*ids, live), other.encode(*ids, live))


_RANK = """
import json, os, sys, torch
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from dre_fast.nn.bank import MemoryBank
rank, folder = int(os.environ["RANK"]), sys.argv[1]
dist.init_process_group("gloo")
sizes = [[30, 4], [55]][rank]
bank = MemoryBank(sizes, 12, codebook=torch.ones(3, 12) * torch.arange(3)[:, None])
torch.manual_seed(rank)
for slide, n in enumerate(sizes):
    bank.write(slide, torch.arange(n), torch.randn(n, 12), step=rank)
dcp.save({f"bank.{rank}": bank.state_dict()}, checkpoint_id=folder)
other = MemoryBank(sizes, 12, codebook=torch.zeros(3, 12))
state = {f"bank.{rank}": other.state_dict()}
dcp.load(state, checkpoint_id=folder)
other.load_state_dict(state[f"bank.{rank}"])
same = all(torch.equal(a, getattr(other, name)) for name, a in bank.state_dict().items())
dist.barrier()
dist.destroy_process_group()
print(json.dumps({"rank": rank, "same": same}))
"""


@pytest.mark.slow
def test_distributed_checkpoint_of_two_ranks(tmp_path: Path) -> None:
    env = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29641",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(tmp_path / "a")],
            env={**env, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == {"rank": rank, "same": True}


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_restored_in_place_at_another_number_of_ranks(tmp_path: Path, dtype: str) -> None:
    save(tmp_path, SPLIT, "int8")
    mine = [20, 3, 0]
    bank = MemoryBank([LENGTHS[i] for i in mine], D, dtype=dtype)
    bank.restore_shards(tmp_path, slides=mine)
    loaded, _ = MemoryBank.load_shards(tmp_path, slides=mine, dtype=dtype)
    assert_equal(bank, loaded)
    bank.restore_shards(tmp_path, slides=mine)  # over rows that are there
    assert_equal(bank, loaded)
    with pytest.raises(ValueError, match=rf"slide 4 has {LENGTHS[4]} tiles there and {LENGTHS[0]} here"):
        bank.restore_shards(tmp_path, slides=[20, 3, 4])
    with pytest.raises(ValueError, match="2 slides asked for, this bank has 3"):
        bank.restore_shards(tmp_path, slides=[20, 3])
    assert_equal(bank, loaded)
    with pytest.raises(ValueError, match="D = 5"):
        MemoryBank([LENGTHS[20]], 5).restore_shards(tmp_path, slides=[20])


def test_a_slide_is_sampled_alike_whichever_bank_holds_it() -> None:
    codebook = torch.randn(K, D, generator=torch.Generator().manual_seed(1))
    part = filled([12, 3], codebook, "int8")
    whole = MemoryBank([LENGTHS.get(i, 1) for i in range(21)], D, codebook=codebook)
    for cycle in (0, 1, 5):
        there = whole.sample(torch.tensor([12, 3]), 4, cycle=cycle, seed=3)
        assert part.sample(torch.tensor([0, 1]), 4, cycle=cycle, seed=3).equal(there)
    assert part.add_slide(9) == 2
    assert part.number.tolist() == [12, 3, 2]
    with pytest.raises(ValueError, match="3 integers >= 0"):
        part.set_numbers(torch.tensor([1, 2]))
