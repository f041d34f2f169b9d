from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("h5py", reason="needs h5py")

import h5py
from bag_makers import coords_of, features_of

from dre_fast.data.bags import BagError, open_bag, write_bag
from dre_fast.data.coords import read_coords


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_round_trip(dtype, tmp_path):
    x, xy = features_of(700, dtype=dtype), coords_of(700)
    path = write_bag(tmp_path / "new" / "S1.h5", x, xy, tile_size_level0=512)
    bag = open_bag(path)
    assert path == tmp_path / "new" / "S1.h5"
    assert bag.dtype == (torch.float16 if dtype == torch.float16 else torch.float32)
    assert torch.equal(bag.features(), x.to(bag.dtype))
    assert torch.equal(bag.coords(), xy)
    assert bag.tile_size_level0 == 512
    assert (bag.layout, bag.attributes["name"]) == ("trident", "S1")
    assert [p.name for p in path.parent.iterdir()] == ["S1.h5"]


def test_what_trident_and_clam_read(tmp_path):
    x, xy = features_of(5), coords_of(5)
    path = write_bag(
        tmp_path / "S1.h5",
        x,
        xy,
        slide_id="TCGA-1",
        tile_size_level0=512,
        level0_magnification=40,
        target_magnification=20,
        overlap=64,
        level0_size=(20000, 10000),
        encoder="uni_v1",
    )
    with h5py.File(path) as file:
        assert sorted(file) == ["coords", "features"]
        assert (file["coords"].dtype, file["coords"].shape) == (np.int64, (5, 2))
        assert file["features"].dtype == np.float32
        folder = str(tmp_path)
        assert dict(file["coords"].attrs) == {
            "patch_size": 256,
            "patch_size_level0": 512,
            "level0_magnification": 40,
            "target_magnification": 20,
            "overlap": 64,
            "level0_width": 20000,
            "level0_height": 10000,
            "name": "TCGA-1",
            "savetodir": folder,
        }
        assert dict(file["features"].attrs) == {"name": "TCGA-1", "savetodir": folder, "encoder": "uni_v1"}
        file_rows = file["features"]
        assert file_rows.maxshape == (None, 8)  # CLAM and TRIDENT append to them
    tiling = read_coords(path)  # as a coordinate file of TRIDENT
    assert (tiling.slide_id, tiling.tile_size, tiling.tile_size_level0, tiling.overlap) == (
        "TCGA-1",
        256,
        512,
        64,
    )
    assert open_bag(path).tile_size_level0 == 512


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, None),
        ({"patch_size": 224}, 224),
        ({"patch_size": 224, "level0_magnification": 40, "target_magnification": 30}, 299),
        ({"tile_size_level0": 512.5}, 512.5),
        ({"tile_size_level0": 299, "level0_magnification": 40, "target_magnification": 30}, 299),
    ],
)
def test_sizes_follow_from_each_other(given, found, tmp_path):
    path = write_bag(tmp_path / "S1.h5", features_of(3), coords_of(3), **given)
    assert open_bag(path).tile_size_level0 == found


def test_bags_without_tiles_or_coordinates(tmp_path):
    bag = open_bag(write_bag(tmp_path / "S1.h5", torch.zeros(0, 8), torch.zeros(0, 2)))
    assert (bag.tiles, bag.dim) == (0, 8)
    assert tuple(bag.coords().shape) == (0, 2)
    bag = open_bag(write_bag(tmp_path / "S2.hdf5", features_of(3).numpy()))
    assert bag.coords() is None
    bag = open_bag(write_bag(tmp_path / "S3.h5", features_of(3)[None].requires_grad_(), coords_of(3).numpy()))
    assert (bag.tiles, bag.dim) == (3, 8)


def test_a_bag_of_another_layout_is_converted(tmp_path):
    from bag_makers import stamp

    source = open_bag(stamp(tmp_path, features_of(4).half(), coords_of(4, 256)), mpp=0.5)
    path = write_bag(
        tmp_path / "out" / "S1.h5",
        source.features(),
        source.coords(),
        tile_size_level0=source.tile_size_level0,
    )
    bag = open_bag(path)
    assert torch.equal(bag.features(), source.features())
    assert torch.equal(bag.coords(), coords_of(4, 512))
    assert bag.tile_size_level0 == 512


def test_nothing_is_written_of_a_wrong_bag(tmp_path):
    x, xy = features_of(4), coords_of(4)
    bad = x.clone()
    bad[2, 5] = torch.inf
    kept = write_bag(tmp_path / "S1.h5", x, xy)
    before = kept.read_bytes()
    both = {"level0_magnification": 40, "target_magnification": 20}
    for arguments, options, message in (
        ((bad, xy), {"slide_id": "P7"}, "slide P7: tile 2 holds inf in column 5"),
        ((x, xy[:3]), {}, "4 tiles of features but 3 coordinates"),
        ((x, xy + 0.5), {}, "'coords' has fractions"),
        ((x, xy[:, :1]), {}, r"'coords' must be \[n, 2\]"),
        ((x[0], xy[:1]), {}, "one vector of 8 numbers"),
        ((x.long(), xy), {}, "they are int64"),
        ((torch.zeros(0), None), {}, r"must be \[0, D\]"),
        (
            (x,),
            {"tile_size_level0": 512},
            "patch_size, patch_size_level0, overlap describe coords, and there are none",
        ),
        ((x, xy), {"tile_size_level0": 0}, "tile_size_level0 is 0, it must be a number above 0"),
        ((x, xy), {"tile_size_level0": 512, "level0_magnification": 40}, "go together"),
        ((x, xy), both, "say nothing without tile_size_level0 or patch_size"),
        ((x, xy), {"overlap": 3}, "say nothing without tile_size_level0 or patch_size"),
        (
            (x, xy),
            {**both, "patch_size": 256, "tile_size_level0": 500},
            "tiles of 256 px at 20x are 512 px wide at 40x, not tile_size_level0=500",
        ),
    ):
        with pytest.raises(BagError, match=rf"S1\.h5.*{message}"):
            write_bag(tmp_path / "S1.h5", *arguments, **options)
    with pytest.raises(BagError, match=r"S1\.pt: bags are written as \.h5 or \.hdf5"):
        write_bag(tmp_path / "S1.pt", x)
    assert kept.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["S1.h5"]


def test_a_write_that_breaks_off_leaves_the_old_bag(tmp_path, monkeypatch):
    x = features_of(4)
    path = write_bag(tmp_path / "S1.h5", x, coords_of(4))
    plain = h5py.File.create_dataset

    def fails(file, name, **options):
        if name == "coords":
            raise OSError("disk full")
        return plain(file, name, **options)

    monkeypatch.setattr(h5py.File, "create_dataset", fails)
    with pytest.raises(OSError, match="disk full"):
        write_bag(path, x + 1, coords_of(4))
    assert torch.equal(open_bag(path).features(), x)
    assert [p.name for p in tmp_path.iterdir()] == ["S1.h5"]
