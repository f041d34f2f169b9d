"""Where the tiles of a bag lie: each producer's coordinates as level-0 pixels of their top-left corners."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dre_fast.data.bag_rows import BagError
from dre_fast.data.coords import CoordsError, checked_coords, tile_size_level0

_MICRONS = ("um", "µm", "μm", "micron", "microns", "micrometer", "micrometers", "micrometre", "micrometres")
_PIXELS = ("px", "pixel", "pixels")
# STAMP 1 counted in pixels of tiles that are 224 px and 256 um wide.
_STAMP1_PX, _STAMP1_UM = 224, 256.0


@dataclass(frozen=True)
class PixelCoords:
    """Level-0 pixels as they are.

    Attributes:
        path: of the file, for messages.
        open: gives a context with the stored array [n, 2].
        tile_size: level-0 pixels a tile is wide, or None.
    """

    path: Path
    open: Callable[[], contextlib.AbstractContextManager[Any]]
    tile_size: float | None = None

    def level0(self, mpp: float | None) -> Tensor:
        """int64 [n, 2]. Subclasses: ``mpp`` of level 0, None where it is not known."""
        del mpp
        return torch.from_numpy(_whole(self.path, self._stored()))

    def tile_size_level0(self, mpp: float | None) -> float | None:
        """Level-0 pixels a tile is wide; None where the file, or ``mpp``, does not say."""
        del mpp
        return self.tile_size

    def _stored(self) -> np.ndarray:
        with self.open() as array:
            block = array[:]
        stored = block.detach().numpy().copy() if isinstance(block, Tensor) else np.array(block)
        return stored[0] if stored.ndim == 3 and stored.shape[0] == 1 else stored


@dataclass(frozen=True)
class MicronCoords(PixelCoords):
    """STAMP: micrometres, level-0 pixel = um / mpp. Its attributes tell the mpp of a tile, not that of the slide.

    Attributes:
        tile_um: micrometres a tile is wide, or None.
        stamp1: stored in units of 256 / 224 um.
    """

    tile_um: float | None = None
    stamp1: bool = False

    def level0(self, mpp: float | None) -> Tensor:
        stored = self._stored()
        if self.stamp1 and len(stored) and (stored % _STAMP1_PX).any():
            raise BagError(
                f"{self.path}: coordinates without a unit that are not multiples of {_STAMP1_PX}, so they are not those "
                "of STAMP 1; write what they are into the attribute 'unit' of the file: 'um', or 'px' for level-0 pixels"
            )
        if mpp is None:
            raise BagError(
                f"{self.path}: its coordinates are in micrometres, and neither the file nor the call gives the slide's "
                "microns per pixel (tile_size_um / tile_size_px is that of the tiles); pass mpp= of level 0, e.g. "
                "open_bag(path, mpp=0.25), or write it into the file's attribute 'slide_mpp'"
            )
        _check_numbers(self.path, stored)
        um = stored.astype(np.float64) * (_STAMP1_UM / _STAMP1_PX if self.stamp1 else 1.0)
        return torch.from_numpy(np.rint(um / mpp).astype(np.int64).reshape(-1, 2))

    def tile_size_level0(self, mpp: float | None) -> float | None:
        return None if mpp is None or self.tile_um is None else self.tile_um / mpp


@dataclass(frozen=True)
class CentreCoords(PixelCoords):
    """slideflow: level-0 centres of tiles that are int(tile_um / mpp) px wide.

    Attributes:
        tile_um: of bags_config.json; None where there is none, or where it is a magnification.
        config: where it was looked for.
    """

    tile_um: float | None = None
    config: Path = Path()

    def level0(self, mpp: float | None) -> Tensor:
        if self.tile_um is None or mpp is None:
            lacks = [] if self.tile_um else [f"a number 'tile_um' in {self.config}"]
            lacks += ["the slide's microns per pixel: pass mpp="] if mpp is None else []
            raise BagError(
                f"{self.path}: slideflow stores the centres of tiles, and their corners need {' and '.join(lacks)}"
            )
        centres = _whole(self.path, self._stored())
        return torch.from_numpy(centres - int(self.tile_um / mpp) // 2)

    def tile_size_level0(self, mpp: float | None) -> float | None:
        return None if mpp is None or self.tile_um is None else float(int(self.tile_um / mpp))


def stored_coords(
    path: Path,
    open_array: Callable[[], Any],
    shape: tuple[int, ...],
    count: int,
    attributes: Mapping[str, Any],
    feature_key: str = "features",
) -> PixelCoords:
    """The coordinates beside features, in the unit the attributes tell.

    Args:
        shape: of the stored array, [count, 2] or [1, count, 2].
        count: tiles of the bag.
        feature_key: ``feats`` is STAMP's.

    Raises:
        BagError: not one pair a tile, or a unit that is not known.
    """
    check_shape(path, shape, count)
    unit = attributes.get("unit")
    if unit is not None and str(unit).lower() not in _MICRONS + _PIXELS:
        raise BagError(
            f"{path}: attribute 'unit' is {unit!r}; coordinates may be in 'um', or in level-0 'px'"
        )
    if str(unit).lower() in _PIXELS or (unit is None and not _like_stamp(attributes, feature_key)):
        plain = feature_key == "feats" and unit is None
        try:
            size = tile_size_level0(path, attributes)
        except CoordsError as error:
            raise BagError(str(error)) from error
        return (UnmarkedCoords if plain else PixelCoords)(path, open_array, size)
    width = attributes.get("tile_size_um", attributes.get("tile_size") if unit is not None else None)
    stamp1 = unit is None and width is None
    tile_um = _STAMP1_UM if stamp1 else positive(path, "tile_size_um", width)
    return MicronCoords(path, open_array, None, tile_um, stamp1)


@dataclass(frozen=True)
class UnmarkedCoords(PixelCoords):
    """``feats`` of a file without attributes: level-0 pixels, unless they may be the units of STAMP 1."""

    def level0(self, mpp: float | None) -> Tensor:
        whole = super().level0(mpp)
        if bool((whole != 0).any()) and not bool((whole % _STAMP1_PX).any()):
            raise BagError(
                f"{self.path}: 'coords' are multiples of {_STAMP1_PX} and no attribute tells their unit: level-0 pixels, "
                "or the 256/224 um of STAMP 1? Write it into the file: attribute 'unit' = 'px' says the first, "
                "'extractor' (any text) the second"
            )
        return whole


def check_shape(path: Path, shape: tuple[int, ...], count: int) -> None:
    """Raises BagError unless ``shape`` is one (x, y) for each of ``count`` tiles."""
    squeezed = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if squeezed == (0,) and count == 0:
        return
    if len(squeezed) != 2 or squeezed[1] != 2:
        raise BagError(f"{path}: 'coords' must be [n, 2], they are {list(shape)}")
    if squeezed[0] != count:
        raise BagError(
            f"{path}: {count} tiles of features but {squeezed[0]} coordinates; they are of different runs: "
            "extract the features again"
        )


def positive(path: Path, name: str, value: Any) -> float | None:
    """``value`` as a number above zero, None as None.

    Raises:
        BagError: something else.
    """
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise BagError(f"{path}: {name} is {value!r}, it must be a number above 0")
    return number


def _like_stamp(attributes: Mapping[str, Any], feature_key: str) -> bool:
    return "tile_size_um" in attributes or (
        feature_key == "feats" and ("extractor" in attributes or "stamp_version" in attributes)
    )


def _whole(path: Path, stored: np.ndarray) -> np.ndarray:
    _check_numbers(path, stored)
    try:
        return checked_coords(path, stored)
    except CoordsError as error:
        raise BagError(str(error)) from error


def _check_numbers(path: Path, stored: np.ndarray) -> None:
    if stored.dtype.kind not in "iuf" or not np.isfinite(stored.astype(np.float64)).all():
        raise BagError(f"{path}: 'coords' hold something that is not a finite number")
