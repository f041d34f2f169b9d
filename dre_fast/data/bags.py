"""Bags of tile features from any producer's files, read lazily, and a folder of them.

folder = BagFolder("features")              # CLAM, TRIDENT, STAMP, slideflow, .pt, .npy, zarr: docs/bags.md
x = folder["S1"].features()                 # [n, D]
dre_fast.fit_codebook(folder, 16)           # one bag in memory at a time
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dre_fast.data.bag_coords import positive
from dre_fast.data.bag_files import find_bags, slide_id_of
from dre_fast.data.bag_layouts import Layout, read_layout
from dre_fast.data.bag_rows import BagError, check_finite, spans, wanted_rows
from dre_fast.data.bag_writer import write_bag

__all__ = ["Bag", "BagError", "BagFolder", "find_bags", "open_bag", "write_bag"]

CHUNK = 65536


class Bag:
    """The tile features of one slide in a file that is opened for each read: picklable, safe in workers.

    Attributes:
        slide_id: name of the slide.
        path: of the file or zarr folder.
        tiles: n, may be 0.
        dim: D; 0 where a bag without tiles does not say.
        dtype: of :meth:`features`: float16, bfloat16 or float32.
        layout: "clam", "trident", "stamp", "h5", "slideflow", "pt", "torchmil" or "zarr".
        attributes: what the file says beside its arrays.
        mpp: microns per pixel of level 0, given or in attribute ``slide_mpp``; None where not known.
    """

    def __init__(
        self, slide_id: str, path: Path, found: Layout, mpp: float | None, dim: int | None = None
    ) -> None:
        self.slide_id, self.path, self.layout = slide_id, path, found.name
        self.tiles, stored_dim = found.features.shape
        self.dim = stored_dim or dim or 0
        self.dtype = found.features.dtype
        self.attributes = found.attributes
        self.mpp = (
            positive(path, "attribute 'slide_mpp'", found.attributes.get("slide_mpp")) if mpp is None else mpp
        )
        self._found = found

    def __len__(self) -> int:
        return self.tiles

    def __repr__(self) -> str:
        return f"Bag({self.slide_id!r}, {self.tiles} tiles, D={self.dim}, {self.layout}, {self.path})"

    def features(self, rows: slice | Tensor | None = None) -> Tensor:
        """Features [m, D] in the stored dtype (float64 as float32), read now.

        Args:
            rows: which, in this order: a slice, int [m], bool [n]; all by default.

        Raises:
            BagError: the file cannot be read, or a row that is read holds NaN or Inf (slide, tile and column are named).
            IndexError: no such tile.
        """
        where = f"{self.path}: slide {self.slide_id}"
        numbers = wanted_rows(where, rows, self.tiles)
        read = self._found.features.read(numbers)
        if len(read) == 0:
            return read.new_zeros(0, self.dim)
        check_finite(where, read, numbers)
        return read

    def coords(self) -> Tensor | None:
        """Level-0 pixels int64 [n, 2] of the tiles' top-left corners; None where none are stored.

        Raises:
            BagError: micrometres (STAMP) or centres (slideflow) and no ``mpp``; fractions of a pixel.
        """
        return None if self._found.coords is None else self._found.coords.level0(self.mpp)

    @property
    def tile_size_level0(self) -> float | None:
        """Level-0 pixels a tile is wide; None where the file, or ``mpp``, does not say."""
        return None if self._found.coords is None else self._found.coords.tile_size_level0(self.mpp)

    def iter_rows(self, chunk: int = CHUNK) -> Iterator[Tensor]:
        """The features in pieces of at most ``chunk`` rows."""
        for piece in spans(self.tiles, chunk):
            yield self.features(piece)


def open_bag(path: str | os.PathLike[str], *, slide_id: str | None = None, mpp: float | None = None) -> Bag:
    """Open a bag of any layout without reading its features.

    Args:
        path: an HDF5, ``.pt`` (tensors only: nothing in it is run) or ``.npy`` file, or a zarr folder.
        slide_id: by default the name of the file without its suffix.
        mpp: microns per pixel of the slide's level 0; the coordinates of STAMP and slideflow need it.

    Raises:
        BagError: missing or damaged, no features in it (says which keys were looked for and which are there), another
            rank or dtype, or coordinates that do not fit the features.
        ModuleNotFoundError: h5py or zarr is needed and missing; says how to get it.
    """
    path = Path(path)
    mpp = positive(path, "mpp", mpp)
    return Bag(slide_id_of(path) if slide_id is None else slide_id, path, read_layout(path), mpp)


class BagFolder(Mapping[str, Bag]):
    """The bags of a folder by slide, opened when asked for; all of one D.

    Also a source of rows for :func:`dre_fast.fit_codebook`, ``ResidualEncoding.fit`` and ``ResidualMIL.fit_codebook``:
    they read one piece of one bag at a time.

    Args:
        folder: or table, as for :func:`find_bags`, ``recursive`` too.
        ids: these slides only, in this order, e.g. those of the training split.
        mpp: microns per pixel of level 0, of all slides or by slide.

    Raises:
        BagError: as :func:`find_bags`, or a slide of ``ids`` without bag, or given twice; from ``[]`` as
            :func:`open_bag`, or a bag of another D than those opened before (both are named).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        ids: Iterable[str] | None = None,
        recursive: bool = False,
        mpp: float | Mapping[str, float] | None = None,
    ) -> None:
        self.folder = Path(folder)
        files = find_bags(folder, recursive=recursive)
        self.files = files if ids is None else _chosen(self.folder, files, ids)
        self._mpp = mpp
        self._bags: dict[str, Bag] = {}
        self._first: Bag | None = None

    def __getitem__(self, slide_id: str) -> Bag:
        bag = self._open(slide_id)
        if bag.dim == 0:
            bag.dim = self.dim
        return bag

    def __contains__(self, slide_id: object) -> bool:
        return slide_id in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        return f"BagFolder({str(self.folder)!r}, {len(self)} bags)"

    @property
    def dim(self) -> int:
        """D; opens bags until one tells. 0 where none does: all are without tiles."""
        for slide_id in self.files:
            if self._first is not None:
                break
            self._open(slide_id)
        return 0 if self._first is None else self._first.dim

    def cu_seqlens(self) -> Tensor:
        """Offsets int64 [B+1] of the bags in the order of the rows; opens all. For ``dre_fast.codebook.bag_weights``."""
        tiles = [0, *(bag.tiles for bag in self.values())]
        return torch.tensor(tiles, dtype=torch.int64).cumsum(0)

    def iter_rows(self, chunk: int = CHUNK) -> Iterator[Tensor]:
        """The rows of all bags, slide by slide, in pieces [m, D] of at most ``chunk`` rows."""
        for bag in self.values():
            yield from bag.iter_rows(chunk)

    def _open(self, slide_id: str) -> Bag:
        if slide_id in self._bags:
            return self._bags[slide_id]
        if slide_id not in self.files:
            raise KeyError(f"{self.folder}: no bag of slide {slide_id!r} among {len(self)}")
        mpp = self._mpp.get(slide_id) if isinstance(self._mpp, Mapping) else self._mpp
        bag = open_bag(self.files[slide_id], slide_id=slide_id, mpp=mpp)
        first = self._first
        if first is not None and bag.dim and bag.dim != first.dim:
            raise BagError(
                f"{bag.path}: slide {slide_id} has D={bag.dim}, but slide {first.slide_id} ({first.path}) has "
                f"D={first.dim}; a folder holds the features of one encoder ({self._counted()})"
            )
        if first is None and bag.dim:
            self._first = bag
        self._bags[slide_id] = bag
        return bag

    def _counted(self) -> str:
        """Which D how many bags have: who is the odd one."""
        found: Counter[int] = Counter()
        for slide_id, path in self.files.items():
            with contextlib.suppress(BagError):
                found[open_bag(path, slide_id=slide_id).dim] += 1
        return ", ".join(f"D={dim} in {number}" for dim, number in found.most_common() if dim)


def _chosen(folder: Path, files: Mapping[str, Path], ids: Iterable[str]) -> dict[str, Path]:
    if isinstance(ids, str):
        raise BagError(f"{folder}: ids must be a list of slides, got the text {ids!r}")
    wanted: Sequence[Any] = list(ids)
    absent = [slide_id for slide_id in wanted if slide_id not in files]
    if absent:
        have = ", ".join(list(files)[:3])
        raise BagError(
            f"{folder}: no bag of slide {absent[0]!r} ({len(absent)} of {len(wanted)} absent); it has bags of "
            f"{len(files)} slides: {have}{' ...' if len(files) > 3 else ''}"
        )
    if len(set(wanted)) < len(wanted):
        twice = next(slide_id for n, slide_id in enumerate(wanted) if slide_id in wanted[:n])
        raise BagError(f"{folder}: slide {twice!r} is given twice in ids")
    return {slide_id: files[slide_id] for slide_id in wanted}
