"""Maps over a slide's thumbnail: which codeword each tile belongs to, and what each tile adds to a logit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dre_fast.data.tiling import Tiling
from dre_fast.eval.colours import distinct_colours
from dre_fast.eval.figures import INK, MUTED, new_figure, save_figure

Image = NDArray[np.uint8]
_LEGEND_ROWS = 16
_COVER = 0.62  # of a codeword's colour over the tissue
_WIDEST, _HIGHEST = 4.6, 6.5  # inches of a panel
_LEGEND_WIDTH, _BAR_WIDTH = 1.1, 0.14


def draw_codewords(
    path: str | os.PathLike[str],
    thumbnail: Image,
    tiling: Tiling,
    codes: Tensor,
    codewords: int,
    *,
    title: str | None = None,
    outline: Tensor | None = None,
) -> Path:
    """Writes a picture of the thumbnail beside the same in grey with every tile in the colour of its codeword.

    Args:
        path: file to write; its suffix decides the format (.png).
        thumbnail: uint8 [h, w, 3] of the whole slide.
        tiling: the slide's tiles, N of them.
        codes: int64 [N] in [-1, codewords); -1 is left uncoloured.
        codewords: K; a codeword has the same colour on every slide.
        title: over the picture; None: the slide's name.
        outline: bool [N], tiles to draw a frame around, such as annotated ones.

    Raises:
        ValueError: values that do not fit the tiling, or a tiling without slide dimensions.
    """
    codes = codes.detach().cpu()
    if len(codes) and not -1 <= int(codes.min()) <= int(codes.max()) < codewords:
        raise ValueError(f"codes must lie in [-1, {codewords}), got {int(codes.min())} to {int(codes.max())}")
    colours = codeword_colours(codewords)
    shown = codes.numpy()
    placed = colours[np.clip(shown, 0, None)]
    overlay = _overlay(thumbnail, tiling, placed, shown >= 0)
    counts = np.bincount(shown[shown >= 0], minlength=codewords)

    figure, axes, side = _two_panels(thumbnail, title or tiling.slide_id, _LEGEND_WIDTH)
    axes.imshow(_blend(_grey(thumbnail), overlay, _COVER), interpolation="nearest")
    _outline(axes, thumbnail, tiling, outline)
    largest = np.argsort(-counts, kind="stable")[:_LEGEND_ROWS]
    handles, labels = [], []
    from matplotlib.patches import Patch

    for k in largest:
        if counts[k]:  # the colour as it is seen over white
            handles.append(Patch(facecolor=colours[k] * _COVER + 1 - _COVER, edgecolor="none"))
            labels.append(f"{k}: {100 * counts[k] / counts.sum():.0f} %")
    more = int((counts > 0).sum()) - len(handles)
    if more > 0:
        handles.append(Patch(facecolor="none", edgecolor="none"))
        labels.append(f"+ {more} more")
    side.set_axis_off()
    legend = side.legend(
        handles,
        labels,
        title="codeword: tiles",
        loc="center left",
        bbox_to_anchor=(0.0, 0.5),
        fontsize=8,
        title_fontsize=8,
        frameon=False,
        handlelength=1.0,
        handleheight=1.0,
    )
    legend.get_title().set_color(MUTED)
    return save_figure(figure, path)


def draw_contributions(
    path: str | os.PathLike[str],
    thumbnail: Image,
    tiling: Tiling,
    values: Tensor,
    *,
    title: str | None = None,
    label: str = "contribution to the logit",
    outline: Tensor | None = None,
) -> Path:
    """Writes a picture of the thumbnail beside the same with every tile coloured by a signed value.

    The scale is symmetric about zero, red for positive and blue for negative; it ends at the 99.5th
    percentile of the absolute values, so that one tile cannot wash out the rest.

    Args:
        path: file to write; its suffix decides the format (.png).
        thumbnail: uint8 [h, w, 3] of the whole slide.
        tiling: the slide's tiles, N of them.
        values: float [N]; overlapping tiles are averaged.
        title: over the picture; None: the slide's name.
        label: of the colour bar.
        outline: bool [N], tiles to draw a frame around, such as annotated ones.

    Raises:
        ValueError: values that are not finite (the tile is named) or do not fit the tiling.
    """
    v = values.detach().cpu().double().numpy()
    if not np.isfinite(v).all():
        tile = int(np.nonzero(~np.isfinite(v))[0][0])
        raise ValueError(
            f"slide {tiling.slide_id!r}: the value of tile {tile} is {v[tile]}; it must be finite"
        )
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    limit = float(np.quantile(np.abs(v), 0.995)) if len(v) else 0.0
    limit = limit or float(np.abs(v).max(initial=0.0)) or 1.0
    scale = ScalarMappable(Normalize(-limit, limit), colormaps["RdBu_r"])
    overlay = _overlay(thumbnail, tiling, v[:, None], np.ones(len(v), dtype=bool))
    colour = np.asarray(scale.to_rgba(overlay[..., 0]), dtype=np.float64)
    colour[..., 3] = overlay[..., 1]

    figure, axes, side = _two_panels(thumbnail, title or tiling.slide_id, _BAR_WIDTH)
    # Grey tissue underneath: its own pink would read as a positive value.
    axes.imshow(_blend(_grey(thumbnail), colour, 0.72), interpolation="nearest")
    _outline(axes, thumbnail, tiling, outline)
    clipped = "both" if len(v) and np.abs(v).max() > limit else "neither"
    bar = figure.colorbar(scale, cax=side, extend=clipped)
    bar.set_label(label, fontsize=8, color=MUTED)
    bar.ax.tick_params(labelsize=7, colors=MUTED)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return save_figure(figure, path)


def codeword_colours(codewords: int) -> NDArray[np.float64]:
    """Colours of K codewords, the first ones the furthest apart: float64 [K, 3] in [0, 1]."""
    return distinct_colours(codewords)


def _two_panels(thumbnail: Image, title: str, side: float):  # type: ignore[no-untyped-def]
    """Two panels of one size with the plain thumbnail on the left: the figure, the axes on the right, those beside.

    Args:
        side: inches that the axes beside the panels are wide.
    """
    height, width = thumbnail.shape[:2]
    scale = min(_WIDEST / width, _HIGHEST / height)
    wide, high = width * scale, height * scale
    # room for the title over two narrow panels, and for the legend beside two low ones
    figure = new_figure(max(2 * wide + side, 4.6) + 0.9, max(high, 1.6) + 0.45)
    plain, axes, beside = figure.subplots(1, 3, gridspec_kw={"width_ratios": (wide, wide, side)})
    plain.imshow(thumbnail, interpolation="lanczos")
    for each in (plain, axes):
        each.set_xticks([])
        each.set_yticks([])
        for spine in each.spines.values():
            spine.set_color("#d5d9de")
    figure.suptitle(title, fontsize=10, color=INK)
    return figure, axes, beside


def _grey(thumbnail: Image) -> Image:
    """The same without colour: what is painted over it alone has a hue."""
    return np.repeat(thumbnail.mean(2, keepdims=True), 3, axis=2).astype(np.uint8)


def _boxes(thumbnail: Image, tiling: Tiling) -> NDArray[np.int64]:
    """Tile rectangles in thumbnail pixels: int64 [N, 4] as (x0, y0, x1, y1), at least one pixel each."""
    if thumbnail.ndim != 3 or thumbnail.shape[2] != 3:
        raise ValueError(f"thumbnail must be uint8 [h, w, 3], got {list(thumbnail.shape)}")
    if tiling.dimensions is None:
        raise ValueError(
            f"slide {tiling.slide_id!r}: its coordinates do not tell the slide's size, which a map needs; "
            f"tile it again "
            "with `dre-fast tile`"
        )
    scale = np.array(thumbnail.shape[1::-1]) / np.array(tiling.dimensions)
    first = np.floor(tiling.coords * scale + 1e-6).astype(np.int64)
    last = np.floor((tiling.coords + tiling.tile_size_level0) * scale + 1e-6).astype(np.int64)
    return np.concatenate([first, np.maximum(last, first + 1)], axis=1)


def _overlay(
    thumbnail: Image, tiling: Tiling, values: NDArray[np.float64], shown: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Per-tile values [N, c] painted into an image [h, w, c + 1]; the last channel is 1 where there is a
    tile."""
    if len(values) != len(tiling.coords):
        raise ValueError(
            f"slide {tiling.slide_id!r}: {len(values)} values for {len(tiling.coords)} tiles; they must be "
            f"of one tiling"
        )
    total = np.zeros((*thumbnail.shape[:2], values.shape[1] + 1))
    for (x0, y0, x1, y1), value, there in zip(_boxes(thumbnail, tiling), values, shown):
        if there:
            total[y0:y1, x0:x1, :-1] += value
            total[y0:y1, x0:x1, -1] += 1
    count = total[..., -1:]
    total[..., :-1] /= np.maximum(count, 1)
    total[..., -1:] = np.minimum(count, 1)
    return total


def _blend(base: Image, overlay: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """RGB in [0, 1]: the overlay's colour (channels 0-2) at `alpha` where its last channel is set."""
    cover = overlay[..., -1:] * alpha
    return base / 255.0 * (1 - cover) + overlay[..., :3] * cover


def _outline(axes, thumbnail: Image, tiling: Tiling, outline: Tensor | None) -> None:  # type: ignore[no-untyped-def]
    if outline is None:
        return
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    marked = outline.detach().cpu().numpy().astype(bool)
    frames = [
        Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0)
        for x0, y0, x1, y1 in _boxes(thumbnail, tiling)[marked]
    ]
    axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor=INK, linewidth=0.7))
