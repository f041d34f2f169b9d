"""Which tiles go live in a step, read ahead and augmented, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dre_fast.data.tiles import CachedTileReader, TileReader
from dre_fast.nn.bank import MemoryBank

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


def augmented(images: Tensor, flips: bool, stain: float, key: int) -> Tensor:
    """Tiles uint8 [m, 3, P, P], turned and stained anew by a generator of this key -> the same shape."""
    generator = torch.Generator().manual_seed(key % 2**63)
    if flips:
        images = turn_and_flip(images, generator)
    if stain:
        images = jitter_stain(images, stain, generator)
    return images


def read_augmented(
    reader: TileReader | CachedTileReader, flips: bool, stain: float, key: int, slide: int, tiles: Tensor
) -> Tensor:
    """Tiles int64 [m] of a slide as uint8 [m, 3, P, P], augmented by key, slide and the first of them."""
    return augmented(
        reader.read(slide, tiles), flips, stain, (key * 1_000_003 + slide) * 1_000_003 + int(tiles[0])
    )


def turn_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """One of the 8 symmetries of the square for each tile; tissue has no up. [m, 3, P, P] -> the same shape."""
    choice = torch.randint(8, (len(images),), generator=generator)
    out = images.clone()
    for symmetry in range(1, 8):
        picked = choice == symmetry
        turned = torch.rot90(images[picked], symmetry % 4, dims=(2, 3))
        out[picked] = turned.flip(3) if symmetry >= 4 else turned
    return out


def jitter_stain(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change how strongly each tile is stained, uint8 [m, 3, P, P] -> the same.

    Optical density -log(I / 255) is linear in the amount of stain (Beer-Lambert). Each tile's is multiplied by
    exp(strength * N(0, 1)), half of it common to the channels, half of each channel's own, so that the stain of a
    slide cannot serve as its name.
    """
    common = torch.randn(len(images), 1, 1, 1, generator=generator)
    channel = torch.randn(len(images), 3, 1, 1, generator=generator)
    factor = (strength * (common + channel) / 2**0.5).exp()
    # I' = 255 (I / 255)^factor; one table of 256 values per tile and channel is cheaper than a power per pixel
    levels = torch.arange(256) / 255
    table = (levels ** factor.reshape(-1, 1) * 255).round().to(torch.uint8)
    flat = images.reshape(len(images) * 3, -1).long()
    return table.gather(1, flat).reshape(images.shape)


def epoch_order(slides: int, seed: int, epoch: int) -> Tensor:
    """Order of the slides in an epoch, int64 [slides]: a function of (seed, epoch) alone."""
    return torch.randperm(slides, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def epoch_slides(slides: int, *, epoch: int, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """The slides of :func:`epoch_batches` without live tiles: for steps that read every tile themselves."""
    for chosen in epoch_order(slides, seed, epoch).split(batch_size)[start:]:
        none = torch.zeros(len(chosen), 0, dtype=torch.int64)
        yield Batch(chosen, none, torch.zeros(len(chosen), 0, 3, 0, 0, dtype=torch.uint8))


def epoch_batches(
    bank: MemoryBank,
    reader: TileReader | CachedTileReader,
    *,
    epoch: int,
    live: int,
    batch_size: int,
    seed: int,
    start: int = 0,
    augment: bool = True,
    stain: float = 0.0,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches of an epoch from batch ``start`` on; every slide is visited once, its live tiles by permutation."""
    order = epoch_order(bank.num_slides, seed, epoch)[start * batch_size :]
    tiles = bank.sample(order.to(bank.start.device), live, cycle=epoch, seed=seed).cpu()
    dataset = _LiveTiles(reader, order, tiles, seed * 100_003 + epoch, augment, stain)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        # its own generator: the loader must not draw from the global one, whose state a checkpoint records
        generator=torch.Generator().manual_seed(seed),
    )
    for i, images in enumerate(loader):
        if isinstance(images, ValueError):
            raise images
        rows = slice(i * batch_size, i * batch_size + len(images))
        if bank.tier == "file":
            bank.prefetch(order[rows.start : rows.stop + _AHEAD * batch_size])
        yield Batch(order[rows], tiles[rows], images)
