"""Slides tiled at several magnifications: the tiles of all their tilings, one tiling after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dre_fast.data.slides import SlideError
from dre_fast.data.tiles import CachedTileReader, TileReader
from dre_fast.data.tiling import Tiling


@dataclass(frozen=True, eq=False)
class JoinedTiling:
    """The tilings of one slide; its tiles are numbered through, those of the first tiling first.

    Attributes:
        scales: tilings of one ``tile_size``, at least one of them with tiles.
    """

    scales: tuple[Tiling, ...]

    def __len__(self) -> int:
        return sum(len(tiling) for tiling in self.scales)

    @property
    def slide_id(self) -> str:
        """Name of the slide."""
        return self.scales[0].slide_id

    @property
    def coords(self) -> np.ndarray:
        """int64 [N,2], level-0 (x, y) of the top-left corner of every tile."""
        return np.concatenate([tiling.coords for tiling in self.scales])


def scales_of(tiling: Tiling | JoinedTiling) -> tuple[Tiling, ...]:
    """The tilings that a slide's tiles come from: one, unless it was tiled at several magnifications."""
    return tiling.scales if isinstance(tiling, JoinedTiling) else (tiling,)


class MultiScaleReader:
    """Reads the tiles of slides that have several tilings each, numbered as in :class:`JoinedTiling`.

    Args:
        reader: of all tilings, those of a slide side by side: slide 0 at every scale, slide 1 at every scale, ...
        scales: tilings of each slide.

    Raises:
        ValueError: two tilings of a slide are the same (named).
    """

    def __init__(self, reader: TileReader | CachedTileReader, scales: int) -> None:
        self.reader, self.scales, self.tile_size = reader, scales, reader.tile_size
        flat = reader.tilings
        self.tilings = [
            JoinedTiling(tuple(flat[first : first + scales])) for first in range(0, len(flat), scales)
        ]
        for joined in self.tilings:
            _check_distinct(joined)
        counts = [[0, *(len(tiling) for tiling in joined.scales)] for joined in self.tilings]
        self._starts = torch.tensor(counts).cumsum(1)  # [S, scales + 1]

    def __len__(self) -> int:
        """Number of slides."""
        return len(self.tilings)

    @property
    def tiles_per_slide(self) -> list[int]:
        """Number of tiles of every slide, all scales together."""
        return [len(tiling) for tiling in self.tilings]

    def read(self, slide_index: int, tile_ids: torch.Tensor | np.ndarray | Sequence[int]) -> torch.Tensor:
        """Tiles of one slide, of any scales; as :meth:`dre_fast.data.tiles.TileReader.read`.

        Returns:
            uint8 [m,3,P,P], RGB; zeros for id -1.

        Raises:
            ValueError: no such slide or tile.
            SlideError: the slide does not open, does not fit its coordinates, or is damaged at a tile; names slide,
                scale, and the tile by its number in that scale.
        """
        if not 0 <= slide_index < len(self.tilings):
            raise ValueError(f"no slide {slide_index}: there are {len(self.tilings)}")
        ids = torch.from_numpy(np.asarray(tile_ids, dtype=np.int64).reshape(-1))
        tiling, starts = self.tilings[slide_index], self._starts[slide_index]
        bad = ids[(ids < -1) | (ids >= len(tiling))]
        if len(bad):
            raise ValueError(
                f"slide {tiling.slide_id}: no tile {int(bad[0])}, it has tiles 0 to {len(tiling) - 1}"
            )
        out = torch.zeros(len(ids), 3, self.tile_size, self.tile_size, dtype=torch.uint8)
        for scale in range(self.scales):
            there = (ids >= starts[scale]) & (ids < starts[scale + 1])
            if there.any():
                try:
                    out[there] = self.reader.read(
                        slide_index * self.scales + scale, ids[there] - starts[scale]
                    )
                except SlideError as error:
                    raise SlideError(
                        f"{error} (scale {scale} of {self.scales}, {tiling.scales[scale].mpp} um/px)"
                    ) from error
        return out

    def close(self) -> None:
        """Close the slides that are open; they open again when needed."""
        self.reader.close()


def _check_distinct(joined: JoinedTiling) -> None:
    for i, tiling in enumerate(joined.scales):
        for j, other in enumerate(joined.scales[:i]):
            same = tiling.tile_size_level0 == other.tile_size_level0
            if same and len(tiling) and np.array_equal(tiling.coords, other.coords):
                raise ValueError(
                    f"slide {joined.slide_id}: its tiles of scale {i} are those of scale {j} again; the folders of "
                    "data.tiles must hold different tilings"
                )
