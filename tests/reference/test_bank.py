"""The bank's reference operations against a row-by-row model in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dre_fast.reference import bank as reference
from dre_fast.reference.quantize import DTYPES, has_scale, padded_dim, row_dtype

LENGTHS = [4, 1, 9]
D, K = 6, 3


def tables(dtype: torch.dtype, codebook: Tensor) -> dict[str, Any]:
    rows, k = sum(LENGTHS), codebook.shape[0]
    lengths = torch.tensor(LENGTHS)
    return {
        "payload": torch.zeros(rows, padded_dim(D, dtype), dtype=dtype),
        "scale": torch.zeros(rows if has_scale(dtype) else 0),
        "code": torch.full((rows,), -1, dtype=torch.int16),
        "age": torch.full((rows,), -1, dtype=torch.int32),
        "drift": torch.zeros(rows),
        "sums": torch.zeros(len(LENGTHS), k, D, dtype=torch.int64),
        "counts": torch.zeros(len(LENGTHS), k, dtype=torch.int64),
        "codebook": codebook,
        "start": lengths.cumsum(0) - lengths,
    }


def write(bank: dict[str, Any], slides: list[int], tiles: list[int], features: Tensor, step: int) -> None:
    reference.write(
        *bank.values(),
        torch.tensor(slides, dtype=torch.int64),
        torch.tensor(tiles, dtype=torch.int64),
        features,
        step,
    )


def stored_int8(x: np.ndarray) -> np.ndarray:
    """Unit norm, one scale, round half to even: the value an int8 row stands for."""
    f = (x.astype(np.float64) / max(np.sqrt((x.astype(np.float64) ** 2).sum()), 1e-12)).astype(np.float32)
    scale = np.float32(np.abs(f).max()) / np.float32(127)
    return np.rint(f / scale).astype(np.float32) * scale if scale > 0 else np.zeros_like(f)


class Model:
    """What the bank should hold, one dict entry a row."""

    def __init__(self, codebook: np.ndarray) -> None:
        self.codebook, self.rows, self.age, self.drift = codebook.astype(np.float64), {}, {}, {}

    def write(self, slides: list[int], tiles: list[int], features: np.ndarray, step: int) -> None:
        given = {(s, t): x for s, t, x in zip(slides, tiles, features) if s >= 0 and t >= 0}
        for key, x in given.items():
            new, old = stored_int8(x), self.rows.get(key)
            if old is None:
                self.drift[key] = 0.0
            else:
                a, b = old.astype(np.float64), new.astype(np.float64)
                self.drift[key] = 1 - a @ b / np.sqrt((a @ a) * (b @ b))
            self.rows[key], self.age[key] = new, step

    def code(self, key: tuple[int, int]) -> int:
        return int(((self.rows[key].astype(np.float64) - self.codebook) ** 2).sum(1).argmin())

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        sums, counts = np.zeros((len(LENGTHS), K, D), np.int64), np.zeros((len(LENGTHS), K), np.int64)
        for key, row in self.rows.items():
            sums[key[0], self.code(key)] += np.rint(row.astype(np.float64) * 2**24).astype(np.int64)
            counts[key[0], self.code(key)] += 1
        return sums, counts


def test_writes_follow_the_row_by_row_model() -> None:
    rng = np.random.default_rng(0)
    codebook = torch.tensor(rng.normal(size=(K, D)) * 0.4, dtype=torch.float32)
    bank, model = tables(torch.int8, codebook), Model(codebook.numpy())
    for step in range(40):
        n = int(rng.integers(0, 8))
        slides = rng.integers(-1, 3, n).tolist()
        # duplicates and skips happen by themselves on slides this small
        tiles = [int(rng.integers(-1, LENGTHS[s])) if s >= 0 else 0 for s in slides]
        x = rng.normal(size=(n, D)).astype(np.float32) * 10.0 ** rng.integers(-6, 7)
        write(bank, slides, tiles, torch.tensor(x).view(n, D), step)
        model.write(slides, tiles, x, step)
    sums, counts = model.sums()
    assert np.array_equal(bank["sums"].numpy(), sums)
    assert np.array_equal(bank["counts"].numpy(), counts)
    for s, n in enumerate(LENGTHS):
        for t in range(n):
            row = int(bank["start"][s]) + t
            stored = reference.read(bank["payload"], bank["scale"], torch.tensor([row]), D)[0].numpy()
            if (s, t) not in model.rows:
                assert bank["age"][row] == -1
                assert bank["code"][row] == -1
                assert not stored.any()
                continue
            assert np.array_equal(stored, model.rows[s, t])
            assert bank["age"][row] == model.age[s, t]
            assert bank["code"][row] == model.code((s, t))
            assert abs(float(bank["drift"][row]) - model.drift[s, t]) < 1e-6
    assert not bank["payload"][:, D:].any()  # the padding stays zero


@pytest.mark.parametrize("name", list(DTYPES))
def test_a_duplicate_counts_as_if_only_the_last_was_given(name: str) -> None:
    codebook, x = torch.randn(K, D) * 0.4, torch.randn(5, D)
    twice, once = (tables(row_dtype(name), codebook) for _ in range(2))
    for bank in (twice, once):
        write(bank, [2, 0], [3, 1], torch.ones(2, D), 1)
    write(twice, [2, 0, 2, -1, 2], [3, 1, 3, 3, 3], x, 2)
    write(once, [0, 2], [1, 3], x[[1, 4]], 2)
    for key, table in once.items():
        assert torch.equal(twice[key].float(), table.float()), key


def test_without_a_codebook_only_rows_are_kept() -> None:
    bank = tables(torch.int8, torch.zeros(0, D))
    write(bank, [0, 2], [3, 8], torch.randn(2, D), 4)
    assert (bank["code"] == -1).all()
    assert bank["sums"].shape == (3, 0, D)
    assert bank["age"].tolist().count(4) == 2


def test_drift() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    b = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    assert reference.drift_of(a, b).tolist() == [0.0, 1.0, 2.0, 1.0, 0.0, 0.0]


def test_drift_resolves_small_moves() -> None:
    angle = 1e-4
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[np.cos(angle), np.sin(angle)]], dtype=torch.float32)
    assert float(reference.drift_of(a, b)) == pytest.approx(angle**2 / 2, rel=0.2)


def test_unit_rows_of_extreme_inputs() -> None:
    x = torch.tensor([[3e38, 3e38], [1e-30, 0.0], [0.0, 0.0], [3.0, -4.0]])
    f = reference.unit_rows(x)
    assert f[0].tolist() == pytest.approx([2**-0.5] * 2)
    assert f[1, 0] == pytest.approx(1e-18)  # below eps: divided by eps, not blown up
    assert not f[2].any()
    assert f[3].tolist() == pytest.approx([0.6, -0.8])


def test_equal_distances_go_to_the_lowest_codeword() -> None:
    codebook = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.5]])
    assert reference.assign_codes(z, codebook).tolist() == [1, 0, 0, 0]


def test_last_of_each() -> None:
    rows = torch.tensor([5, 2, 5, 9, 2, 5])
    keep = torch.tensor([True, True, True, False, True, False])
    assert reference.last_of_each(rows, keep).tolist() == [4, 2]
    assert reference.last_of_each(rows[:0], keep[:0]).shape == (0,)


@pytest.mark.parametrize("name", list(DTYPES))
def test_rest_is_the_residual_sum_of_the_other_rows(name: str) -> None:
    codebook = torch.randn(K, D) * 0.4
    bank = tables(row_dtype(name), codebook)
    write(bank, [2] * 7 + [0] * 4, [0, 1, 2, 3, 5, 6, 7, 0, 1, 2, 3], torch.randn(11, D), 0)
    tiles = torch.tensor([[5, 4, 0, -1], [1, -1, -1, -1]])  # tile 4 of slide 2 was never written
    keys = ("payload", "scale", "code", "sums", "counts", "codebook", "start")
    got, n = reference.rest(*(bank[k] for k in keys), torch.tensor([2, 0]), tiles)

    z = reference.read(bank["payload"], bank["scale"], torch.arange(14), D).double()
    for i, rows in enumerate(([6, 7, 8, 11, 12], [0, 2, 3])):
        expected, counts = torch.zeros(K, D, dtype=torch.float64), torch.zeros(K, dtype=torch.int64)
        for row in rows:
            k = int(bank["code"][row])
            expected[k] += z[row] - codebook[k].double()
            counts[k] += 1
        assert torch.allclose(got[i], expected, rtol=0, atol=len(rows) * 2.0**-25)
        assert torch.equal(n[i], counts)
