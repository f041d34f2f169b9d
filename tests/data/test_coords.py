from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

pytest.importorskip("h5py")
pytest.importorskip("openslide")
pytest.importorskip("tifffile")

import h5py
from slide_files import pattern, write_pyramid

from dre_fast.data.coords import CoordsError, nominal_magnification, read_coords, write_coords
from dre_fast.data.slides import open_slide
from dre_fast.data.tiling import fit_to_slide, tile_slide


def tiling_of(tmp_path, slide_mpp=0.25, factors=(1, 2, 4), **options):
    path = write_pyramid(tmp_path / "a.tif", pattern(2048, 1536), mpp=slide_mpp, factors=factors)
    with open_slide(path) as slide:
        return tile_slide(slide, tissue="none", **options)


def write_h5(path, coords, attributes):
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("coords", data=coords)
        for key, value in attributes.items():
            dataset.attrs[key] = value
    return path


def same(a, b):
    for field in fields(a):
        one, two = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, two)
            assert one.dtype == two.dtype == np.int64
        else:
            assert one == two, field.name


@pytest.mark.parametrize("options", [{}, {"overlap": 64}, {"mpp": 0.7}, {"edge": "pad", "tile_size": 224}])
def test_round_trip(tmp_path, options):
    tiling = tiling_of(tmp_path, **options)
    write_coords(tmp_path / "out" / "a.h5", tiling)
    same(read_coords(tmp_path / "out" / "a.h5"), tiling)


def test_zero_tiles_round_trip(tmp_path):
    tiling = replace(tiling_of(tmp_path), coords=np.empty((0, 2), dtype=np.int64))
    write_coords(tmp_path / "a.h5", tiling)
    same(read_coords(tmp_path / "a.h5"), tiling)


@pytest.mark.parametrize(
    ("slide_mpp", "factors", "mpp"),
    [
        (0.25, (1, 2, 4), 0.5),
        (0.25, (1, 4), 0.5),
        (0.499, (1, 4), 0.5),
        (0.2527, (1, 4), 0.5),
        (0.46, (1, 4), 1.1),
    ],
)
def test_clam_and_trident_cut_out_the_same_tissue(tmp_path, slide_mpp, factors, mpp):
    tiling = tiling_of(tmp_path, slide_mpp, factors, mpp=mpp)
    write_coords(tmp_path / "a.h5", tiling)
    with h5py.File(tmp_path / "a.h5") as file:
        dataset = file["coords"]
        attributes = dict(dataset.attrs)
        assert dataset.dtype == np.int64
        assert dataset.shape == (len(tiling), 2)
    # CLAM reads patch_size x patch_size pixels of patch_level, and the summary keys of its own files.
    clam = {
        "patch_size",
        "patch_level",
        "downsample",
        "downsampled_level_dim",
        "level_dim",
        "name",
        "save_path",
    }
    assert clam <= set(attributes)
    assert attributes["patch_level"] == tiling.level
    footprint = attributes["patch_size"] * attributes["downsample"][0]
    assert footprint == pytest.approx(tiling.tile_size_level0, abs=0.5)
    assert tuple(attributes["level_dim"]) == tiling.level_dimensions
    # TRIDENT scales patch_size by the ratio of the magnifications and rounds.
    trident = {"patch_size_level0", "level0_magnification", "target_magnification", "overlap", "savetodir"}
    assert trident <= set(attributes)
    scale = (10 / attributes["target_magnification"]) / (10 / attributes["level0_magnification"])
    assert round(attributes["patch_size"] * scale) == tiling.tile_size_level0
    assert attributes["patch_size_level0"] == tiling.tile_size_level0
    assert (attributes["level0_width"], attributes["level0_height"]) == (2048, 1536)
    assert attributes["name"] == "a"


def test_where_a_level_fits_the_attributes_are_the_usual_ones(tmp_path):
    write_coords(tmp_path / "a.h5", tiling_of(tmp_path))
    with h5py.File(tmp_path / "a.h5") as file:
        a = file["coords"].attrs
        assert (a["patch_size"], a["patch_level"], a["level0_magnification"]) == (256, 1, 40)
        assert a["target_magnification"] == 20


@pytest.mark.parametrize(
    ("mpp", "magnification"), [(0.499, 20), (0.2527, 40), (0.2201, 40), (1.01, 10), (0.12, 80)]
)
def test_nominal_magnification(mpp, magnification):
    assert nominal_magnification(mpp) == magnification


def trident_attributes(**changes):
    attributes = {
        "patch_size": 256,
        "patch_size_level0": 512,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "name": "a",
        "savetodir": "/somewhere/20x_256px_0px_overlap",
        "level0_width": 2048,
        "level0_height": 1536,
    }
    attributes.update(changes)
    return {k: v for k, v in attributes.items() if v is not None}


def test_reads_trident(tmp_path):
    coords = np.array([[0, 0], [512, 512]])
    tiling = read_coords(write_h5(tmp_path / "a_patches.h5", coords, trident_attributes()))
    assert (tiling.slide_id, tiling.tile_size, tiling.tile_size_level0) == ("a", 256, 512)
    assert (tiling.mpp, tiling.slide_mpp, tiling.dimensions) == (0.5, 0.25, (2048, 1536))
    assert tiling.level is None
    np.testing.assert_array_equal(tiling.coords, coords)
    for factors, level, read in (((1, 2, 4), 1, 256), ((1, 4), 0, 512)):
        path = write_pyramid(tmp_path / "a.tif", pattern(2048, 1536), factors=factors)
        with open_slide(path) as slide:
            fitted = fit_to_slide(tiling, slide)
        assert (fitted.level, fitted.read_size) == (level, read)
        write_coords(tmp_path / "again.h5", fitted)
        same(read_coords(tmp_path / "again.h5"), fitted)


def test_reads_earlier_trident_files(tmp_path):
    # No level0_width; the name missing or stored as the text None; a float magnification; rank three
    # features.
    attributes = trident_attributes(
        level0_width=None, level0_height=None, name="None", level0_magnification=40.0
    )
    tiling = read_coords(write_h5(tmp_path / "TCGA-1_patches.h5", np.array([[[0, 512]]]), attributes))
    assert tiling.slide_id == "TCGA-1"
    assert tiling.dimensions is None
    assert tiling.coords.tolist() == [[0, 512]]


def test_trident_rounds_the_footprint_that_it_reads(tmp_path):
    # 256 px at 20x of a 30x slide; patch_size_level0 is stored rounded down, the patches are cut rounded.
    attributes = trident_attributes(patch_size=255, patch_size_level0=382, level0_magnification=30)
    tiling = read_coords(write_h5(tmp_path / "a.h5", np.array([[0, 0]]), attributes))
    assert tiling.tile_size_level0 == round(255 * 30 / 20)


def clam_attributes(**changes):
    attributes = {
        "patch_size": 256,
        "patch_level": 1,
        "downsample": (2.0, 2.0),
        "downsampled_level_dim": np.array([1024, 768]),
        "level_dim": (1024, 768),
        "name": "a",
        "save_path": "RESULTS/patches",
    }
    attributes.update(changes)
    return {k: v for k, v in attributes.items() if v is not None}


def test_reads_clam(tmp_path):
    coords = np.array([[0, 0], [512, 1024]], dtype=np.int32)
    tiling = read_coords(write_h5(tmp_path / "a.h5", coords, clam_attributes()))
    assert (tiling.slide_id, tiling.tile_size, tiling.read_size, tiling.level) == ("a", 256, 256, 1)
    assert tiling.tile_size_level0 == 512
    assert (tiling.mpp, tiling.slide_mpp) == (None, None)
    assert tiling.coords.dtype == np.int64
    with open_slide(write_pyramid(tmp_path / "a.tif", pattern(2048, 1536), factors=(1, 2))) as slide:
        fitted = fit_to_slide(tiling, slide)
    write_coords(tmp_path / "again.h5", fitted)
    same(read_coords(tmp_path / "again.h5"), fitted)
    level0 = clam_attributes(patch_level=0, downsample=(1.0, 1.0), level_dim=(2048, 1536))
    assert read_coords(write_h5(tmp_path / "b.h5", coords, level0)).dimensions == (2048, 1536)


@pytest.mark.parametrize(
    ("attributes", "key"),
    [
        (clam_attributes(patch_size=None), "patch_size"),
        (clam_attributes(patch_level=None), "patch_level"),
        (clam_attributes(downsample=None), "downsample"),
        (trident_attributes(patch_size=None), "patch_size"),
        (trident_attributes(level0_magnification="None"), "level0_magnification"),
        (trident_attributes(target_magnification=None), "target_magnification"),
        ({}, "patch_size"),
    ],
)
def test_a_missing_attribute_names_file_and_key(tmp_path, attributes, key):
    path = write_h5(tmp_path / "odd.h5", np.array([[0, 0]]), attributes)
    with pytest.raises(CoordsError, match=rf"odd\.h5.*no attribute '{key}'"):
        read_coords(path)


def test_a_missing_attribute_of_our_own(tmp_path):
    write_coords(tmp_path / "a.h5", tiling_of(tmp_path))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["coords"].attrs["tile_size"]
    with pytest.raises(CoordsError, match=r"a\.h5.*no attribute 'tile_size'.*dre_fast"):
        read_coords(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["coords"].attrs["dre_fast_coords"] = 99
    with pytest.raises(CoordsError, match="newer dre_fast"):
        read_coords(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (np.zeros((4, 3), dtype=np.int64), "must be numbers"),
        (np.array([[0.5, 1.0]]), "fractions"),
        (np.array([[b"a", b"b"]]), "must be numbers"),
    ],
)
def test_coordinates_that_are_none(tmp_path, coords, message):
    with pytest.raises(CoordsError, match=message):
        read_coords(write_h5(tmp_path / "a.h5", coords, clam_attributes()))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (clam_attributes(patch_size="big"), "'patch_size' of 'coords' is 'big', not a number"),
        (clam_attributes(patch_size=256.5), "not a whole number"),
        (clam_attributes(custom_downsample=2), "custom_downsample"),
        (trident_attributes(target_magnification=0), "must be positive"),
    ],
)
def test_attributes_that_make_no_sense(tmp_path, attributes, message):
    with pytest.raises(CoordsError, match=message):
        read_coords(write_h5(tmp_path / "a.h5", np.array([[0, 0]]), attributes))


def test_other_files(tmp_path, test_data):
    with pytest.raises(CoordsError, match=r"no\.h5: no such file"):
        read_coords(tmp_path / "no.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(CoordsError, match=r"text\.h5: not a readable HDF5"):
        read_coords(tmp_path / "text.h5")
    with pytest.raises(CoordsError, match="no dataset 'coords', only"):
        read_coords(test_data / "bags/TCGA-3X-AAVA-01Z-00-DX1.h5")
    with pytest.raises(CoordsError, match="no attribute 'patch_size'"):
        read_coords(test_data / "bags/TCGA-AD-6964-01Z-00-DX1.h5")


def test_an_unfitted_tiling_is_not_written(tmp_path):
    tiling = read_coords(write_h5(tmp_path / "a.h5", np.array([[0, 0]]), trident_attributes()))
    with pytest.raises(ValueError, match="fit_to_slide"):
        write_coords(tmp_path / "b.h5", tiling)
    assert not (tmp_path / "b.h5").exists()
