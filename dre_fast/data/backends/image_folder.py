"""A folder of tile images as one slide."""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from dre_fast.data.backends.array import load_image
from dre_fast.data.optional import need
from dre_fast.data.slides import IMAGE_SUFFIXES, Slide, SlideError

_NUMBER = re.compile(r"\d+")
_XY = re.compile(r"(?<![a-z])x[=_-]?(\d+)[^0-9]*?(?<![a-z])y[=_-]?(\d+)", re.IGNORECASE)
_YX = re.compile(r"(?<![a-z])y[=_-]?(\d+)[^0-9]*?(?<![a-z])x[=_-]?(\d+)", re.IGNORECASE)
_CELL = re.compile(
    r"(?<![a-z])r(?:ow)?[=_-]?(\d+)[^0-9]*?(?<![a-z])c(?:ol(?:umn)?)?[=_-]?(\d+)", re.IGNORECASE
)
# Decoded images kept: a read that crosses tile borders, and the next one, touch a handful.
KEPT_IMAGES = 16


class ImageFolderSlide(Slide):
    """The images of a folder laid out on one canvas, level 0 only, white where there is none.

    Where an image lies is read from its name, by the first rule that fits every name:
    ``x512_y1024`` (also ``y.._x..``): level-0 pixels; ``r3_c5`` / ``row3_col5``: row and column; two or more
    numbers: the last two are x and y (``512_1024.png``, ``slide7_512_1024.jpg``), pixels, or columns and rows
    when neighbours would otherwise lie closer than a tenth of an image; fewer numbers in every name: a square
    grid in the natural order of the names.

    Raises:
        SlideError: no images, names of which only some carry coordinates, or two images at one place.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise SlideError(f"slide {folder}: backend 'images' needs a folder of tile images")
        files = sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES), key=_natural)
        if not files:
            raise SlideError(
                f"slide {folder}: no tile images in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})"
            )
        self._files = files
        sizes = _image_sizes(files)
        cell = sizes.max(axis=0)
        self._origins = _layout(folder, files, cell)
        corners = self._origins + sizes
        super().__init__(folder, [tuple(corners.max(axis=0).tolist())], [1.0])
        self._corners = corners
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self.tile_origins = self._origins
        uniform = bool((sizes == cell).all()) and cell[0] == cell[1]
        self.tile_extent = int(cell[0]) if uniform else 0
        self.mpp_note = "a folder of images states none"

    def _read(self, x: int, y: int, level: int, w: int, h: int) -> np.ndarray:
        out = np.full((h, w, 3), 255, dtype=np.uint8)
        low, high = np.array([x, y]), np.array([x + w, y + h])
        for i in np.flatnonzero(((self._origins < high) & (self._corners > low)).all(axis=1)):
            pixels = self._image(int(i))
            from_x, from_y = np.maximum(self._origins[i], low)
            to_x, to_y = np.minimum(self._corners[i], high)
            ox, oy = self._origins[i]
            out[from_y - y : to_y - y, from_x - x : to_x - x] = pixels[
                from_y - oy : to_y - oy, from_x - ox : to_x - ox
            ]
        return out

    def _image(self, index: int) -> np.ndarray:
        with self._lock:
            if index in self._kept:
                self._kept.move_to_end(index)
                return self._kept[index]
        pixels = load_image(self._files[index])
        with self._lock:
            self._kept[index] = pixels
            while len(self._kept) > KEPT_IMAGES:
                self._kept.popitem(last=False)
        return pixels

    def close(self) -> None:
        self._kept.clear()


def _image_sizes(files: list[Path]) -> np.ndarray:
    image = need("PIL.Image", "wsi")
    sizes = np.empty((len(files), 2), dtype=np.int64)
    for i, file in enumerate(files):
        try:
            with image.open(file) as opened:
                sizes[i] = opened.size
        except (OSError, SyntaxError) as error:
            raise SlideError(f"slide {file.parent}: {file.name} is not a readable image: {error}") from error
    return sizes


def _layout(folder: Path, files: list[Path], cell: np.ndarray) -> np.ndarray:
    """Top-left corners int64 [N,2] in level-0 pixels."""
    stems = [f.stem for f in files]
    for pattern, swap, in_cells in ((_XY, False, False), (_YX, True, False), (_CELL, True, True)):
        found = [pattern.search(stem) for stem in stems]
        if all(found):
            places = np.array([[int(m[1]), int(m[2])] for m in found if m], dtype=np.int64)
            places = places[:, ::-1].copy() if swap else places
            return _distinct(folder, files, places * cell if in_cells else places)
    numbers = [_NUMBER.findall(stem) for stem in stems]
    with_two = [len(n) >= 2 for n in numbers]
    if all(with_two):
        places = np.array([[int(n[-2]), int(n[-1])] for n in numbers], dtype=np.int64)
        return _distinct(folder, files, places * cell if _are_cells(places, cell) else places)
    if any(with_two):
        odd = files[with_two.index(False)].name
        raise SlideError(f"slide {folder}: {odd} carries no coordinates while other images of the folder do")
    columns = math.ceil(math.sqrt(len(files)))
    index = np.arange(len(files), dtype=np.int64)
    return np.stack([index % columns, index // columns], axis=1) * cell


def _are_cells(places: np.ndarray, cell: np.ndarray) -> bool:
    """True when the numbers count columns and rows: as pixels, neighbours would overlap by more than 90 %."""
    for axis in range(2):
        gaps = np.diff(np.unique(places[:, axis]))
        if len(gaps) and gaps.min() * 10 < cell[axis]:
            return True
    return False


def _distinct(folder: Path, files: list[Path], places: np.ndarray) -> np.ndarray:
    _, first, counts = np.unique(places, axis=0, return_index=True, return_counts=True)
    if (counts > 1).any():
        place = places[first[counts > 1][0]]
        same = [files[i].name for i in np.flatnonzero((places == place).all(axis=1))[:2]]
        raise SlideError(f"slide {folder}: {same[0]} and {same[1]} lie at the same place {place.tolist()}")
    return places


def _natural(path: Path) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]
