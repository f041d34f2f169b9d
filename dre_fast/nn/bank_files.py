"""Saving and loading a memory bank: one file, or one file a rank that loads at any other number of ranks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dre_fast.nn import bank_checks as checks
from dre_fast.nn import bank_io
from dre_fast.nn.bank_shards import Shards
from dre_fast.nn.bank_tables import BankTables
from dre_fast.nn.bank_tiers import choose_tier
from dre_fast.reference.quantize import row_dtype

if TYPE_CHECKING:
    from typing_extensions import Self


class BankFiles(BankTables):
    """What :class:`~dre_fast.MemoryBank` keeps on disk."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank to one safetensors file; its metadata name format, version, dtype, dim, sizes and CRC-32.

        The file appears whole or not at all, and no second copy of the rows is made in memory.

        Raises:
            OSError: disk full, no permission ... (names the file); an older file of that name is untouched.
        """
        self._write(path, {}, {})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: str | torch.dtype | None = None,
        **placement: Any,
    ) -> Self:
        """Read a bank saved by :meth:`save`.

        Args:
            placement: ``tier``, ``folder``, ``cache`` and ``budget`` as for a new bank.
            device: where to put it (default: the current default device).
            dtype: row format; another one than the file's converts the stored rows, codes them again and
                rebuilds the sums. Ages and drifts are kept.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, cut short, changed since it was saved, or too large for the free memory; names
                the file.
        """
        tables, _ = bank_io.read_tables(path)
        row = row_dtype(dtype or tables["payload"].dtype)
        rows, slides = tables["payload"].shape[0], tables["start"].shape[0]
        k, dim = tables["codebook"].shape
        bank = cls(
            [], dim, dtype=row, device=device, **_resolved(placement, rows, dim, row, slides, k, device)
        )
        bank._adopt(tables)
        return bank

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over what :meth:`save` wrote, of any size, where and in the row format this bank has.

        Raises:
            FileNotFoundError, ValueError: as :meth:`load`, or rows of another D; this bank is unchanged then.
        """
        tables, _ = bank_io.read_tables(path)
        if tables["codebook"].shape[1] != self.dim:
            raise ValueError(
                f"{path}: rows of {tables['codebook'].shape[1]} values, this bank has D = {self.dim}"
            )
        self._adopt(tables)

    def save_shard(
        self,
        path: str | os.PathLike[str],
        *,
        shard: int,
        shards: int,
        slides: Sequence[int] | Tensor,
        save_id: str,
    ) -> Path:
        """Write this bank as one of the files of a bank shared out to several ranks, each with its own slides.

        Every rank calls it with the same folder, ``shards`` and ``save_id``; :meth:`load_shards` puts the files
        together, for any other number of ranks. Ranks need not wait for each other: a save that lacks a file, or has
        one of another save, is told by ``save_id`` when it is loaded. With ``torch.distributed.checkpoint``, whose
        shards load at the same ranks only, save ``bank.state_dict()`` under a key of each rank.

        Args:
            path: a folder, made when missing. The file is ``bank-00001-of-00004.safetensors`` for shard 0 of 4.
            shard: 0 .. shards - 1.
            slides: int64 [S], the number of each slide of this bank in the whole cohort, in the order of its ids;
                distinct. Removed slides are left out whatever stands there.
            save_id: the same in all shards of one save, different in every save, such as "step-1200".

        Returns:
            The file.

        Raises:
            ValueError: shard outside its range, numbers that are not one each, or twice the same.
            OSError: as :meth:`save`.
        """
        if not 0 <= shard < shards:
            raise ValueError(f"MemoryBank: shard {shard} of {shards}: shards are 0..{shards - 1}")
        numbers = torch.as_tensor(slides).to("cpu", torch.int64).reshape(-1)
        if numbers.shape[0] != self.num_slides:
            raise ValueError(
                f"MemoryBank: {numbers.shape[0]} slide numbers for the {self.num_slides} slides of this bank"
            )
        there = self.length.cpu() > 0
        found, times = numbers[there].unique(return_counts=True)
        if bool((times > 1).any()):
            raise ValueError(
                f"MemoryBank: two slides of this bank have the number {int(found[times > 1][0])}"
            )
        if bool((found < 0).any()):
            raise ValueError(f"MemoryBank: slide numbers count from 0, got {int(found.min())}")
        file = Path(path) / f"bank-{shard + 1:05d}-of-{shards:05d}.safetensors"
        about = {"save_id": save_id, "shard": str(shard), "shards": str(shards)}
        self._write(file, {"slide_numbers": torch.where(there, numbers, -1)}, about)
        return file

    @classmethod
    def load_shards(
        cls,
        path: str | os.PathLike[str],
        *,
        slides: Iterable[int] | Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: str | torch.dtype | None = None,
        **placement: Any,
    ) -> tuple[Self, Tensor]:
        """A bank of the slides one rank wants, from the files that :meth:`save_shard` wrote at any number of ranks.

        Rows, codes, ages, drift, sums and counts have the bits they were saved with. Only the rows of these slides are
        read, slide by slide, so that memory holds them once.

        Args:
            path: the folder.
            slides: numbers in the whole cohort, in the order of the new bank's ids (default: all, ascending).
            device, dtype, placement: as for :meth:`load`.

        Returns:
            The bank, and the number of each of its slides, int64 [S].

        Raises:
            FileNotFoundError: no shard in the folder.
            ValueError: a shard is missing, of another save, or does not fit the others; a slide that no shard or more
                than one has. Names files and slides.
        """
        saved = Shards.open(path)
        numbers = saved.numbers() if slides is None else _numbers(slides)
        lengths = saved.lengths(numbers)
        row = row_dtype(dtype or saved.dtype)
        k, dim = saved.codebook.shape
        rows, count = int(lengths.sum()), numbers.shape[0]
        bank = cls(
            lengths, dim, dtype=row, device=device, **_resolved(placement, rows, dim, row, count, k, device)
        )
        bank._take_shards(saved, numbers)
        return bank, numbers

    def restore_shards(self, path: str | os.PathLike[str], *, slides: Iterable[int] | Tensor) -> None:
        """Take over slides of what :meth:`save_shard` wrote, where and in the row format this bank has.

        Args:
            path: the folder.
            slides: their numbers in the whole cohort, one for each slide of this bank, in the order of its ids.

        Raises:
            FileNotFoundError, ValueError: as :meth:`load_shards`, or slides of other sizes than this bank's, or rows
                of another D; this bank is unchanged then.
        """
        saved, numbers = Shards.open(path), _numbers(slides)
        if saved.codebook.shape[1] != self.dim:
            raise ValueError(
                f"{path}: rows of {saved.codebook.shape[1]} values, this bank has D = {self.dim}"
            )
        lengths, own = saved.lengths(numbers), self.length.cpu()
        if lengths.shape != own.shape:
            raise ValueError(f"{path}: {len(lengths)} slides asked for, this bank has {len(own)}")
        if not lengths.equal(own):
            slide = int((lengths != own).nonzero()[0, 0])
            raise ValueError(
                f"{path}: slide {int(numbers[slide])} has {int(lengths[slide])} tiles there and {int(own[slide])} here"
            )
        self._take_shards(saved, numbers)

    @torch.no_grad()
    def _take_shards(self, saved: Shards, numbers: Tensor) -> None:
        """Fill the slides of this bank, sized alike, with those of these numbers."""
        self.set_numbers(numbers)
        self.codebook = saved.codebook.to(self.device, copy=True)
        k = saved.codebook.shape[0]
        self.slide_sums = self.slide_sums.new_zeros(len(numbers), k, self.dim)
        self.slide_counts = self.slide_counts.new_zeros(len(numbers), k)
        for slide, number in enumerate(numbers.tolist()):
            self._take_slide(slide, *saved.place(number))
        if self.dtype != saved.dtype:
            self._sum_up(recode=True)

    def _write(self, path: str | os.PathLike[str], more: dict[str, Tensor], about: dict[str, str]) -> None:
        if self._file is not None:
            self._file.ring.flush()
        sizes = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "dim": str(self.dim),
            "slides": str(self.num_slides),
            "rows": str(self.payload.shape[0]),
            "codewords": str(self.codebook.shape[0]),
        }
        tables = {name: getattr(self, name) for name in checks.TABLES}
        bank_io.write_tables(path, {**tables, **more}, {**sizes, **about})


def _numbers(slides: Iterable[int] | Tensor) -> Tensor:
    return torch.as_tensor(slides).to("cpu", torch.int64).reshape(-1)


def _resolved(
    placement: dict[str, Any], rows: int, dim: int, row: torch.dtype, slides: int, codewords: int, device: Any
) -> dict[str, Any]:
    """With the tier chosen, by the size that the bank will have."""
    if placement.get("tier") != "auto":
        return placement
    place = torch.empty(0, device=device).device
    budget, folder = placement.get("budget"), placement.get("folder")
    tier = choose_tier(rows, dim, row, slides, codewords, place, budget, folder)
    if tier != "file":
        return {"tier": tier}
    return {"tier": tier, "folder": folder, "cache": placement.get("cache")}
