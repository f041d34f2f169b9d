"""Cutting a slide into tiles of a requested pixel size: which level, how many pixels of it, which tiles are
tissue.

A tile of ``tile_size`` pixels at ``mpp`` microns per pixel covers ``tile_size_level0`` pixels of level 0. It
is read as ``read_size`` pixels of ``level`` and resampled to ``tile_size`` where the two differ. The
footprint and the step of the grid are whole level-0 pixels, so that every tile is an exact multiple of the
step: neighbours neither overlap nor leave gaps, however wide the slide. The price is a pixel size that
differs from the request by at most half a pixel in ``read_size`` (0.1 % for 512 pixels), or by
``LEVEL_TOLERANCE`` where a level is taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dre_fast.data.slides import Slide, SlideError
from dre_fast.data.tissue import tissue_fraction, tissue_mask

# A level this close to the request is read as it is: scanners write 0.499 or 0.2527 for what is meant as 0.5
# or 0.25, and resampling by one percent would only blur.
LEVEL_TOLERANCE = 0.02
TISSUE_METHODS = ("otsu-saturation", "none")
EDGES = ("drop", "pad")


@dataclass(frozen=True, eq=False)
class Tiling:
    """The tiles of one slide. Immutable.

    Attributes:
        slide_id: name of the slide.
        coords: int64 [N,2], level-0 (x, y) of the top-left corner of every tile; row by row.
        tile_size: side of a tile in pixels as the encoder sees it.
        mpp: requested microns per pixel, None where a foreign file does not tell.
        slide_mpp: microns per pixel of level 0, None where a foreign file does not tell.
        level: pyramid level the tiles are read from, None until the slide is opened (``fit_to_slide``) where
            a foreign file does not tell; so are the following three.
        read_size: side in pixels of that level.
        level_downsample: level-0 pixels per pixel of that level.
        level_dimensions: (width, height) of that level.
        tile_size_level0: side in level-0 pixels.
        dimensions: (width, height) of level 0, None where a foreign file does not tell.
        overlap: requested overlap of neighbours in tile pixels.
        tissue, min_tissue, edge: how tiles were chosen; None for files of other tools.
    """

    slide_id: str
    coords: np.ndarray
    tile_size: int
    mpp: float | None
    slide_mpp: float | None
    level: int | None
    read_size: int | None
    tile_size_level0: int
    dimensions: tuple[int, int] | None
    level_downsample: float | None = None
    level_dimensions: tuple[int, int] | None = None
    overlap: int = 0
    tissue: str | None = None
    min_tissue: float | None = None
    edge: str | None = None

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def true_mpp(self) -> float | None:
        """Microns per pixel of the tiles as they come out, after rounding to whole pixels."""
        return None if self.slide_mpp is None else self.slide_mpp * self.tile_size_level0 / self.tile_size

    @property
    def step_level0(self) -> int:
        """Level-0 pixels from one tile to the next."""
        return max(1, round(self.tile_size_level0 * (1 - self.overlap / self.tile_size)))


def tile_slide(
    slide: Slide,
    *,
    tile_size: int = 256,
    mpp: float = 0.5,
    overlap: int = 0,
    tissue: str | np.ndarray = "otsu-saturation",
    min_tissue: float = 0.25,
    edge: str = "drop",
    allow_upsample: bool = False,
    allow_empty: bool = False,
    slide_id: str | None = None,
) -> Tiling:
    """Lays a grid of tiles over a slide and keeps those with enough tissue.

    A folder of tile images whose size fits the request gives its own images as tiles, wherever they lie.

    Args:
        slide: an open slide with known ``mpp``.
        tile_size: side of a tile in pixels at ``mpp``.
        mpp: microns per pixel of the tiles; 0.5 is what is called 20x.
        overlap: pixels (at ``mpp``) shared by neighbours, 0 .. tile_size - 1.
        tissue: ``"otsu-saturation"``, ``"none"`` (keep every tile), or your own mask, bool [h,w] of any size
            that covers the whole slide.
        min_tissue: smallest fraction of a tile that must be tissue, 0 .. 1.
        edge: ``"drop"`` keeps only tiles that lie wholly on the slide; ``"pad"`` also those that hang over
            its right and lower edge, filled with white, which counts as glass. A slide smaller than one tile
            gives one padded tile in either case.
        allow_upsample: accept a slide whose level 0 is coarser than ``mpp`` and enlarge its tiles.
        allow_empty: return zero tiles where nothing is left instead of an error.
        slide_id: name to store; the file name without its suffix by default.

    Raises:
        SlideError: unknown ``mpp`` of the slide, a slide coarser than the request, no tile left.
        ValueError: an argument out of its range.
    """
    _check_arguments(tile_size, mpp, overlap, tissue, min_tissue, edge)
    slide_mpp = slide.require_mpp()
    want = mpp / slide_mpp
    if want < 1 - LEVEL_TOLERANCE and not allow_upsample:
        raise SlideError(
            f"slide {slide.path}: scanned at {slide_mpp:g} um/px, coarser than the requested {mpp:g}. Ask "
            f"for coarser tiles (--mpp-out {slide_mpp:g}) or allow enlarging them (--allow-upsample)"
        )
    level, read_size = choose_level(slide.level_downsamples, want, tile_size)
    downsample = slide.level_downsamples[level]
    tiling = Tiling(
        slide_id=slide_id or slide.slide_id,
        coords=np.empty((0, 2), dtype=np.int64),
        tile_size=tile_size,
        mpp=float(mpp),
        slide_mpp=slide_mpp,
        level=level,
        read_size=read_size,
        tile_size_level0=max(1, round(read_size * downsample)),
        dimensions=slide.dimensions,
        level_downsample=downsample,
        level_dimensions=slide.level_dimensions[level],
        overlap=overlap,
        tissue=tissue if isinstance(tissue, str) else "custom",
        min_tissue=float(min_tissue),
        edge=edge,
    )
    coords = _all_coords(slide, tiling)
    if isinstance(tissue, np.ndarray) or tissue != "none":
        mask = tissue if isinstance(tissue, np.ndarray) else tissue_mask(slide, tile_size * mpp, slide_mpp)
        fraction = tissue_fraction(mask, slide.dimensions, coords, tiling.tile_size_level0)
        # The sums are exact only to rounding: a tile of pure tissue must pass min_tissue=1.
        kept = coords[fraction >= min_tissue - 1e-9] if min_tissue > 0 else coords[fraction > 0]
    else:
        kept = coords
    if not len(kept) and not allow_empty:
        raise SlideError(
            f"slide {slide.path}: no tissue found: none of {len(coords)} tiles of {tile_size} px at {mpp:g} "
            f"um/px has {min_tissue:.0%} of it. Look at the slide; lower --min-tissue, take every tile with "
            "--tissue none, or leave the slide out"
        )
    return replace(tiling, coords=kept)


def choose_level(downsamples: Sequence[float], want: float, tile_size: int) -> tuple[int, int]:
    """The level to read for tiles that are ``want`` times coarser than level 0, and how many of its pixels.

    Takes the level nearest to the request when it is within ``LEVEL_TOLERANCE`` (and then ``tile_size``
    pixels of it, no resampling), else the coarsest level finer than the request, else (enlarging) level 0.
    """
    nearest = min(range(len(downsamples)), key=lambda i: abs(math.log(downsamples[i] / want)))
    if abs(downsamples[nearest] / want - 1) <= LEVEL_TOLERANCE:
        return nearest, tile_size
    finer = [i for i, d in enumerate(downsamples) if d < want]
    level = max(finer, key=lambda i: downsamples[i], default=0)
    return level, max(1, round(tile_size * want / downsamples[level]))


def fit_to_slide(tiling: Tiling, slide: Slide) -> Tiling:
    """Fills in the level to read where a file of another tool does not store it, and checks the rest.

    Raises:
        SlideError: the coordinates were made for a slide of another size or with another pyramid, or a tile lies
            outside the slide.
    """
    if tiling.dimensions is not None and tiling.dimensions != slide.dimensions:
        raise SlideError(
            f"slide {slide.path}: is {_by(slide.dimensions)} px, but the tiles of {tiling.slide_id} were "
            f"made for {_by(tiling.dimensions)} px: another slide or another version of it; tile it again"
        )
    # Files of other tools do not say what slide they belong to; a tile off the slide would read as white.
    outside = (tiling.coords >= slide.dimensions) | (tiling.coords <= -tiling.tile_size_level0)
    if outside.any():
        tile = int(outside.any(1).argmax())
        raise SlideError(
            f"slide {slide.path}: is {_by(slide.dimensions)} px, but tile {tile} of {tiling.slide_id} lies at "
            f"x={tiling.coords[tile, 0]}, y={tiling.coords[tile, 1]}, outside of it: coordinates of another slide?"
        )
    level, read_size = tiling.level, tiling.read_size
    if level is None or read_size is None:
        want = tiling.tile_size_level0 / tiling.tile_size
        level, read_size = choose_level(slide.level_downsamples, want, tiling.tile_size)
    if level >= len(slide.level_downsamples):
        raise SlideError(
            f"slide {slide.path}: the tiles of {tiling.slide_id} are read from level {level}, but this file "
            f"has levels 0 to {len(slide.level_downsamples) - 1}; tile it again"
        )
    return replace(
        tiling,
        level=level,
        read_size=read_size,
        dimensions=slide.dimensions,
        level_downsample=slide.level_downsamples[level],
        level_dimensions=slide.level_dimensions[level],
    )


def _all_coords(slide: Slide, tiling: Tiling) -> np.ndarray:
    size, step = tiling.tile_size_level0, tiling.step_level0
    if slide.tile_origins is not None and slide.tile_extent == size and tiling.overlap == 0:
        # Row by row, like the grid.
        order = np.lexsort((slide.tile_origins[:, 0], slide.tile_origins[:, 1]))
        return slide.tile_origins[order]
    xs, ys = (_positions(length, size, step, tiling.edge == "pad") for length in slide.dimensions)
    grid_y, grid_x = np.meshgrid(ys, xs, indexing="ij")
    return np.stack([grid_x.ravel(), grid_y.ravel()], axis=1)


def _positions(length: int, size: int, step: int, pad: bool) -> np.ndarray:
    """Multiples of ``step`` at which tiles of ``size`` start along an axis of ``length`` pixels."""
    if length <= size:
        return np.zeros(1, dtype=np.int64)
    last = math.ceil((length - size) / step) if pad else (length - size) // step
    return np.arange(last + 1, dtype=np.int64) * step


def _check_arguments(
    tile_size: int, mpp: float, overlap: int, tissue: str | np.ndarray, min_tissue: float, edge: str
) -> None:
    if tile_size < 1:
        raise ValueError(f"tile_size must be at least 1 pixel, got {tile_size}")
    if not (math.isfinite(mpp) and mpp > 0):
        raise ValueError(f"mpp must be a positive number of microns per pixel, got {mpp}")
    if not 0 <= overlap < tile_size:
        raise ValueError(f"overlap must be 0 .. tile_size - 1 = {tile_size - 1} pixels, got {overlap}")
    if not 0 <= min_tissue <= 1:
        raise ValueError(f"min_tissue is a fraction, 0 .. 1, got {min_tissue}")
    if edge not in EDGES:
        raise ValueError(f"edge must be one of {', '.join(EDGES)}, got {edge!r}")
    if isinstance(tissue, np.ndarray):
        if tissue.ndim != 2 or tissue.dtype != bool or tissue.size == 0:
            raise ValueError(f"a tissue mask must be bool [h,w], got {tissue.dtype} {tissue.shape}")
    elif tissue not in TISSUE_METHODS:
        raise ValueError(f"tissue must be one of {', '.join(TISSUE_METHODS)} or a mask, got {tissue!r}")


def _by(dimensions: tuple[int, int]) -> str:
    return f"{dimensions[0]} x {dimensions[1]}"
