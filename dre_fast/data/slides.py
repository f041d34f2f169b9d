"""Whole-slide images behind one small interface, whatever file or library they come from.

Coordinates: ``x`` and ``y`` are always pixels of level 0 (full resolution), ``w``, ``h`` and ``size`` pixels
of the level that is read, ``mpp`` is microns per pixel of level 0. Everything outside the slide, or
transparent, is white.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType

import numpy as np

from dre_fast.data.resample import scale_tile
from dre_fast.ops.planes import put_planar

BACKENDS = ("auto", "openslide", "cucim", "images", "array")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
SLIDE_SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".czi", ".dcm"}
)

# Scanners make 0.1 to 10 um/px. Resolution tags outside this range are the 72 or 300 dpi that image editors
# write.
PLAUSIBLE_MPP = (0.01, 20.0)
SQUARE_TOLERANCE = 0.01
# Source pixels per side of the blocks a thumbnail is made from: bounds its memory whatever the slide's size.
THUMBNAIL_BLOCK = 2048


class SlideError(ValueError):
    """A slide cannot be opened, read or tiled. The message names the slide and what to do."""


class Slide(ABC):
    """One open slide.

    Attributes:
        path: where it was opened from.
        level_dimensions: (width, height) of every level in pixels, level 0 first.
        level_downsamples: level-0 pixels per pixel of every level; 1.0 for level 0.
        mpp: microns per pixel of level 0, None where the file does not state it. May be set.
        mpp_note: where ``mpp`` comes from, or why there is none.
        objective_power: nominal magnification from the file, None where absent. Never turned into ``mpp``.
        tile_origins: int64 [N,2], the top-left corners of the stored images when the slide is a folder of
            tile images, else None.
        tile_extent: side of those images in pixels, 0 when they are not all square and of one size.
    """

    def __init__(self, path: Path, level_dimensions: list[tuple[int, int]], level_downsamples: list[float]):
        self.path = path
        self.level_dimensions = tuple((int(w), int(h)) for w, h in level_dimensions)
        self.level_downsamples = tuple(float(d) for d in level_downsamples)
        self.mpp: float | None = None
        self.mpp_note = "it has no resolution metadata"
        self.objective_power: float | None = None
        self.tile_origins: np.ndarray | None = None
        self.tile_extent = 0

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height) of level 0 in pixels."""
        return self.level_dimensions[0]

    @property
    def slide_id(self) -> str:
        """The file or folder name without its suffix."""
        return self.path.name if self.path.is_dir() else self.path.stem

    @abstractmethod
    def _read(self, x: int, y: int, level: int, w: int, h: int) -> np.ndarray:
        """uint8 [h,w,3], or [h,w,4] with a last channel to ignore; white outside the slide."""

    def read_region(self, x: int, y: int, level: int, w: int, h: int) -> np.ndarray:
        """Reads ``w`` x ``h`` pixels of ``level`` whose top-left corner is at level-0 pixel (``x``, ``y``).

        Returns:
            uint8 [h,w,3], RGB, white outside the slide.

        Raises:
            SlideError: there is no such level, or the file is damaged at that place.
        """
        self._check_level(level)
        return np.ascontiguousarray(self._read(int(x), int(y), level, int(w), int(h))[..., :3])

    def read_tiles(self, coords: np.ndarray, level: int, size: int) -> np.ndarray:
        """Reads square tiles of ``size`` pixels of ``level``.

        Args:
            coords: int64 [N,2], level-0 (x, y) of the top-left corners.

        Returns:
            uint8 [N,size,size,3].

        Raises:
            SlideError: as ``read_region``.
        """
        self._check_level(level)
        out = np.empty((len(coords), 3, size, size), dtype=np.uint8)
        self.read_planar(coords, level, size, out)
        return np.ascontiguousarray(np.moveaxis(out, 1, 3))

    def read_planar(self, coords: np.ndarray, level: int, size: int, out: np.ndarray) -> None:
        """Reads tiles as ``read_tiles`` does, scaled to the size of ``out``, uint8 [N,3,P,P], which is
        filled.

        Raises:
            SlideError: as ``read_region``.
        """
        self._check_level(level)
        for (x, y), target in zip(np.asarray(coords).tolist(), out, strict=True):
            put_planar(scale_tile(self._read(x, y, level, size, size), out.shape[-1]), target)

    def thumbnail(self, max_px: int = 1024) -> np.ndarray:
        """The whole slide, area-averaged to at most ``max_px`` pixels on its longer side (never enlarged).

        Returns:
            uint8 [h,w,3]. Memory stays bounded for slides without a pyramid, too.
        """
        from PIL import Image

        width, height = self.dimensions
        scale = min(1.0, max_px / max(width, height))
        out_w, out_h = max(1, round(width * scale)), max(1, round(height * scale))
        level = self.best_level(min(width / out_w, height / out_h))
        level_w, level_h = self.level_dimensions[level]
        fx, fy = level_w / out_w, level_h / out_h
        out = np.empty((out_h, out_w, 3), dtype=np.uint8)
        step_x, step_y = max(1, int(THUMBNAIL_BLOCK / fx)), max(1, int(THUMBNAIL_BLOCK / fy))
        for top in range(0, out_h, step_y):
            bottom = min(top + step_y, out_h)
            for left in range(0, out_w, step_x):
                right = min(left + step_x, out_w)
                x0, y0 = math.floor(left * fx), math.floor(top * fy)
                x1 = min(level_w, math.ceil(right * fx))
                y1 = min(level_h, math.ceil(bottom * fy))
                downsample = self.level_downsamples[level]
                block = self._read(
                    round(x0 * downsample), round(y0 * downsample), level, max(1, x1 - x0), max(1, y1 - y0)
                )
                box = (left * fx - x0, top * fy - y0, right * fx - x0, bottom * fy - y0)
                box = (*box[:2], min(box[2], block.shape[1]), min(box[3], block.shape[0]))
                small = Image.fromarray(np.ascontiguousarray(block[..., :3])).resize(
                    (right - left, bottom - top), Image.Resampling.BOX, box=box
                )
                out[top:bottom, left:right] = np.asarray(small)
        return out

    def best_level(self, downsample: float) -> int:
        """The coarsest level that is not coarser than ``downsample`` (0.1 % of rounding allowed)."""
        fitting = [i for i, d in enumerate(self.level_downsamples) if d <= downsample * 1.001]
        return max(fitting, key=lambda i: self.level_downsamples[i], default=0)

    def require_mpp(self) -> float:
        """``mpp``, or a SlideError that says how to give it."""
        if self.mpp is not None:
            return self.mpp
        objective = (
            f" Its objective power is {self.objective_power:g}x, which does not fix the pixel size."
            if self.objective_power
            else ""
        )
        raise SlideError(
            f"slide {self.path}: unknown microns per pixel: {self.mpp_note}.{objective} Give them with --mpp "
            "(mpp=... in Python); 20x scans usually have 0.5, 40x scans 0.25."
        )

    def close(self) -> None:  # noqa: B027 - a slide in memory has nothing to release
        """Releases the file. The slide cannot be read afterwards."""

    def _check_level(self, level: int) -> None:
        if not 0 <= level < len(self.level_dimensions):
            raise SlideError(
                f"slide {self.path}: no level {level}, it has levels 0 to {len(self.level_dimensions) - 1}"
            )

    def _set_mpp(self, x: float | None, y: float | None, source: str) -> None:
        """Takes over what the file states, when it can be trusted; otherwise notes why it is not."""
        if x is None or y is None:
            return
        if not all(math.isfinite(v) and PLAUSIBLE_MPP[0] <= v <= PLAUSIBLE_MPP[1] for v in (x, y)):
            self.mpp_note = f"{source} gives {x:g} x {y:g} um, which no scanner makes"
        elif abs(x - y) > SQUARE_TOLERANCE * min(x, y):
            self.mpp_note = f"{source} gives {x:g} x {y:g} um, so its pixels are not square"
        else:
            self.mpp, self.mpp_note = (x + y) / 2, source

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        w, h = self.dimensions
        mpp = "unknown mpp" if self.mpp is None else f"{self.mpp:g} um/px"
        return (
            f"{type(self).__name__}({self.path.name}, {w} x {h}, {len(self.level_dimensions)} levels, {mpp})"
        )


def open_slide(
    path: str | Path | np.ndarray, backend: str = "auto", mpp: float | None = None, num_workers: int = 1
) -> Slide:
    """Opens a slide.

    Args:
        path: a slide file, a folder of tile images, an image or ``.npy`` file, or a uint8 array [H,W,3].
        backend: ``"openslide"``, ``"cucim"``, ``"images"`` (folder of tiles), ``"array"`` (``.npy``, PNG,
            JPEG or an array in memory), or ``"auto"``: images for a folder, array for an array, ``.npy`` or
            plain image file, openslide for the rest.
        mpp: microns per pixel of level 0. Overrides what the file states; needed where it states nothing.
        num_workers: threads that decode the tiles of one call (cuCIM only).

    Raises:
        SlideError: the file is missing, damaged or of an unknown format, or ``mpp`` is not positive.
        ModuleNotFoundError: the library of the backend is not installed; says what to install.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown slide backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
        raise SlideError(f"slide {_name(path)}: mpp must be a positive number, got {mpp}")
    slide = _open(path, _choose_backend(path) if backend == "auto" else backend, num_workers)
    if mpp is not None:
        slide.mpp, slide.mpp_note = float(mpp), "given by the caller"
    return slide


def on_white(pixels: np.ndarray) -> np.ndarray:
    """Puts straight-alpha RGBA [...,4], RGB [...,3] or grey [h,w] uint8 pixels on white.

    Returns:
        uint8 [...,3], or the RGBA pixels themselves where all are opaque (their alpha is to be ignored).
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[-1] == 1:
        return np.repeat(pixels, 3, axis=-1)
    if pixels.shape[-1] == 3 or pixels[..., 3].min(initial=255) == 255:
        return pixels
    weight = pixels[..., 3:].astype(np.uint16)
    blended = pixels[..., :3] * weight + 255 * (255 - weight)
    return ((blended + 127) // 255).astype(np.uint8)


def _choose_backend(path: str | Path | np.ndarray) -> str:
    if isinstance(path, np.ndarray):
        return "array"
    path = Path(path)
    if path.is_dir():
        return "images"
    return "array" if path.suffix.lower() in IMAGE_SUFFIXES | {".npy"} else "openslide"


def _open(path: str | Path | np.ndarray, backend: str, num_workers: int) -> Slide:
    if backend == "array":
        from dre_fast.data.backends.array import open_array

        return open_array(path)
    if isinstance(path, np.ndarray):
        raise ValueError(f"an array in memory is read by backend 'array' or 'auto', not {backend!r}")
    path = Path(path)
    if not path.exists():
        raise SlideError(f"slide {path}: no such file or folder")
    if backend == "images":
        from dre_fast.data.backends.image_folder import ImageFolderSlide

        return ImageFolderSlide(path)
    if path.is_dir():
        raise SlideError(f"slide {path}: is a folder; backend {backend!r} reads files (folders: 'images')")
    if backend == "cucim":
        from dre_fast.data.backends.cucim_reader import CuCIMSlide

        return CuCIMSlide(path, num_workers)
    from dre_fast.data.backends.openslide_reader import OpenSlideSlide

    return OpenSlideSlide(path)


def _name(path: str | Path | np.ndarray) -> str:
    return "<array>" if isinstance(path, np.ndarray) else str(path)
