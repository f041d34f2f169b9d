"""k-means: its parts, and fit_codebook against scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dre_fast import codebook_rows as fitting
from dre_fast import fit_codebook
from dre_fast.reference import kmeans


class Bank:
    """Rows that can only be read in chunks."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.largest = rows, 0

    def iter_rows(self, chunk: int = 65536) -> Iterator[Tensor]:
        self.largest = max(self.largest, chunk)
        yield from self.rows.split(chunk)


def clusters(centres: int, each: int, dim: int, spread: float) -> Tensor:
    means = torch.randn(centres, 1, dim)
    return (means + spread * torch.randn(centres, each, dim)).reshape(-1, dim)[torch.randperm(centres * each)]


def inertia_of(rows: Tensor, codebook: Tensor) -> float:
    return float(torch.cdist(rows.double(), codebook.double()).square().amin(dim=1).sum())


@pytest.mark.parametrize(("spread", "words"), [(0.1, 12), (1.0, 12), (1.0, 40)])
def test_inertia_beside_scikit_learn(spread: float, words: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster", reason="needs scikit-learn")
    rows = clusters(12, 250, 16, spread)
    codebook, inertia = fit_codebook(rows, words, iterations=50)
    assert codebook.shape == (words, 16)
    assert codebook.dtype == torch.float32
    assert inertia == pytest.approx(inertia_of(rows, codebook), rel=1e-5)
    theirs = cluster.KMeans(words, n_init=3, max_iter=50, random_state=0).fit(rows.numpy()).inertia_
    assert inertia <= 1.03 * theirs


def test_inertia_beside_scikit_learn_on_a_real_bag(test_data: Path) -> None:
    cluster = pytest.importorskip("sklearn.cluster", reason="needs scikit-learn")
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    for path in sorted((test_data / "bags").rglob("*.h5")):
        with h5py.File(path) as file:
            name = next((name for name in ("features", "feats") if name in file), None)
            if name is not None:
                rows = torch.from_numpy(file[name][()]).float().squeeze()[:4000]
                break
    else:
        pytest.fail(f"no bag with features under {test_data / 'bags'}")
    rows = torch.nn.functional.normalize(rows)
    _, inertia = fit_codebook(rows, 16)
    theirs = cluster.KMeans(16, n_init=1, max_iter=25, random_state=0).fit(rows.numpy()).inertia_
    assert inertia <= 1.05 * theirs


def test_fit_is_the_specification() -> None:
    rows = clusters(6, 100, 8, 0.7)
    codebook, inertia = fit_codebook(rows, 9, iterations=7, seed=3, tolerance=0)
    # the sample draws from the generator first, so the specification starts from the same codewords
    start, _ = fit_codebook(rows, 9, iterations=0, seed=3)
    expected, expected_inertia = kmeans.fit_kmeans(rows.double(), 9, iterations=7, warm_start=start)
    torch.testing.assert_close(codebook.double(), expected, rtol=1e-4, atol=1e-5)
    assert inertia == pytest.approx(float(expected_inertia), rel=1e-5)


def test_each_step_lowers_the_inertia_until_nothing_moves() -> None:
    rows = clusters(5, 200, 4, 1.0).double()
    codebook = kmeans.kmeans_plus_plus(rows, 20, torch.Generator().manual_seed(0))
    last = inertia_of(rows, codebook)
    for _ in range(60):
        codebook, counts = kmeans.lloyd_step(rows, codebook)
        assert int(counts.sum()) == len(rows)
        assert inertia_of(rows, codebook) <= last + 1e-9
        last = inertia_of(rows, codebook)
    means = torch.stack([rows[kmeans.hard_assign(rows, codebook) == k].mean(dim=0) for k in range(20)])
    assert (means - codebook).norm() < 0.05 * codebook.norm()


def test_start_chooses_rows_far_apart() -> None:
    rows = clusters(10, 50, 8, 0.01)
    start = kmeans.kmeans_plus_plus(rows, 10, torch.Generator().manual_seed(0))
    assert all((rows == codeword).all(dim=1).any() for codeword in start)
    assert inertia_of(rows, start) < 0.1 * inertia_of(rows, rows[:10])
    again = kmeans.kmeans_plus_plus(rows, 10, torch.Generator().manual_seed(0))
    assert torch.equal(start, again)


def test_seed_decides() -> None:
    rows = clusters(8, 80, 6, 1.0)
    first, second, other = (fit_codebook(rows, 8, seed=seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
def test_chunks_and_banks_give_what_one_tensor_gives(monkeypatch: pytest.MonkeyPatch, init: str) -> None:
    rows = clusters(6, 150, 8, 0.5)
    whole, inertia = fit_codebook(rows, 7, init=init)
    monkeypatch.setattr(fitting, "CHUNK", 128)
    bank = Bank(rows)
    for source in (rows, bank):
        codebook, chunked = fit_codebook(source, 7, init=init)
        torch.testing.assert_close(codebook, whole, rtol=1e-4, atol=1e-5)
        assert chunked == pytest.approx(inertia, rel=1e-5)
    assert bank.largest == 128


def test_sample_is_uniform_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "CHUNK", 100)
    rows = torch.arange(5000.0)[:, None]
    hits = torch.zeros(5000)
    for seed in range(100):
        seen = fitting.survey(rows, 500, seed, None)
        sample = seen.sample
        assert seen.count == 5000
        assert sample.shape == (500, 1)
        assert (sample[1:] > sample[:-1]).all()  # distinct, in order
        hits[sample[:, 0].long()] += 1
    tenths = hits.view(10, 500).sum(dim=1)  # 5000 expected in each tenth, standard deviation about 64
    assert (tenths - 5000).abs().max() < 300


def test_warm_start_keeps_the_identity_of_codewords() -> None:
    rows = clusters(8, 100, 6, 0.05)
    codebook, _ = fit_codebook(rows, 8)
    order = torch.randperm(8)
    drifted = rows + 0.1
    warm, inertia = fit_codebook(drifted, 8, warm_start=codebook[order])
    assert torch.equal(torch.cdist(warm, codebook[order]).argmin(dim=1), torch.arange(8))
    torch.testing.assert_close(warm, codebook[order] + 0.1, rtol=0, atol=1e-4)
    assert inertia == pytest.approx(inertia_of(drifted, warm), rel=1e-5)


def test_empty_codewords_move_to_the_farthest_rows() -> None:
    rows = torch.cat([0.01 * torch.randn(200, 2), torch.tensor([[50.0, 0.0], [0.0, 40.0], [49.0, 0.0]])])
    start = torch.tensor([[0.0, 0.0], [1e4, 1e4], [1e4, -1e4]])
    fits = [fit_codebook(rows, 3, warm_start=start) for _ in range(2)]
    assert torch.equal(fits[0][0], fits[1][0])
    codebook, inertia = fits[0]
    # codeword 1 takes the farthest row, and codeword 2 the farthest from it too, not its neighbour at 49
    torch.testing.assert_close(codebook[1], torch.tensor([49.5, 0.0]))
    torch.testing.assert_close(codebook[2], torch.tensor([0.0, 40.0]))
    assert inertia < 1.0


def test_fewer_distinct_rows_than_codewords() -> None:
    rows = torch.randn(3, 4).repeat(20, 1)
    codebook, inertia = fit_codebook(rows, 5)
    assert torch.isfinite(codebook).all()
    assert inertia == pytest.approx(0.0, abs=1e-9)


def test_rows_of_any_dtype_under_autocast() -> None:
    rows = clusters(6, 100, 8, 0.3)
    expected, _ = fit_codebook(rows.bfloat16().float(), 6)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = fit_codebook(rows.bfloat16(), 6)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, expected)
    assert not fit_codebook(rows.requires_grad_(), 6)[0].requires_grad


def test_errors() -> None:
    rows = torch.randn(20, 4)
    with pytest.raises(ValueError, match="21 codewords need at least as many rows, got 20"):
        fit_codebook(rows, 21)
    with pytest.raises(ValueError, match="at least 1"):
        fit_codebook(rows, 0)
    with pytest.raises(
        ValueError, match="'k-means\\+\\+', 'k-means||', 'random', got 'pca'".replace("|", "\\|")
    ):
        fit_codebook(rows, 2, init="pca")
    with pytest.raises(ValueError, match=r"warm_start must be \(2, 4\), got \(3, 4\)"):
        fit_codebook(rows, 2, warm_start=rows[:3])
    with pytest.raises(ValueError, match="warm_start holds NaN"):
        fit_codebook(rows, 2, warm_start=torch.full((2, 4), torch.nan))
    with pytest.raises(ValueError, match=r"floating point \[N, D\]"):
        fit_codebook(torch.randn(2, 3, 4), 2)
    with pytest.raises(ValueError, match="iterations must be at least 0"):
        fit_codebook(torch.randn(20, 4), 3, iterations=-1)
    with pytest.raises(ValueError, match="no rows"):
        fit_codebook(Bank(torch.empty(0, 4)), 2)
    rows[13, 2] = torch.inf
    with pytest.raises(ValueError, match="row 13 holds NaN or Inf"):
        fit_codebook(rows, 2)
