"""What synthetic tissue is made of: smooth random fields, masks, points, and small stamps that are placed
many times."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatImage = NDArray[np.float32]


# ---------------------------------------------------------------------------------------------------- fields


def resize(image: FloatImage, shape: tuple[int, int]) -> FloatImage:
    """Bicubic resize of a float32 image [h, w] to `shape`."""
    from PIL import Image

    resized = Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.float32)


def smooth(shape: tuple[int, int], scale: float, rng: np.random.Generator) -> FloatImage:
    """Smooth noise of about zero mean and unit deviation that varies over `scale` pixels, float32 [h, w]."""
    coarse = (max(2, round(shape[0] / scale) + 3), max(2, round(shape[1] / scale) + 3))
    return resize(rng.standard_normal(coarse).astype(np.float32), shape)


def tissue_mask(shape: tuple[int, int], rng: np.random.Generator) -> FloatImage:
    """One or two irregular pieces on glass: float32 [h, w] in [0, 1] with a soft edge."""
    height, width = shape
    small = (max(8, height // 8), max(8, width // 8))
    y, x = np.meshgrid(np.linspace(0, 1, small[0]), np.linspace(0, 1, small[1]), indexing="ij")
    wobble = 0.16 * smooth(small, small[0] / 4, rng) + 0.06 * smooth(small, small[0] / 14, rng)
    if rng.random() < 0.5:
        pieces = [
            (
                rng.uniform(0.46, 0.54),
                rng.uniform(0.46, 0.54),
                rng.uniform(0.33, 0.38),
                rng.uniform(0.35, 0.40),
            )
        ]
    else:
        pieces = [
            (
                rng.uniform(0.27, 0.30),
                rng.uniform(0.42, 0.58),
                rng.uniform(0.20, 0.23),
                rng.uniform(0.33, 0.39),
            ),
            (
                rng.uniform(0.72, 0.75),
                rng.uniform(0.42, 0.58),
                rng.uniform(0.18, 0.21),
                rng.uniform(0.28, 0.36),
            ),
        ]
    level = np.full(small, -1.0)
    for cx, cy, rx, ry in pieces:
        level = np.maximum(level, 1.0 - np.hypot((x - cx) / rx, (y - cy) / ry))
    level = level + wobble
    # A margin of glass on every side, whatever the wobble does.
    margin = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))
    level = np.minimum(level, (margin - 0.03) * 6)
    return np.clip(resize((level * 14 + 0.5).astype(np.float32), shape), 0, 1)


def stroma(shape: tuple[int, int], um: float, rng: np.random.Generator) -> FloatImage:
    """Wavy eosinophilic fibres, float32 [h, w]."""
    height, width = shape
    theta = rng.uniform(0, np.pi)
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None, :]
    phase = (x * np.float32(np.cos(theta)) + y * np.float32(np.sin(theta))) * np.float32(
        2 * np.pi / (17 * um)
    )
    phase = phase + 5.0 * smooth(shape, 150 * um, rng) + 1.3 * smooth(shape, 40 * um, rng)
    density = 0.5 + 0.11 * smooth(shape, 120 * um, rng)
    grain = smooth(shape, 3 * um, rng)
    return np.clip(density + 0.10 * np.sin(phase) + 0.05 * grain, 0.05, None).astype(np.float32)


def focus_mask(inside: NDArray[np.bool_], fraction: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """One to three irregular foci that together take `fraction` of the tissue: bool [h, w]."""
    height, width = inside.shape
    small = (max(8, height // 8), max(8, width // 8))
    coarse = inside[:: height // small[0], :: width // small[1]][: small[0], : small[1]]
    ys, xs = np.nonzero(coarse)
    if not len(ys):
        return np.zeros_like(inside)
    seeds = rng.integers(len(ys), size=int(rng.integers(1, 4)))
    score = np.full(coarse.shape, np.inf)
    y, x = np.mgrid[: coarse.shape[0], : coarse.shape[1]]
    for seed in seeds:
        score = np.minimum(score, np.hypot(y - ys[seed], x - xs[seed]) / coarse.shape[0])
    score = score + 0.045 * smooth(coarse.shape, coarse.shape[0] / 9, rng)
    threshold = np.quantile(score[coarse], fraction)
    focus = resize((threshold - score).astype(np.float32), (height, width)) > 0
    return focus & inside


def dilate(mask: NDArray[np.bool_], pixels: int = 24) -> NDArray[np.bool_]:
    """Grows a mask by about `pixels` on every side."""
    grown = mask.copy()
    for axis in (0, 1):
        base = grown.copy()
        for step in (pixels, -pixels, pixels // 2, -(pixels // 2)):
            grown |= np.roll(base, step, axis=axis)
    return grown


def grid_points(mask: NDArray[np.bool_], spacing: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Jittered hexagonal grid points inside a mask, float64 [n, 2] as (x, y)."""
    height, width = mask.shape
    rows = np.arange(spacing / 2, height, spacing * 0.88)
    cols = np.arange(spacing / 2, width, spacing)
    x = cols[None, :] + (np.arange(len(rows)) % 2)[:, None] * spacing / 2
    y = np.broadcast_to(rows[:, None], x.shape)
    points = np.stack([x, y], -1).reshape(-1, 2) + rng.uniform(-0.15, 0.15, (x.size, 2)) * spacing
    points = points + rng.uniform(-0.5, 0.5, 2) * spacing
    points = points[rng.random(len(points)) > 0.1]  # gaps, and the jitter, hide the grid
    ok = (points[:, 0] >= 0) & (points[:, 0] < width) & (points[:, 1] >= 0) & (points[:, 1] < height)
    points = points[ok]
    return points[mask[points[:, 1].astype(int), points[:, 0].astype(int)]]


# ---------------------------------------------------------------------------------------------------- stamps


def nucleus_stamps(
    length: NDArray[np.float64],
    width: NDArray[np.float64],
    orientation: NDArray[np.float64],
    darkness: NDArray[np.float64],
    texture: float,
    rng: np.random.Generator,
) -> FloatImage:
    """Soft-edged ellipses with chromatin texture, float32 [n, s, s]; lengths in pixels, orientation in
    radians."""
    half = int(np.ceil(length.max() / 2 + 1.5))
    axis = np.arange(-half, half + 1, dtype=np.float64)
    y, x = axis[None, :, None], axis[None, None, :]
    cos, sin = np.cos(orientation)[:, None, None], np.sin(orientation)[:, None, None]
    u, v = x * cos + y * sin, -x * sin + y * cos
    a, b = length[:, None, None] / 2, width[:, None, None] / 2
    radius = np.hypot(u / a, v / b)
    # Distance to the edge in pixels, about: one pixel of ramp is the anti-aliasing.
    body = np.clip((1 - radius) * np.minimum(a, b) + 0.5, 0, 1)
    rim = np.exp(-(((radius - 0.85) / 0.22) ** 2))
    noise = rng.standard_normal((len(length), len(axis), len(axis)))
    stamps = body * np.clip(1 - texture * 0.6 * (1 - rim) + texture * 0.2 * noise, 0.15, 1.6)
    # The same stain per area whatever the texture, so that vesicular and smudged nuclei are equally dark on
    # average.
    stamps *= (0.85 * darkness * body.sum((1, 2)) / stamps.sum((1, 2)))[:, None, None]
    return stamps.astype(np.float32)


def place(
    image: FloatImage, stamps: FloatImage, which: NDArray[np.int64], points: NDArray[np.float64]
) -> None:
    """Stamps `stamps[which[i]]` at `points[i]` (x, y), keeping the larger value; parts outside the image are
    cut."""
    height, width = image.shape
    half = stamps.shape[1] // 2
    offset = np.arange(-half, half + 1)
    y = np.rint(points[:, 1]).astype(np.int64)[:, None, None] + offset[None, :, None]
    x = np.rint(points[:, 0]).astype(np.int64)[:, None, None] + offset[None, None, :]
    ok = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (stamps[which] > 0)
    flat = (y * width + x)[ok]
    np.maximum.at(image.reshape(-1), flat, stamps[which][ok])


def add(image: FloatImage, stamps: FloatImage, which: NDArray[np.int64], points: NDArray[np.float64]) -> None:
    """Adds `stamps[which[i]]` at `points[i]` (x, y); parts outside the image are cut."""
    height, width = image.shape
    half = stamps.shape[1] // 2
    for index, (px, py) in zip(which, np.rint(points).astype(int)):
        y0, x0 = py - half, px - half
        top, left = max(0, -y0), max(0, -x0)
        bottom = min(stamps.shape[1], height - y0)
        right = min(stamps.shape[2], width - x0)
        if bottom > top and right > left:
            image[y0 + top : y0 + bottom, x0 + left : x0 + right] += stamps[index, top:bottom, left:right]


def zero_sum(delta: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """Shifts mass between the two signs of a pattern so that it sums to zero, and sets its energy.

    The energy fixes the second-order change of mean colour, which is the same for every pattern of one
    strength.
    """
    positive, negative = np.clip(delta, 0, None), np.clip(-delta, 0, None)
    balanced = positive / positive.sum() - negative / negative.sum()
    return balanced * (strength / np.sqrt((balanced**2).sum()))
