"""Paints one synthetic H&E-like slide: glass, stroma, benign structures and (in tumour slides) tumour
structures.

The painter works on two concentration maps, haematoxylin and eosin, and turns them into colour at the very
end by the Beer-Lambert law with stain vectors that differ from slide to slide. Nuclei and structures are
small stamps that are rendered once per slide and then placed, all of a kind in one indexed maximum, so a
slide takes a fraction of a second.

What distinguishes the classes is arrangement, not amount. A "glandular" structure is a ring of nuclei around
a pale lumen; a "squamous" one holds as many nuclei, packed solid around an eosinophilic whorl, with a pale
cleft outside. Eosin moved into one place is taken from another (each structure's eosin change sums to zero),
and normal slides carry benign foci of the same extent and the same nuclear area, so mean colour says next to
nothing about the labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dre_fast.data.synthetic_shapes import (
    FloatImage,
    add,
    dilate,
    focus_mask,
    grid_points,
    nucleus_stamps,
    place,
    smooth,
    stroma,
    tissue_mask,
    zero_sum,
)

SUBTYPES = ("glandular", "squamous")

# Optical densities of the two stains per unit concentration in R, G, B (unit vectors, about what H&E gives).
_HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])
_EOSIN = np.array([0.10, 0.88, 0.46])

# Sizes in micrometres.
_STRUCTURE_SPACING = 50.0
_RADIUS_RANGE = (15.0, 20.0)
_NUCLEI_PER_STRUCTURE = 15
_STROMAL_NUCLEI_PER_MM2 = 2600.0


@dataclass(frozen=True)
class TissueSpec:
    """What one slide shows.

    Attributes:
        width, height: level-0 size in pixels.
        mpp: micrometres per pixel; structures keep their size in micrometres.
        subtype: "glandular", "squamous" or None for a slide without tumour.
        witness: fraction of the tissue area taken by the tumour focus (or by the benign focus of a normal
            slide).
        nuclear_scale: diameter of tumour nuclei relative to the usual one.
        pleomorphism: relative spread of the diameters and darkness of tumour nuclei.
        contrast: 1 is the usual strength of the class pattern; towards 0 the nuclei lose their arrangement.
        texture: 1 is the usual difference in shape and chromatin of the nuclei of the two subtypes; 0 leaves
            only their arrangement to tell them apart.
        stain_variation: spread of hue, strength and brightness between slides; 1 is one laboratory on a good
            week, 3 is several laboratories.
    """

    width: int
    height: int
    mpp: float
    subtype: str | None
    witness: float
    nuclear_scale: float = 1.0
    pleomorphism: float = 0.1
    contrast: float = 1.0
    texture: float = 1.0
    stain_variation: float = 1.0


def paint(spec: TissueSpec, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Paints a slide.

    Args:
        spec: what to show.
        rng: source of every random choice; the same state gives the same pixels.

    Returns:
        pixels uint8 [height, width, 3], RGB, and the tumour structures float64 [n, 3] as (x, y, radius) in
        level-0 pixels, n = 0 for a normal slide.
    """
    shape = (spec.height, spec.width)
    um = 1.0 / spec.mpp  # pixels per micrometre
    tissue = tissue_mask(shape, rng)
    inside = tissue > 0.5

    angle = smooth(shape, 260 * um, rng) * np.float32(0.9) + np.float32(rng.uniform(0, np.pi))
    eosin = stroma(shape, um, rng)
    haematoxylin = 0.05 + 0.03 * smooth(shape, 40 * um, rng)

    focus = focus_mask(inside, spec.witness, rng)
    centres = grid_points(focus, _STRUCTURE_SPACING * um, rng)
    stray = grid_points(inside & ~dilate(focus), 3.1 * _STRUCTURE_SPACING * um, rng)
    occupied = np.concatenate([centres, stray])

    structures = np.zeros((0, 3))
    if spec.subtype is None:
        _paint_benign(haematoxylin, eosin, centres, um, rng)
    else:
        structures = _paint_tumour(haematoxylin, eosin, centres, spec, um, rng)
    _paint_benign(haematoxylin, eosin, stray, um, rng)
    _paint_stromal_nuclei(haematoxylin, inside, occupied, angle, um, rng)
    return _stain(haematoxylin, eosin, tissue, spec.stain_variation, rng), structures


# ------------------------------------------------------------------------------------------------ structures


def _radii(n: int, um: float, rng: np.random.Generator) -> NDArray[np.float64]:
    return rng.uniform(*_RADIUS_RANGE, size=n) * um


def _ring_nuclei(
    n_nuclei: int, radius: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nuclei along a wobbly closed curve: offsets [n, n_nuclei, 2] and orientations (radial) [n,
    n_nuclei]."""
    n = len(radius)
    turn = rng.uniform(0, 2 * np.pi, (n, 1))
    angle = (
        turn + (np.arange(n_nuclei)[None] + rng.uniform(-0.18, 0.18, (n, n_nuclei))) * 2 * np.pi / n_nuclei
    )
    squeeze, axis = rng.uniform(0.0, 0.16, (n, 1)), rng.uniform(0, np.pi, (n, 1))
    r = radius[:, None] * (1 + squeeze * np.cos(2 * (angle - axis))) * rng.uniform(0.94, 1.06, (n, n_nuclei))
    return np.stack([r * np.cos(angle), r * np.sin(angle)], -1), angle


def _solid_nuclei(
    n_nuclei: int, radius: NDArray[np.float64], hole: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nuclei packed over a disc but for a hole of `hole` radii: offsets [n, n_nuclei, 2], orientations [n,
    n_nuclei].

    The positions are those of a shifted, turned and shaken hexagonal lattice nearest to the centre.
    """
    n = len(radius)
    # Spacing at which `n_nuclei` cells of the lattice fill the disc (radius 1.12) outside the hole.
    spacing = np.sqrt(np.pi * (1.12**2 - hole**2) / (n_nuclei * np.sqrt(3) / 2))
    row, col = np.mgrid[-8:9, -8:9]
    lattice = np.stack([col + 0.5 * (row % 2), row * np.sqrt(3) / 2], -1).reshape(1, -1, 2) * spacing
    points = (
        lattice + rng.uniform(-0.5, 0.5, (n, 1, 2)) * spacing + rng.normal(0, 0.07, (n, 289, 2)) * spacing
    )
    distance = np.hypot(points[..., 0], points[..., 1])
    order = np.argsort(np.where(distance < hole, np.inf, distance), axis=1)[:, :n_nuclei]
    points = np.take_along_axis(points, order[..., None], axis=1)
    turn = rng.uniform(0, 2 * np.pi, (n, 1))
    cos, sin = np.cos(turn), np.sin(turn)
    offset = np.stack(
        [points[..., 0] * cos - points[..., 1] * sin, points[..., 0] * sin + points[..., 1] * cos], -1
    )
    return offset * radius[:, None, None], rng.uniform(0, np.pi, (n, n_nuclei))


def _gland_eosin(radius: float, half: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Pale lumen, pink apical cytoplasm and a thin basement line; zero-sum pattern [s, s]."""
    y, x = np.mgrid[-half : half + 1, -half : half + 1] / radius
    r = np.hypot(x, y) * (1 + 0.10 * np.cos(2 * (np.arctan2(y, x) - rng.uniform(0, np.pi))))
    lumen = np.clip((0.56 - r) * 7, 0, 1)
    cytoplasm = np.exp(-(((r - 0.74) / 0.16) ** 2)) + 0.7 * np.exp(-(((r - 1.34) / 0.10) ** 2))
    return cytoplasm * (1 - lumen) - lumen


def _nest_eosin(radius: float, half: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Concentric keratin whorl in the centre and a pale cleft around the nest; zero-sum pattern [s, s]."""
    y, x = np.mgrid[-half : half + 1, -half : half + 1] / radius
    r = np.hypot(x - rng.uniform(-0.08, 0.08), y - rng.uniform(-0.08, 0.08))
    whorl = np.clip((0.40 - r) * 7, 0, 1) * (0.75 + 0.5 * np.cos(r * 2 * np.pi / 0.20))
    cleft = np.exp(-(((r - 1.42) / 0.11) ** 2))
    return whorl - cleft * (whorl <= 0)


def _vessel_eosin(radius: float, half: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A lumen with some red cells and a muscular wall; pattern [s, s]."""
    y, x = np.mgrid[-half : half + 1, -half : half + 1] / radius
    r = np.hypot(x, y)
    cells = np.zeros_like(r)
    offset, _ = _solid_nuclei(int(rng.integers(4, 11)), np.ones(1), 0.0, rng)
    for cx, cy in offset[0] * 0.55 + rng.normal(0, 0.05, 2):
        cells = np.maximum(cells, np.clip((0.19 - np.hypot(x - cx, y - cy)) * 12, 0, 1))
    wall = np.exp(-(((r - 1.25) / 0.14) ** 2))
    return 1.3 * cells * (r < 0.7) + 0.6 * wall - ((r < 0.75) & (cells <= 0))


def _paint_tumour(
    haematoxylin: FloatImage,
    eosin: FloatImage,
    centres: NDArray[np.float64],
    spec: TissueSpec,
    um: float,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Paints every structure of the tumour focus; returns them as (x, y, radius) [n, 3]."""
    n = len(centres)
    radius = _radii(n, um, rng)
    glandular = spec.subtype == "glandular"
    if glandular:
        offset, orientation = _ring_nuclei(_NUCLEI_PER_STRUCTURE, radius, rng)
    else:
        offset, orientation = _solid_nuclei(_NUCLEI_PER_STRUCTURE, radius, 0.42, rng)
    if spec.contrast < 1:  # blend towards scattered nuclei, which both subtypes share
        scattered = rng.uniform(-1.2, 1.2, offset.shape) * radius[:, None, None]
        offset = spec.contrast * offset + (1 - spec.contrast) * scattered

    half = int(np.ceil(1.8 * _RADIUS_RANGE[1] * um))
    # The lumen is larger than the whorl; these strengths give tiles of both kinds the same spread of
    # brightness.
    pattern, strength = (_gland_eosin, 6.0) if glandular else (_nest_eosin, 10.0)
    strength *= um * spec.contrast
    variants = [zero_sum(pattern(r, half, rng), strength) for r in np.linspace(*_RADIUS_RANGE, 6) * um]
    which = np.clip(np.searchsorted(np.linspace(*_RADIUS_RANGE, 6) * um, radius), 0, 5)
    add(eosin, np.stack(variants).astype(np.float32), which, centres)

    points = (centres[:, None] + offset).reshape(-1, 2)
    bins = 12
    per_bin = 6
    turns = np.repeat(np.arange(bins) * np.pi / bins, per_bin)
    size = 8.2 * um * spec.nuclear_scale * np.exp(rng.normal(0, spec.pleomorphism, bins * per_bin))
    dark = 1.0 * np.exp(rng.normal(0, 0.6 * spec.pleomorphism, bins * per_bin))
    # Columnar and vesicular (dark rim, pale centre) in glands, round and smudged in nests; area and mean
    # stain agree.
    sign = 1 if glandular else -1
    aspect, chromatin = 1.325 + sign * 0.275 * spec.texture, 0.55 + sign * 0.45 * spec.texture
    stamps = nucleus_stamps(size * aspect**0.5, size / aspect**0.5, turns, dark, chromatin, rng)
    slot = np.floor((orientation.reshape(-1) % np.pi) / np.pi * bins).astype(np.int64) % bins
    place(haematoxylin, stamps, slot * per_bin + rng.integers(per_bin, size=len(points)), points)
    return np.concatenate([centres, radius[:, None] * 1.2], axis=1)


def _paint_benign(
    haematoxylin: FloatImage,
    eosin: FloatImage,
    centres: NDArray[np.float64],
    um: float,
    rng: np.random.Generator,
) -> None:
    """Vessels (thin rings of flat nuclei round red cells) and lymphoid clusters (solid, small, dark), half
    and half.

    Both look a little like one of the tumour patterns, so "any ring" or "any cluster" does not solve the
    task.
    """
    vessel = rng.random(len(centres)) < 0.5
    radius = _radii(len(centres), um, rng)

    ring = centres[vessel]
    if len(ring):
        offset, angle = _ring_nuclei(13, radius[vessel] * 0.95, rng)
        bins = 12
        turns = np.arange(bins) * np.pi / bins
        stamps = nucleus_stamps(
            np.full(bins, 10.5 * um), np.full(bins, 5.0 * um), turns, np.full(bins, 1.25), 0.3, rng
        )
        slot = np.floor(((angle.reshape(-1) + np.pi / 2) % np.pi) / np.pi * bins).astype(np.int64) % bins
        place(haematoxylin, stamps, slot, (ring[:, None] + offset).reshape(-1, 2))
        half = int(np.ceil(1.8 * _RADIUS_RANGE[1] * um))
        variants = np.stack([zero_sum(_vessel_eosin(17.0 * um, half, rng), 6.0 * um) for _ in range(6)])
        add(eosin, variants.astype(np.float32), rng.integers(6, size=len(ring)), ring)

    cluster = centres[~vessel]
    if len(cluster):
        offset, _ = _solid_nuclei(30, radius[~vessel] * 1.05, 0.0, rng)
        n_stamps = 24
        size = 6.3 * um * np.exp(rng.normal(0, 0.06, n_stamps))
        turns = rng.uniform(0, np.pi, n_stamps)
        stamps = nucleus_stamps(size * 1.04, size * 0.96, turns, np.full(n_stamps, 1.25), 0.25, rng)
        points = (cluster[:, None] + offset).reshape(-1, 2)
        place(haematoxylin, stamps, rng.integers(n_stamps, size=len(points)), points)


def _paint_stromal_nuclei(
    haematoxylin: FloatImage,
    inside: NDArray[np.bool_],
    occupied: NDArray[np.float64],
    angle: FloatImage,
    um: float,
    rng: np.random.Generator,
) -> None:
    """Spindle nuclei along the fibres and a few lymphocytes, everywhere in the tissue except inside
    structures."""
    height, width = inside.shape
    n = rng.poisson(inside.sum() / um**2 * 1e-6 * _STROMAL_NUCLEI_PER_MM2 * rng.uniform(0.8, 1.2))
    ys, xs = np.nonzero(inside[::4, ::4])
    pick = rng.integers(len(ys), size=n) if len(ys) else np.zeros(0, dtype=np.int64)
    points = np.stack([xs[pick] * 4, ys[pick] * 4], -1) + rng.uniform(0, 4, (len(pick), 2))
    free = np.ones((height // 4 + 1, width // 4 + 1), dtype=bool)
    reach = int(np.ceil(1.35 * _RADIUS_RANGE[1] * um / 4))
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = np.stack([dx, dy], -1)[np.hypot(dx, dy) <= reach]
    blocked = (occupied[:, None] // 4).astype(np.int64) + disc[None]
    ok = (blocked >= 0).all(-1) & (blocked[..., 0] < free.shape[1]) & (blocked[..., 1] < free.shape[0])
    free[blocked[..., 1][ok], blocked[..., 0][ok]] = False
    cell = np.clip((points // 4).astype(np.int64), 0, [free.shape[1] - 1, free.shape[0] - 1])
    points = points[free[cell[:, 1], cell[:, 0]]]

    bins, per_bin = 12, 4
    turns = np.repeat(np.arange(bins) * np.pi / bins, per_bin)
    size = 10.5 * um * np.exp(rng.normal(0, 0.15, bins * per_bin))
    spindle = nucleus_stamps(size, size * 0.38, turns, np.full(bins * per_bin, 1.0), 0.4, rng)
    round_cells = nucleus_stamps(
        np.full(8, 6.2 * um), np.full(8, 5.8 * um), np.zeros(8), np.full(8, 1.2), 0.25, rng
    )
    is_round = rng.random(len(points)) < 0.2
    at = points[~is_round].astype(np.int64)
    local = angle[np.clip(at[:, 1], 0, height - 1), np.clip(at[:, 0], 0, width - 1)] + rng.normal(
        0, 0.3, len(at)
    )
    slot = np.floor((local % np.pi) / np.pi * bins).astype(np.int64) % bins
    place(haematoxylin, spindle, slot * per_bin + rng.integers(per_bin, size=len(at)), points[~is_round])
    place(haematoxylin, round_cells, rng.integers(8, size=int(is_round.sum())), points[is_round])


# ---------------------------------------------------------------------------------------------------- colour


def _stain(
    haematoxylin: FloatImage,
    eosin: FloatImage,
    tissue: FloatImage,
    variation: float,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Beer-Lambert colour with per-slide stain vectors, strengths, brightness and white balance: uint8 [h, w,
    3]."""
    hue, strength = 0.012 * variation, 0.045 * variation
    h_vector = np.clip(_HAEMATOXYLIN + rng.normal(0, hue, 3), 0.02, None) * np.exp(rng.normal(0, strength))
    e_vector = np.clip(_EOSIN + rng.normal(0, hue, 3), 0.02, None) * np.exp(rng.normal(0, strength))
    white = np.clip(242 + variation * (rng.uniform(-4, 4) + rng.normal(0, 1, 3)), 0, 255)
    h_map = np.clip(haematoxylin, 0, None) * tissue
    e_map = np.clip(eosin, 0, None) * tissue
    grain = rng.standard_normal(tissue.shape, dtype=np.float32) * np.float32(1.6)
    pixels = np.empty((*tissue.shape, 3), dtype=np.uint8)
    for channel in range(3):
        density = h_map * np.float32(1.05 * h_vector[channel]) + e_map * np.float32(e_vector[channel])
        value = np.exp(-density) * np.float32(white[channel]) + grain
        pixels[..., channel] = np.clip(value, 0, 255).astype(np.uint8)
    return pixels
