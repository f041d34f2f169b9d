"""Pixels in planes, as PyTorch wants them: the one copy that every tile read from a slide goes through."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np

from dre_fast.ops import native


def _compiled() -> Callable[[np.ndarray, np.ndarray], None] | None:
    """The C++ copy, None where it was not built (or by an older checkout)."""
    if native.why_not("host"):
        return None
    return getattr(importlib.import_module("dre_fast._host"), "split_planes", None)


_split = _compiled()


def backend() -> str:
    """What copies: "C++", or, slower, "numpy"."""
    return "numpy" if _split is None else "C++"


def put_planar(tile: np.ndarray, out: np.ndarray) -> None:
    """Copies the colours of ``tile``, uint8 [P,P,3 or 4], into ``out``, uint8 [3,P,P]; other threads run meanwhile."""
    if _split is not None and tile.flags.c_contiguous and out.flags.c_contiguous:
        _split(tile, out)
        return
    # Plane by plane: copying three of four interleaved channels at once is ten times slower.
    for channel in range(3):
        out[channel] = tile[..., channel]
