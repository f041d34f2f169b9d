"""The bags of a cohort as training reads them: checked once, in memory as far as they fit, batched ragged."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dre_fast.data.bags import Bag, BagError, open_bag
from dre_fast.data.cohort import Cohort, CohortError, SlideRecord
from dre_fast.progress import progress

ENCODED_AT_ONCE = 65_536  # tiles
SHOWN = 10  # faults named in one message
_KEPT_AS = (torch.float32, torch.float16, torch.bfloat16)


class BagSet:
    """The bags of S slides.

    Every bag is opened first, so that missing keys, damaged files and sizes that do not fit are all named before anything
    long begins. Then every bag is read once: its features are checked, a sample of its tiles is kept for codebooks, and
    a mark of its content, so that one bag under two names is noticed. The sample of a slide depends on its id and the
    seed alone.

    Args:
        cohort: its records' ``path`` are feature files.
        sample: tiles kept of all bags together, as many of each; 0 keeps none.
        seed: of the sample.
        memory_gb: 10^9 bytes of features to keep in memory; bags beyond are read again each time.

    Attributes:
        records: the slides.
        dim: D.
        tiles: number of tiles of each slide.
        marks: of each slide, a hash of its features.

    Raises:
        ValueError: bags that cannot be read, of another D than most, without tiles, or with NaN or Inf (slide, tile and
            file named, up to ten of them); or a record without file.
    """

    def __init__(self, cohort: Cohort, *, sample: int = 0, seed: int = 0, memory_gb: float = 4.0) -> None:
        self.records: tuple[SlideRecord, ...] = cohort.records
        self.source = cohort.source
        self.tiles: list[int] = []
        self.marks: list[str] = []
        self.samples: list[Tensor] = []
        self._kept: dict[int, Tensor] = {}
        self._bags = self._opened()
        self.dim = self._common_dim()
        left = memory_gb * 1e9
        share = -(-sample // max(len(self.records), 1))
        faults: list[str] = []
        for i, record in enumerate(progress(self.records, "bags", total=len(self.records), unit="bag")):
            try:
                features = self._read(i)
            except BagError as error:
                faults.append(str(error))
                continue
            self.tiles.append(len(features))
            self.marks.append(_mark(features))
            if share:
                self.samples.append(features[_drawn(len(features), share, seed, record.slide_id)].clone())
            size = features.numel() * features.element_size()
            if size <= left:
                left -= size
                self._kept[i] = features
        self._refuse(faults)

    def __len__(self) -> int:
        return len(self.records)

    def features(self, slide: int) -> Tensor:
        """Tiles of a slide, [n, D], float of 16 or 32 bits."""
        return self._kept[slide] if slide in self._kept else self._read(slide)

    def ragged(self, slides: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Bags one after the other: x [N, D] and cu_seqlens int64 [B+1]."""
        bags = [self.features(slide) for slide in slides]
        offsets = torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)
        return torch.cat(bags), offsets

    def in_batches(self, slides: Sequence[int], desc: str) -> Iterator[tuple[Tensor, Tensor]]:
        """:meth:`ragged` of all of these slides in their order, about `ENCODED_AT_ONCE` tiles at once or one slide."""
        batches: list[list[int]] = []
        room = 0
        for slide in slides:
            if not batches or self.tiles[slide] > room:
                batches.append([])
                room = ENCODED_AT_ONCE
            batches[-1].append(slide)
            room -= self.tiles[slide]
        for batch in progress(batches, desc, unit="batch"):
            yield self.ragged(batch)

    def refuse_copies(self) -> None:
        """Refuse slides of two cases that hold the same features: they are one slide, in training and test at once.

        Raises:
            CohortError: names both.
        """
        first: dict[str, SlideRecord] = {}
        for record, mark in zip(self.records, self.marks):
            other = first.setdefault(mark, record)
            if other.case_id != record.case_id:
                raise CohortError(
                    f"{self.source}: slides {other.slide_id!r} (case {other.case_id!r}) and {record.slide_id!r} (case "
                    f"{record.case_id!r}) hold the same features ({other.path}, {record.path}); give them one case_id, "
                    "or take one out"
                )

    def _opened(self) -> list[Bag]:
        """All bags, none of them read."""
        bags: list[Bag] = []
        faults: list[str] = []
        for record in self.records:
            if record.path is None:
                raise ValueError(
                    f"slide {record.slide_id!r}: no feature file; make the cohort with bag_cohort"
                )
            try:
                bags.append(open_bag(record.path, slide_id=record.slide_id))
            except BagError as error:
                faults.append(str(error))
                continue
            if not len(bags[-1]):
                faults.append(
                    f"slide {record.slide_id!r} ({record.path}): a bag without tiles; take the slide out of {self.source}"
                )
        self._refuse(faults)
        return bags

    def _common_dim(self) -> int:
        """D of all bags."""
        found = Counter(bag.dim for bag in self._bags).most_common()
        if len(found) > 1:
            most = found[0][0]
            other = [
                f"slide {bag.slide_id!r} ({bag.path}) has D={bag.dim}"
                for bag in self._bags
                if bag.dim != most
            ]
            counted = ", ".join(f"D={dim} in {_slides(count)}" for dim, count in found)
            raise BagError(
                f"{self.source}: features of several sizes, {counted}; the bags of a folder must come from one encoder: "
                f"extract these again, or take them out{_listed(other)}"
            )
        return found[0][0] if found else 0

    def _read(self, slide: int) -> Tensor:
        features = self._bags[slide].features()
        return features if features.dtype in _KEPT_AS else features.float()

    def _refuse(self, faults: Sequence[str]) -> None:
        if len(faults) == 1:
            raise BagError(faults[0])
        if faults:
            raise BagError(
                f"{self.source}: {len(faults)} of {_slides(len(self.records))} have a bag that cannot be used"
                f"{_listed(faults)}"
            )


def _slides(count: int) -> str:
    return "1 slide" if count == 1 else f"{count} slides"


def _listed(lines: Sequence[str]) -> str:
    """One a line, up to `SHOWN`, and how many more."""
    shown = "".join(f"\n  {line}" for line in lines[:SHOWN])
    return f":{shown}" + (f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")


def _drawn(tiles: int, share: int, seed: int, slide_id: str) -> Tensor:
    """Distinct tiles of a slide, ascending, int64 [min(share, tiles)]."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{slide_id}".encode()).digest()[:7], "big")
    order = torch.randperm(tiles, generator=torch.Generator().manual_seed(key))
    return order[:share].sort().values


def _mark(features: Tensor) -> str:
    digest = hashlib.blake2b(repr((tuple(features.shape), str(features.dtype))).encode(), digest_size=16)
    raw: Any = features.contiguous().view(torch.uint8).numpy()
    digest.update(raw)
    return digest.hexdigest()
