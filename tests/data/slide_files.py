"""Slides with known content, drawn by the tests that read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile


def pattern(width: int, height: int) -> np.ndarray:
    """uint8 [height,width,3] that tells its own position: red is x mod 251, green y mod 241, blue the tissue
    stain.

    Every pixel is saturated enough to count as tissue.
    """
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x % 251, y % 241, 255 * ((x // 64 + y // 64) % 2)], axis=-1).astype(np.uint8)


def smooth(width: int, height: int) -> np.ndarray:
    """uint8 [height,width,3] without sharp edges: a slope along x, one along y, a slow wave."""
    y, x = np.mgrid[0:height, 0:width]
    wave = 128 + 100 * np.sin(2 * np.pi * x / 400) * np.cos(2 * np.pi * y / 500)
    return np.stack([255 * x / width, 255 * y / height, wave], axis=-1).round().astype(np.uint8)


def halve(pixels: np.ndarray) -> np.ndarray:
    """Exact 2 x 2 means, the odd last row and column dropped."""
    h, w = pixels.shape[0] // 2, pixels.shape[1] // 2
    blocks = pixels[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3)
    return (blocks.mean(axis=(1, 3)) + 0.5).astype(np.uint8)


def write_pyramid(
    path: Path,
    pixels: np.ndarray,
    mpp: float | None = 0.25,
    factors: tuple[int, ...] = (1, 2, 4),
    compression: str | None = None,
    resolution: tuple[float, float] | None = None,
    unit: str = "CENTIMETER",
) -> Path:
    """Writes a tiled TIFF whose level ``i`` is smaller by ``factors[i]`` (powers of two)."""
    levels = [pixels]
    while len(levels) < len(factors):
        level = levels[-1]
        for _ in range(int(np.log2(factors[len(levels)] // factors[len(levels) - 1]))):
            level = halve(level)
        levels.append(level)
    with tifffile.TiffWriter(path) as file:
        for i, (level, factor) in enumerate(zip(levels, factors, strict=True)):
            options = {}
            if resolution is not None:
                options = {"resolution": resolution, "resolutionunit": unit}
            elif mpp is not None:
                options = {"resolution": (1e4 / (mpp * factor),) * 2, "resolutionunit": unit}
            file.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression=compression,
                subfiletype=int(i > 0),
                metadata=None,
                **options,
            )
    return path


def stained(width: int, height: int, blobs: list[tuple[int, int, int, int]]) -> np.ndarray:
    """Glass (uint8, near white, slightly noisy) with pink rectangles (x, y, w, h)."""
    noise = np.random.default_rng(0).integers(-3, 4, (height, width, 1))
    image = np.broadcast_to(np.array([243, 242, 244]) + noise, (height, width, 3)).astype(np.uint8).copy()
    for x, y, w, h in blobs:
        image[y : y + h, x : x + w] = (205, 120, 170)
    return image
