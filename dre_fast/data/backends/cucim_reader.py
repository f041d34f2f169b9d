"""Slides through cuCIM: tiled TIFF and Aperio SVS, batches decoded by several threads, no GPU needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dre_fast.data.optional import need
from dre_fast.data.resample import put_planar, scale_tile
from dre_fast.data.slides import Slide, SlideError, on_white

# Tiles per batch: while one is taken over, the threads decode the next ones; larger batches overlap less.
BATCH = 16


class CuCIMSlide(Slide):
    """A slide file read by cuCIM.

    Three habits of cuCIM are corrected or to be known (seen with 26.10): outside the slide it paints black
    for plain TIFF and white for SVS (here always white); it cuts positions down to whole pixels of the level
    (here they are rounded, so that both readers agree to half a pixel); and a damaged tile is not reported as
    an error, only printed to stderr, and comes back with undefined content. Check doubtful files with the
    openslide backend.
    """

    def __init__(self, path: Path, num_workers: int = 1):
        clara = need("cucim.clara", "cucim")
        try:
            self._handle: Any = clara.CuImage(str(path))
            resolutions = self._handle.resolutions
            metadata = self._handle.metadata
        except (ValueError, RuntimeError, OSError) as error:
            raise SlideError(
                f"slide {path}: cuCIM cannot read it ({error}): it is damaged, incompletely downloaded, "
                "or a format for the openslide backend"
            ) from error
        super().__init__(path, resolutions["level_dimensions"], resolutions["level_downsamples"])
        self._workers = max(1, num_workers)
        self._read_metadata(metadata)

    def _read(self, x: int, y: int, level: int, w: int, h: int) -> np.ndarray:
        return next(self._read_batches([(x, y)], level, w, h))[0]

    def read_planar(self, coords: np.ndarray, level: int, size: int, out: np.ndarray) -> None:
        self._check_level(level)
        corners = [(int(x), int(y)) for x, y in np.asarray(coords).tolist()]
        targets = iter(out)
        for tiles in self._read_batches(corners, level, size, size):
            for tile in tiles:
                put_planar(scale_tile(tile, out.shape[-1]), next(targets))

    def _read_batches(
        self, corners: list[tuple[int, int]], level: int, w: int, h: int
    ) -> Iterator[np.ndarray]:
        """The regions in order, uint8 [n,h,w,3], white outside the slide."""
        if not corners:
            return
        downsample = self.level_downsamples[level]
        pixels = [(round(x / downsample), round(y / downsample)) for x, y in corners]
        # The first level-0 pixel that cuCIM maps onto the wanted pixel of the level.
        places = [(math.ceil(px * downsample), math.ceil(py * downsample)) for px, py in pixels]
        done = 0
        try:
            # One region gives an image, several an iterator over batches.
            if len(places) == 1:
                batches: Any = [self._handle.read_region(places[0], (w, h), level)]
            else:
                batches = self._handle.read_region(
                    places, (w, h), level, num_workers=self._workers, batch_size=min(BATCH, len(places))
                )
            for batch in batches:
                tiles = on_white(np.asarray(batch).reshape(-1, h, w, batch.shape[-1]))[..., :3]
                self._whiten_outside(tiles, pixels[done : done + len(tiles)], level)
                done += len(tiles)
                yield tiles
        except (ValueError, RuntimeError, OSError) as error:
            raise SlideError(
                f"slide {self.path}: cuCIM failed to read {len(corners)} regions of {w} x {h} px at level "
                f"{level} from x={corners[0][0]}, y={corners[0][1]} on: {error}"
            ) from error

    def _whiten_outside(self, tiles: np.ndarray, pixels: list[tuple[int, int]], level: int) -> None:
        level_w, level_h = self.level_dimensions[level]
        h, w = tiles.shape[1:3]
        for tile, (px, py) in zip(tiles, pixels, strict=True):
            left, top = min(w, max(0, -px)), min(h, max(0, -py))
            right, bottom = max(0, min(w, level_w - px)), max(0, min(h, level_h - py))
            tile[:top] = 255
            tile[bottom:] = 255
            tile[:, :left] = 255
            tile[:, right:] = 255

    def _read_metadata(self, metadata: dict[str, Any]) -> None:
        aperio = metadata.get("aperio", {})
        if "MPP" in aperio:
            mpp = float(aperio["MPP"])
            self._set_mpp(mpp, mpp, "aperio.MPP")
        else:
            sizes = dict(zip(self._handle.dims, zip(self._handle.spacing(), self._handle.spacing_units())))
            if sizes["X"][1] == sizes["Y"][1] == "micrometer":
                self._set_mpp(float(sizes["X"][0]), float(sizes["Y"][0]), "its TIFF resolution")
        if "AppMag" in aperio:
            self.objective_power = float(aperio["AppMag"])

    def close(self) -> None:
        self._handle.close()
