"""What a codeword looks like: the tiles nearest to it, out of all slides."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dre_fast.eval.colours import distinct_colours
from dre_fast.eval.figures import INK, MUTED, new_figure, save_figure


@dataclass(frozen=True)
class TopTiles:
    """The nearest tiles of each codeword.

    Args:
        tiles: for each of K codewords (slide index, tile number, distance), nearest first.
        counts: int64 [K], how many tiles have the codeword.
    """

    tiles: list[list[tuple[int, int, float]]]
    counts: Tensor


def top_tiles(
    slides: Iterable[tuple[Tensor, Tensor]], codebook: Tensor, *, count: int = 8, per_slide: int = 2
) -> TopTiles:
    """The ``count`` tiles nearest to each codeword among those assigned to it, at most ``per_slide`` of a slide.

    Ties go to the earlier slide and tile, so the choice is the same every time.

    Args:
        slides: for each slide its features, fp32 [n, D], and their codes, int64 [n].
        codebook: fp32 [K, D].
    """
    best: list[list[tuple[float, int, int]]] = [[] for _ in range(len(codebook))]
    counts = torch.zeros(len(codebook), dtype=torch.int64)
    for number, (features, codes) in enumerate(slides):
        counts += torch.bincount(codes.cpu(), minlength=len(codebook))
        distance = (features - codebook[codes]).norm(dim=1)
        for k in codes.unique().tolist():
            rows = (codes == k).nonzero().flatten()
            order = distance[rows].argsort(stable=True)[:per_slide]
            found = [(float(distance[row]), number, int(row)) for row in rows[order]]
            best[k] = sorted(best[k] + found)[:count]
    return TopTiles([[(slide, tile, d) for d, slide, tile in row] for row in best], counts)


def draw_sheet(
    path: str | os.PathLike[str],
    top: TopTiles,
    images: dict[tuple[int, int], np.ndarray],
    codewords: list[int],
    title: str | None = None,
) -> Path:
    """A row of tiles for each of some codewords, nearest on the left, beside the codeword's colour in the maps.

    Args:
        images: (slide, tile) -> uint8 [H, W, 3], of every tile of these rows.
        codewords: which, from above.
        title: over the sheet.
    """
    wide = max(max((len(top.tiles[k]) for k in codewords), default=0), 1)
    total = max(int(top.counts.sum()), 1)
    colours = distinct_colours(len(top.tiles))
    figure = new_figure(1.5 + max(wide, 3), 1.15 * len(codewords) + 0.2 + 0.3 * bool(title))
    grid = figure.subplots(
        len(codewords), wide + 1, squeeze=False, gridspec_kw={"width_ratios": [1.4, *[1] * wide]}
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for row, k in enumerate(codewords):
        share = f"{int(top.counts[k]):,} tiles\n{float(top.counts[k]) / total:.1%}"
        grid[row][0].add_patch(_patch(colours[k]))
        grid[row][0].text(0.88, 0.62, f"codeword {k}", ha="right", va="center", fontsize=9, color=INK)
        grid[row][0].text(0.88, 0.3, share, ha="right", va="center", fontsize=7, color=MUTED)
        for axes, (slide, tile, _) in zip(grid[row][1:], top.tiles[k], strict=False):
            axes.imshow(images[slide, tile], interpolation="nearest")
    if title:
        figure.suptitle(title, fontsize=10, color=INK)
    return save_figure(figure, path, dpi=130)


def _patch(colour: np.ndarray):  # type: ignore[no-untyped-def]
    """A bar of a colour at the right of the axes of a row's name."""
    from matplotlib.patches import Rectangle

    return Rectangle((0.93, 0.0), 0.07, 1.0, facecolor=colour, edgecolor="none")
