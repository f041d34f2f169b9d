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

import contextlib
import json
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dre_fast.data.bag_coords import CentreCoords, PixelCoords, check_shape, positive, stored_coords
from dre_fast.data.bag_rows import ArrayFile, BagError, feature_array
from dre_fast.data.optional import need

FEATURE_KEYS = ("features", "feats", "patch_embeddings", "tile_embeds")
HDF5 = (".h5", ".hdf5")
_TRIDENT = ("patch_size_level0", "level0_magnification", "target_magnification")
_STAMP = ("unit", "tile_size_um", "extractor", "stamp_version")


@dataclass(frozen=True)
class Layout:
    """A bag's file, described: see the table of the module."""

    name: str
    features: ArrayFile
    coords: PixelCoords | None
    attributes: dict[str, Any]


def read_layout(path: Path) -> Layout:
    """Describe the bag in ``path``.

    Raises:
        BagError: no such file, another kind of file, damaged, no features in it (says which keys were looked for and
            which are there), or features and coordinates that do not fit.
        ModuleNotFoundError: the package that reads it is missing; says how to get it.
    """
    if is_zarr(path):
        return _zarr(path)
    if path.is_dir():
        raise BagError(f"{path}: a folder, not a bag; BagFolder reads a folder of bags")
    if not path.exists():
        raise BagError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix in HDF5:
        return _hdf5(path)
    if suffix == ".pt":
        return _pt(path)
    if suffix == ".npy":
        return _npy(path)
    raise BagError(f"{path}: bags are .h5, .hdf5, .pt or .npy files, or .zarr folders")


def is_zarr(path: Path) -> bool:
    """Whether ``path`` is a zarr array or group."""
    return path.is_dir() and (
        path.suffix.lower() == ".zarr"
        or any((path / n).exists() for n in (".zarray", ".zgroup", "zarr.json"))
    )


# ------------------------------------------------------------------------------------------------------- HDF5


@contextlib.contextmanager
def _open_hdf5(path: Path) -> Iterator[Any]:
    h5py = need("h5py", "wsi")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise BagError(f"{path}: not a readable HDF5 file ({error}); copy or extract it again") from error
    with file:
        yield file


@contextlib.contextmanager
def _hdf5_array(path: Path, key: str) -> Iterator[Any]:
    with _open_hdf5(path) as file:
        try:
            yield file[key]
        except OSError as error:
            raise BagError(f"{path}: {key!r} cannot be read ({error}); copy or extract it again") from error


def _hdf5(path: Path) -> Layout:
    with _open_hdf5(path) as file:
        found = _group(path, file, partial(_hdf5_array, path))
        key, own, has_coords = found.key, found.attributes, found.coords is not None
        name = "clam" if has_coords else "torchmil"
        if any(attribute in own for attribute in _STAMP) and (key == "feats" or "tile_size_um" in own):
            name = "stamp"
        elif key != "features":
            name = "h5"
        elif any(attribute in own for attribute in (*_TRIDENT, "encoder")):
            name = "trident"
    coords = found.coords or _coords_folder(path, found.features.shape[0])
    return Layout(name, found.features, coords, own)


@dataclass(frozen=True)
class _Group:
    key: str
    features: ArrayFile
    coords: PixelCoords | None
    attributes: dict[str, Any]


def _group(path: Path, group: Any, open_key: Callable[[str], Any]) -> _Group:
    """Features and coordinates of an HDF5 file or zarr group."""
    keys = sorted(group.keys())
    key = _feature_key(path, keys)
    array = group[key]
    attributes = _plain(group.attrs)
    if attributes.get("feat_type", "tile") != "tile":
        raise BagError(
            f"{path}: attribute 'feat_type' is {attributes['feat_type']!r}: embeddings of slides or patients, not tiles"
        )
    if not hasattr(array, "shape"):
        raise BagError(f"{path}: {key!r} is a group of {sorted(array.keys())}, not an array")
    attributes.update(_plain(array.attrs))
    features = feature_array(path, key, array.shape, array.dtype, partial(open_key, key))
    coords = None
    if "coords" in keys:
        stored = group["coords"]
        attributes.update(_plain(stored.attrs))
        coords = stored_coords(
            path, partial(open_key, "coords"), stored.shape, features.shape[0], attributes, key
        )
    return _Group(key, features, coords, attributes)


def _feature_key(path: Path, keys: Collection[str]) -> str:
    found = [key for key in FEATURE_KEYS if key in keys]
    if len(found) == 1:
        return found[0]
    if found:
        raise BagError(
            f"{path}: holds {' and '.join(map(repr, found))}: which are the features? Keep one of them"
        )
    looked = ", ".join(map(repr, FEATURE_KEYS))
    there = ", ".join(map(repr, sorted(keys)[:20])) or "nothing"
    hint = "; this is a file of tile coordinates: extract features first" if set(keys) == {"coords"} else ""
    raise BagError(f"{path}: no features: looked for {looked}, found {there}{hint}")


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as Python values; TRIDENT writes None as the text "None"."""
    plain: dict[str, Any] = {}
    for key, value in attributes.items():
        if isinstance(value, (np.ndarray, np.generic)):
            value = value.tolist()
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if not (isinstance(value, str) and value == "None"):
            plain[str(key)] = value
    return plain


# --------------------------------------------------------------------------------------------------------- pt


def _pt(path: Path) -> Layout:
    held = _load_pt(path)
    attributes: dict[str, Any] = {}
    coords: PixelCoords | None = None
    key = None
    if isinstance(held, Mapping):
        key = _feature_key(path, [str(k) for k in held])
        attributes = {str(k): v for k, v in held.items() if isinstance(v, (str, int, float, bool))}
    value = held if key is None else held[key]
    shape, dtype = _shape_of(path, value)
    features = feature_array(path, key or "features", shape, dtype, partial(_pt_array, path, key))
    count = features.shape[0]
    if key is not None and held.get("coords") is not None:
        stored = _shape_of(path, held["coords"], "coords")[0]
        coords = stored_coords(path, partial(_pt_array, path, "coords"), stored, count, attributes)
    name = "clam" if path.parent.name == "pt_files" else "pt"
    index = _index_of(path)
    if index is not None:
        name = "slideflow"
        coords, attributes = _slideflow(path, index, count)
    elif coords is None and name == "clam":
        coords = _clam_coords(path, count)
    return Layout(name, features, coords, attributes)


@contextlib.contextmanager
def _pt_array(path: Path, key: str | None) -> Iterator[Any]:
    held = _load_pt(path)
    value = held if key is None else held[key]
    if isinstance(value, (list, tuple)):
        value = torch.cat([part if part.dim() == 2 else part[None] for part in value])
    yield value


def _load_pt(path: Path) -> Any:
    """The tensors of a file, mapped and not yet read where its format allows; objects other than those are refused.

    Files of torch before 1.6 are read whole. Arrays of numpy are allowed: TRIDENT used to save them.
    """
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise BagError(
            f"{path}: holds Python objects that may run code when they are read, so it is not read "
            f"({str(error).strip().splitlines()[0]}); write it again with torch.save(features, path), features a tensor"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BagError(f"{path}: not a readable .pt file ({reason[0]}); copy or extract it again") from error


def _numpy_globals() -> list[Any]:
    # what an array of numbers is pickled by, under its names in numpy 1 and 2
    _reconstruct: Any = np.zeros(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8")]
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    return [*((_reconstruct, name) for name in names), np.ndarray, np.dtype, *kinds]


def _shape_of(path: Path, value: Any, name: str = "features") -> tuple[tuple[int, ...], Any]:
    if isinstance(value, (Tensor, np.ndarray)):
        if isinstance(value, Tensor) and value.layout != torch.strided:
            raise BagError(f"{path}: {name} are a sparse tensor; save them dense")
        return tuple(value.shape), value.dtype
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value):
        dims = {(part.shape[-1], part.dtype) if part.dim() in (1, 2) else None for part in value}
        if len(dims) == 1 and None not in dims:
            return (sum(1 if part.dim() == 1 else len(part) for part in value), value[0].shape[-1]), value[
                0
            ].dtype
        raise BagError(
            f"{path}: {name} are a list of tensors that are not all [D] or [n, D] of one D and dtype"
        )
    raise BagError(f"{path}: {name} must be a tensor [n, D], they are {type(value).__name__}")


def _index_of(path: Path) -> Path | None:
    for suffix in (".index.npz", ".index.npy"):
        index = path.with_name(path.stem + suffix)
        if index.exists():
            return index
    return None


def _slideflow(path: Path, index: Path, count: int) -> tuple[CentreCoords, dict[str, Any]]:
    with _index_array(index) as array:
        check_shape(index, array.shape, count)
    config = path.with_name("bags_config.json")
    attributes: dict[str, Any] = {}
    if config.exists():
        try:
            attributes = dict(json.loads(config.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise BagError(f"{config}: not a readable JSON object ({error})") from error
    width = attributes.get("tile_um")
    # a magnification such as "20x" gives a width that depends on the levels of the slide
    tile_um = None if isinstance(width, str) else positive(config, "tile_um", width)
    return CentreCoords(index, partial(_index_array, index), None, tile_um, config), attributes


@contextlib.contextmanager
def _index_array(index: Path) -> Iterator[Any]:
    try:
        held = np.load(index, allow_pickle=False)
        keys = ["arr_0"] if isinstance(held, np.ndarray) else list(held.files)
        array = held if isinstance(held, np.ndarray) else held["arr_0"] if "arr_0" in keys else None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise BagError(f"{index}: not a readable index of slideflow ({error})") from error
    if array is None:
        raise BagError(f"{index}: no coordinates: looked for 'arr_0', found {keys}")
    yield array


def _clam_coords(path: Path, count: int) -> PixelCoords | None:
    beside = path.parent.parent / "h5_files" / f"{path.stem}.h5"
    if not beside.exists():
        return None
    with _open_hdf5(beside) as file:
        if "coords" not in file:
            return None
        stored = file["coords"]
        open_coords = partial(_hdf5_array, beside, "coords")
        return stored_coords(beside, open_coords, stored.shape, count, _plain(stored.attrs))


# -------------------------------------------------------------------------------------------------------- npy


@contextlib.contextmanager
def _npy_array(path: Path) -> Iterator[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BagError(f"{path}: not a readable .npy file of numbers ({error})") from error
    yield array


def _npy(path: Path) -> Layout:
    with _npy_array(path) as array:
        features = feature_array(path, "features", array.shape, array.dtype, partial(_npy_array, path))
    return Layout("torchmil", features, _coords_folder(path, features.shape[0]), {})


def _coords_folder(path: Path, count: int) -> PixelCoords | None:
    """torchmil: coords/ID beside the folder of features, or beside the folder that holds those."""
    for folder in (path.parent.parent, path.parent.parent.parent):
        beside = folder / "coords" / path.name
        if not beside.is_file() or beside == path:
            continue
        if beside.suffix.lower() == ".npy":
            with _npy_array(beside) as array:
                return stored_coords(beside, partial(_npy_array, beside), array.shape, count, {})
        with _open_hdf5(beside) as file:
            if "coords" not in file:
                raise BagError(f"{beside}: no coordinates: looked for 'coords', found {sorted(file.keys())}")
            stored = file["coords"]
            open_coords = partial(_hdf5_array, beside, "coords")
            return stored_coords(beside, open_coords, stored.shape, count, _plain(stored.attrs))
    return None


# ------------------------------------------------------------------------------------------------------- zarr


@contextlib.contextmanager
def _zarr_array(path: Path, key: str | None = None) -> Iterator[Any]:
    root = _open_zarr(path)
    yield root if key is None else root[key]


def _open_zarr(path: Path) -> Any:
    zarr = need("zarr", "zarr")
    if (path / "zarr.json").exists() and int(zarr.__version__.partition(".")[0]) < 3:
        raise BagError(
            f"{path}: zarr format 3, and zarr {zarr.__version__} reads format 2; install zarr>=3 (Python 3.11 or newer)"
        )
    try:
        return zarr.open(str(path), mode="r")
    except Exception as error:  # each version of zarr has types of its own
        raise BagError(f"{path}: not a readable zarr array or group ({error})") from error


def _zarr(path: Path) -> Layout:
    root = _open_zarr(path)
    if hasattr(root, "shape"):
        features = feature_array(path, "features", root.shape, root.dtype, partial(_zarr_array, path))
        return Layout("zarr", features, None, _plain(root.attrs))
    found = _group(path, root, partial(_zarr_array, path))
    return Layout("zarr", found.features, found.coords, found.attributes)
