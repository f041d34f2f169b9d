"""What each producer of tile features writes, found out without reading the features.

============  ===========================================================================  ====================
layout        file                                                                         coordinates
============  ===========================================================================  ====================
clam          h5_files/ID.h5: ``features``, ``coords``; pt_files/ID.pt: tensor             level-0 px
trident       features_ENC/ID.h5: the same, ``coords`` with TRIDENT's attributes           level-0 px
stamp         ID.h5: ``feats``, ``coords``, attributes unit, tile_size_um, extractor       um
h5            ID.h5: ``feats``, with or without ``coords``, no attributes                  level-0 px
slideflow     ID.pt: tensor; ID.index.npz: ``arr_0``; bags_config.json                     level-0 px of centres
pt            ID.pt: tensor, array, list of tensors, or dict (MIL_BASELINE, DSMIL, eva)    ``coords`` of a dict
torchmil      ID.npy, or ID.h5: ``features``                                               ../coords/ID.npy, .h5
zarr          ID.zarr: array, or group like an HDF5 file                                   as in HDF5
============  ===========================================================================  ====================
"""

from __future__ import annotations

from pathlib import Path

from dre_fast.data.bag_arrays import Layout, read_hdf5, read_npy, read_zarr
from dre_fast.data.bag_pt import read_pt
from dre_fast.data.bag_rows import BagError

HDF5 = (".h5", ".hdf5")


def read_layout(path: Path) -> Layout:
    """Describe the bag in ``path``.

    Raises:
        BagError: no such file, another kind of file, damaged, no features in it (says which keys were looked for and
            which are there), or features and coordinates that do not fit.
        ModuleNotFoundError: the package that reads it is missing; says how to get it.
    """
    if is_zarr(path):
        return read_zarr(path)
    if path.is_dir():
        raise BagError(f"{path}: a folder, not a bag; BagFolder reads a folder of bags")
    if not path.exists():
        raise BagError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix in HDF5:
        return read_hdf5(path)
    if suffix == ".pt":
        return read_pt(path)
    if suffix == ".npy":
        return read_npy(path)
    raise BagError(f"{path}: bags are .h5, .hdf5, .pt or .npy files, or .zarr folders")


def is_zarr(path: Path) -> bool:
    """Whether ``path`` is a zarr array or group."""
    return path.is_dir() and (
        path.suffix.lower() == ".zarr"
        or any((path / n).exists() for n in (".zarray", ".zgroup", "zarr.json"))
    )
