"""Any history of calls: the bank against a dict of rows, its sums against a recomputation, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from dre_fast.nn.bank import MemoryBank
from dre_fast.ops import bank as ops
from dre_fast.reference.quantize import DTYPES

D = 6
Array = np.ndarray


def stored(x: Array, dtype: str) -> Array:
    """The value a row stands for: unit norm, then the row format; a row at a time, in numpy where it can."""
    wide = x.astype(np.float64)
    f = (wide / max(np.sqrt((wide * wide).sum()), 1e-12)).astype(np.float32)
    return requantized(f, dtype)


def requantized(f: Array, dtype: str) -> Array:
    largest = {"int8": 127, "float8_e4m3fn": 448}.get(dtype)
    if largest is None:
        return torch.tensor(f).to(DTYPES[dtype]).float().numpy()
    scale = np.float32(np.abs(f).max()) / np.float32(largest)
    if scale == 0:
        return np.zeros_like(f)
    if dtype == "int8":
        return np.rint(f / scale).astype(np.float32) * scale
    return torch.tensor(np.clip(f / scale, -448, 448)).to(torch.float8_e4m3fn).float().numpy() * scale


def nearest(z: Array, codebook: Array) -> int:
    return int(((z.astype(np.float64) - codebook.astype(np.float64)) ** 2).sum(1).argmin())


class BankMachine(RuleBasedStateMachine):
    """Model: {slide: {tile: (row, age, drift)}} and the codebook; codes and sums follow from it."""

    slides = Bundle("slides")
    placement: ClassVar[dict[str, Any]] = {}

    @initialize(dtype=st.sampled_from(list(DTYPES)), words=st.integers(0, 4), seed=st.integers(0, 999))
    def start(self, dtype: str, words: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype, self.step = dtype, 0
        self.length: dict[int, int] = {}
        self.rows: dict[int, dict[int, tuple[Array, int, float]]] = {}
        self.codebook = self.draw(words, D) * np.float32(0.4)
        codebook = torch.tensor(self.codebook) if words else None
        self.bank = MemoryBank([], D, codebook=codebook, dtype=dtype, **self.placement)
        self.given = 0

    def draw(self, *shape: int) -> Array:
        return self.rng.normal(size=shape).astype(np.float32)

    # ------------------------------------------------------------------ what can happen

    @rule(target=slides, n=st.integers(1, 12))
    def add(self, n: int) -> int:
        slide = self.bank.add_slide(n)
        assert slide == self.given
        self.given += 1
        self.length[slide], self.rows[slide] = n, {}
        return slide

    @rule(target=slides, sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4))
    def add_many(self, sizes: list[int]) -> MultipleResults[int]:
        ids = self.bank.add_slides(sizes)
        assert ids == list(range(self.given, self.given + len(sizes)))
        self.given += len(sizes)
        for slide, n in zip(ids, sizes):
            self.length[slide], self.rows[slide] = n, {}
        return multiple(*ids)

    @rule(slide=consumes(slides))
    def remove(self, slide: int) -> None:
        self.bank.remove_slide(slide)
        del self.length[slide], self.rows[slide]

    @rule(data=st.data(), chosen=st.lists(slides, min_size=1, max_size=8), magnitude=st.integers(-6, 6))
    def write(self, data: st.DataObject, chosen: list[int], magnitude: int) -> None:
        tiles = [data.draw(st.integers(-1, self.length[s] - 1)) for s in chosen]
        x = self.draw(len(chosen), D) * np.float32(10.0**magnitude)
        if data.draw(st.booleans()):
            x[0] = 0  # a row without direction
        self.step += 1
        self.bank.write(chosen, tiles, torch.tensor(x), step=self.step)
        last = {(s, t): i for i, (s, t) in enumerate(zip(chosen, tiles)) if t >= 0}
        for (s, t), i in last.items():
            new, drift = stored(x[i], self.dtype), 0.0
            if t in self.rows[s]:
                a, b = self.rows[s][t][0].astype(np.float64), new.astype(np.float64)
                power = (a @ a) * (b @ b)
                drift = 1 - a @ b / np.sqrt(power) if power > 0 else float((a @ a) != (b @ b))
            self.rows[s][t] = (new, self.step, drift)

    @rule(data=st.data(), slide=slides)
    def encode(self, data: st.DataObject, slide: int) -> None:
        """Every written row of a slide, some of them live: residuals row by row, and the same counts exactly."""
        n, k = self.length[slide], len(self.codebook)
        if k == 0:
            return
        tiles = data.draw(st.lists(st.integers(0, n - 1), max_size=4, unique=True))
        live = self.draw(1, len(tiles), D)
        ids = torch.tensor([tiles], dtype=torch.int64)
        V, counts = self.bank.encode([slide], ids, torch.tensor(live), memory="full", return_counts=True)
        rows = [row for tile, (row, _, _) in self.rows[slide].items() if tile not in tiles] + list(live[0])
        expected, number = np.zeros((k, D)), [0] * k
        for row in rows:
            code = nearest(row, self.codebook)
            expected[code] += row.astype(np.float64) - self.codebook[code]
            number[code] += 1
        assert counts[0].tolist() == number
        assert np.abs(V[0].numpy() - expected).max(initial=0) < 1e-5
        if not tiles:
            return
        # the live tiles of a visit, and all others by permutation: the same rows again
        ids = self.bank.sample([slide], len(tiles), cycle=0, seed=self.step)
        given = (ids, torch.tensor(live))
        whole = self.bank.encode([slide], *given, memory="full")
        chosen = self.bank.encode([slide], *given, memory=n, cycle=0, seed=self.step)
        assert (whole - chosen).abs().max() < 1e-5

    @rule(slide=slides, tile=st.integers(12, 99))
    def refused_write(self, slide: int, tile: int) -> None:
        with pytest.raises(ValueError, match=f"slide {slide}, tile {tile}"):
            self.bank.write([slide, slide], [0, tile], torch.ones(2, D), step=self.step)
        with pytest.raises(ValueError, match=f"slide {slide}, tile 0"):
            self.bank.write([slide], [0], torch.full((1, D), float("nan")), step=self.step)

    @rule(words=st.integers(1, 5))
    def set_codebook(self, words: int) -> None:
        self.codebook = self.draw(words, D) * np.float32(0.4)
        self.bank.set_codebook(torch.tensor(self.codebook))

    @rule()
    def rebuild(self) -> None:
        self.bank.rebuild()

    @rule(dtype=st.one_of(st.none(), st.sampled_from(list(DTYPES))))
    def save_and_load(self, dtype: str | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bank.safetensors"
            self.bank.save(path)
            self.bank = MemoryBank.load(path, dtype=dtype, **self.placement)
        self.converted(dtype)

    @rule(dtype=st.one_of(st.none(), st.sampled_from(list(DTYPES))), n=st.integers(1, 5))
    def state_dict(self, dtype: str | None, n: int) -> None:
        other = MemoryBank([n], D, dtype=dtype or self.dtype, **self.placement)
        other.load_state_dict(self.bank.state_dict())
        self.bank = other
        self.converted(dtype)

    def converted(self, dtype: str | None) -> None:
        if dtype is None or dtype == self.dtype:
            return
        self.dtype = dtype
        for rows in self.rows.values():
            for tile, (z, age, drift) in rows.items():
                rows[tile] = (requantized(z, dtype), age, drift)

    # ------------------------------------------------------------------ what must hold after every one

    @invariant()
    def rows_are_the_models(self) -> None:
        assert self.bank.num_slides == self.given
        for slide, n in self.length.items():
            rows = self.rows[slide]
            z = self.bank.read(slide, torch.arange(n)).numpy()
            ages, codes, drifts = (f(slide) for f in (self.bank.ages, self.bank.codes, self.bank.drifts))
            for tile in range(n):
                row, age, drift = rows.get(tile, (np.zeros(D, np.float32), -1, 0.0))
                assert np.array_equal(z[tile], row)
                assert ages[tile] == age
                assert abs(float(drifts[tile]) - drift) < 1e-6
                expected = nearest(row, self.codebook) if tile in rows and len(self.codebook) else -1
                assert codes[tile] == expected

    @invariant()
    def sums_are_a_recomputation(self) -> None:
        k = len(self.codebook)
        assert self.bank.slide_sums.shape == (self.given, k, D)
        sums = torch.zeros(self.given, k, D, dtype=torch.int64)
        counts = torch.zeros(self.given, k, dtype=torch.int64)
        for slide, rows in self.rows.items():
            codes = self.bank.codes(slide)
            for tile, (row, _, _) in rows.items():
                if k:
                    fixed = np.rint(row.astype(np.float64) * 2**24).astype(np.int64)
                    sums[slide, codes[tile]] += torch.tensor(fixed)
                    counts[slide, codes[tile]] += 1
        assert torch.equal(self.bank.slide_sums, sums)
        assert torch.equal(self.bank.slide_counts, counts)

    @invariant()
    def slabs_do_not_overlap(self) -> None:
        used = torch.zeros(self.bank.payload.shape[0], dtype=torch.int64)
        for slide in self.length:
            first, n = int(self.bank.start[slide]), int(self.bank.length[slide])
            assert n == self.length[slide]
            used[first : first + n] += 1
        assert used.max() <= 1 if len(used) else not self.length
        assert (self.bank.age[used == 0] == -1).all()  # gaps are blank
        assert int((self.bank.age >= 0).sum()) == sum(len(rows) for rows in self.rows.values())


class ReferenceMachine(BankMachine):
    """The same with the reference behind the write, where a compiled one would be chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen, ops.backend = ops.backend, lambda name, device="cpu": "reference"

    def teardown(self) -> None:
        ops.backend = self.chosen


class FileMachine(BankMachine):
    """The same with rows in a file: a cache of few slides, so that they come and go all the time."""

    placement: ClassVar[dict[str, Any]] = {"tier": "file", "folder": tempfile.gettempdir(), "cache": 96 * 32}

    @rule(chosen=st.lists(BankMachine.slides, max_size=20))
    def prefetch(self, chosen: list[int]) -> None:
        assert 0 <= self.bank.prefetch(torch.tensor(chosen, dtype=torch.int64)) <= len(chosen)

    @invariant()
    def the_cache_keeps_its_size(self) -> None:
        found = self.bank.cache_statistics()
        assert found["rows_in_memory"] <= found["rows_cached"]

    def teardown(self) -> None:
        if hasattr(self, "bank"):
            self.bank.close()


TestBank = BankMachine.TestCase
TestBank.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestReferenceBank = ReferenceMachine.TestCase
TestReferenceBank.settings = settings(max_examples=10, stateful_step_count=30, deadline=None)
TestBankInAFile = FileMachine.TestCase
TestBankInAFile.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
LONG = settings(max_examples=40, stateful_step_count=50, deadline=None)


@pytest.mark.slow
class TestLongBank(BankMachine.TestCase):  # type: ignore[misc, name-defined]
    """Thousands of steps."""

    settings = LONG


@pytest.mark.slow
class TestLongBankInAFile(FileMachine.TestCase):  # type: ignore[misc, name-defined]
    """Thousands of steps."""

    settings = LONG
