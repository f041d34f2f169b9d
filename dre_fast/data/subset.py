"""Some slides of a reader, numbered anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dre_fast.data.multiscale import JoinedTiling, MultiScaleReader
from dre_fast.data.tiles import CachedTileReader, TileReader
from dre_fast.data.tiling import Tiling


class SubsetReader:
    """Reads slide ``i`` of a share as slide ``slides[i]`` of the whole; the reader itself is shared, not copied.

    Args:
        reader: of all slides.
        slides: int64 [S], the slides of the share.
    """

    def __init__(self, reader: TileReader | CachedTileReader | MultiScaleReader, slides: Tensor) -> None:
        self.reader, self.slides = reader, slides.tolist()
        self.tilings: list[Tiling | JoinedTiling] = [reader.tilings[slide] for slide in self.slides]
        self.tile_size = reader.tile_size

    def __len__(self) -> int:
        """Number of slides."""
        return len(self.slides)

    @property
    def tiles_per_slide(self) -> list[int]:
        """Number of tiles of every slide."""
        return [len(t) for t in self.tilings]

    def read(self, slide_index: int, tile_ids: torch.Tensor | np.ndarray | Sequence[int]) -> torch.Tensor:
        """Tiles of a slide of the share; as :meth:`dre_fast.data.tiles.TileReader.read`.

        Raises:
            ValueError: no such slide or tile.
        """
        if not 0 <= slide_index < len(self.slides):
            raise ValueError(f"no slide {slide_index}: there are {len(self.slides)}")
        return self.reader.read(self.slides[slide_index], tile_ids)

    def close(self) -> None:
        """Close the slides that are open, of all shares of the reader."""
        self.reader.close()


Reader = TileReader | CachedTileReader | MultiScaleReader | SubsetReader
