"""Colours for many classes that differ as far as their number allows."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Neither so light nor so dark nor so grey that a colour is lost on a slide; in OKLab.
_LIGHTNESS, _CHROMA, _LEVELS = (0.46, 0.82), 0.12, 18
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@lru_cache(maxsize=16)
def _ordered(count: int) -> Array:
    levels = np.linspace(0, 1, _LEVELS)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = to_lab(rgb)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    kept = (lab[:, 0] >= _LIGHTNESS[0]) & (lab[:, 0] <= _LIGHTNESS[1]) & (chroma >= _CHROMA)
    rgb, lab = rgb[kept], lab[kept]
    chosen = [int(np.argmin(((rgb - (0.0, 0.4, 1.0)) ** 2).sum(1)))]  # a blue
    nearest = ((lab - lab[chosen[0]]) ** 2).sum(1)
    for _ in range(min(count, len(rgb)) - 1):
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, ((lab - lab[chosen[-1]]) ** 2).sum(1))
    return rgb[chosen]


def distinct_colours(count: int) -> Array:
    """``count`` colours, each as far from all before it as can be in OKLab, so a longer list begins with a shorter one.

    Past some two thousand they repeat.

    Returns:
        sRGB float64 [count, 3] in [0, 1].
    """
    found = _ordered(max(count, 1))
    return found[np.arange(count) % len(found)]


def to_lab(rgb: Array) -> Array:
    """sRGB [*, 3] in [0, 1] -> OKLab [*, 3] (Ottosson 2020, "A perceptual color space for image processing")."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_CONES.T) @ _TO_LAB.T
