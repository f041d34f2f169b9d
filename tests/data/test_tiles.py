from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("openslide")
pytest.importorskip("tifffile")
pytest.importorskip("h5py")

import h5py
import tifffile
from PIL import Image
from slide_files import halve, pattern, smooth, write_pyramid
from torch.utils.data import DataLoader, Dataset

from dre_fast.data.coords import read_coords
from dre_fast.data.resample import scale_tile
from dre_fast.data.slides import SlideError, open_slide
from dre_fast.data.tiles import CachedTileReader, TileReader
from dre_fast.data.tiling import tile_slide

P = 64


@pytest.fixture
def cohort(tmp_path):
    """Three slides and their tilings of 64 px at 0.5 um/px."""
    paths, tilings = [], []
    for i, (w, h) in enumerate([(600, 400), (512, 512), (320, 700)]):
        path = write_pyramid(tmp_path / f"s{i}.tif", np.roll(pattern(w, h), 7 * i, axis=1), factors=(1, 2))
        with open_slide(path) as slide:
            tilings.append(tile_slide(slide, tile_size=P, tissue="none"))
        paths.append(path)
    return paths, tilings


def expected(path, tiling, tile):
    with open_slide(path) as slide:
        x, y = tiling.coords[tile].tolist()
        region = slide.read_region(x, y, tiling.level, tiling.read_size, tiling.read_size)
    return torch.from_numpy(scale_tile(region, tiling.tile_size).copy()).permute(2, 0, 1)


@pytest.mark.parametrize("backend", ["auto", "cucim"])
def test_tiles_are_where_their_coordinates_say(cohort, backend):
    if backend == "cucim":
        pytest.importorskip("cucim")
    paths, tilings = cohort
    reader = TileReader(paths, tilings, backend=backend, num_workers=2)
    assert len(reader) == 3
    assert reader.tiles_per_slide == [len(t) for t in tilings]
    ids = torch.tensor([3, 0, -1, 5, 3])
    for s in (1, 0, 2):
        tiles = reader.read(s, ids)
        assert tiles.dtype == torch.uint8
        assert tiles.shape == (5, 3, P, P)
        assert tiles.is_contiguous()
        for k, tile in enumerate(ids.tolist()):
            if tile < 0:
                assert tiles[k].count_nonzero() == 0
            else:
                assert torch.equal(tiles[k], expected(paths[s], tilings[s], tile))
    assert reader.read(0, torch.tensor([-1, -1])).count_nonzero() == 0
    assert reader.read(0, []).shape == (0, 3, P, P)


@pytest.mark.parametrize("backend", ["auto", "cucim"])
def test_a_level_between_is_reduced_by_exact_means(tmp_path, backend):
    if backend == "cucim":
        pytest.importorskip("cucim")
    pixels = pattern(1024, 512)
    path = write_pyramid(tmp_path / "a.tif", pixels, mpp=0.25, factors=(1, 4))
    with open_slide(path) as slide:
        tiling = tile_slide(slide, tile_size=P, mpp=0.5, tissue="none")
    assert (tiling.level, tiling.read_size) == (0, 2 * P)
    tiles = TileReader([path], [tiling], backend=backend).read(0, np.arange(len(tiling)))
    want = halve(pixels).astype(int)
    for tile, (x, y) in zip(tiles, tiling.coords // 2, strict=True):
        got = tile.permute(1, 2, 0).numpy().astype(int)
        assert np.abs(got - want[y : y + P, x : x + P]).max() <= 1


def test_a_fractional_ratio_keeps_positions_and_does_not_alias(tmp_path):
    # 0.3 -> 0.5 um/px: 107 px are read for 64.
    path = write_pyramid(tmp_path / "a.tif", smooth(1400, 900), mpp=0.3, factors=(1,))
    with open_slide(path) as slide:
        tiling = tile_slide(slide, tile_size=P, mpp=0.5, tissue="none")
        assert tiling.read_size == 107
        tiles = TileReader([path], [tiling]).read(0, np.arange(len(tiling))).float()
        for k in (0, 5, len(tiling) - 1):
            x, y = tiling.coords[k].tolist()
            centre = (x + 53.5) / 1400 * 255, (y + 53.5) / 900 * 255
            assert tiles[k, 0].mean() == pytest.approx(centre[0], abs=0.6)
            assert tiles[k, 1].mean() == pytest.approx(centre[1], abs=0.6)
    stripes = np.zeros((300, 300, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # finer than the output can show: must come out grey, not as broad bands
    tiling = tile_slide(open_slide(stripes, mpp=0.3), tile_size=P, mpp=0.5, tissue="none")
    grey = TileReader([stripes], [tiling]).read(0, [0])[0, :, 4:-4, 4:-4].float()
    assert (grey - 127.5).abs().max() < 12


@pytest.mark.parametrize("channels", [3, 4])
def test_scaling_ignores_the_fourth_channel(channels):
    tile = np.random.default_rng(0).integers(0, 256, (90, 90, channels), dtype=np.uint8)
    direct = Image.fromarray(tile[..., :3])
    np.testing.assert_array_equal(scale_tile(tile, 45)[..., :3], np.asarray(direct.reduce(2)))
    lanczos = np.asarray(direct.resize((64, 64), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(scale_tile(tile, 64)[..., :3], lanczos)
    assert scale_tile(tile, 90) is tile


def test_open_slides_are_bounded(cohort):
    paths, tilings = cohort
    reader = TileReader(paths, tilings, max_open=2)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for _ in range(3):
        for s in (0, 1, 2, 1):
            reader.read(s, [0])
            assert reader.open_slides <= 2
    reader.close()
    assert reader.open_slides == 0
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before
    assert reader.read(0, [1]).any()


def test_pickling_leaves_the_handles_behind(cohort):
    reader = TileReader(*cohort)
    first = reader.read(0, [0, 1])
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.open_slides == 0
    assert torch.equal(copy.read(0, [0, 1]), first)


class Tiles(Dataset):
    def __init__(self, reader, n):
        self.reader, self.n = reader, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.reader.read(i % 3, [i, -1])


@pytest.mark.parametrize(
    ("backend", "start"),
    [("auto", "fork"), ("cucim", "fork"), pytest.param("auto", "spawn", marks=pytest.mark.slow)],
)
def test_workers_of_a_dataloader_read_the_same(cohort, backend, start):
    if backend == "cucim":
        pytest.importorskip("cucim")
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} on this system")
    reader = TileReader(*cohort, backend=backend)
    want = [
        reader.read(i % 3, [i, -1]) for i in range(10)
    ]  # the parent's handles are open when workers start
    loader = DataLoader(Tiles(reader, 10), batch_size=None, num_workers=2, multiprocessing_context=start)
    for got, one in zip(loader, want, strict=True):
        assert torch.equal(got, one)
    assert torch.equal(reader.read(0, [0, -1]), want[0])


@pytest.mark.parametrize("backend", ["auto", "cucim"])
def test_threads_may_share_a_reader(cohort, backend):
    if backend == "cucim":
        pytest.importorskip("cucim")
    paths, tilings = cohort
    reader = TileReader(paths, tilings, backend=backend, max_open=1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: reader.read(i % 3, [i % 9]), range(60)))
    for i, got in enumerate(results):
        assert torch.equal(got[0], expected(paths[i % 3], tilings[i % 3], i % 9))


def test_threads_that_want_one_slide_open_it_once(cohort, monkeypatch):
    opened = []

    def slowly(path, *arguments):
        opened.append(path)
        time.sleep(0.1)
        return open_slide(path, *arguments)

    monkeypatch.setattr("dre_fast.data.tiles.open_slide", slowly)
    paths, tilings = cohort
    reader = TileReader(paths, tilings)
    with ThreadPoolExecutor(6) as pool:
        started = time.perf_counter()
        list(pool.map(lambda i: reader.read(i % 3, [0]), range(6)))
        assert time.perf_counter() - started < 0.28  # three slides at the same time
    assert sorted(opened) == sorted(paths)


def test_slides_in_strips_are_read_by_threads_through_cucim(tmp_path):
    """Handles of such a file must not be shared: pixels of one thread turned up in the tiles of another."""
    pytest.importorskip("cucim")
    pixels = pattern(1024, 1024)
    tifffile.imwrite(tmp_path / "a.tif", pixels, rowsperstrip=16, photometric="rgb")
    with open_slide(tmp_path / "a.tif", "cucim", mpp=0.5) as slide:
        tiling = tile_slide(slide, tile_size=P, mpp=0.5, tissue="none")
    for reader, threads in (
        (TileReader([tmp_path / "a.tif"], [tiling], backend="cucim"), 4),
        (TileReader([tmp_path / "a.tif"], [tiling], backend="cucim", num_workers=4), 1),
    ):
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(partial(reader.read, 0), torch.arange(len(tiling)).split(16))
            for tile, (x, y) in zip(torch.cat(list(parts)), tiling.coords, strict=True):
                want = pixels[y : y + P, x : x + P].transpose(2, 0, 1)
                np.testing.assert_array_equal(tile.numpy(), want)


def test_bad_requests_name_slide_and_tile(cohort):
    paths, tilings = cohort
    reader = TileReader(paths, tilings)
    with pytest.raises(ValueError, match=f"slide s1: no tile 99, it has tiles 0 to {len(tilings[1]) - 1}"):
        reader.read(1, [0, 99])
    with pytest.raises(ValueError, match="no tile -2"):
        reader.read(1, [-2])
    with pytest.raises(ValueError, match="no slide 3: there are 3"):
        reader.read(3, [0])
    with pytest.raises(ValueError, match="2 slides but 3 tilings"):
        TileReader(paths[:2], tilings)
    with pytest.raises(ValueError, match="slide s1: its tiles have 32 px, those of s0 64 px"):
        TileReader(paths[:2], [tilings[0], replace(tilings[1], tile_size=32)])
    with pytest.raises(ValueError, match="max_open"):
        TileReader(paths, tilings, max_open=0)
    with pytest.raises(ValueError, match="no slides"):
        TileReader([], [])


def test_the_wrong_slide_is_noticed(cohort):
    paths, tilings = cohort
    with pytest.raises(SlideError, match=r"s1\.tif: is 512 x 512 px.*s0 were made for 600 x 400"):
        TileReader([paths[1]], [tilings[0]]).read(0, [0])
    with pytest.raises(SlideError, match="no such file"):
        TileReader(["gone.svs"], [tilings[0]]).read(0, [0])


def test_a_damaged_tile_is_named_and_the_rest_still_reads(test_data, tmp_path):
    path = tmp_path / "damaged.svs"
    shutil.copy(test_data / "slides/CMU-1-Small-Region.svs", path)
    with open_slide(path) as slide:
        tiling = tile_slide(slide, tile_size=240, mpp=0.499, tissue="none")
    with tifffile.TiffFile(path) as file:
        start, count = file.pages[0].dataoffsets[13], file.pages[0].databytecounts[13]
    with open(path, "r+b") as raw:
        raw.seek(start)
        raw.write(bytes(count))
    bad = int(np.flatnonzero((tiling.coords == [3 * 240, 240]).all(axis=1))[0])
    reader = TileReader([path], [tiling])
    with pytest.raises(SlideError, match=rf"slide damaged, tile {bad}: .*damaged\.svs"):
        reader.read(0, [0, 1, bad, 2])
    assert reader.read(0, [0, 1, 2]).any()


def test_foreign_coordinates_read_without_pixel_size(tmp_path):
    pixels = pattern(600, 400)
    path = write_pyramid(tmp_path / "a.tif", pixels, mpp=None, factors=(1,))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        attrs = file.create_dataset("coords", data=np.array([[10, 20], [64, 0]])).attrs
        attrs.update(patch_size=P, patch_level=0, downsample=(1.0, 1.0), level_dim=(600, 400), name="a")
    tiles = TileReader([path], [read_coords(tmp_path / "a.h5")]).read(0, [0])
    np.testing.assert_array_equal(tiles[0].permute(1, 2, 0).numpy(), pixels[20 : 20 + P, 10 : 10 + P])


@pytest.mark.parametrize("workers", [1, 3])
def test_the_cache_holds_the_same_tiles(cohort, tmp_path, workers):
    reader = TileReader(*cohort)
    cached = reader.cache_to(tmp_path / "cache" / "tiles.h5", workers=workers)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["tiles.h5"]
    for copy in (cached, pickle.loads(pickle.dumps(cached)), CachedTileReader(cached.path, cohort[1])):
        for s, n in enumerate(reader.tiles_per_slide):
            ids = np.concatenate([np.arange(n), [-1, 0]])
            assert torch.equal(copy.read(s, ids), reader.read(s, ids))
    assert len(pickle.dumps(cached)) < 100_000
    loader = DataLoader(Tiles(cached, 6), batch_size=None, num_workers=1)
    for i, got in enumerate(loader):
        assert torch.equal(got, reader.read(i % 3, [i, -1]))
    cached.close()
    assert cached.read(0, [0]).any()


def test_an_existing_cache_is_used_without_the_slides(cohort, tmp_path):
    paths, tilings = cohort
    TileReader(paths, tilings).cache_to(tmp_path / "tiles.h5")
    for path in paths:
        path.unlink()
    assert TileReader(paths, tilings).cache_to(tmp_path / "tiles.h5").read(2, [4]).any()


def test_a_stale_cache_is_refused(cohort, tmp_path):
    paths, tilings = cohort
    path = tmp_path / "tiles.h5"
    TileReader(paths, tilings).cache_to(path)
    moved = replace(tilings[1], coords=tilings[1].coords + 1)
    with pytest.raises(
        ValueError, match=r"tiles\.h5: out of date: slide s1 was tiled differently.*delete it"
    ):
        TileReader(paths, [tilings[0], moved, tilings[2]]).cache_to(path)
    with pytest.raises(ValueError, match="out of date: made from 3 slides"):
        CachedTileReader(path, tilings[:2])
    with pytest.raises(ValueError, match="in this order"):
        CachedTileReader(path, tilings[::-1])
    (tmp_path / "other.h5").write_text("no")
    with pytest.raises(ValueError, match=r"other\.h5: not readable"):
        CachedTileReader(tmp_path / "other.h5", tilings)
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file["features"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"features\.h5: not a tile cache"):
        CachedTileReader(tmp_path / "features.h5", tilings)


def test_an_interrupted_cache_leaves_nothing(cohort, tmp_path, monkeypatch):
    paths, tilings = cohort
    paths[2].write_bytes(b"damaged meanwhile")
    with pytest.raises(SlideError, match=r"s2\.tif"):
        TileReader(paths, tilings).cache_to(tmp_path / "tiles.h5")
    assert not list(tmp_path.glob("*tiles*"))


def test_real_slides_at_two_sizes(test_data):
    path = test_data / "slides/TCGA-CR-7395-01A-01-TS1.svs"
    with open_slide(path, mpp=0.25) as slide:
        coarse = tile_slide(slide, tile_size=128, mpp=0.5)
        fine = tile_slide(slide, tile_size=256, mpp=0.25)
    assert (coarse.level, fine.level) == (1, 0)
    a = TileReader([path], [coarse]).read(0, range(0, len(coarse), 29)).float()
    places = coarse.coords[::29]
    b = TileReader([path], [replace(fine, coords=places)]).read(0, range(len(places))).float()
    # The level of the file and our own reduction of level 0 show the same place: any shift by a pixel is much
    # worse.
    reduced = torch.nn.functional.avg_pool2d(b, 2)

    def error(dx: int, dy: int) -> float:
        return float((a - reduced.roll((dy, dx), (2, 3)))[:, :, 2:-2, 2:-2].abs().mean())

    shifts = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if (dx, dy) != (0, 0)]
    assert error(0, 0) < 0.7 * min(error(dx, dy) for dx, dy in shifts)
