"""Reading tiles of many slides as tensors: from the slide files, or from a cache of decoded tiles."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dre_fast.data.buffers import Buffers
from dre_fast.data.files import atomic_path
from dre_fast.data.optional import need
from dre_fast.data.slides import Slide, SlideError, open_slide
from dre_fast.data.tiling import Tiling, fit_to_slide
from dre_fast.progress import progress

CACHE_FORMAT_VERSION = 1
# Tiles decoded by one task while a cache is written.
CACHE_CHUNK = 32


class _Reader:
    """What readers of tiles share: the tilings, and errors that name slide and tile."""

    def __init__(self, tilings: Sequence[Tiling]):
        if not tilings:
            raise ValueError("no slides to read tiles from")
        sizes = sorted({t.tile_size for t in tilings})
        if len(sizes) > 1:
            odd = next(t for t in tilings if t.tile_size != tilings[0].tile_size)
            raise ValueError(
                f"slide {odd.slide_id}: its tiles have {odd.tile_size} px, those of {tilings[0].slide_id} "
                f"{tilings[0].tile_size} px; tile all slides alike"
            )
        self.tilings = list(tilings)
        self.tile_size = sizes[0]

    def __len__(self) -> int:
        """Number of slides."""
        return len(self.tilings)

    @property
    def tiles_per_slide(self) -> list[int]:
        """Number of tiles of every slide."""
        return [len(t) for t in self.tilings]

    def _ids(self, slide_index: int, tile_ids: torch.Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
        if not 0 <= slide_index < len(self.tilings):
            raise ValueError(f"no slide {slide_index}: there are {len(self.tilings)}")
        ids = np.asarray(tile_ids, dtype=np.int64).reshape(-1)
        tiling = self.tilings[slide_index]
        bad = ids[(ids < -1) | (ids >= len(tiling))]
        if len(bad):
            raise ValueError(
                f"slide {tiling.slide_id}: no tile {bad[0]}, it has tiles 0 to {len(tiling) - 1}"
            )
        return ids


class TileReader(_Reader):
    """Reads tiles from slide files at the size and pixel size of their tilings.

    At most ``max_open`` slides stay open, the least recently used is closed first. Picklable, and safe to use
    in the workers of a DataLoader: handles are opened by the process that reads and never shared with
    another. Reading from several threads is allowed.

    Args:
        slides: path of every slide (or a uint8 array [H,W,3]), in the order of ``tilings``.
        tilings: tiles of every slide, all of one ``tile_size``.
        backend: as for ``open_slide``.
        max_open: bound on open slides, at least 1.
        mpp: microns per pixel of slides that do not state it. Reading does not depend on it.
        num_workers: threads that decode one ``read`` (cuCIM only).

    Raises:
        ValueError: different numbers of slides and tilings, or tile sizes that differ.
    """

    def __init__(
        self,
        slides: Sequence[str | Path | np.ndarray],
        tilings: Sequence[Tiling],
        backend: str = "auto",
        max_open: int = 8,
        mpp: float | None = None,
        num_workers: int = 1,
    ):
        super().__init__(tilings)
        if len(slides) != len(tilings):
            raise ValueError(f"{len(slides)} slides but {len(tilings)} tilings")
        if max_open < 1:
            raise ValueError(f"max_open must be at least 1, got {max_open}")
        self.slides = list(slides)
        self.backend = backend
        self.max_open = max_open
        self.mpp = mpp
        self.num_workers = num_workers
        self._inherited: list[Any] = []
        self._start()

    def read(self, slide_index: int, tile_ids: torch.Tensor | np.ndarray | Sequence[int]) -> torch.Tensor:
        """Reads tiles of one slide.

        Args:
            slide_index: position in ``slides``.
            tile_ids: int64 [m], rows of the tiling's ``coords``; -1 gives a tile of zeros.

        Returns:
            uint8 [m,3,P,P] with P = ``tile_size``, RGB.

        Raises:
            ValueError: no such slide or tile.
            SlideError: the slide does not open, does not fit its coordinates, or is damaged at a tile; names
                both.
        """
        ids = self._ids(slide_index, tile_ids)
        out = self._buffers.take((len(ids), 3, self.tile_size, self.tile_size))
        wanted = ids >= 0
        if wanted.all():
            self._fill(slide_index, ids, out)
        else:
            out[~wanted] = 0
            tiles = np.empty((int(wanted.sum()), *out.shape[1:]), dtype=np.uint8)
            self._fill(slide_index, ids[wanted], tiles)
            out[wanted] = tiles
        return torch.from_numpy(out)

    @property
    def open_slides(self) -> int:
        """Number of slides open in this process."""
        return len(self._open) if self._pid == os.getpid() else 0

    def slide(self, slide_index: int) -> Slide:
        """The open slide, e.g. for its thumbnail. It may be closed by a later ``read``."""
        return self._handle(slide_index)[0]

    def close(self) -> None:
        """Closes all slides; they open again when needed."""
        with self._lock:
            while self._open:
                self._open.popitem()[1][0].close()

    def cache_to(self, path: str | Path, workers: int = 1) -> CachedTileReader:
        """Decodes all tiles once into one file and returns a reader of it; an existing cache is checked and
        reused.

        The file takes 3 * P * P bytes a tile (197 KB for 256 px). It appears whole or not at all.

        Args:
            path: HDF5 file to create or reuse.
            workers: threads that decode.

        Raises:
            ValueError: the existing file holds other tiles; names the first slide that differs.
        """
        path = Path(path)
        if not path.exists():
            self._write_cache(path, max(1, workers))
        return CachedTileReader(path, self.tilings)

    def _write_cache(self, path: Path, workers: int) -> None:
        h5py = need("h5py", "wsi")
        total, size = sum(self.tiles_per_slide), self.tile_size
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            file.attrs["dre_fast_tiles"] = CACHE_FORMAT_VERSION
            file.attrs["tile_size"] = size
            text = h5py.string_dtype()
            file.create_dataset("slide_id", data=[t.slide_id for t in self.tilings], dtype=text)
            file.create_dataset("fingerprint", data=[fingerprint(t) for t in self.tilings], dtype=text)
            file.create_dataset("n_tiles", data=np.array(self.tiles_per_slide, dtype=np.int64))
            # One contiguous block, so that readers can map it into memory.
            tiles = file.create_dataset("tiles", shape=(total, 3, size, size), dtype=np.uint8)
            done = 0
            chunks = progress(self._chunks(workers), "caching tiles", self._count_chunks(), "chunk")
            for chunk in chunks:
                tiles[done : done + len(chunk)] = chunk
                done += len(chunk)

    def _count_chunks(self) -> int:
        return sum(-(-n // CACHE_CHUNK) for n in self.tiles_per_slide)

    def _chunks(self, workers: int) -> Iterator[np.ndarray]:
        """All tiles in order, decoded ahead by ``workers`` threads, few chunks held at a time."""
        tasks = (
            (slide, start)
            for slide, n in enumerate(self.tiles_per_slide)
            for start in range(0, n, CACHE_CHUNK)
        )

        def decode(task: tuple[int, int]) -> np.ndarray:
            slide, start = task
            stop = min(start + CACHE_CHUNK, len(self.tilings[slide]))
            return self.read(slide, np.arange(start, stop)).numpy()

        with ThreadPoolExecutor(workers) as pool:
            while batch := list(islice(tasks, 2 * workers)):
                yield from pool.map(decode, batch)

    def _fill(self, slide_index: int, ids: np.ndarray, out: np.ndarray) -> None:
        """Reads tiles into ``out``, uint8 [n,3,P,P]."""
        if not len(ids):
            return
        try:
            self._read_into(slide_index, ids, out)
        except SlideError as error:
            self._drop(slide_index)
            raise self._named(slide_index, ids, error) from error

    def _named(self, slide_index: int, ids: np.ndarray, error: SlideError) -> SlideError:
        """The error of a batch with the tile that causes it, found by reading one at a time."""
        slide_id = self.tilings[slide_index].slide_id
        scratch = np.empty((1, 3, self.tile_size, self.tile_size), dtype=np.uint8)
        for tile in ids.tolist():
            try:
                self._read_into(slide_index, np.array([tile]), scratch)
            except SlideError as single:
                self._drop(slide_index)
                return SlideError(f"slide {slide_id}, tile {tile}: {single}")
        return SlideError(f"slide {slide_id}, tiles {ids.tolist()}: {error}")

    def _read_into(self, slide_index: int, ids: np.ndarray, out: np.ndarray) -> None:
        slide, tiling = self._handle(slide_index)
        assert tiling.level is not None
        assert tiling.read_size is not None
        slide.read_planar(tiling.coords[ids], tiling.level, tiling.read_size, out)

    def _handle(self, slide_index: int) -> tuple[Slide, Tiling]:
        if self._pid != os.getpid():
            # Forked: file positions and threads of inherited handles belong to the parent. They are kept
            # referenced, as closing them here could disturb it.
            self._inherited.append(self._open)
            self._start()
        # A gate for each slide: threads that want one slide open it once, and a slow disk keeps no other slide waiting.
        with self._lock:
            gate = self._gates.setdefault(slide_index, threading.Lock())
        with gate:
            with self._lock:
                if slide_index in self._open:
                    self._open.move_to_end(slide_index)
                    return self._open[slide_index]
            slide = open_slide(self.slides[slide_index], self.backend, self.mpp, self.num_workers)
            try:
                entry = (slide, fit_to_slide(self.tilings[slide_index], slide))
            except SlideError:
                slide.close()
                raise
            with self._lock:
                self._open[slide_index] = entry
                while len(self._open) > self.max_open:
                    # Not closed by hand: another thread may be reading it. Its last reference closes it.
                    self._open.popitem(last=False)
            return entry

    def _drop(self, slide_index: int) -> None:
        # After one error OpenSlide answers every later call with that error; a fresh handle does not.
        with self._lock:
            self._open.pop(slide_index, None)

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._gates: dict[int, threading.Lock] = {}
        self._buffers = Buffers()
        self._open: OrderedDict[int, tuple[Slide, Tiling]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_gates", "_buffers", "_open", "_inherited", "_pid")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._inherited = []
        self._start()


class CachedTileReader(_Reader):
    """Reads tiles from a file made by ``TileReader.cache_to``; the slides themselves are not needed.

    Args:
        path: the cache.
        tilings: tiles of every slide; the cache must hold exactly these.

    Raises:
        ValueError: the file is no cache or was made from other tilings; names the first slide that differs.
    """

    def __init__(self, path: str | Path, tilings: Sequence[Tiling]):
        super().__init__(tilings)
        self.path = Path(path)
        self._offset = self._verify()
        self._starts = np.concatenate([[0], np.cumsum(self.tiles_per_slide)])
        self._tiles: np.ndarray | None = None

    def read(self, slide_index: int, tile_ids: torch.Tensor | np.ndarray | Sequence[int]) -> torch.Tensor:
        """Same as ``TileReader.read``: uint8 [m,3,P,P], zeros for id -1."""
        ids = self._ids(slide_index, tile_ids)
        if self._tiles is None:
            shape = (int(self._starts[-1]), 3, self.tile_size, self.tile_size)
            self._tiles = np.memmap(self.path, dtype=np.uint8, mode="r", offset=self._offset, shape=shape)
        out = np.zeros((len(ids), *self._tiles.shape[1:]), dtype=np.uint8)
        wanted = ids >= 0
        out[wanted] = self._tiles[ids[wanted] + self._starts[slide_index]]
        return torch.from_numpy(out)

    def close(self) -> None:
        """Unmaps the file; it is mapped again when needed."""
        self._tiles = None

    def _verify(self) -> int:
        """Byte offset of the tiles in the file."""
        h5py = need("h5py", "wsi")
        advice = "delete it to have it made again, or give another path"
        try:
            with h5py.File(self.path, "r") as file:
                if file.attrs.get("dre_fast_tiles") != CACHE_FORMAT_VERSION:
                    raise ValueError(f"tile cache {self.path}: not a tile cache of this version; {advice}")
                names = file["slide_id"].asstr()[:].tolist()
                prints = file["fingerprint"].asstr()[:].tolist()
                offset = file["tiles"].id.get_offset()
        except (OSError, KeyError) as error:
            raise ValueError(f"tile cache {self.path}: not readable ({error}); {advice}") from error
        if names != [t.slide_id for t in self.tilings]:
            raise ValueError(
                f"tile cache {self.path}: out of date: made from {len(names)} slides, not these "
                f"{len(self.tilings)} in this order; {advice}"
            )
        for tiling, cached in zip(self.tilings, prints):
            if cached != fingerprint(tiling):
                raise ValueError(
                    f"tile cache {self.path}: out of date: slide {tiling.slide_id} was tiled differently "
                    f"when it was made; {advice}"
                )
        if offset is None:  # HDF5 places nothing for zero tiles
            raise ValueError(f"tile cache {self.path}: holds no tiles; {advice}")
        return int(offset)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as a copy of its content.
        return {**self.__dict__, "_tiles": None}


def fingerprint(tiling: Tiling) -> str:
    """Hash of everything that decides which pixels the tiles of a slide show."""
    parts = (
        tiling.slide_id,
        tiling.tile_size,
        tiling.level,
        tiling.read_size,
        tiling.tile_size_level0,
        tiling.dimensions,
    )
    digest = hashlib.sha256(repr(parts).encode())
    digest.update(np.ascontiguousarray(tiling.coords, dtype="<i8").tobytes())
    return digest.hexdigest()[:32]
