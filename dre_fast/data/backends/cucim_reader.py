"""Slides through cuCIM: tiled TIFF and Aperio SVS, decoded on the CPU by the threads that ask for tiles."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dre_fast.data.optional import need
from dre_fast.data.resample import scale_tile
from dre_fast.data.slides import Slide, SlideError, on_white
from dre_fast.ops.planes import put_planar


class CuCIMSlide(Slide):
    """A slide file read by cuCIM, safe to share between threads, not between processes.

    Tile by tile: cuCIM decodes a region in the thread that asks for it, while Python's other threads run, in less time
    than its own loader of batches takes for one, which starts threads at every call and stands still between calls.

    Three habits of cuCIM are corrected or to be known (seen with 26.10): outside the slide it paints black
    for plain TIFF and white for SVS (here always white); it cuts positions down to whole pixels of the level
    (here they are rounded, so that both readers agree to half a pixel); and a damaged tile is not reported as
    an error, only printed to stderr, and comes back with undefined content. Check doubtful files with the
    openslide backend.
    """

    def __init__(self, path: Path, num_workers: int = 1):
        self._clara = need("cucim.clara", "cucim")
        handle = self._open(path)
        resolutions, metadata = handle.resolutions, handle.metadata
        super().__init__(path, resolutions["level_dimensions"], resolutions["level_downsamples"])
        self._idle = deque([handle])
        self._workers = max(1, num_workers)
        self._threads = ThreadPoolExecutor(self._workers, "tiles") if self._workers > 1 else None
        self._read_metadata(handle, metadata)

    def _read(self, x: int, y: int, level: int, w: int, h: int) -> np.ndarray:
        found: list[np.ndarray] = []
        self._each(np.array([[x, y]]), level, w, h, lambda _, pixels: found.append(pixels))
        return found[0]

    def read_planar(self, coords: np.ndarray, level: int, size: int, out: np.ndarray) -> None:
        self._check_level(level)
        if self._threads is None or len(coords) < 2:
            self._fill(coords, level, size, out)
            return
        edges = np.linspace(0, len(coords), min(self._workers, len(coords)) + 1).astype(int).tolist()
        shares = [slice(first, last) for first, last in pairwise(edges)]
        done = [self._threads.submit(self._fill, coords[part], level, size, out[part]) for part in shares]
        wait(done)  # all of them, before an error is raised: they write into out
        for each in done:
            each.result()

    def _fill(self, coords: np.ndarray, level: int, size: int, out: np.ndarray) -> None:
        if size == out.shape[-1]:
            self._each(coords, level, size, size, lambda tile, pixels: put_planar(pixels, out[tile]))
        else:
            side = out.shape[-1]
            self._each(
                coords,
                level,
                size,
                size,
                lambda tile, pixels: put_planar(scale_tile(pixels, side), out[tile]),
            )

    def _each(
        self, coords: np.ndarray, level: int, w: int, h: int, use: Callable[[int, np.ndarray], None]
    ) -> None:
        """Calls ``use`` with the number and the pixels of each region, uint8 [h,w,3 or 4], white outside the slide.

        What is the same for all is done once, and what few need is left out for the others: while Python works for one
        thread it works for no other, and a thread that waits for it sleeps for longer than that.
        """
        downsample = self.level_downsamples[level]
        corners = np.round(np.asarray(coords) / downsample).astype(np.int64)
        # The first level-0 pixel that cuCIM maps onto the wanted pixel of the level.
        places = [(x, y) for x, y in np.ceil(corners * downsample).astype(np.int64).tolist()]
        beyond = (corners < 0) | (corners + np.array([w, h]) > self.level_dimensions[level])
        outside = set(np.flatnonzero(beyond.any(axis=1)).tolist())
        size, colours = (w, h), (h, w, 3)
        handle = self._take_handle()
        try:
            for tile, place in enumerate(places):
                try:
                    pixels = np.asarray(handle.read_region(place, size, level))
                except (ValueError, RuntimeError, OSError) as error:
                    x, y = coords[tile].tolist()
                    raise SlideError(
                        f"slide {self.path}: cuCIM failed to read {w} x {h} px at x={x}, y={y}, level {level}: {error}"
                    ) from error
                if pixels.shape != colours:
                    pixels = on_white(pixels.reshape(h, w, -1))
                if tile in outside:
                    px, py = corners[tile].tolist()
                    self._whiten_outside(pixels, px, py, level)
                use(tile, pixels)
        finally:
            self._idle.append(handle)

    def _open(self, path: Path) -> Any:
        try:
            return self._clara.CuImage(str(path))
        except (ValueError, RuntimeError, OSError) as error:
            raise SlideError(
                f"slide {path}: cuCIM cannot read it ({error}): it is damaged, incompletely downloaded, "
                "or a format for the openslide backend"
            ) from error

    def _take_handle(self) -> Any:
        """A handle that no other thread has: those of slides in strips share a state, and mix up their pixels."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._open(self.path)

    def _whiten_outside(self, tile: np.ndarray, px: int, py: int, level: int) -> None:
        level_w, level_h = self.level_dimensions[level]
        h, w = tile.shape[:2]
        left, top = min(w, max(0, -px)), min(h, max(0, -py))
        right, bottom = max(0, min(w, level_w - px)), max(0, min(h, level_h - py))
        tile[:top] = 255
        tile[bottom:] = 255
        tile[:, :left] = 255
        tile[:, right:] = 255

    def _read_metadata(self, handle: Any, metadata: dict[str, Any]) -> None:
        aperio = metadata.get("aperio", {})
        if "MPP" in aperio:
            mpp = float(aperio["MPP"])
            self._set_mpp(mpp, mpp, "aperio.MPP")
        else:
            sizes = dict(zip(handle.dims, zip(handle.spacing(), handle.spacing_units())))
            if sizes["X"][1] == sizes["Y"][1] == "micrometer":
                self._set_mpp(float(sizes["X"][0]), float(sizes["Y"][0]), "its TIFF resolution")
        if "AppMag" in aperio:
            self.objective_power = float(aperio["AppMag"])

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        while self._idle:
            self._idle.pop().close()
