"""What goes wrong around a bank's file leaves the old file, and nothing else."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dre_fast.nn.bank import MemoryBank
from dre_fast.nn.bank_io import _host

D = 16
_SAVES = """
import sys, torch
from dre_fast.nn.bank import MemoryBank
bank = MemoryBank([20000], 16, codebook=torch.randn(3, 16))
for step in range(10**9):
    bank.write(0, [step % 20000], torch.ones(1, 16) * (1 + step % 7), step=step)
    bank.save(sys.argv[1])
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_while_saving(tmp_path: Path) -> None:
    """After SIGKILL at any moment the file is a whole old one or a whole new one; what else lies there goes next time."""
    path = tmp_path / "bank.safetensors"
    chance = random.Random(0)
    left = 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVES, str(path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        bank = MemoryBank.load(path)
        sums = bank.slide_sums.clone()
        bank.rebuild()
        assert torch.equal(bank.slide_sums, sums)
        left += len(list(tmp_path.iterdir())) - 1
        assert len(list(tmp_path.iterdir())) <= 2  # at most what this one left: it removed the earlier one's
    assert left  # some were killed in the middle of a save
    bank.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_living_processes_are_writing_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {
        "stale": f".{path.name}.{_host()}.{gone.pid}-0123abcd",
        "alive": f".{path.name}.{_host()}.{os.getppid()}-0123abcd",
        "elsewhere": f".{path.name}.another-host.{gone.pid}-0123abcd",
        "other file": f".other.{_host()}.{gone.pid}-0123abcd",
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"x")
    MemoryBank([3], D).save(path)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, *names.values()} - {names["stale"]}


_FULL = """
import resource, signal, sys, torch
from dre_fast.nn.bank import MemoryBank
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
bank = MemoryBank([20000], 16)
try:
    bank.save(sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_disk_that_fills_up_keeps_the_old_file(tmp_path: Path) -> None:
    """A limit of 100 kB a file stands for the full disk: writing fails in the middle."""
    path = tmp_path / "bank.safetensors"
    old = MemoryBank([3], D)
    old.write(0, [1], torch.ones(1, D), step=5)
    old.save(path)
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "bank.safetensors: the memory bank was not saved: File too large" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert MemoryBank.load(path).ages(0).tolist() == [-1, 5, -1]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        MemoryBank([3], D).save(tmp_path / "file" / "bank.safetensors")


@pytest.mark.parametrize("table", ["payload", "code", "slide_sums", "drift", "codebook"])
def test_a_flipped_bit_is_found_before_anything_is_taken_over(tmp_path: Path, table: str) -> None:
    path = tmp_path / "bank.safetensors"
    bank = MemoryBank([50, 3], D, codebook=torch.randn(4, D))
    bank.write(0, torch.arange(50), torch.randn(50, D), step=0)
    bank.save(path)
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[table]["data_offsets"]
    data[8 + length + (begin + end) // 2] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=rf"bank\.safetensors: damaged: the bytes of {table} "):
        MemoryBank.load(path)


def test_files_without_sums_load(tmp_path: Path) -> None:
    """As earlier releases wrote them."""
    path = tmp_path / "bank.safetensors"
    MemoryBank([50], D).save(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]["crc32"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert MemoryBank.load(path).num_slides == 1
