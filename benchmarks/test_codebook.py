"""k-means on the CPU, twenty Lloyd passes from the same start, against scikit-learn, faiss and plain torch: P12.

    pytest --benchmark-only -k codebook

Times are of whole fits: what a library does before and after its passes counts. All must reach the same inertia.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.registry import Encode
from dre_fast import fit_codebook
from dre_fast.ops import encode

PASSES = 20
SHAPES = (
    Encode("P12-cpu", 200_000, 384, 64, 1, torch.float32),
    Encode("P12-cpu-K256", 100_000, 384, 256, 1, torch.float32),
    Encode("P12-cpu-bf16", 200_000, 384, 64, 1, torch.bfloat16),
)
Fit = Callable[[Tensor, Tensor], Tensor]


def ours(x: Tensor, start: Tensor) -> Tensor:
    return fit_codebook(x, len(start), iterations=PASSES, warm_start=start, tolerance=0.0)[0]


def scikit_learn(x: Tensor, start: Tensor) -> Tensor:
    """Lloyd's algorithm, the fastest of scikit-learn's on this shape; it has no bf16, so such rows are converted."""
    cluster = pytest.importorskip("sklearn.cluster")
    fit = cluster.KMeans(len(start), init=start.numpy(), n_init=1, max_iter=PASSES, tol=0, copy_x=False)
    return torch.from_numpy(fit.fit(x.float().numpy()).cluster_centers_)


def faiss(x: Tensor, start: Tensor) -> Tensor:
    """All rows, where faiss by default takes a sample of 256 a codeword."""
    library = pytest.importorskip("faiss")
    fit = library.Kmeans(x.shape[1], len(start), niter=PASSES, max_points_per_centroid=len(x))
    fit.train(x.float().numpy(), init_centroids=start.numpy())
    return torch.from_numpy(fit.centroids)


def gemm(x: Tensor, start: Tensor) -> Tensor:
    """Assignment by matrix product a block at a time, then the quickest sum of rows by codeword in torch."""
    cu, codebook = torch.tensor([0, len(x)]), start
    for _ in range(PASSES):
        codes = peers.nearest_blocked(x, codebook.to(x.dtype))
        residuals = peers.sums_by_embedding_bag(x, codes, codebook, cu)[0]
        members = torch.bincount(codes, minlength=len(codebook))
        codebook = codebook + residuals.float() / members.clamp(min=1)[:, None]
    return codebook


FITS: dict[str, Fit] = {"dre_fast": ours, "scikit-learn": scikit_learn, "faiss": faiss, "gemm": gemm}


@lru_cache(maxsize=1)
def inputs(shape: Encode) -> tuple[Tensor, Tensor]:
    """Rows without clusters, and the first of them to start from: k-means is far from done after twenty passes.

    On clusters it would be done after three, where some libraries stop.
    """
    x = torch.randn(shape.rows, shape.dim, generator=torch.Generator().manual_seed(0)).to(shape.dtype)
    return x, x[: shape.codewords].float()


def inertia(x: Tensor, codebook: Tensor) -> float:
    return float(encode.nearest(x, None, None, codebook)[1].double().sum())


@lru_cache(maxsize=1)
def expected(shape: Encode) -> float:
    x, start = inputs(shape)
    return inertia(x, ours(x, start))


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.id)
def test_codebook(benchmark, shape: Encode, name: str) -> None:
    x, start = inputs(shape)
    found = inertia(x, FITS[name](x, start))
    # bf16 products choose other codewords for a few rows
    assert found == pytest.approx(expected(shape), rel=1e-2 if x.dtype == torch.bfloat16 else 1e-4)
    benchmark.group = f"k-means, {PASSES} Lloyd passes, {shape}"
    benchmark.extra_info.update(
        implementation=name,
        ours=name == "dre_fast",
        variant="",
        backend=encode.backend("hard_encode", "cpu", shape.dtype),
        bytes=PASSES * shape.bytes,
        calls=1,
        difference=abs(found / expected(shape) - 1),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    benchmark.pedantic(lambda: FITS[name](x, start), rounds=3)  # it ran above
