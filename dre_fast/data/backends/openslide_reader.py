"""Slides through OpenSlide: Aperio, Hamamatsu, MIRAX, Leica, Ventana, Philips, DICOM, generic tiled TIFF."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dre_fast.data.optional import need
from dre_fast.data.slides import Slide, SlideError, on_white


class OpenSlideSlide(Slide):
    """A slide file read by OpenSlide. Safe to share between threads, not between processes.

    At levels above 0 OpenSlide interpolates when a level-0 position falls between two pixels of the level.
    """

    def __init__(self, path: Path):
        openslide = need("openslide", "wsi")
        try:
            self._handle = openslide.OpenSlide(str(path))
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise SlideError(
                f"slide {path}: OpenSlide cannot read it ({error}): it is damaged, incompletely downloaded "
                "or not a tiled slide format"
            ) from error
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideError(f"slide {path}: does not open: {error}") from error
        super().__init__(path, list(self._handle.level_dimensions), list(self._handle.level_downsamples))
        self._error: type[Exception] = openslide.OpenSlideError
        self._read_metadata(openslide)

    def _read(self, x: int, y: int, level: int, w: int, h: int) -> np.ndarray:
        try:
            region = self._handle.read_region((x, y), level, (w, h))
        except self._error as error:
            raise SlideError(
                f"slide {self.path}: damaged at x={x}, y={y}, level {level}, {w} x {h} px: {error}"
            ) from error
        return on_white(np.asarray(region))

    def _read_metadata(self, openslide: object) -> None:
        properties = self._handle.properties
        self._set_mpp(
            _number(properties.get("openslide.mpp-x")),
            _number(properties.get("openslide.mpp-y", properties.get("openslide.mpp-x"))),
            "openslide.mpp",
        )
        if self.mpp is None:
            aperio = _number(properties.get("aperio.MPP"))
            self._set_mpp(aperio, aperio, "aperio.MPP")
        if self.mpp is None:
            microns = {"centimeter": 1e4, "inch": 25400.0}.get(
                properties.get("tiff.ResolutionUnit", "").lower()
            )
            x, y = (_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY")
            if microns and x and y:
                self._set_mpp(microns / x, microns / y, "its TIFF resolution")
        self.objective_power = _number(properties.get("openslide.objective-power"))

    def close(self) -> None:
        self._handle.close()


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
