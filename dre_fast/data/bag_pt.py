"""Bags in .pt files: tensors, dicts and lists of them, and the indices slideflow writes beside."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dre_fast.data.bag_arrays import Layout, clam_coords, feature_key
from dre_fast.data.bag_coords import CentreCoords, PixelCoords, check_shape, positive, stored_coords
from dre_fast.data.bag_rows import BagError, feature_array


def read_pt(path: Path) -> Layout:
    held = _load_pt(path)
    attributes: dict[str, Any] = {}
    coords: PixelCoords | None = None
    key = None
    if isinstance(held, Mapping):
        key = feature_key(path, [str(k) for k in held])
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
        coords = clam_coords(path, count)
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
        # torch's own first line advises weights_only=False, the one thing not to do; the object's name is further down
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise BagError(
            f"{path}: holds Python objects that may run code when they are read{f' ({named[1]})' if named else ''}, "
            "so it is not read; write it again with torch.save(features, path), features a tensor"
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
