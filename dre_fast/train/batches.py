"""The tiles of a plan's visits, read ahead by worker processes, augmented, and put together as batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dre_fast.data.tiles import CachedTileReader, TileReader
from dre_fast.nn.bank import MemoryBank
from dre_fast.train.augment import augmented
from dre_fast.train.samplers import EpochPlan

_AHEAD = 2  # batches whose slides are on their way from the bank's file while one is in work


@dataclass
class Batch:
    """``slides`` int64 [B] (bank ids), ``tiles`` int64 [B, m] (-1 = unused slot), ``images`` uint8 [B, m, 3, P, P]."""

    slides: Tensor
    tiles: Tensor
    images: Tensor


class _LiveTiles(Dataset["Tensor | ValueError"]):
    def __init__(
        self,
        reader: TileReader | CachedTileReader,
        slides: Tensor,
        tiles: Tensor,
        key: int,
        flips: bool,
        stain: float,
    ) -> None:
        self.reader, self.slides, self.tiles = reader, slides, tiles
        self.key, self.flips, self.stain = key, flips, stain

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, index: int) -> Tensor | ValueError:
        slide = int(self.slides[index])
        try:
            images = self.reader.read(slide, self.tiles[index])
        except (
            ValueError
        ) as error:  # handed over as it is: a DataLoader would bury it in a worker's traceback
            return error
        return augmented(images, self.flips, self.stain, self.key * 1_000_003 + slide)


def _collate(items: list[Tensor | ValueError]) -> Tensor | ValueError:
    for item in items:
        if isinstance(item, ValueError):
            return item
    return default_collate(items)  # type: ignore[no-any-return]


def without_tiles(slides: Tensor, batch_size: int, start: int = 0) -> Iterator[Batch]:
    """Slides in batches from batch ``start`` on, without live tiles: for steps that read every tile themselves."""
    for chosen in slides.split(batch_size)[start:]:
        none = torch.zeros(len(chosen), 0, dtype=torch.int64)
        yield Batch(chosen, none, torch.zeros(len(chosen), 0, 3, 0, 0, dtype=torch.uint8))


def read_batches(
    plan: EpochPlan,
    reader: TileReader | CachedTileReader,
    bank: MemoryBank,
    *,
    batch_size: int,
    key: int,
    start: int = 0,
    augment: bool = True,
    stain: float = 0.0,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches of an epoch's plan from batch ``start`` on.

    Args:
        key: of the augmentation; with the slide it fixes what is done to its tiles.
        bank: asked for the rows of coming slides ahead, where they lie in a file.
    """
    slides, tiles = plan.slides[start * batch_size :], plan.tiles[start * batch_size :]
    loader = DataLoader(
        _LiveTiles(reader, slides, tiles, key, augment, stain),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        # its own generator: the loader must not draw from the global one, whose state a checkpoint records
        generator=torch.Generator().manual_seed(key % 2**63),
    )
    for i, images in enumerate(loader):
        if isinstance(images, ValueError):
            raise images
        rows = slice(i * batch_size, i * batch_size + len(images))
        if bank.tier == "file":
            bank.prefetch(slides[rows.start : rows.stop + _AHEAD * batch_size])
        yield Batch(slides[rows], tiles[rows], images)
