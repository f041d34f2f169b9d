"""fit_codebook: where rows may lie, weights, k-means||, mini-batches, and what is told about the fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dre_fast import MemoryBank, codebook_rows, fit_codebook
from dre_fast.codebook import bag_weights
from dre_fast.reference.sampling import hashed_uniform


def clusters(centres: int, each: int, dim: int, spread: float) -> Tensor:
    means = torch.randn(centres, 1, dim)
    return (means + spread * torch.randn(centres, each, dim)).reshape(-1, dim)[torch.randperm(centres * each)]


def inertia_of(rows: Tensor, codebook: Tensor, weights: Tensor | None = None) -> float:
    nearest = torch.cdist(rows.double(), codebook.double()).square().amin(dim=1)
    return float((nearest if weights is None else nearest * weights.double()).sum())


class Chunks:
    """Chunks of uneven sizes, from the start each time."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        for first, part in enumerate(self.rows.split(170)):
            yield part.numpy() if first % 2 else part


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
def test_every_source_gives_the_same_codebook(init: str, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    rows = clusters(6, 150, 8, 0.5)
    expected, inertia = fit_codebook(rows, 7, init=init)
    np.save(tmp_path / "rows.npy", rows.numpy())
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file["features"] = rows.numpy()
    with h5py.File(tmp_path / "rows.h5") as file:
        sources: list[Any] = [
            rows.numpy(),
            np.load(tmp_path / "rows.npy", mmap_mode="r"),
            file["features"],
            list(rows.split(100)),
            Chunks(rows),
        ]
        for source in sources:
            codebook, found = fit_codebook(source, 7, init=init)
            torch.testing.assert_close(codebook, expected, rtol=1e-4, atol=1e-5)
            assert found == pytest.approx(inertia, rel=1e-5)
    assert torch.equal(
        fit_codebook(rows.numpy(), 7, init=init)[0], expected
    )  # the same chunks: the same bits


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float8_e4m3fn", "float32"])
def test_a_bank_is_read_as_it_is_stored(dtype: str) -> None:
    rows = clusters(6, 50, 16, 0.3)
    bank = MemoryBank([120, 200, 10], 16, dtype=dtype)
    slides = torch.tensor([0] * 110 + [1] * 190)
    bank.write(slides, torch.cat([torch.arange(110), torch.arange(190)]), rows, step=0)
    stored = torch.cat(list(bank.iter_rows()))
    for options in ({}, {"init": "k-means||"}, {"batch_size": 64, "iterations": 30}):
        codebook, inertia = fit_codebook(bank, 6, **options)  # type: ignore[arg-type]
        expected, _ = fit_codebook(stored, 6, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(codebook, expected, rtol=1e-5, atol=1e-6)
        assert inertia == pytest.approx(inertia_of(stored, codebook), rel=1e-4, abs=1e-6)
    weights = bank.slide_weights()
    torch.testing.assert_close(weights, bag_weights(torch.tensor([0, 110, 300])))
    assert float(weights[:110].sum()) == pytest.approx(float(weights[110:].sum()))


def test_the_sample_does_not_depend_on_the_chunks() -> None:
    rows = torch.arange(3000.0)[:, None]
    whole = codebook_rows.survey(rows, 200, 5, None).sample
    for size in (1, 7, 2999):
        assert torch.equal(codebook_rows.survey(list(rows.split(size)), 200, 5, None).sample, whole)
    u = hashed_uniform(0, 100_000, 3)
    assert torch.equal(torch.cat([hashed_uniform(0, 17, 3), hashed_uniform(17, 83, 3)]), u[:100])
    assert ((u >= 0) & (u < 1)).all()
    assert float(u.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(u.std()) == pytest.approx(12**-0.5, abs=0.005)
    assert len(u.unique()) > 99_990
    assert abs(float(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1])) < 0.02
    assert not torch.equal(u, hashed_uniform(0, 100_000, 4))
    assert not torch.equal(u, hashed_uniform(0, 100_000, 3, stream=1))


def test_history_falls_and_ends_with_the_inertia() -> None:
    rows = clusters(10, 200, 6, 1.0)
    history: list[float] = []
    codebook, inertia = fit_codebook(rows, 20, iterations=15, tolerance=0, history=history)
    assert len(history) <= 16
    assert history[-1] == inertia
    assert inertia == pytest.approx(inertia_of(rows, codebook), rel=1e-5)
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(history))
    assert history[-1] < 0.95 * history[0]
    start, first = fit_codebook(rows, 20, iterations=0, history=(none := []))
    assert none == [first] == [pytest.approx(history[0])]
    assert start.shape == (20, 6)


def test_a_weight_counts_as_that_many_rows() -> None:
    rows = clusters(5, 60, 4, 0.8)
    times = torch.randint(0, 4, (len(rows),))
    start = rows[:6]
    repeated = rows.repeat_interleave(times, dim=0)
    expected, inertia = fit_codebook(repeated, 6, warm_start=start, tolerance=0, iterations=8)
    codebook, found = fit_codebook(
        rows, 6, warm_start=start, tolerance=0, iterations=8, weights=times.float()
    )
    torch.testing.assert_close(codebook, expected, rtol=1e-4, atol=1e-5)
    assert found == pytest.approx(inertia, rel=1e-5)
    for init in ("k-means++", "k-means||", "random"):
        codebook, found = fit_codebook(rows, 6, init=init, weights=times.float())
        assert found == pytest.approx(inertia_of(rows, codebook, times), rel=1e-5)


def test_rows_without_weight_draw_no_codeword() -> None:
    rows = torch.cat([clusters(4, 50, 3, 0.1), 1e3 + torch.randn(50, 3)])
    weights = torch.cat([torch.ones(200), torch.zeros(50)])
    for init in ("k-means++", "k-means||", "random"):
        codebook, _ = fit_codebook(rows, 4, init=init, weights=weights)
        assert codebook.abs().max() < 100, init


def test_rows_without_weight_take_no_empty_codeword() -> None:
    rows = torch.cat([torch.randn(200, 2), 50 + torch.randn(60, 2)])
    weights = torch.cat([torch.ones(200), torch.zeros(60)])
    start = torch.cat([torch.randn(3, 2), torch.full((2, 2), 1e3)])  # two codewords that are empty at first
    codebook, found = fit_codebook(rows, 5, warm_start=start, weights=weights, tolerance=0)
    alone, expected = fit_codebook(rows[:200], 5, warm_start=start, tolerance=0)
    torch.testing.assert_close(codebook, alone)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("unit", [1e-300, 1e-46, 1e-20, 1e20, 1e39, 1e300])
def test_weights_of_any_size(unit: float) -> None:
    rows, weights = clusters(6, 50, 3, 0.2), torch.rand(300, dtype=torch.float64)
    expected, inertia = fit_codebook(rows, 6, weights=weights)
    codebook, found = fit_codebook(rows, 6, weights=unit * weights)
    torch.testing.assert_close(codebook, expected)
    assert found == pytest.approx(unit * inertia, rel=1e-6)


def test_weights_outside_a_uniform_sample() -> None:
    """Six rows of 60,000 count: a sample of all rows would hold none of them."""
    rows, few = torch.randn(60_000, 4), torch.randperm(60_000)[:6]
    weights = torch.zeros(60_000).index_fill_(0, few, 1.0)
    for init in ("k-means++", "k-means||", "random"):
        codebook, inertia = fit_codebook(rows, 6, weights=weights, init=init, iterations=0)
        assert inertia == pytest.approx(0, abs=1e-9), init
        assert {tuple(c) for c in codebook.tolist()} == {tuple(r) for r in rows[few].tolist()}, init


def test_more_weighted_codewords_than_int16_counts() -> None:
    rows = torch.arange(36_000.0)[:, None] + 0.3 * torch.rand(36_000, 1)
    options = {"init": "random", "iterations": 1}
    expected = fit_codebook(rows, 33_000, **options)
    codebook, inertia = fit_codebook(rows, 33_000, weights=torch.ones(36_000), **options)
    by_value, other = codebook.flatten().sort().values, expected[0].flatten().sort().values
    assert by_value.diff().min() > 0  # every codeword sits among its own rows
    assert inertia < 2 * expected[1]
    assert abs(float(by_value.mean() - other.mean())) < 100


class _Passes:
    """Rows that are cut, or end, in another way in each pass."""

    def __init__(self, passes: list[list[Tensor]]) -> None:
        self.passes = iter(passes)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(next(self.passes))


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
def test_every_pass_must_see_the_same_rows(init: str) -> None:
    rows = torch.randn(100, 3)
    for other, message in (
        ([], "gave 0 rows in another pass, 100"),
        ([rows[:70]], "gave 70 rows"),
        ([rows, rows[:1]], "more than 100 rows"),
    ):
        for iterations in (0, 2):
            with pytest.raises(ValueError, match=message):
                fit_codebook(_Passes([[rows], *[other] * 20]), 4, init=init, iterations=iterations)
    cut_anew = [list(rows.split(7 + 5 * n)) for n in range(40)]
    expected = fit_codebook(rows, 4, init=init)[0]
    torch.testing.assert_close(fit_codebook(_Passes(cut_anew), 4, init=init)[0], expected)


def test_every_bag_counts_equally() -> None:
    large, small = torch.randn(2000, 2), 6 + torch.randn(20, 2)
    rows, cu = torch.cat([large, small]), torch.tensor([0, 2000, 2000, 2020])
    weights = bag_weights(cu)
    assert float(weights.mean()) == pytest.approx(1.0)
    assert float(weights[:2000].sum()) == pytest.approx(float(weights[2000:].sum()))
    codebook, _ = fit_codebook(rows, 1, weights=weights)
    torch.testing.assert_close(codebook[0], (large.mean(0) + small.mean(0)) / 2, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_k_means_parallel_beside_scikit_learn(spread: float) -> None:
    cluster = pytest.importorskip("sklearn.cluster", reason="needs scikit-learn")
    rows = clusters(40, 100, 8, spread)
    inertia = fit_codebook(rows, 40, init="k-means||", iterations=50)[1]
    theirs = cluster.KMeans(40, n_init=3, max_iter=50, random_state=0).fit(rows.numpy()).inertia_
    assert inertia <= 1.04 * theirs


def test_mini_batches_come_close_to_lloyd() -> None:
    rows = clusters(8, 500, 6, 0.4)
    lloyd = fit_codebook(rows, 8)[1]
    history: list[float] = []
    first, second = (
        fit_codebook(rows, 8, iterations=60, batch_size=256, seed=2, history=history) for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert first[1] <= 1.05 * lloyd
    assert first[1] == pytest.approx(inertia_of(rows, first[0]), rel=1e-5)
    assert len(history) == 122
    # one batch of all rows is one Lloyd step
    start = rows[:8]
    batch = fit_codebook(rows, 8, warm_start=start, iterations=1, batch_size=len(rows))[0]
    torch.testing.assert_close(batch, fit_codebook(rows, 8, warm_start=start, iterations=1)[0])


def test_mini_batches_reseed_empty_codewords() -> None:
    rows = clusters(4, 200, 3, 0.05)
    start = torch.full((4, 3), 1e3) + torch.arange(4)[:, None]
    codebook, inertia = fit_codebook(rows, 4, warm_start=start, iterations=100, batch_size=64)
    assert codebook.abs().max() < 10
    assert inertia < 3 * fit_codebook(rows, 4)[1]


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
def test_corner_sizes(init: str) -> None:
    rows = torch.randn(9, 3)
    codebook, inertia = fit_codebook(rows, 9, init=init)
    assert inertia == pytest.approx(0.0, abs=1e-6)
    one, _ = fit_codebook(rows, 1, init=init)
    torch.testing.assert_close(one[0], rows.mean(0), rtol=1e-4, atol=1e-5)
    same = torch.ones(30, 3)
    codebook, inertia = fit_codebook(same, 4, init=init)
    assert torch.isfinite(codebook).all()
    assert inertia == 0.0


def test_half_precision_rows_are_not_copied_to_fp32() -> None:
    rows = clusters(6, 100, 8, 0.3).half()
    codebook, _ = fit_codebook(rows, 6)
    assert codebook.dtype == torch.float32
    torch.testing.assert_close(codebook, fit_codebook(rows.float(), 6)[0], rtol=1e-5, atol=1e-5)


def test_errors_name_what_is_wrong() -> None:
    rows = torch.randn(20, 4)
    with pytest.raises(ValueError, match="only once; pass a list"):
        fit_codebook(iter(rows.split(5)), 2)
    with pytest.raises(ValueError, match=r"an array that slices.* got int"):
        fit_codebook(3, 2)
    with pytest.raises(ValueError, match="got str"):
        fit_codebook("rows.npy", 2)
    with pytest.raises(ValueError, match="row 10 has D=3, the rows before it D=4"):
        fit_codebook([rows[:10], rows[:5, :3]], 2)
    with pytest.raises(ValueError, match="19 weights for 20 rows"):
        fit_codebook(rows, 2, weights=torch.ones(19))
    for wrong, got in ((torch.ones(20, dtype=torch.int64), "int64"), ([1.0] * 20, "list")):
        with pytest.raises(ValueError, match=f"weights must be a floating point tensor .* got .*{got}"):
            fit_codebook(rows, 2, weights=wrong)
    with pytest.raises(ValueError, match="weight of row 7 is nan"):
        fit_codebook(rows, 2, weights=torch.ones(20).index_fill_(0, torch.tensor([7]), torch.nan))
    with pytest.raises(ValueError, match="need at least as many rows with a weight above 0, got 3"):
        fit_codebook(rows, 4, weights=(torch.arange(20) < 3).float())
    with pytest.raises(ValueError, match="warm_start must be a tensor, got ndarray"):
        fit_codebook(rows, 2, warm_start=rows[:2].numpy())
    with pytest.raises(ValueError, match=r"weight of row 3 is -1\.0"):
        fit_codebook(rows, 2, weights=torch.ones(20).index_fill_(0, torch.tensor([3]), -1.0))
    with pytest.raises(ValueError, match="all weights are 0"):
        fit_codebook(rows, 2, weights=torch.zeros(20))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        fit_codebook(rows, 2, batch_size=0)
    with pytest.raises(ValueError, match="need a tensor or a bank"):
        fit_codebook(list(rows.split(5)), 2, batch_size=4)
    with pytest.raises(ValueError, match="take no weights"):
        fit_codebook(rows, 2, batch_size=4, weights=torch.ones(20))
    bad = rows.clone()
    bad[11, 0] = float("nan")
    with pytest.raises(ValueError, match="row 11 holds NaN or Inf"):
        fit_codebook(list(bad.split(4)), 2)
