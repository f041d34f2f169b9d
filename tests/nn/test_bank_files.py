"""Files of the memory bank: whole or absent, readable by safetensors, converted on request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dre_fast.nn import bank_checks, bank_io
from dre_fast.nn.bank import MemoryBank
from dre_fast.reference.quantize import DTYPES

D, K = 12, 5


def filled(dtype: str = "int8", codebook: bool = True) -> MemoryBank:
    bank = MemoryBank([7, 40, 3], D, codebook=torch.randn(K, D) * 0.4 if codebook else None, dtype=dtype)
    for step, (slide, n) in enumerate(((0, 7), (1, 25), (2, 3), (1, 10))):
        bank.write(slide, torch.arange(n), torch.randn(n, D), step=step)
    return bank


def assert_equal(a: MemoryBank, b: MemoryBank) -> None:
    for name, table in a.state_dict().items():
        other = getattr(b, name)
        assert table.dtype == other.dtype
        assert torch.equal(table.float(), other.float()), name


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("codebook", [True, False])
def test_round_trip(tmp_path: Path, dtype: str, codebook: bool) -> None:
    bank = filled(dtype, codebook)
    bank.remove_slide(2)
    path = tmp_path / "new" / "bank.safetensors"
    bank.save(path)
    loaded = MemoryBank.load(path)
    assert_equal(bank, loaded)
    loaded.write([0], [0], torch.randn(1, D), step=9)  # its own memory, not the file's
    assert_equal(bank, MemoryBank.load(path))
    assert [p.name for p in path.parent.iterdir()] == ["bank.safetensors"]


def test_an_empty_bank_round_trips(tmp_path: Path) -> None:
    bank = MemoryBank([], D)
    bank.save(tmp_path / "bank.safetensors")
    assert_equal(bank, MemoryBank.load(tmp_path / "bank.safetensors"))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_safetensors_library_reads_it(tmp_path: Path, dtype: str) -> None:
    safetensors = pytest.importorskip(
        "safetensors", reason="needs safetensors: pip install 'dre_fast[train]'"
    )
    bank = filled(dtype)
    bank.save(tmp_path / "bank.safetensors")
    with safetensors.safe_open(tmp_path / "bank.safetensors", framework="pt") as file:
        about = file.metadata()
        assert {
            k: about[k] for k in ("format", "version", "dtype", "dim", "rows", "slides", "codewords")
        } == {
            "format": "dre_fast.memory_bank",
            "version": "1",
            "dtype": dtype,
            "dim": "12",
            "rows": "50",
            "slides": "3",
            "codewords": "5",
        }
        for name, table in bank.state_dict().items():
            assert torch.equal(file.get_tensor(name).float(), table.float()), name


@pytest.mark.parametrize("source", list(DTYPES))
@pytest.mark.parametrize("target", list(DTYPES))
def test_conversion_keeps_ages_and_exact_sums(tmp_path: Path, source: str, target: str) -> None:
    bank = filled(source)
    bank.save(tmp_path / "bank.safetensors")
    loaded = MemoryBank.load(tmp_path / "bank.safetensors", dtype=target)
    assert loaded.dtype == DTYPES[target]
    assert torch.equal(loaded.age, bank.age)
    assert torch.equal(loaded.drift, bank.drift)
    for slide, n in enumerate((7, 40, 3)):
        tiles = torch.arange(n)
        difference = (loaded.read(slide, tiles) - bank.read(slide, tiles)).abs().max()
        assert difference <= (0.0 if source == target else 0.07)
    sums, counts = loaded.slide_sums.clone(), loaded.slide_counts.clone()
    loaded.rebuild()
    assert torch.equal(loaded.slide_sums, sums)
    assert torch.equal(loaded.slide_counts, counts)
    assert torch.equal(counts.sum(1), bank.slide_counts.sum(1))
    codes = loaded.code.clone()
    loaded.set_codebook(loaded.codebook.clone())
    assert torch.equal(loaded.code, codes)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    filled().save(path)
    data = path.read_bytes()
    cuts = [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"bank\.safetensors: (not a memory bank|cut short)"):
            MemoryBank.load(path)
    path.write_bytes(data + b"x")
    with pytest.raises(ValueError, match="cut short or damaged"):
        MemoryBank.load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(ValueError, match="not a memory bank"):
        MemoryBank.load(path)
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a memory bank"):
        MemoryBank.load(path)
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="a safetensors file, but not a memory bank"):
        MemoryBank.load(path)
    with pytest.raises(FileNotFoundError):
        MemoryBank.load(tmp_path / "nothing.safetensors")


def rewritten(path: Path, change: object) -> None:
    """Save the header of a file again after ``change`` edited it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_damaged_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    cases = {
        "format 2": lambda h: h["__metadata__"].update(version="2"),
        "does not fill": lambda h: h["age"].update(shape=[49]),
        "unknown dtype": lambda h: h["age"].update(dtype="U128"),
        "impossible offsets": lambda h: h["age"].update(data_offsets=[-4, 196]),
        "missing age": lambda h: h.update(other=h.pop("age")),
        "header": lambda h: h["age"].pop("shape"),
    }
    for message, change in cases.items():
        filled().save(path)
        rewritten(path, change)
        with pytest.raises(ValueError, match=message):
            MemoryBank.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bank.safetensors"
    old = filled()
    old.save(path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bank_io.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        filled().save(path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["bank.safetensors"]
    assert_equal(old, MemoryBank.load(path))


def test_a_file_too_large_for_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bank.safetensors"
    filled().save(path)
    monkeypatch.setattr(bank_checks, "free_bytes", lambda device: 100)
    with pytest.raises(ValueError, match=r"50 rows x 12 int8.*needs 3.3 kB; 100 bytes free"):
        MemoryBank.load(path)
