"""Writing a bag as TRIDENT does: one HDF5 file a slide, which CLAM, torchmil and TRIDENT read as well."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dre_fast.data.bag_coords import check_shape, positive
from dre_fast.data.bag_rows import BagError, check_finite, feature_array
from dre_fast.data.coords import CoordsError, checked_coords
from dre_fast.data.files import atomic_path
from dre_fast.data.optional import need

_CHUNK_BYTES = 1 << 18


def write_bag(
    path: str | os.PathLike[str],
    features: Tensor | np.ndarray,
    coords: Tensor | np.ndarray | None = None,
    *,
    slide_id: str | None = None,
    tile_size_level0: float | None = None,
    patch_size: int | None = None,
    level0_magnification: float | None = None,
    target_magnification: float | None = None,
    overlap: int = 0,
    level0_size: tuple[int, int] | None = None,
    encoder: str | None = None,
) -> Path:
    """Write one bag, whole or not at all: datasets ``features`` [n, D] and ``coords`` int64 [n, 2].

    Args:
        path: ``.h5`` or ``.hdf5``; folders are created.
        features: [n, D], n >= 0; float16 and float32 are kept, bfloat16 and float64 become float32.
        coords: level-0 pixels [n, 2] of the top-left corners, whole numbers.
        slide_id: attribute ``name``; by default the name of the file.
        tile_size_level0: level-0 pixels a tile is wide (``patch_size_level0``).
        patch_size: pixels of a tile at ``target_magnification``. By default it follows from the others.
        level0_magnification, target_magnification: of the slide and of the tiles, e.g. 40 and 20.
        overlap: of neighbouring tiles, in pixels like ``patch_size``.
        level0_size: (width, height) of the slide.
        encoder: name of the encoder.

    Returns:
        The path.

    Raises:
        BagError: shapes, dtypes or sizes that do not fit, NaN or Inf (the tile is named), tile attributes without coords.
    """
    path = Path(path)
    where = f"{path}: slide {slide_id or path.stem}"
    if path.suffix.lower() not in (".h5", ".hdf5"):
        raise BagError(f"{path}: bags are written as .h5 or .hdf5")
    rows = _features(path, where, features)
    sizes = _tile_attributes(
        path, tile_size_level0, patch_size, level0_magnification, target_magnification, overlap
    )
    if level0_size is not None:
        sizes.update(level0_width=int(level0_size[0]), level0_height=int(level0_size[1]))
    if coords is None and sizes:
        raise BagError(f"{where}: {', '.join(sizes)} describe coords, and there are none")
    places = None if coords is None else _coords(path, coords, len(rows))
    h5py = need("h5py", "wsi")
    common = {"name": slide_id or path.stem, "savetodir": str(path.parent)}
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        _write(file, "features", rows, {**common, **({"encoder": encoder} if encoder else {})})
        if places is not None:
            _write(file, "coords", places, {**common, **sizes})
    return path


def _write(file: Any, name: str, rows: np.ndarray, attributes: dict[str, Any]) -> None:
    chunk = max(1, _CHUNK_BYTES // (rows.shape[1] * rows.itemsize))
    dataset = file.create_dataset(
        name, data=rows, maxshape=(None, rows.shape[1]), chunks=(chunk, rows.shape[1])
    )
    for key, value in attributes.items():
        dataset.attrs[key] = value


def _features(path: Path, where: str, features: Tensor | np.ndarray) -> np.ndarray:
    tensor = features.detach().cpu() if isinstance(features, Tensor) else torch.from_numpy(np.array(features))
    shape = feature_array(path, "features", tensor.shape, tensor.dtype, lambda: None).shape
    if shape[1] == 0:
        raise BagError(f"{where}: features of no tiles must be [0, D], so that D is known")
    tensor = tensor if tensor.dtype == torch.float16 else tensor.float()
    tensor = tensor.reshape(shape)
    check_finite(where, tensor, range(len(tensor)))
    return tensor.contiguous().numpy()


def _coords(path: Path, coords: Tensor | np.ndarray, count: int) -> np.ndarray:
    array = np.asarray(coords.detach().cpu().numpy() if isinstance(coords, Tensor) else coords)
    check_shape(path, array.shape, count)
    try:
        return checked_coords(path, array)
    except CoordsError as error:
        raise BagError(str(error)) from error


def _tile_attributes(
    path: Path,
    tile_size_level0: float | None,
    patch_size: int | None,
    source: float | None,
    target: float | None,
    overlap: int,
) -> dict[str, Any]:
    """TRIDENT's attributes; what is not given follows from patch_size_level0 = patch_size * source / target."""
    size0 = positive(path, "tile_size_level0", tile_size_level0)
    size = positive(path, "patch_size", patch_size)
    source, target = (
        positive(path, "level0_magnification", source),
        positive(path, "target_magnification", target),
    )
    if (source is None) != (target is None):
        raise BagError(f"{path}: level0_magnification and target_magnification go together")
    scale = 1.0 if source is None or target is None else source / target
    if size is None and size0 is not None:
        size = round(size0 / scale)
    if size is None:
        if source is not None or overlap:
            raise BagError(
                f"{path}: magnifications and overlap say nothing without tile_size_level0 or patch_size"
            )
        return {}
    if size0 is None:
        size0 = round(size * scale)
    if source is not None and round(size * scale) != size0:
        raise BagError(
            f"{path}: tiles of {size:g} px at {target:g}x are {round(size * scale)} px wide at {source:g}x, not "
            f"tile_size_level0={size0:g}"
        )
    values = {
        "patch_size": size,
        "patch_size_level0": size0,
        "level0_magnification": source,
        "target_magnification": target,
        "overlap": overlap,
    }
    return {key: _number(value) for key, value in values.items() if value is not None}


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
