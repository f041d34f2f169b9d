"""Antialiased scaling of tiles."""

from __future__ import annotations

import numpy as np

from dre_fast.data.optional import need


def scale_tile(tile: np.ndarray, size: int) -> np.ndarray:
    """Scales one square tile, uint8 [s,s,C], to uint8 [size,size,C]; C is 3 or 4, the channels are
    independent.

    Whole-number reductions are exact area means; everything else is Lanczos-3, whose support widens with the
    reduction, so it does not alias.
    """
    source = tile.shape[0]
    if source == size:
        return tile
    image = need("PIL.Image", "wsi")
    # RGBX, not RGBA: Pillow must not weigh the colours by the fourth channel.
    mode = "RGB" if tile.shape[2] == 3 else "RGBX"
    picture = image.frombuffer(mode, (source, source), np.ascontiguousarray(tile).data, "raw", mode, 0, 1)
    if source % size == 0:
        return np.asarray(picture.reduce(source // size))
    return np.asarray(picture.resize((size, size), image.Resampling.LANCZOS))
