"""Sheets of the tiles nearest to each codeword of a trained model."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from dre_fast.data.files import write_text_atomic
from dre_fast.eval.sheets import draw_sheet, top_tiles
from dre_fast.progress import progress
from dre_fast.reference.encode import hard_assign
from dre_fast.train.build import SlideSet
from dre_fast.train.inference import LoadedRun, encode_tiles_of

_ROWS = 16  # codewords a page


def write_sheets(
    loaded: LoadedRun,
    slides: SlideSet,
    out: str | os.PathLike[str],
    *,
    count: int = 8,
    per_slide: int = 2,
    chunk: int = 256,
    features: Sequence[Tensor] | None = None,
) -> list[Path]:
    """Write codewords_000.png, ... of sixteen codewords each, and codewords.csv, which names every tile on them.

    Args:
        count: tiles a codeword.
        per_slide: of them from one slide, at most.
        chunk: tiles encoded at once.
        features: of the slides' tiles, [n, D] each, where they are encoded already.

    Returns:
        The files.
    """
    codebook = loaded.model.codebook

    def every_slide() -> Iterator[tuple[Tensor, Tensor]]:
        for i in progress(range(len(slides)), "codewords", unit="slide"):
            own = features[i] if features else encode_tiles_of(loaded.model, slides.reader, i, chunk)
            yield own, hard_assign(own, codebook)

    top = top_tiles(every_slide(), codebook, count=count, per_slide=per_slide)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[tuple[int, int], np.ndarray] = {}
    for slide, tile in sorted({(slide, tile) for row in top.tiles for slide, tile, _ in row}):
        images[slide, tile] = slides.reader.read(slide, [tile])[0].permute(1, 2, 0).numpy()
    title = f"Tiles nearest to each codeword in {len(slides)} slide{'s' if len(slides) > 1 else ''}, nearest on the left"
    files = []
    for first in range(0, len(codebook), _ROWS):
        rows = list(range(first, min(first + _ROWS, len(codebook))))
        files.append(draw_sheet(folder / f"codewords_{first:03d}.png", top, images, rows, title))
    with io.StringIO() as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["codeword", "tiles", "rank", "slide_id", "tile", "x", "y", "distance"])
        for k, row in enumerate(top.tiles):
            for rank, (slide, tile, distance) in enumerate(row):
                x, y = slides.reader.tilings[slide].coords[tile].tolist()
                name = slides.records[slide].slide_id
                writer.writerow([k, int(top.counts[k]), rank, name, tile, x, y, f"{distance:.6g}"])
        write_text_atomic(folder / "codewords.csv", text.getvalue())
    return [*files, folder / "codewords.csv"]
