"""Tile coordinates in HDF5: one file a slide, readable by CLAM and TRIDENT, and theirs readable here.

The dataset ``coords``, int64 [N,2], holds level-0 pixels; everything else is an attribute of it. CLAM reads
``patch_size`` pixels of ``patch_level``. TRIDENT reads ``patch_size`` pixels after scaling level 0 from
``level0_magnification`` to ``target_magnification``. One number serves both when ``patch_size`` counts pixels
of the level the tiles are read from and ``target_magnification`` is that level's: both then cut out exactly
the tissue that dre_fast does, and scale it to their encoder's input themselves. What dre_fast needs beyond
that (``tile_size``, ``mpp``, how tiles were chosen) stands in attributes of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dre_fast.data.files import atomic_path
from dre_fast.data.optional import need
from dre_fast.data.tiling import Tiling

FORMAT = "dre_fast_coords"
FORMAT_VERSION = 1
# Microns per pixel times magnification, the convention behind "20x is 0.5 um/px".
UM_TIMES_MAGNIFICATION = 10.0
MAGNIFICATIONS = (80, 60, 40, 20, 10, 5, 2.5, 1.25)
_MAGNIFICATIONS = ("level0_magnification", "target_magnification")
_TRIDENT_KEYS = ("patch_size_level0", *_MAGNIFICATIONS)


class CoordsError(ValueError):
    """A coordinate file cannot be read. The message names the file and the key."""


def write_coords(path: str | Path, tiling: Tiling) -> None:
    """Writes a tiling; the file appears whole or not at all.

    Raises:
        ValueError: the tiling does not know its level or slide yet (it was read from a file of another tool):
            pass it through ``fit_to_slide`` first.
    """
    h5py = need("h5py", "wsi")
    path = Path(path)
    attributes = _attributes(path, tiling)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        rows = np.ascontiguousarray(tiling.coords, dtype=np.int64).reshape(-1, 2)
        dataset = file.create_dataset("coords", data=rows, maxshape=(None, 2), chunks=(4096, 2))
        for key, value in attributes.items():
            dataset.attrs[key] = value


def read_coords(path: str | Path) -> Tiling:
    """Reads the tiling of one slide from a file written by dre_fast, CLAM or TRIDENT.

    TRIDENT stores no level and nominal magnifications instead of microns: ``mpp`` and ``slide_mpp`` are then
    10 over the magnification, and ``level`` is None until ``fit_to_slide`` (``TileReader`` does it) sees the
    slide. CLAM stores no pixel size at all: ``mpp`` and ``slide_mpp`` are None.

    Raises:
        CoordsError: not an HDF5 file, no ``coords``, or an attribute missing; names the file and the key.
    """
    h5py = need("h5py", "wsi")
    path = Path(path)
    if not path.is_file():
        raise CoordsError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            if "coords" not in file:
                raise CoordsError(f"{path}: no dataset 'coords', only {sorted(file.keys())}")
            rows = np.asarray(file["coords"])
            attributes = _Attributes(path, dict(file["coords"].attrs))
    except OSError as error:
        raise CoordsError(f"{path}: not a readable HDF5 file: {error}") from error
    coords = checked_coords(path, rows)
    if FORMAT in attributes:
        return _read_own(attributes, coords)
    if any(key in attributes for key in _TRIDENT_KEYS):
        return _read_trident(attributes, coords)
    return _read_clam(attributes, coords)


def _attributes(path: Path, tiling: Tiling) -> dict[str, Any]:
    level, read_size, downsample = tiling.level, tiling.read_size, tiling.level_downsample
    dimensions, level_dimensions = tiling.dimensions, tiling.level_dimensions
    if None in (level, read_size, downsample, dimensions, level_dimensions):
        raise ValueError(
            f"{path}: the tiling of {tiling.slide_id} does not know the levels of its slide; pass it through "
            "dre_fast.data.tiling.fit_to_slide(tiling, slide) before writing it"
        )
    assert read_size is not None
    assert dimensions is not None
    folder = str(path.parent)
    values: dict[str, Any] = {
        FORMAT: FORMAT_VERSION,
        "name": tiling.slide_id,
        "tile_size": tiling.tile_size,
        "tile_overlap": tiling.overlap,
        "mpp": tiling.mpp,
        "slide_mpp": tiling.slide_mpp,
        "tissue": tiling.tissue,
        "min_tissue": tiling.min_tissue,
        "edge": tiling.edge,
        # both
        "patch_size": read_size,
        # CLAM
        "patch_level": level,
        "downsample": (downsample, downsample),
        "level_dim": level_dimensions,
        "downsampled_level_dim": level_dimensions,
        "save_path": folder,
        # TRIDENT
        "patch_size_level0": tiling.tile_size_level0,
        "overlap": round(tiling.overlap * read_size / tiling.tile_size),
        "level0_width": dimensions[0],
        "level0_height": dimensions[1],
        "savetodir": folder,
    }
    if tiling.slide_mpp is not None:
        magnification = nominal_magnification(tiling.slide_mpp)
        values["level0_magnification"] = magnification
        # Not magnification / downsample: TRIDENT computes the footprint back from this ratio and rounds it.
        target = magnification * read_size / tiling.tile_size_level0
        values["target_magnification"] = round(target) if math.isclose(target, round(target)) else target
    return {key: value for key, value in values.items() if value is not None}


def tile_size_level0(path: str | Path, attributes: Mapping[str, Any]) -> float | None:
    """Level-0 pixels a tile is wide, by attributes of dre_fast, TRIDENT or CLAM; None where they do not say.

    Args:
        path: the file they come from, for messages.

    Raises:
        CoordsError: an attribute that is not a number.
    """
    a = _Attributes(Path(path), attributes)
    if "patch_size" in a and _MAGNIFICATIONS[0] in a and _MAGNIFICATIONS[1] in a and FORMAT not in a:
        source, target = (a.number(key, "TRIDENT") for key in _MAGNIFICATIONS)
        if source > 0 and target > 0:
            return _trident_footprint(a.number("patch_size", "TRIDENT"), source, target)
    if "patch_size_level0" in a:
        return a.number("patch_size_level0", "TRIDENT")
    if (
        "patch_size" in a
        and "patch_level" in a
        and ("downsample" in a or not a.number("patch_level", "CLAM"))
    ):
        downsample = a.number("downsample", "CLAM") if "downsample" in a else 1.0
        return round(a.number("patch_size", "CLAM") * downsample)
    return None


def nominal_magnification(mpp: float) -> float:
    """The usual objective nearest to ``mpp`` microns per pixel: 0.499 -> 20, 0.2527 -> 40."""
    wanted = math.log(UM_TIMES_MAGNIFICATION / mpp)
    return min(MAGNIFICATIONS, key=lambda m: abs(math.log(m) - wanted))


class _Attributes:
    """Attributes of one file, read with errors that name the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path = path
        # TRIDENT writes None as the text "None".
        self.values = {k: v for k, v in values.items() if not (isinstance(v, str) and v == "None")}

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def _get(self, key: str, producer: str) -> Any:
        if key not in self.values:
            found = ", ".join(sorted(self.values)) or "none"
            raise CoordsError(
                f"{self.path}: dataset 'coords' has no attribute {key!r}, needed to read tiles the way "
                f"{producer} stores them (attributes found: {found})"
            )
        return self.values[key]

    def number(self, key: str, producer: str) -> float:
        value = self._get(key, producer)
        try:
            number = float(np.asarray(value, dtype=np.float64).reshape(-1)[0])
        except (ValueError, TypeError, IndexError):
            number = math.nan
        if not math.isfinite(number):
            raise CoordsError(f"{self.path}: attribute {key!r} of 'coords' is {value!r}, not a number")
        return number

    def integer(self, key: str, producer: str) -> int:
        number = self.number(key, producer)
        if number != int(number):
            raise CoordsError(f"{self.path}: attribute {key!r} of 'coords' is {number}, not a whole number")
        return int(number)

    def pair(self, key: str, producer: str) -> tuple[int, int]:
        value = np.asarray(self._get(key, producer)).reshape(-1)
        if len(value) != 2:
            raise CoordsError(f"{self.path}: attribute {key!r} of 'coords' is not a (width, height) pair")
        return int(value[0]), int(value[1])

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return value.decode() if isinstance(value, bytes) else None if value is None else str(value)

    def optional_number(self, key: str) -> float | None:
        return self.number(key, "dre_fast") if key in self else None

    def slide_id(self) -> str:
        return self.text("name") or self.path.stem.removesuffix("_patches")


def _read_own(a: _Attributes, coords: np.ndarray) -> Tiling:
    who = "dre_fast"
    version = a.integer(FORMAT, who)
    if version > FORMAT_VERSION:
        raise CoordsError(f"{a.path}: written by a newer dre_fast (format {version}); update dre_fast")
    return Tiling(
        slide_id=a.slide_id(),
        coords=coords,
        tile_size=a.integer("tile_size", who),
        mpp=a.optional_number("mpp"),
        slide_mpp=a.optional_number("slide_mpp"),
        level=a.integer("patch_level", who),
        read_size=a.integer("patch_size", who),
        tile_size_level0=a.integer("patch_size_level0", who),
        dimensions=(a.integer("level0_width", who), a.integer("level0_height", who)),
        level_downsample=a.number("downsample", who),
        level_dimensions=a.pair("level_dim", who),
        overlap=a.integer("tile_overlap", who),
        tissue=a.text("tissue"),
        min_tissue=a.optional_number("min_tissue"),
        edge=a.text("edge"),
    )


def _read_trident(a: _Attributes, coords: np.ndarray) -> Tiling:
    who = "TRIDENT"
    tile_size = a.integer("patch_size", who)
    source = a.number("level0_magnification", who)
    target = a.number("target_magnification", who)
    if source <= 0 or target <= 0:
        raise CoordsError(f"{a.path}: magnifications of 'coords' must be positive, got {source}, {target}")
    has_size = "level0_width" in a and "level0_height" in a
    return Tiling(
        slide_id=a.slide_id(),
        coords=coords,
        tile_size=tile_size,
        mpp=UM_TIMES_MAGNIFICATION / target,
        slide_mpp=UM_TIMES_MAGNIFICATION / source,
        level=None,
        read_size=None,
        tile_size_level0=_trident_footprint(tile_size, source, target),
        dimensions=(a.integer("level0_width", who), a.integer("level0_height", who)) if has_size else None,
        overlap=a.integer("overlap", who) if "overlap" in a else 0,
    )


def _trident_footprint(tile_size: float, source: float, target: float) -> int:
    # TRIDENT lays its grid and cuts its tiles by the rounded product; its own patch_size_level0 is rounded
    # down.
    return round(tile_size * source / target)


def _read_clam(a: _Attributes, coords: np.ndarray) -> Tiling:
    who = "CLAM"
    size = a.integer("patch_size", who)
    level = a.integer("patch_level", who)
    downsample = a.number("downsample", who) if "downsample" in a or level else 1.0
    if "custom_downsample" in a and a.number("custom_downsample", who) != 1:
        raise CoordsError(
            f"{a.path}: attribute 'custom_downsample' of 'coords' is not 1: tools disagree on what "
            "patch_size means then; tile the slide again"
        )
    return Tiling(
        slide_id=a.slide_id(),
        coords=coords,
        tile_size=size,
        mpp=None,
        slide_mpp=None,
        level=level,
        read_size=size,
        tile_size_level0=round(size * downsample),
        dimensions=a.pair("level_dim", who) if level == 0 and "level_dim" in a else None,
        level_downsample=downsample,
        level_dimensions=a.pair("level_dim", who) if "level_dim" in a else None,
    )


def checked_coords(path: Path, rows: np.ndarray) -> np.ndarray:
    """Level-0 coordinates int64 [N,2] from what a file holds, [N,2] or [1,N,2].

    Raises:
        CoordsError: another shape, not numbers, or fractions; names the file.
    """
    if rows.ndim == 3 and rows.shape[0] == 1:
        rows = rows[0]
    if rows.size == 0:
        return np.empty((0, 2), dtype=np.int64)
    if rows.ndim != 2 or rows.shape[1] != 2 or rows.dtype.kind not in "iuf":
        raise CoordsError(f"{path}: dataset 'coords' must be numbers [N,2], got {rows.dtype} {rows.shape}")
    coords = rows.astype(np.int64)
    if rows.dtype.kind == "f" and not np.array_equal(coords, rows):
        raise CoordsError(f"{path}: dataset 'coords' has fractions, so it is not in level-0 pixels")
    return coords
