from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("openslide")
pytest.importorskip("tifffile")

from PIL import Image
from slide_files import pattern, stained, write_pyramid

from dre_fast.data.overview import draw_overview
from dre_fast.data.slides import SlideError, open_slide
from dre_fast.data.tiling import Tiling, choose_level, fit_to_slide, tile_slide
from dre_fast.data.tissue import majority, otsu, saturation_mask, tissue_fraction, tissue_mask


@pytest.mark.parametrize(
    ("downsamples", "want", "level", "read"),
    [
        ((1, 4, 16), 1.0, 0, 256),  # 20x slide, 0.5 asked
        ((1, 4, 16), 2.0, 0, 512),  # 40x slide: between levels, the finer one, reduced
        ((1, 2, 4), 2.0, 1, 256),
        ((1, 2.0005, 4.001), 2.0, 1, 256),  # within tolerance: as it is
        ((1, 2, 4), 1 / 0.998, 0, 256),  # 0.499 um/px asked for 0.5
        ((1, 2, 4), 1.985, 1, 256),  # 0.2519 um/px
        ((1, 4, 16), 8.0, 1, 512),
        ((1, 4, 16), 64.0, 2, 1024),
        ((1, 2, 4), 1.9, 0, 486),  # 5 % off: resampled
        ((1, 2, 4), 0.5, 0, 128),  # enlarging
        ((1, 3.97, 15.9), 4.0, 1, 256),
    ],
)
def test_level_choice(downsamples, want, level, read):
    assert choose_level(downsamples, want, 256) == (level, read)


@pytest.mark.parametrize("slide_mpp", [0.2513, 0.25, 0.499, 0.1213, 0.46, 0.3457])
def test_tiles_abut_and_never_drift(slide_mpp):
    slide = open_slide(np.broadcast_to(np.uint8(100), (300, 60_000, 3)), mpp=slide_mpp)
    tiling = tile_slide(slide, mpp=0.5, tile_size=64, tissue="none", edge="drop")
    xs = np.unique(tiling.coords[:, 0])
    assert (np.diff(xs) == tiling.tile_size_level0).all()
    assert xs[0] == 0
    assert xs[-1] + 2 * tiling.tile_size_level0 > 60_000 >= xs[-1] + tiling.tile_size_level0
    # The footprint is what was asked for, to half a pixel or the tolerance within which a level is taken as
    # it is.
    ideal = 64 * 0.5 / slide_mpp
    assert abs(tiling.tile_size_level0 - ideal) <= max(0.5, 0.02 * ideal)
    assert tiling.true_mpp == pytest.approx(0.5, rel=0.02)
    # The ids of grid cells that other tools compute from the coordinates are whole and distinct.
    assert len({(x // tiling.tile_size_level0) for x in xs.tolist()}) == len(xs)


def test_whole_tiles_only_or_padded_ones():
    slide = open_slide(np.full((500, 1000, 3), 128, dtype=np.uint8), mpp=0.5)
    drop = tile_slide(slide, tile_size=256, tissue="none")
    assert drop.coords.tolist() == [[0, 0], [256, 0], [512, 0]]
    pad = tile_slide(slide, tile_size=256, tissue="none", edge="pad")
    assert pad.coords.tolist() == [[x, y] for y in (0, 256) for x in (0, 256, 512, 768)]
    exact = tile_slide(slide, tile_size=250, tissue="none", edge="pad")
    assert len(exact) == 8
    assert exact.coords.tolist() == tile_slide(slide, tile_size=250, tissue="none").coords.tolist()


@pytest.mark.parametrize("edge", ["drop", "pad"])
def test_a_slide_lower_than_a_tile_gives_one_row(edge):
    slide = open_slide(np.full((100, 600, 3), (200, 40, 120), dtype=np.uint8), mpp=0.5)
    kept = {
        fraction: tile_slide(slide, edge=edge, min_tissue=fraction).coords.tolist() for fraction in (0.3, 0.1)
    }
    assert kept[0.3] == [[0, 0], [256, 0]]  # 39 % of a whole tile each
    # The third, 88 x 100 px, has 13 %: it hangs over the right edge, too.
    assert kept[0.1] == [[0, 0], [256, 0]] + ([[512, 0]] if edge == "pad" else [])


def test_a_slide_smaller_than_a_tile_gives_one():
    slide = open_slide(np.full((100, 90, 3), (200, 40, 120), dtype=np.uint8), mpp=0.5)
    assert tile_slide(slide, min_tissue=0.1).coords.tolist() == [[0, 0]]


def test_overlap():
    slide = open_slide(np.full((512, 1024, 3), 128, dtype=np.uint8), mpp=0.25)
    tiling = tile_slide(slide, tile_size=128, mpp=0.5, overlap=32, tissue="none")
    assert tiling.tile_size_level0 == 256
    assert np.unique(tiling.coords[:, 0]).tolist() == [0, 192, 384, 576, 768]
    assert tiling.overlap == 32


def test_finer_than_the_slide_is_refused_unless_allowed():
    slide = open_slide(np.full((600, 600, 3), 128, dtype=np.uint8), mpp=1.0)
    with pytest.raises(SlideError, match=r"<array>: scanned at 1 um/px.*--mpp-out 1\).*--allow-upsample"):
        tile_slide(slide, tissue="none")
    tiling = tile_slide(slide, tissue="none", allow_upsample=True)
    assert (tiling.level, tiling.read_size, tiling.tile_size_level0) == (0, 128, 128)
    close = open_slide(np.full((600, 600, 3), 128, dtype=np.uint8), mpp=0.505)
    assert tile_slide(close, tissue="none").read_size == 256


def test_a_slide_without_pixel_size_names_itself_and_the_option(tmp_path):
    path = write_pyramid(tmp_path / "nameless.tif", pattern(512, 512), mpp=None, factors=(1,))
    with open_slide(path) as slide, pytest.raises(SlideError, match=r"nameless\.tif.*--mpp.*20x.*0\.5"):
        tile_slide(slide)


def test_tissue_is_found_where_it_is(tmp_path):
    image = stained(4096, 2048, [(1000, 500, 1100, 900), (3000, 100, 60, 60)])
    path = write_pyramid(tmp_path / "a.tif", image, mpp=0.5, factors=(1, 4), compression="jpeg")
    with open_slide(path) as slide:
        tiling = tile_slide(slide, tile_size=128, min_tissue=0.5)
        mask = tissue_mask(slide, 64, 0.5)
    assert mask.mean() == pytest.approx(1100 * 900 / (4096 * 2048), rel=0.03)
    kept = {tuple(c) for c in tiling.coords.tolist()}
    want = set()
    for x in range(0, 4096, 128):
        for y in range(0, 2048, 128):
            wide = max(0, min(x + 128, 2100) - max(x, 1000))
            high = max(0, min(y + 128, 1400) - max(y, 500))
            if wide * high >= 0.5 * 128 * 128:
                want.add((x, y))
    assert kept == want
    # Row by row.
    assert tiling.coords.tolist() == sorted(tiling.coords.tolist(), key=lambda c: (c[1], c[0]))


def test_bare_glass_is_an_error_that_names_the_slide(tmp_path):
    path = write_pyramid(tmp_path / "empty.tif", stained(2048, 1024, []), mpp=0.5, factors=(1, 4))
    with open_slide(path) as slide:
        with pytest.raises(SlideError, match=r"empty\.tif: no tissue found: none of 32 tiles.*--min-tissue"):
            tile_slide(slide)
        assert len(tile_slide(slide, allow_empty=True)) == 0
        assert len(tile_slide(slide, tissue="none")) == 32


def test_a_slide_full_of_tissue_keeps_every_tile():
    rng = np.random.default_rng(0)
    pink = np.clip(np.array([200, 120, 170]) + rng.normal(0, 12, (1024, 1024, 3)), 0, 255).astype(np.uint8)
    assert len(tile_slide(open_slide(pink, mpp=0.5), min_tissue=1.0)) == 16


def test_black_fill_and_grey_dirt_are_no_tissue():
    image = stained(1024, 1024, [(0, 0, 512, 1024)])
    image[:, 768:] = (3, 0, 1)  # saturated in name only
    image[300:400, 560:700] = (120, 121, 120)
    mask = saturation_mask(image)
    assert mask[:, :500].all()
    assert not mask[:, 520:].any()


def test_a_mask_of_ones_own():
    slide = open_slide(np.full((1000, 2000, 3), 255, dtype=np.uint8), mpp=0.5)
    mask = np.zeros((10, 20), dtype=bool)
    mask[:5, :10] = True
    tiling = tile_slide(slide, tile_size=250, tissue=mask, min_tissue=0.5)
    assert tiling.tissue == "custom"
    assert tiling.coords.tolist() == [[x, y] for y in (0, 250) for x in (0, 250, 500, 750)]
    with pytest.raises(ValueError, match="must be bool"):
        tile_slide(slide, tissue=mask.astype(np.uint8))


def test_tissue_fraction_is_exact():
    rng = np.random.default_rng(0)
    mask = rng.random((25, 40)) < 0.4
    full = np.kron(mask, np.ones((8, 8)))  # the slide: 320 x 200 px, every mask pixel 8 x 8
    coords = np.array([[0, 0], [3, 5], [100, 50], [300, 190], [7, 0]])
    padded = np.pad(full, ((0, 64), (0, 64)))
    want = [padded[y : y + 33, x : x + 33].mean() for x, y in coords]
    np.testing.assert_allclose(tissue_fraction(mask, (320, 200), coords, 33), want, atol=1e-12)


def test_otsu_and_majority():
    values = np.concatenate([np.full(500, 10), np.full(300, 12), np.full(200, 90)]).astype(np.uint8)
    assert 12 <= otsu(values) < 90
    assert otsu(np.full(10, 7, dtype=np.uint8)) == 0
    assert otsu(np.zeros(0, dtype=np.uint8)) == 0
    speck = np.zeros((20, 20), dtype=bool)
    speck[10, 10] = True
    assert not majority(speck, 5).any()
    assert majority(~speck, 5).all()


def test_a_folder_of_tiles_gives_its_own_tiles(tmp_path):
    folder = tmp_path / "case"
    folder.mkdir()
    places = [(7, 11), (300, 11), (7, 300)]  # on no grid
    for x, y in places:
        Image.fromarray(pattern(256, 256)).save(folder / f"x{x}_y{y}.png")
    slide = open_slide(folder, mpp=0.5)
    assert [tuple(c) for c in tile_slide(slide).coords.tolist()] == places
    # Another size is cut from the canvas.
    assert tile_slide(slide, tile_size=64).coords[0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_size": 0}, "tile_size"),
        ({"mpp": -1.0}, "mpp must be"),
        ({"mpp": float("nan")}, "mpp must be"),
        ({"overlap": 256}, "overlap must be 0 .. tile_size - 1 = 255"),
        ({"min_tissue": 1.5}, "min_tissue is a fraction"),
        ({"edge": "wrap"}, "edge must be one of"),
        ({"tissue": "hsv"}, "tissue must be one of"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        tile_slide(open_slide(np.zeros((8, 8, 3), dtype=np.uint8), mpp=0.5), **options)


def test_fit_to_slide_refuses_another_slide(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", pattern(1024, 768), mpp=0.25, factors=(1, 2))
    with open_slide(path) as slide:
        tiling = tile_slide(slide, tissue="none")
        assert (tiling.level, tiling.read_size, tiling.tile_size_level0) == (1, 256, 512)
        assert fit_to_slide(tiling, slide).level == 1
    with (
        open_slide(write_pyramid(tmp_path / "b.tif", pattern(1024, 770), factors=(1, 2))) as other,
        pytest.raises(SlideError, match=r"b\.tif: is 1024 x 770 px.*made for 1024 x 768"),
    ):
        fit_to_slide(tiling, other)
    with (
        open_slide(write_pyramid(tmp_path / "flat.tif", pattern(1024, 768), factors=(1,))) as flat,
        pytest.raises(SlideError, match=r"flat\.tif.*read from level 1.*levels 0 to 0"),
    ):
        fit_to_slide(tiling, flat)


@pytest.mark.parametrize("place", [(300, 0), (0, 300), (-64, 0)])
def test_fit_to_slide_refuses_tiles_off_the_slide(place):
    slide = open_slide(np.full((300, 300, 3), 128, dtype=np.uint8), mpp=0.5)
    made = tile_slide(slide, tile_size=64, tissue="none", slide_id="s")
    foreign = replace(made, dimensions=None, coords=np.array([[0, 0], [299, -63], place]))
    with pytest.raises(SlideError, match=rf"tile 2 of s lies at x={place[0]}, y={place[1]}, outside"):
        fit_to_slide(foreign, slide)
    at_the_edge = replace(foreign, coords=foreign.coords[:2])
    assert fit_to_slide(at_the_edge, slide).dimensions == (300, 300)


def test_real_slides(test_data):
    with open_slide(test_data / "slides/CMU-1-Small-Region.svs") as slide:
        tiling = tile_slide(slide)
        assert (tiling.level, tiling.read_size, tiling.tile_size_level0) == (0, 256, 256)
        assert tiling.true_mpp == pytest.approx(0.499)
        assert 30 <= len(tiling) <= 45  # a strip of skin on glass: 88 tiles in all
        picture = draw_overview(slide, tiling, max_px=600)
        assert picture.shape == (600, 449, 3)
        plain = slide.thumbnail(600)
        assert 0.3 < (picture != plain).any(axis=-1).mean() < 0.75  # glass dimmed, tiles outlined
    with open_slide(test_data / "slides/TCGA-CR-7395-01A-01-TS1.svs", mpp=0.25) as slide:
        tiling = tile_slide(slide)
        assert (tiling.level, tiling.read_size, tiling.tile_size_level0) == (1, 256, 512)


def test_a_tiling_is_a_plain_value():
    tiling = Tiling("a", np.zeros((3, 2), dtype=np.int64), 256, 0.5, 0.25, 0, 512, 512, (1000, 1000))
    assert len(tiling) == 3
    assert tiling.step_level0 == 512
    assert Tiling("a", tiling.coords, 256, None, None, 0, 256, 256, None).true_mpp is None
