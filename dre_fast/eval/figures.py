"""What every drawing of this package shares: matplotlib without global state, whole files, one look."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from dre_fast.data.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1f2733"
MUTED = "#69707d"
GRID = "#e3e6ea"
# Distinct for colour-blind readers (after Okabe and Ito 2008).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B")


def new_figure(width: float, height: float) -> Figure:
    """A white figure of `width` x `height` inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'dre_fast[train]'") from error
    # A Figure of its own, not pyplot: no global state, no window, safe in threads and notebooks.
    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 110) -> Path:
    """Writes a figure to `path` (format by suffix), whole or not at all; returns the path.

    Names of slides, tasks and runs are shown as they are: matplotlib would set what stands between two dollar signs as a
    formula, or fail. Numbers at the axes are left alone.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if "$" in text.get_text() and not text.get_text().startswith("$\\mathdefault"):
            text.set_parse_math(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    return Path(path)


def tidy(axes: object) -> None:
    """A light grid and no box."""
    axes.grid(True, color=GRID, linewidth=0.8)  # type: ignore[attr-defined]
    axes.set_axisbelow(True)  # type: ignore[attr-defined]
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)  # type: ignore[attr-defined]
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)  # type: ignore[attr-defined]
    axes.tick_params(which="both", colors=MUTED, labelsize=8)  # type: ignore[attr-defined]


def label_x(axes: object, what: str) -> None:
    """Name the horizontal axis; epochs and steps have whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(what, fontsize=8, color=MUTED)  # type: ignore[attr-defined]
    if what in ("epoch", "step"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=6))  # type: ignore[attr-defined]
