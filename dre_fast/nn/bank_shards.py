"""The files of a bank that several ranks saved together: which there are, whether they fit, where each slide lies."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dre_fast.nn.bank_io import read_tables

_NAME = re.compile(r"bank-(\d{5})-of-(\d{5})\.safetensors")
Tables = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shards:
    """Mapped into memory, read when touched. ``where``: slide number -> (file, slide of its tables)."""

    folder: Path
    files: list[Path]
    tables: list[Tables]
    where: dict[int, tuple[int, int]]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Shards:
        """All shards of one save.

        Raises:
            FileNotFoundError: none there.
            ValueError: see :meth:`dre_fast.MemoryBank.load_shards`.
        """
        folder = Path(folder)
        found = sorted(p for p in folder.glob("bank-*.safetensors") if _NAME.fullmatch(p.name))
        if not found:
            raise FileNotFoundError(f"{folder}: no shards of a memory bank (bank-00001-of-0000N.safetensors)")
        counts = {_of(path)[1] for path in found}
        if len(counts) > 1:
            raise ValueError(
                f"{folder}: shards of different saves, of {' and of '.join(map(str, sorted(counts)))}: {found[0].name}, "
                f"{found[-1].name}. Remove those that are not wanted"
            )
        number = counts.pop()
        missing = sorted(set(range(1, number + 1)) - {_of(path)[0] for path in found})
        if missing:
            raise ValueError(f"{folder}: shard {', '.join(map(str, missing))} of {number} is missing")
        tables, about = zip(*(read_tables(path) for path in found))
        for path, table, metadata in zip(found, tables, about):
            if "slide_numbers" not in table or table["slide_numbers"].shape != table["start"].shape:
                raise ValueError(f"{path}: a memory bank, but not a shard of one")
            if metadata.get("save_id") != about[0].get("save_id"):
                raise ValueError(
                    f"{path}: of the save {metadata.get('save_id')!r}, but {found[0].name} is of "
                    f"{about[0].get('save_id')!r}: not all ranks finished the last one"
                )
            same = table["payload"].dtype == tables[0]["payload"].dtype
            if not same or not torch.equal(table["codebook"], tables[0]["codebook"]):
                raise ValueError(f"{path}: another row format or codebook than {found[0].name}")
        where: dict[int, tuple[int, int]] = {}
        for file, table in enumerate(tables):
            for slide, name in enumerate(table["slide_numbers"].tolist()):
                if name < 0:
                    continue
                if name in where:
                    raise ValueError(
                        f"{folder}: slide {name} is in {found[where[name][0]].name} and in {found[file].name}"
                    )
                where[name] = file, slide
        return cls(folder, found, list(tables), where)

    @property
    def codebook(self) -> Tensor:
        """fp32 [K, D]."""
        return self.tables[0]["codebook"]

    @property
    def dtype(self) -> torch.dtype:
        """Row format."""
        return self.tables[0]["payload"].dtype

    def numbers(self) -> Tensor:
        """The slides there are, ascending, int64 [S]."""
        return torch.tensor(sorted(self.where), dtype=torch.int64)

    def lengths(self, numbers: Tensor) -> Tensor:
        """Tiles of slides, int64 [S].

        Raises:
            ValueError: a slide that is in no shard, or asked for twice.
        """
        seen: set[int] = set()
        lengths = []
        for number in numbers.tolist():
            if number not in self.where:
                raise ValueError(f"{self.folder}: no shard has slide {number}")
            if number in seen:
                raise ValueError(f"MemoryBank: slide {number} is asked for twice")
            seen.add(number)
            tables, slide = self.place(number)
            lengths.append(int(tables["length"][slide]))
        return torch.tensor(lengths, dtype=torch.int64)

    def place(self, number: int) -> tuple[Tables, int]:
        """Tables that hold a slide, and its id in them."""
        file, slide = self.where[number]
        return self.tables[file], slide


def _of(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1]), int(found[2])
