"""Bags in zarr stores, formats 2 and 3, by the zarr package that is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("zarr", reason="needs zarr (pip install 'dre_fast[zarr]')")

import zarr
from bag_makers import STAMP, TRIDENT, coords_of, features_of

from dre_fast.data.bags import BagError, BagFolder, open_bag

NEW = int(zarr.__version__.partition(".")[0]) >= 3
FORMATS = (2, 3) if NEW else (2,)


def write(path, arrays, attributes=None, zarr_format=2):
    """A group, or an array where ``arrays`` is one."""
    options = {"zarr_format": zarr_format} if NEW else {}
    if isinstance(arrays, np.ndarray):
        array = zarr.open_array(
            str(path), mode="w", shape=arrays.shape, dtype=arrays.dtype, chunks=(5, 8), **options
        )
        array[:] = arrays
        return path
    group = zarr.open_group(str(path), mode="w", **options)
    for key, array in arrays.items():
        create = group.create_array if NEW else group.create_dataset
        create(key, data=array, chunks=(5, *array.shape[1:]))
    for key, values in (attributes or {}).items():
        (group[key] if key else group).attrs.update(values)
    return path


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_groups(zarr_format, tmp_path):
    x, xy = features_of(23).half(), coords_of(23)
    arrays = {"features": x.numpy(), "coords": xy.numpy()}
    attributes = {"coords": TRIDENT, "": {"encoder": "uni"}}
    bag = open_bag(write(tmp_path / "S1.zarr", arrays, attributes, zarr_format))
    assert (bag.slide_id, bag.tiles, bag.dim, bag.dtype, bag.layout) == ("S1", 23, 8, torch.float16, "zarr")
    for rows in (None, slice(4, 9), torch.tensor([22, 0, 7, 0]), torch.arange(23) % 2 == 0):
        assert torch.equal(bag.features(rows), x if rows is None else x[rows])
    assert torch.equal(bag.coords(), xy)
    assert bag.tile_size_level0 == 512
    assert bag.attributes["encoder"] == "uni"


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_arrays(zarr_format, tmp_path):
    x = features_of(12)
    bag = open_bag(write(tmp_path / "S1.zarr", x.numpy(), zarr_format=zarr_format))
    assert torch.equal(bag.features(slice(3, 11)), x[3:11])
    assert bag.coords() is None


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_units_as_in_hdf5(zarr_format, tmp_path):
    um = coords_of(4, 256)
    arrays = {"feats": features_of(4).numpy(), "coords": um.float().numpy()}
    path = write(tmp_path / "S1.zarr", arrays, {"": STAMP}, zarr_format)
    assert torch.equal(open_bag(path, mpp=0.5).coords(), um * 2)
    with pytest.raises(BagError, match=r"S1\.zarr: its coordinates are in micrometres"):
        open_bag(path).coords()


def test_only_the_chunks_of_the_rows_are_read(tmp_path):
    x = features_of(20)
    path = write(tmp_path / "S1.zarr", {"features": x.numpy()})
    (path / "features" / "3.0").unlink()  # zarr reads a missing chunk as zeros
    bag = open_bag(path)
    assert torch.equal(bag.features(slice(0, 15)), x[:15])
    (path / "features" / "2.0").write_bytes(b"half")
    assert torch.equal(bag.features(torch.tensor([9, 0])), x[[9, 0]])
    with pytest.raises(BagError, match=r"S1\.zarr: features cannot be read .*; copy or extract it again"):
        bag.features(torch.tensor([12]))


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_folders_and_errors(zarr_format, tmp_path):
    write(tmp_path / "S1.zarr", {"features": features_of(3).numpy()}, zarr_format=zarr_format)
    write(tmp_path / "S2", features_of(3).numpy(), zarr_format=zarr_format)
    folder = BagFolder(tmp_path, recursive=True)
    assert list(folder) == ["S1", "S2"]
    assert folder.dim == 8
    with pytest.raises(BagError, match="one zarr bag, not a folder of bags"):
        BagFolder(tmp_path / "S2")
    path = write(tmp_path / "S3.zarr", {"x": features_of(3).numpy()}, zarr_format=zarr_format)
    with pytest.raises(BagError, match=r"S3\.zarr: no features: looked for 'features', .* found 'x'"):
        open_bag(path)
    path = write(tmp_path / "S4.zarr", {"features": np.zeros((3, 8), np.int64)}, zarr_format=zarr_format)
    with pytest.raises(BagError, match=r"S4\.zarr: features must be float16"):
        open_bag(path)
    (tmp_path / "S5.zarr").mkdir()
    with pytest.raises(BagError, match=r"S5\.zarr: not a readable zarr array or group"):
        open_bag(tmp_path / "S5.zarr")


def test_a_format_that_the_package_does_not_read(tmp_path, monkeypatch):
    (tmp_path / "S1.zarr").mkdir()
    (tmp_path / "S1.zarr" / "zarr.json").write_text("{}")
    monkeypatch.setattr(zarr, "__version__", "2.18.7")
    with pytest.raises(
        BagError, match=r"S1\.zarr: zarr format 3, and zarr 2\.18\.7 reads format 2; install zarr>=3"
    ):
        open_bag(tmp_path / "S1.zarr")
