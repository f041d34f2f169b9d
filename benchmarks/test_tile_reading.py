"""Tile loading against the reading library's own decode rate on the same slide, in the same order and processes (P11).

A painted slide is written as a pyramid of JPEG tiles. The floor is what a user's own loop gives: openslide's
``read_region`` turned into an array, in as many processes of a torch DataLoader; cuCIM's batched ``read_region`` with as
many threads, all tiles in one call, in batches of two sizes. Ours reads 16 tiles at a time, as a step does, checks slide,
tile and size, and gives planar uint8 tensors in order, ready for the encoder. With cuCIM every tile is read 16 times,
so that starting threads does not count for much.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dre_fast.data.slides import open_slide
from dre_fast.data.synthetic import write_pyramid
from dre_fast.data.synthetic_tissue import TissueSpec, paint
from dre_fast.data.tiles import TileReader
from dre_fast.data.tiling import Tiling, tile_slide
from dre_fast.train.read_ahead import read_jobs

pytest.importorskip("openslide", reason="needs openslide-python")
pytest.importorskip("tifffile", reason="needs tifffile and imagecodecs")
TILE, MPP, BATCH = 256, 0.5, 16
SIDE = 4096  # pixels of the slide: 256 tiles
PASSES = {"openslide": 1, "cucim": 16}
# Tiles in a batch of cuCIM's loader, and batches ahead.
LOADERS = {"library alone": (16, 2), "library alone, batches of 8": (8, 4)}


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tiling]:
    """A slide of 4,096 px, one painted field repeated, and all its tiles in an order drawn at random."""
    path = tmp_path_factory.mktemp("slide") / "slide.tiff"
    field, _ = paint(TissueSpec(1024, 1024, MPP, "glandular", 0.5), np.random.default_rng(0))
    pixels = np.tile(field, (SIDE // 1024, SIDE // 1024, 1))
    write_pyramid(path, pixels, mpp=MPP, tile=256)
    with open_slide(path) as opened:
        return path, tile_slide(opened, tile_size=TILE, mpp=MPP, tissue="none")


def order_of(tiling: Tiling, passes: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.randperm(len(tiling), generator=generator) for _ in range(passes)])


class Raw(Dataset[np.ndarray]):
    """Batches of tiles by openslide alone, a handle in each process."""

    def __init__(self, path: Path, tiling: Tiling) -> None:
        self.path, self.batches = (
            path,
            np.split(tiling.coords[order_of(tiling).numpy()], len(tiling) // BATCH),
        )
        self.handle: Any = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> np.ndarray:
        import openslide

        if self.handle is None:
            self.handle = openslide.OpenSlide(str(self.path))
        regions = [self.handle.read_region((int(x), int(y)), 0, (TILE, TILE)) for x, y in self.batches[index]]
        return np.stack([np.asarray(region)[..., :3] for region in regions])


def raw_openslide(path: Path, tiling: Tiling, workers: int) -> int:
    loader = DataLoader(Raw(path, tiling), batch_size=None, num_workers=workers)
    return sum(len(batch) for batch in loader)


def raw_cucim(path: Path, tiling: Tiling, workers: int, batch: int, ahead: int) -> int:
    from cucim import CuImage

    image = CuImage(str(path))
    order = order_of(tiling, PASSES["cucim"]).numpy()
    places = [(int(x), int(y)) for x, y in tiling.coords[order]]
    regions: Any = image.read_region(
        places, (TILE, TILE), 0, num_workers=workers, batch_size=batch, prefetch_factor=ahead
    )
    return sum(len(np.asarray(batch)) for batch in regions)


def ours(path: Path, tiling: Tiling, workers: int, backend: str) -> int:
    reader = TileReader([path], [tiling], backend=backend)
    jobs = [(0, ids) for ids in order_of(tiling, PASSES[backend]).split(BATCH)]
    ahead = {"workers": 0, "threads": workers} if backend == "cucim" else {"workers": workers}
    read = read_jobs(reader, jobs, [tiling.slide_id], slow=60.0, **ahead)
    total = sum(len(images) for images in read if isinstance(images, torch.Tensor))
    reader.close()
    return total


def _cases() -> list[tuple[str, str, int]]:
    return [
        (library, implementation, workers)
        for library, counts in (("openslide", (0, 1, 2)), ("cucim", (1, 2)))
        for workers in counts
        for implementation in (
            "dre_fast",
            "library alone",
            *(tuple(LOADERS)[1:] if library == "cucim" else ()),
        )
    ]


@pytest.mark.parametrize(("library", "implementation", "workers"), _cases())
def test_tile_reading(benchmark: Any, slide: Any, library: str, implementation: str, workers: int) -> None:
    if library == "cucim":
        pytest.importorskip("cucim", reason="needs cucim")
    path, tiling = slide
    run: Callable[[], int]
    if implementation == "dre_fast":
        run = lambda: ours(path, tiling, workers, library)  # noqa: E731
    elif library == "openslide":
        run = lambda: raw_openslide(path, tiling, workers)  # noqa: E731
    else:
        run = lambda: raw_cucim(path, tiling, workers, *LOADERS[implementation])  # noqa: E731
    tiles = len(tiling) * PASSES[library]
    assert run() == tiles
    what = "threads" if library == "cucim" else "processes" if workers else "the calling process"
    benchmark.group = f"P11 tiles of 256 px, {library}, {workers or ''} {what}".replace("  ", " ")
    benchmark.extra_info.update(implementation=implementation, tiles=tiles)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
