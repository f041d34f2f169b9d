"""GeoJSON of tiles, and the nearest tiles of each codeword."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dre_fast.data.tiling import Tiling
from dre_fast.eval.geojson import write_geojson
from dre_fast.eval.sheets import draw_sheet, top_tiles

COORDS = np.array([[0, 0], [512, 0], [0, 512]])


def tiling() -> Tiling:
    return Tiling(
        slide_id="S1",
        coords=COORDS,
        tile_size=256,
        mpp=0.5,
        slide_mpp=0.25,
        level=0,
        read_size=512,
        tile_size_level0=512,
        dimensions=(1024, 1024),
    )


def test_squares_in_level_0_pixels_with_class_and_measurement(tmp_path) -> None:
    value = torch.tensor([0.5, -1.25, 1e-9])
    path = write_geojson(
        tmp_path / "S1.geojson", tiling(), torch.tensor([2, 0, 2]), 3, {"subtype LUAD": value}
    )
    page = json.loads(path.read_text())
    assert page["type"] == "FeatureCollection"
    first, second, third = page["features"]
    assert first["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[0, 0], [512, 0], [512, 512], [0, 512], [0, 0]]],
    }
    assert second["geometry"]["coordinates"][0][2] == [1024, 512]
    assert [f["properties"]["classification"]["name"] for f in page["features"]] == [
        "codeword 2",
        "codeword 0",
        "codeword 2",
    ]
    assert first["properties"]["classification"] == third["properties"]["classification"]
    assert all(0 <= c <= 255 for c in first["properties"]["classification"]["color"])
    assert second["properties"]["measurements"] == {"subtype LUAD": -1.25}
    assert {f["properties"]["objectType"] for f in page["features"]} == {"tile"}


def test_values_that_do_not_fit_the_tiles_are_refused(tmp_path) -> None:
    codes = torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="S1: 2 values of 'x' for 3 tiles"):
        write_geojson(tmp_path / "a.geojson", tiling(), codes, 2, {"x": torch.zeros(2)})
    with pytest.raises(ValueError, match="S1: 'x' of tile 1 is not finite"):
        write_geojson(
            tmp_path / "a.geojson", tiling(), codes, 2, {"x": torch.tensor([0.0, float("nan"), 0.0])}
        )
    assert not list(tmp_path.iterdir())


def test_nearest_tiles_as_by_sorting_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(5, 8, generator=generator)
    slides = []
    for n in (40, 0, 25, 60):
        rows = torch.randn(n, 8, generator=generator)
        slides.append(
            (rows, torch.cdist(rows, codebook).argmin(1) if n else torch.zeros(0, dtype=torch.int64))
        )
    top = top_tiles(slides, codebook, count=6, per_slide=100)
    for k in range(5):
        found = sorted(
            ((rows[i] - codebook[k]).norm().item(), s, i)
            for s, (rows, codes) in enumerate(slides)
            for i in range(len(rows))
            if codes[i] == k
        )
        assert [(slide, tile) for slide, tile, _ in top.tiles[k]] == [(s, i) for _, s, i in found[:6]]
        assert int(top.counts[k]) == len(found)
    few = top_tiles(slides, codebook, count=6, per_slide=1)
    assert all(len({slide for slide, _, _ in row}) == len(row) <= 3 for row in few.tiles)


def test_a_codeword_without_tiles_has_an_empty_row(tmp_path) -> None:
    rows, codes = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    top = top_tiles([(rows, codes)], torch.zeros(2, 2), count=2)
    assert [len(row) for row in top.tiles] == [2, 0]
    images = {(0, i): np.full((16, 16, 3), 80 * i, dtype=np.uint8) for i in range(3)}
    assert draw_sheet(tmp_path / "sheet.png", top, images, [0, 1]).stat().st_size > 3000
