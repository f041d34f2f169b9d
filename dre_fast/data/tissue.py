"""Where the tissue of a slide is: colour saturation against Otsu's threshold on a small image of it."""

from __future__ import annotations

import numpy as np

from dre_fast.data.slides import Slide

# Pixel size of the tissue mask: fine enough for single glands, coarse enough that any slide takes seconds.
MASK_UM = 8.0
MASK_MAX_PX = 4096
# A tile is judged by at least this many mask pixels a side.
PIXELS_PER_TILE = 8
# Otsu splits whatever it is given. On bare glass it would call noise tissue, on a slide full of tissue it
# would call pale stroma glass, so the threshold stays within what glass and stained tissue can be.
SATURATION_RANGE = (0.06, 0.20)
# Scanner fill and dark edges: their saturation is noise.
BLACK = 30
# Side of the neighbourhood that votes on each pixel: drops specks and closes pinholes below half of it.
VOTE = 5


def tissue_mask(slide: Slide, tile_um: float, slide_mpp: float) -> np.ndarray:
    """Tissue mask of a slide.

    Args:
        slide: an open slide.
        tile_um: side of a tile in microns; the mask resolves it into at least ``PIXELS_PER_TILE`` pixels,
            unless the slide itself has fewer.
        slide_mpp: microns per pixel of level 0.

    Returns:
        bool [h,w] that covers the slide exactly, whatever the ratio of ``h`` and ``w`` to its pixels.
    """
    mask_um = min(MASK_UM, tile_um / PIXELS_PER_TILE)
    longest = max(slide.dimensions) * slide_mpp / mask_um
    return saturation_mask(slide.thumbnail(max(1, min(MASK_MAX_PX, round(longest)))))


def saturation_mask(image: np.ndarray) -> np.ndarray:
    """Coloured pixels of uint8 [h,w,3] as bool [h,w].

    HSV saturation (max - min) / max is compared to Otsu's threshold ("A threshold selection method from
    gray-level histograms", Otsu 1979), kept within ``SATURATION_RANGE``, then every pixel takes the majority
    of its ``VOTE`` x ``VOTE`` neighbourhood.
    """
    high = image.max(axis=-1).astype(np.int32)
    low = image.min(axis=-1).astype(np.int32)
    saturation = ((high - low) * 255 // np.maximum(high, 1)).astype(np.uint8)
    bright = high >= BLACK
    threshold = np.clip(otsu(saturation[bright]), SATURATION_RANGE[0] * 255, SATURATION_RANGE[1] * 255)
    return majority((saturation > threshold) & bright, VOTE)


def otsu(values: np.ndarray) -> int:
    """Otsu's threshold of uint8 values: the ``t`` that separates <= t from > t best; 0 without spread."""
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    weight = np.cumsum(counts)
    total = weight[-1]
    moment = np.cumsum(counts * np.arange(256))
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (moment[-1] * weight - moment * total) ** 2 / (weight * (total - weight))
    return int(np.argmax(np.nan_to_num(between[:-1], nan=0.0, posinf=0.0)))


def majority(mask: np.ndarray, side: int) -> np.ndarray:
    """True where more than half of the ``side`` x ``side`` neighbourhood (cut at the borders) is true."""
    half = side // 2
    h, w = mask.shape
    sums = integral(mask)
    top, bottom = np.clip(np.arange(h) - half, 0, h), np.clip(np.arange(h) + half + 1, 0, h)
    left, right = np.clip(np.arange(w) - half, 0, w), np.clip(np.arange(w) + half + 1, 0, w)
    rows = sums[bottom] - sums[top]
    inside = rows[:, right] - rows[:, left]
    area = (bottom - top)[:, None] * (right - left)[None, :]
    return inside * 2 > area


def integral(mask: np.ndarray) -> np.ndarray:
    """Integral image float64 [h+1,w+1]: entry (i, j) is the sum of ``mask[:i, :j]``."""
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    sums[1:, 1:] = mask.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    return sums


def tissue_fraction(
    mask: np.ndarray, dimensions: tuple[int, int], coords: np.ndarray, size: int
) -> np.ndarray:
    """Fraction of each tile that is tissue, exact for the piecewise constant mask.

    Args:
        mask: bool [h,w] over the whole slide.
        dimensions: (width, height) of the slide at level 0.
        coords: int64 [N,2] top-left corners at level 0.
        size: side of a tile in level-0 pixels; what hangs over the edge counts as glass.

    Returns:
        float64 [N] in 0..1.
    """
    sums = integral(mask)
    scale = np.array([mask.shape[1] / dimensions[0], mask.shape[0] / dimensions[1]])
    low, high = coords * scale, (coords + size) * scale
    inside = (
        _interpolate(sums, high[:, 0], high[:, 1])
        - _interpolate(sums, low[:, 0], high[:, 1])
        - _interpolate(sums, high[:, 0], low[:, 1])
        + _interpolate(sums, low[:, 0], low[:, 1])
    )
    return np.clip(inside / (size * size * scale[0] * scale[1]), 0.0, 1.0)


def _interpolate(sums: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Between the nodes of an integral image the sum over a constant pixel is bilinear, so this is no
    # approximation.
    h, w = sums.shape
    x, y = np.clip(x, 0, w - 1), np.clip(y, 0, h - 1)
    i = np.minimum(y.astype(np.int64), max(h - 2, 0))
    j = np.minimum(x.astype(np.int64), max(w - 2, 0))
    fy, fx = y - i, x - j
    top = sums[i, j] * (1 - fx) + sums[i, j + 1] * fx
    bottom = sums[i + 1, j] * (1 - fx) + sums[i + 1, j + 1] * fx
    return top * (1 - fy) + bottom * fy
