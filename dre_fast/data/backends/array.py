"""Slides that are one image: a numpy array, a .npy file (memory-mapped), or a PNG or JPEG."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from dre_fast.data.optional import need
from dre_fast.data.slides import Slide, SlideError, on_white


class ArraySlide(Slide):
    """A single-level slide over ``pixels``, uint8 [H,W,3], [H,W,4] (alpha on white), [H,W,1] or [H,W]."""

    def __init__(self, pixels: np.ndarray, path: Path):
        if pixels.dtype != np.uint8:
            raise SlideError(f"slide {path}: pixels must be uint8 (0 to 255), got {pixels.dtype}")
        channels = pixels.shape[2] if pixels.ndim == 3 else 1
        if pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in pixels.shape:
            raise SlideError(f"slide {path}: expected pixels [H,W,3], [H,W,4] or [H,W], got {pixels.shape}")
        super().__init__(path, [(pixels.shape[1], pixels.shape[0])], [1.0])
        self._pixels = pixels
        self.mpp_note = "an array or plain image states none"

    def _read(self, x: int, y: int, level: int, w: int, h: int) -> np.ndarray:
        out = np.full((h, w, 3), 255, dtype=np.uint8)
        width, height = self.dimensions
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + w, width), min(y + h, height)
        if left < right and top < bottom:
            out[top - y : bottom - y, left - x : right - x] = on_white(self._pixels[top:bottom, left:right])[
                ..., :3
            ]
        return out


def open_array(source: str | Path | np.ndarray) -> ArraySlide:
    """Opens an array, a ``.npy`` file or an image file as a slide."""
    if isinstance(source, np.ndarray):
        return ArraySlide(source, Path("<array>"))
    path = Path(source)
    if not path.is_file():
        raise SlideError(f"slide {path}: no such file")
    if path.suffix.lower() == ".npy":
        try:
            return ArraySlide(np.load(path, mmap_mode="r", allow_pickle=False), path)
        except (ValueError, OSError, EOFError) as error:
            if isinstance(error, SlideError):
                raise
            raise SlideError(f"slide {path}: not a readable .npy file: {error}") from error
    return ArraySlide(load_image(path), path)


def load_image(path: Path) -> np.ndarray:
    """Pixels of an image file, uint8 [H,W,3], on white."""
    image = need("PIL.Image", "wsi")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images as a defence of web servers; a region of a slide is large by
            # nature.
            warnings.simplefilter("ignore", image.DecompressionBombWarning)
            with image.open(path) as opened:
                has_alpha = "A" in opened.getbands() or "transparency" in opened.info
                return on_white(np.asarray(opened.convert("RGBA" if has_alpha else "RGB")))[..., :3]
    except (OSError, SyntaxError, image.DecompressionBombError) as error:
        raise SlideError(f"slide {path}: not a readable image: {error}") from error
