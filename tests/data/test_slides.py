from __future__ import annotations

import shutil

import numpy as np
import pytest

pytest.importorskip("openslide")
pytest.importorskip("tifffile")

import tifffile
from PIL import Image
from slide_files import halve, pattern, smooth, stained, write_pyramid

from dre_fast.data.slides import Slide, SlideError, on_white, open_slide


@pytest.fixture(params=["openslide", "cucim"])
def backend(request):
    if request.param == "cucim":
        pytest.importorskip("cucim", reason="needs cuCIM: pip install 'dre_fast[cucim]'")
    return request.param


def expect(pixels: np.ndarray, x: int, y: int, w: int, h: int) -> np.ndarray:
    """The region of a level, white outside."""
    out = np.full((h, w, 3), 255, dtype=np.uint8)
    for row in range(max(0, -y), min(h, pixels.shape[0] - y)):
        left, right = max(0, -x), min(w, pixels.shape[1] - x)
        if left < right:
            out[row, left:right] = pixels[y + row, x + left : x + right]
    return out


@pytest.mark.parametrize("compression", [None, "deflate", "lzw"])
def test_regions_are_exact_at_every_level_and_white_outside(tmp_path, backend, compression):
    pixels = pattern(1300, 1000)
    levels = [pixels, halve(pixels), halve(halve(pixels))]
    path = write_pyramid(tmp_path / "a.tif", pixels, compression=compression)
    with open_slide(path, backend) as slide:
        assert slide.dimensions == (1300, 1000)
        assert slide.level_dimensions == ((1300, 1000), (650, 500), (325, 250))
        assert slide.level_downsamples == (1.0, 2.0, 4.0)
        for level, factor in enumerate((1, 2, 4)):
            for x, y in ((0, 0), (132, 204), (-60, -32), (1200, 900), (5000, 40), (-400, 5000)):
                got = slide.read_region(x, y, level, 96, 80)
                assert got.dtype == np.uint8
                np.testing.assert_array_equal(got, expect(levels[level], x // factor, y // factor, 96, 80))


def test_read_tiles_equals_read_region(tmp_path, backend):
    path = write_pyramid(tmp_path / "a.tif", pattern(900, 700))
    coords = np.array([[0, 0], [256, 128], [840, 650], [-20, -20], [3, 7]] * 9)
    with open_slide(path, backend, num_workers=2) as slide:
        tiles = slide.read_tiles(coords, 0, 64)
        assert tiles.shape == (45, 64, 64, 3)
        for tile, (x, y) in zip(tiles, coords, strict=True):
            np.testing.assert_array_equal(tile, slide.read_region(x, y, 0, 64, 64))
        assert slide.read_tiles(coords[:0], 0, 64).shape == (0, 64, 64, 3)


def test_cucim_agrees_with_openslide_on_jpeg_and_jpeg2000_slides(test_data):
    pytest.importorskip("cucim")
    for name in ("CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"):
        path = test_data / "slides" / name
        with open_slide(path, "openslide") as one, open_slide(path, "cucim", num_workers=2) as two:
            assert one.dimensions == two.dimensions
            assert one.mpp == two.mpp
            coords = np.array([[0, 0], [1000, 1500], [517, 901], [2100, 2900], [-64, 30]])
            a, b = one.read_tiles(coords, 0, 256), two.read_tiles(coords, 0, 256)
            assert np.abs(a.astype(int) - b.astype(int)).max() <= 2
            for level in range(1, len(one.level_dimensions)):
                a, b = one.read_tiles(coords, level, 256), two.read_tiles(coords, level, 256)
                # Half a pixel apart at most: the images differ by the local contrast, not by a shift.
                assert np.abs(a.astype(int) - b.astype(int)).mean() < 5


def test_real_slides_state_what_they_state(test_data):
    with open_slide(test_data / "slides/CMU-1-Small-Region.svs") as slide:
        assert slide.mpp == pytest.approx(0.499)
        assert slide.objective_power == 20
        assert slide.dimensions == (2220, 2967)
        assert slide.require_mpp() == slide.mpp
        assert slide.slide_id == "CMU-1-Small-Region"
    with open_slide(test_data / "slides/TCGA-CR-7395-01A-01-TS1.svs") as slide:
        assert slide.mpp is None
        with pytest.raises(SlideError, match=r"TCGA-CR-7395-01A-01-TS1\.svs.*--mpp"):
            slide.require_mpp()
    with open_slide(test_data / "slides/TCGA-CR-7395-01A-01-TS1.svs", mpp=0.5) as slide:
        assert slide.require_mpp() == 0.5


def test_a_broken_slide_names_itself(test_data, backend):
    with pytest.raises(SlideError, match=r"broken\.svs.*damaged"):
        open_slide(test_data / "slides/broken.svs", backend)


def test_damage_inside_a_slide_names_the_place(test_data, tmp_path):
    path = tmp_path / "damaged.svs"
    shutil.copy(test_data / "slides/CMU-1-Small-Region.svs", path)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        start, count = page.dataoffsets[13], page.databytecounts[13]
    with open(path, "r+b") as raw:
        raw.seek(start)
        raw.write(bytes(count))
    with open_slide(path) as slide:
        slide.read_region(0, 0, 0, 64, 64)
        with pytest.raises(SlideError, match=r"damaged\.svs.*x=720, y=240"):
            slide.read_region(720, 240, 0, 64, 64)


def test_a_missing_file_and_an_unknown_backend(tmp_path):
    with pytest.raises(SlideError, match=r"no\.svs.*no such file"):
        open_slide(tmp_path / "no.svs")
    with pytest.raises(ValueError, match="unknown slide backend 'vips'"):
        open_slide(tmp_path / "no.svs", "vips")
    with pytest.raises(SlideError, match="mpp must be a positive number"):
        open_slide(tmp_path / "no.svs", mpp=0.0)


def test_no_such_level(tmp_path):
    with (
        open_slide(write_pyramid(tmp_path / "a.tif", pattern(512, 512), factors=(1, 2))) as slide,
        pytest.raises(SlideError, match=r"a\.tif: no level 2, it has levels 0 to 1"),
    ):
        slide.read_region(0, 0, 2, 8, 8)


@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [
        ((40000, 40000), "CENTIMETER", 0.25),
        ((50800, 50800), "INCH", 0.5),
        ((40000, 39900), "CENTIMETER", (0.25 + 10000 / 39900) / 2),
        ((40000, 20000), "CENTIMETER", None),  # pixels not square
        ((72, 72), "INCH", None),  # an editor's default
        ((1, 1), "NONE", None),
    ],
)
def test_pixel_size_from_tiff_tags(tmp_path, backend, resolution, unit, mpp):
    path = write_pyramid(
        tmp_path / "a.tif", pattern(512, 300), resolution=resolution, unit=unit, factors=(1,)
    )
    with open_slide(path, backend) as slide:
        if mpp is None:
            assert slide.mpp is None
            with pytest.raises(SlideError, match=r"a\.tif.*--mpp"):
                slide.require_mpp()
        else:
            assert slide.mpp == pytest.approx(mpp, rel=1e-4)
    with open_slide(path, backend, mpp=0.7) as slide:
        assert slide.mpp == 0.7


def test_the_reason_for_distrust_is_told(tmp_path):
    path = write_pyramid(
        tmp_path / "a.tif", pattern(512, 300), resolution=(72, 72), unit="INCH", factors=(1,)
    )
    with (
        open_slide(path) as slide,
        pytest.raises(SlideError, match=r"352\.778 x 352.778 um, which no scanner"),
    ):
        slide.require_mpp()
    path = write_pyramid(tmp_path / "b.tif", pattern(512, 300), resolution=(40000, 20000), factors=(1,))
    with (
        open_slide(path) as slide,
        pytest.raises(SlideError, match=r"0\.25 x 0\.5 um, so its pixels are not square"),
    ):
        slide.require_mpp()


@pytest.mark.parametrize("factors", [(1,), (1, 2, 4)])
def test_thumbnail_is_the_area_mean_of_the_whole_slide(tmp_path, backend, factors, monkeypatch):
    monkeypatch.setattr("dre_fast.data.slides.THUMBNAIL_BLOCK", 300)  # several blocks
    pixels = smooth(1600, 1000)
    with open_slide(write_pyramid(tmp_path / "a.tif", pixels, factors=factors), backend) as slide:
        small = slide.thumbnail(200)
        assert small.shape == (125, 200, 3)
        want = pixels.reshape(125, 8, 200, 8, 3).mean(axis=(1, 3))
        assert np.abs(small - want).max() < 2  # every level rounds
        assert slide.thumbnail(10**6).shape == (1000, 1600, 3)
        odd = slide.thumbnail(333)
        assert odd.shape == (208, 333, 3)
        direct = np.asarray(Image.fromarray(pixels).resize((333, 208), Image.Resampling.BOX)).astype(int)
        assert np.abs(odd - direct).max() <= 6
        assert np.abs(odd - direct).mean() < 0.6


def test_transparency_turns_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 51]]], dtype=np.uint8)
    assert on_white(rgba).tolist() == [[[10, 20, 30], [255, 255, 255], [206, 208, 210]]]
    assert on_white(np.array([[7]], dtype=np.uint8)).tolist() == [[[7, 7, 7]]]


def test_arrays_npy_and_plain_images(tmp_path):
    pixels = pattern(300, 200)
    np.save(tmp_path / "a.npy", pixels)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for source in (pixels, tmp_path / "a.npy", tmp_path / "a.png"):
        slide = open_slide(source, mpp=0.5)
        assert slide.mpp == 0.5
        assert slide.dimensions == (300, 200)
        np.testing.assert_array_equal(slide.read_region(-5, 150, 0, 80, 80), expect(pixels, -5, 150, 80, 80))
    assert open_slide(pixels).mpp is None
    np.save(tmp_path / "grey.npy", pixels[..., 0])
    np.testing.assert_array_equal(
        open_slide(tmp_path / "grey.npy").read_region(0, 0, 0, 300, 200),
        np.repeat(pixels[..., :1], 3, axis=2),
    )


def test_images_with_transparency_and_palettes(tmp_path):
    rgba = np.zeros((20, 30, 4), dtype=np.uint8)
    rgba[:10] = (200, 30, 90, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    region = open_slide(tmp_path / "a.png").read_region(0, 0, 0, 30, 20)
    assert region[0, 0].tolist() == [200, 30, 90]
    assert region[19, 0].tolist() == [255, 255, 255]
    Image.fromarray(rgba[..., :3]).convert("P").save(tmp_path / "p.png")
    assert open_slide(tmp_path / "p.png").read_region(0, 0, 0, 30, 20).shape == (20, 30, 3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), dtype=np.float32), "uint8"),
        (np.zeros((4, 4, 2), dtype=np.uint8), "expected pixels"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "expected pixels"),
    ],
)
def test_arrays_that_are_no_images(array, message):
    with pytest.raises(SlideError, match=message):
        open_slide(array)


def test_damaged_arrays_and_images_name_the_file(tmp_path):
    for name in ("bad.npy", "bad.png"):
        (tmp_path / name).write_bytes(b"not an image at all")
        with pytest.raises(SlideError, match=name):
            open_slide(tmp_path / name)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(SlideError, match=r"objects\.npy"):
        open_slide(tmp_path / "objects.npy")


def write_folder(folder, pixels, size, name):
    folder.mkdir()
    for y in range(0, pixels.shape[0], size):
        for x in range(0, pixels.shape[1], size):
            Image.fromarray(pixels[y : y + size, x : x + size]).save(folder / name(x, y, size))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        lambda x, y, s: f"{x}_{y}.png",
        lambda x, y, s: f"slide12_{x}_{y}.png",
        lambda x, y, s: f"s_x{x}_y{y}.png",
        lambda x, y, s: f"s_y={y},x={x}.png",
        lambda x, y, s: f"tile_row{y // s}_col{x // s}.png",
        lambda x, y, s: f"case3_r{y // s}_c{x // s}.png",
        lambda x, y, s: f"{x // s}_{y // s}.png",  # columns and rows
    ],
)
def test_a_folder_of_tiles_is_one_slide(tmp_path, name):
    pixels = pattern(200, 150)
    slide = open_slide(write_folder(tmp_path / "case", pixels, 64, name), mpp=0.5)
    assert slide.dimensions == (200, 150)
    np.testing.assert_array_equal(slide.read_region(0, 0, 0, 200, 150), pixels)
    np.testing.assert_array_equal(slide.read_region(50, 60, 0, 40, 100), expect(pixels, 50, 60, 40, 100))
    assert slide.slide_id == "case"
    assert slide.tile_origins.shape == (12, 2)


def test_overlapping_tiles_keep_their_pixel_positions(tmp_path):
    pixels = pattern(128, 64)
    folder = tmp_path / "f"
    folder.mkdir()
    for x in (0, 32, 64):
        Image.fromarray(pixels[:, x : x + 64]).save(folder / f"{x}_0.png")
    slide = open_slide(folder)
    assert slide.tile_origins.tolist() == [[0, 0], [32, 0], [64, 0]]
    np.testing.assert_array_equal(slide.read_region(0, 0, 0, 128, 64), pixels)


def test_images_without_coordinates_form_a_grid_in_natural_order(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    for i in range(11):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"tile{i}.png")
    slide = open_slide(folder)
    assert slide.dimensions == (32, 24)
    seen = [int(slide.read_region(8 * (i % 4), 8 * (i // 4), 0, 8, 8)[0, 0, 0]) for i in range(11)]
    assert seen == list(range(11))
    assert slide.read_region(24, 16, 0, 8, 8).min() == 255


def test_folders_that_cannot_be_laid_out(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    with pytest.raises(SlideError, match="no tile images"):
        open_slide(folder)
    Image.new("RGB", (8, 8)).save(folder / "0_8.png")
    Image.new("RGB", (8, 8)).save(folder / "overview.png")
    with pytest.raises(SlideError, match=r"overview\.png carries no coordinates"):
        open_slide(folder)
    (folder / "overview.png").rename(folder / "a_0_8.png")
    with pytest.raises(SlideError, match="same place"):
        open_slide(folder)
    (folder / "a_0_8.png").write_bytes(b"rubbish")
    with pytest.raises(SlideError, match=r"a_0_8\.png is not a readable image"):
        open_slide(folder)


def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch):
    path = write_pyramid(tmp_path / "a.tif", pattern(300, 300), factors=(1,))
    monkeypatch.setitem(__import__("sys").modules, "openslide", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dre_fast\[wsi\]'"):
        open_slide(path)


def test_repr_tells_the_essentials(tmp_path):
    slide: Slide = open_slide(stained(64, 32, []))
    assert repr(slide) == "ArraySlide(<array>, 64 x 32, 1 levels, unknown mpp)"
