"""A picture of a tiling to look at: the slide with its tiles outlined and everything else dimmed."""

from __future__ import annotations

import numpy as np

from dre_fast.data.optional import need
from dre_fast.data.slides import Slide
from dre_fast.data.tiling import Tiling

LINE = (0, 140, 60)
# Outlines of tiles smaller than this would cover them.
SMALLEST_OUTLINED = 5


def draw_overview(slide: Slide, tiling: Tiling, max_px: int = 1600) -> np.ndarray:
    """Draws the tiles of ``tiling`` over the thumbnail of ``slide``.

    Returns:
        uint8 [h,w,3], at most ``max_px`` on the longer side.
    """
    image, draw = need("PIL.Image", "wsi"), need("PIL.ImageDraw", "wsi")
    thumbnail = slide.thumbnail(max_px)
    height, width = thumbnail.shape[:2]
    scale = np.array([width / slide.dimensions[0], height / slide.dimensions[1]])
    low = np.round(tiling.coords * scale).astype(int)
    high = np.round((tiling.coords + tiling.tile_size_level0) * scale).astype(int)
    kept = np.zeros((height, width), dtype=bool)
    for (x0, y0), (x1, y1) in zip(low, high, strict=True):
        kept[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
    dimmed = (thumbnail.astype(np.uint16) + 2 * 150) // 3
    picture = image.fromarray(np.where(kept[..., None], thumbnail, dimmed).astype(np.uint8))
    pen = draw.Draw(picture)
    for (x0, y0), (x1, y1) in zip(low.tolist(), high.tolist(), strict=True):
        if x1 - x0 >= SMALLEST_OUTLINED:
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=LINE)
    return np.asarray(picture)
