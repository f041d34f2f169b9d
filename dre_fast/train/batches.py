"""The tiles of a plan's visits, read ahead by processes or threads, augmented, and put together as batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dre_fast.data.subset import Reader
from dre_fast.nn.bank import MemoryBank
from dre_fast.train.augment import augmented
from dre_fast.train.config import DataConfig
from dre_fast.train.read_ahead import ReadAhead, read_or_error
from dre_fast.train.samplers import EpochPlan

_AHEAD = 2  # batches whose slides are on their way from the bank's file while one is in work


@dataclass
class Batch:
    """``slides`` int64 [B] (bank ids), ``tiles`` int64 [B, m] (-1 = unused slot), ``images`` uint8 [B, m, 3, P, P].

    ``failed``: errors of slides that were to be in it and could not be read. ``seconds``: the batch was waited for.
    """

    slides: Tensor
    tiles: Tensor
    images: Tensor
    failed: list[ValueError] = field(default_factory=list)
    seconds: float = 0.0


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
        images = read_or_error(self.reader, slide, self.plan.tiles[visit])
        if isinstance(images, ValueError):
            return images
        return augmented(images, self.flips, self.stain, self.key * 1_000_003 + int(self.numbers[slide]))


def _collate(items: list[Tensor | ValueError]) -> tuple[Tensor | None, list[int], list[ValueError]]:
    """Images of the slides that could be read, their places in the batch, and the errors of the others."""
    there = [place for place, item in enumerate(items) if isinstance(item, Tensor)]
    images = [item for item in items if isinstance(item, Tensor)]
    errors = [item for item in items if isinstance(item, ValueError)]
    return default_collate(images) if images else None, there, errors


def without_tiles(plan: EpochPlan, start: int = 0) -> Iterator[Batch]:
    """The slides of a plan from step ``start`` on, without tiles: for steps that read every tile themselves."""
    for step in range(start, len(plan.sizes)):
        yield _no_images(plan.slides[plan.step(step)], 0)


def read_batches(
    plan: EpochPlan,
    reader: Reader,
    bank: MemoryBank,
    names: Sequence[str],
    data: DataConfig,
    *,
    key: int,
    start: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """Batches of an epoch's plan from step ``start`` on.

    Args:
        bank: knows the slides' numbers; asked for the rows of coming slides ahead, where they lie in a file.
        names: of the slides.
        data: ``augment``, ``stain``, ``workers``, ``threads``, ``slow_seconds``; with ``on_error="skip"`` slides that
            cannot be read are left out of their batch.
        key: of the augmentation; with the number of a slide it fixes what is done to its tiles.
        pin: images in pinned memory.

    Raises:
        ValueError: a slide or tile that cannot be read (named), with ``on_error="stop"``.
        OSError: a process that reads died.
    """
    visits = [plan.step(step) for step in range(start, len(plan.sizes))]

    def who(step: int) -> str:
        return "slides " + ", ".join(names[slide] for slide in plan.slides[visits[step]].tolist())

    ahead = ReadAhead(
        _LiveTiles(reader, plan, bank.number.cpu(), key, data.augment, data.stain),
        who,
        workers=data.workers,
        threads=data.threads,
        slow=data.slow_seconds,
        batches=[list(range(those.start, those.stop)) for those in visits],
        collate=_collate,
        pin=pin,
    )
    for step, (those, (images, there, errors)) in enumerate(zip(visits, ahead)):
        if errors and data.on_error == "stop":
            raise errors[0]
        if bank.tier == "file":
            last = visits[min(step + _AHEAD, len(visits) - 1)].stop
            bank.prefetch(plan.slides[those.start : last])
        slides, tiles = plan.slides[those][there], plan.tiles[those][there]
        batch = _no_images(slides, tiles.shape[1]) if images is None else Batch(slides, tiles, images)
        batch.failed, batch.seconds = errors, ahead.seconds
        yield batch


def _no_images(slides: Tensor, m: int) -> Batch:
    none = torch.zeros(len(slides), m, dtype=torch.int64)
    return Batch(slides, none, torch.zeros(len(slides), m, 3, 0, 0, dtype=torch.uint8))
