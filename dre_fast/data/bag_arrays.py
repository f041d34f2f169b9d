"""Bags in HDF5 files, numpy arrays and zarr stores: their arrays by name, their attributes, folders of coordinates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dre_fast.data.bag_coords import PixelCoords, stored_coords
from dre_fast.data.bag_rows import ArrayFile, BagError, feature_array
from dre_fast.data.optional import need

FEATURE_KEYS = ("features", "feats", "patch_embeddings", "tile_embeds")
_TRIDENT = ("patch_size_level0", "level0_magnification", "target_magnification")
_STAMP = ("unit", "tile_size_um", "extractor", "stamp_version")


@dataclass(frozen=True)
class Layout:
    """A bag's file, described: see the table of :mod:`dre_fast.data.bag_layouts`."""

    name: str
    features: ArrayFile
    coords: PixelCoords | None
    attributes: dict[str, Any]


# ------------------------------------------------------------------------------------------------------ HDF5


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


def read_hdf5(path: Path) -> Layout:
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
    key = feature_key(path, keys)
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


def feature_key(path: Path, keys: Collection[str]) -> str:
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


def clam_coords(path: Path, count: int) -> PixelCoords | None:
    beside = path.parent.parent / "h5_files" / f"{path.stem}.h5"
    if not beside.exists():
        return None
    with _open_hdf5(beside) as file:
        if "coords" not in file:
            return None
        stored = file["coords"]
        open_coords = partial(_hdf5_array, beside, "coords")
        return stored_coords(beside, open_coords, stored.shape, count, _plain(stored.attrs))


# ------------------------------------------------------------------------------------------------------ npy


@contextlib.contextmanager
def _npy_array(path: Path) -> Iterator[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BagError(f"{path}: not a readable .npy file of numbers ({error})") from error
    yield array


def read_npy(path: Path) -> Layout:
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


# ------------------------------------------------------------------------------------------------------ zarr


@contextlib.contextmanager
def _zarr_array(path: Path, key: str | None = None) -> Iterator[Any]:
    root = _open_zarr(path)
    try:
        yield root if key is None else root[key]
    except BagError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # what the codecs raise
        raise BagError(
            f"{path}: {key or 'the array'} cannot be read ({error}); copy or extract it again"
        ) from error


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


def read_zarr(path: Path) -> Layout:
    root = _open_zarr(path)
    if hasattr(root, "shape"):
        features = feature_array(path, "features", root.shape, root.dtype, partial(_zarr_array, path))
        return Layout("zarr", features, None, _plain(root.attrs))
    found = _group(path, root, partial(_zarr_array, path))
    return Layout("zarr", found.features, found.coords, found.attributes)
