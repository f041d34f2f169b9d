"""The tiles of a plan's visits, read ahead by worker processes, augmented, and put together as batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dre_fast.data.subset import Reader
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
        self, reader: Reader, plan: EpochPlan, numbers: Tensor, key: int, flips: bool, stain: float
    ) -> None:
        self.reader, self.plan, self.numbers = reader, plan, numbers
        self.key, self.flips, self.stain = key, flips, stain

    def __len__(self) -> int:
        return len(self.plan.slides)

    def __getitem__(self, visit: int) -> Tensor | ValueError:
        slide = int(self.plan.slides[visit])
        try:
            images = self.reader.read(slide, self.plan.tiles[visit])
        except (
            ValueError
        ) as error:  # handed over as it is: a DataLoader would bury it in a worker's traceback
            return error
        return augmented(images, self.flips, self.stain, self.key * 1_000_003 + int(self.numbers[slide]))


def _collate(items: list[Tensor | ValueError]) -> Tensor | ValueError | None:
    for item in items:
        if isinstance(item, ValueError):
            return item
    return default_collate(items) if items else None  # type: ignore[no-any-return]


def without_tiles(plan: EpochPlan, start: int = 0) -> Iterator[Batch]:
    """The slides of a plan from step ``start`` on, without tiles: for steps that read every tile themselves."""
    for step in range(start, len(plan.sizes)):
        yield _no_images(plan.slides[plan.step(step)], 0)


def read_batches(
    plan: EpochPlan,
    reader: Reader,
    bank: MemoryBank,
    *,
    key: int,
    start: int = 0,
    augment: bool = True,
    stain: float = 0.0,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches of an epoch's plan from step ``start`` on.

    Args:
        key: of the augmentation; with the number of a slide it fixes what is done to its tiles.
        bank: knows the slides' numbers; asked for the rows of coming slides ahead, where they lie in a file.
    """
    visits = [plan.step(step) for step in range(start, len(plan.sizes))]
    loader = DataLoader(
        _LiveTiles(reader, plan, bank.number.cpu(), key, augment, stain),
        batch_sampler=[list(range(those.start, those.stop)) for those in visits],
        num_workers=workers,
        collate_fn=_collate,
        # its own generator: the loader must not draw from the global one, whose state a checkpoint records
        generator=torch.Generator().manual_seed(key % 2**63),
    )
    for step, (those, images) in enumerate(zip(visits, loader)):
        if isinstance(images, ValueError):
            raise images
        if bank.tier == "file":
            ahead = visits[min(step + _AHEAD, len(visits) - 1)].stop
            bank.prefetch(plan.slides[those.start : ahead])
        if images is None:
            yield _no_images(plan.slides[those], plan.tiles.shape[1])
        else:
            yield Batch(plan.slides[those], plan.tiles[those], images)


def _no_images(slides: Tensor, m: int) -> Batch:
    none = torch.zeros(len(slides), m, dtype=torch.int64)
    return Batch(slides, none, torch.zeros(len(slides), m, 3, 0, 0, dtype=torch.uint8))
