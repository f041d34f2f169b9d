"""Which slides of a bank in a file lie in memory: a ring of slabs, read ahead, that overwrites nothing in use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


class Event(Protocol):
    """What marks the end of the kernels that read a slab: ``torch.cuda.Event``."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


Place = tuple[int, int, int]  # slide, its first row in the file, its rows


@dataclass
class Slab:
    """The rows of one slide in the ring."""

    slide: int
    start: int  # its first row in the file
    first: int  # its first row in the ring
    rows: int
    read: int  # the job that fills it
    wanted: bool  # read ahead, and not used since
    leases: int = 0
    fresh: bool = True  # not handed out since it was read
    events: list[Event] = field(default_factory=list)
    dirty: list[np.ndarray] = field(default_factory=list)  # tiles written since it was read

    @property
    def end(self) -> int:
        return self.first + self.rows

    def in_use(self) -> bool:
        self.events = [event for event in self.events if not event.query()]
        return self.leases > 0 or bool(self.events)


class SlabRing:
    """Slabs come in at the head of the ring, one after another; the head passes over slabs that are in use.

    A slab is in use while it is leased and until the events recorded at the end of its leases have passed. A
    slab that was read ahead and not used yet is overwritten only by a slide that is needed at once. Written rows
    go back to the file when their slab is overwritten, or with :meth:`flush`. Methods may be called from several
    threads.

    Args:
        file: a ``dre_fast._host.RowFile``, whose ring this object manages.
        rows: rows of the ring.
    """

    def __init__(self, file: Any, rows: int) -> None:
        self.file = file
        self.rows = rows
        self.slabs: dict[int, Slab] = {}
        self._leaving: list[tuple[Slab, int]] = []  # overwritten soon, and the job that writes them back
        self._head = 0
        self._lock = threading.RLock()
        self._counts = dict.fromkeys(("hits", "late", "misses", "refused", "dropped", "evicted"), 0)

    # ------------------------------------------------------------------ reading ahead and using

    def prefetch(self, slides: Sequence[Place]) -> int:
        """Begin to read the slides that come next; what an earlier call named and this one does not may go again.

        Returns:
            How many of them, from the front, are in memory or on their way; the next has no room yet.

        Raises:
            OSError: rows of a slide that left memory could not be written back.
        """
        with self._lock:
            self._reap()
            for slab in self.slabs.values():
                slab.wanted = False
            for done, (slide, start, rows) in enumerate(slides):
                found = self.slabs.get(slide) or self._take(slide, start, rows, urgent=False)
                if found is None:
                    self._counts["refused"] += 1
                    return done
                found.wanted = True
            return len(slides)

    @contextmanager
    def lease(self, slides: Sequence[Place], event: Callable[[], Event | None]) -> Iterator[list[Slab]]:
        """Slabs of distinct slides, read and safe from being overwritten until the block and its kernels end.

        Args:
            event: called at the end of the block: what marks the end of the kernels started in it, or None.

        Raises:
            ValueError: the slides do not fit into the ring together.
            OSError: reading one of them failed; names the slide.
        """
        held: list[Slab] = []
        try:
            with self._lock:
                self._reap()
                held = self._hold_all(slides)
            for slab in held:
                self._wait(slab)
            yield held
        finally:
            mark = event() if held else None
            with self._lock:
                for slab in held:
                    slab.leases -= 1
                    if mark is not None:
                        slab.events.append(mark)

    def _hold_all(self, slides: Sequence[Place]) -> list[Slab]:
        before = dict(self._counts)
        held = self._hold_some(slides)
        if len(held) < len(slides):  # the slabs kept leave gaps too small: start over with nothing in the way
            for slab in held:
                slab.leases -= 1
            for slab in list(self.slabs.values()):
                if not slab.leases:
                    self._finish(slab)
                    self._evict(slab)
            self._head = 0
            evicted = self._counts["evicted"]
            self._counts.update(before, evicted=evicted)
            held = self._hold_some(slides)
        if len(held) < len(slides):
            for slab in held:
                slab.leases -= 1
            slide, _, rows = slides[len(held)]
            together = sum(n for _, _, n in slides)
            raise ValueError(
                f"MemoryBank: slide {slide} ({rows:,} tiles) finds no room: the slides of this call ({len(slides)}) have "
                f"{together:,} rows, the cache in memory holds {self.rows:,}. Make cache= (memory.cache) at least "
                f"{together / self.rows:.1f} times as large, or give fewer slides at once"
            )
        return held

    def _hold_some(self, slides: Sequence[Place]) -> list[Slab]:
        """Leases, from the front, on as many slides as find room."""
        held = []
        for slide, start, rows in slides:
            slab = self.slabs.get(slide)
            if slab is not None and not self._sound(slab):  # read ahead in vain: try again
                del self.slabs[slide]
                slab = None
            if slab is None:
                slab = self._take(slide, start, rows, urgent=True)
                self._counts["misses"] += 1
            else:
                self._counts["hits" if self.file.done(slab.read) else "late"] += 1
            if slab is None:
                break
            slab.leases += 1
            slab.wanted = False
            held.append(slab)
        return held

    def _wait(self, slab: Slab) -> None:
        try:
            self.file.wait(slab.read)
        except OSError as error:
            with self._lock:
                if self.slabs.get(slab.slide) is slab:
                    del self.slabs[slab.slide]
                self._reap()  # where a write-back failed that is the error to report
            raise OSError(error.errno, f"MemoryBank: slide {slab.slide}: {error.strerror}") from error

    def _sound(self, slab: Slab) -> bool:
        """Whether the read of a slab has not failed."""
        try:
            self.file.done(slab.read)
        except OSError:
            return False
        return True

    # ------------------------------------------------------------------ room

    def _take(self, slide: int, start: int, rows: int, urgent: bool) -> Slab | None:
        """A slab for a slide, its read begun, or None where there is no room."""
        first = self._room(rows, lambda slab: slab.in_use() or slab.wanted)
        if first is None and urgent:
            first = self._room(rows, Slab.in_use)
        if first is None and urgent:  # kernels end, leases of this very call do not
            for slab in self.slabs.values():
                self._finish(slab)
            first = self._room(rows, Slab.in_use)
        if first is None:
            return None
        for slab in self._overlapping(self.slabs.values(), first, first + rows):
            self._evict(slab)
        after = [
            job
            for slab, job in self._leaving
            if slab.slide == slide or (slab.first < first + rows and first < slab.end)
        ]
        self._head = first + rows
        read = self.file.read(start, rows, first, after)
        self.slabs[slide] = slab = Slab(slide, start, first, rows, read, wanted=False)
        return slab

    def _room(self, rows: int, kept: Callable[[Slab], bool]) -> int | None:
        """The first place from the head on, once around, where ``rows`` rows overlap no slab that is kept."""
        if rows > self.rows:
            return None
        keep = [slab for slab in self.slabs.values() if kept(slab)]
        head = self._head if self._head + rows <= self.rows else 0
        for begin, stop in ((head, self.rows), (0, head + rows)):
            first = begin
            while first + rows <= min(stop, self.rows):
                blocked = max((s.end for s in self._overlapping(keep, first, first + rows)), default=None)
                if blocked is None:
                    return first
                first = blocked
        return None

    @staticmethod
    def _overlapping(slabs: Iterable[Slab], first: int, end: int) -> list[Slab]:
        return [slab for slab in slabs if slab.first < end and first < slab.end]

    def _evict(self, slab: Slab) -> None:
        self._counts["dropped" if slab.wanted else "evicted"] += 1
        del self.slabs[slab.slide]
        self._leave(slab, self._write_back(slab) if slab.dirty else slab.read)

    def _leave(self, slab: Slab, job: int) -> None:
        """What comes in the place of a slab waits for ``job``: its write-back, or a read that is still under way."""
        if self._sound(slab):
            self._leaving.append((slab, job))

    def _write_back(self, slab: Slab) -> int:
        tiles = np.unique(np.concatenate(slab.dirty))
        job: int = self.file.write(tiles + slab.first, tiles + slab.start, [slab.read])
        return job

    def _reap(self) -> None:
        """Forget slabs that are written back; one whose rows could not be written comes back, nothing is lost.

        Raises:
            OSError: the first such slide.
        """
        leaving, self._leaving = self._leaving, []
        problem = None
        for slab, job in leaving:
            try:
                if not self.file.done(job):
                    self._leaving.append((slab, job))
            except OSError as error:
                if not slab.dirty:
                    continue  # its read failed: there is nothing to keep
                # all that was to come in its place waited for this job, and so was never read
                for other in self._overlapping(list(self.slabs.values()), slab.first, slab.end):
                    del self.slabs[other.slide]
                self.slabs[slab.slide] = slab
                problem = problem or self._kept(slab, error)
        if problem is not None:
            raise problem

    # ------------------------------------------------------------------ file and ring in step

    def wrote(self, slide: int, tiles: np.ndarray) -> None:
        """Note rows of a leased slide that were written in the ring. tiles: int64 [n]."""
        self.slabs[slide].dirty.append(tiles)

    def flush(self) -> None:
        """Write all changed rows to the file and wait until they are there.

        Raises:
            OSError: names the slide; its rows stay in the ring.
        """
        with self._lock:
            jobs = []
            for slab in self.slabs.values():
                if slab.dirty:
                    self._finish(slab)
                    jobs.append((slab, self._write_back(slab)))
            for slab, job in jobs:
                try:
                    self.file.wait(job)
                except OSError as error:
                    raise self._kept(slab, error) from error
                slab.dirty.clear()
            for _, job in self._leaving:
                with suppress(OSError):  # which _reap tells
                    self.file.wait(job)
            self._reap()

    def forget(self, slide: int) -> None:
        """Drop a slide, and what was written to it since it was read. No write of its rows is under way afterwards.

        Raises:
            RuntimeError: it is leased.
        """
        with self._lock:
            slab = self.slabs.get(slide)
            if slab is not None and slab.leases:
                raise RuntimeError(f"MemoryBank: slide {slide} is in use and cannot leave memory")
            for left, job in self._leaving:
                if left.slide == slide:
                    with suppress(OSError):  # rows that are not wanted any more
                        self.file.wait(job)
            self._leaving = [(left, job) for left, job in self._leaving if left.slide != slide]
            if slab is None:
                return
            self._finish(slab)
            del self.slabs[slide]
            slab.dirty.clear()
            self._leave(slab, slab.read)

    def clear(self) -> None:
        """Flush, then forget every slide.

        Raises:
            OSError, RuntimeError: as :meth:`flush` and :meth:`forget`.
        """
        with self._lock:
            self.flush()
            for slide in list(self.slabs):
                self.forget(slide)

    @staticmethod
    def _finish(slab: Slab) -> None:
        for event in slab.events:
            event.synchronize()
        slab.events.clear()

    @staticmethod
    def _kept(slab: Slab, error: OSError) -> OSError:
        return OSError(
            error.errno, f"MemoryBank: slide {slab.slide}: {error.strerror}; its rows are kept in memory"
        )

    def statistics(self) -> dict[str, int]:
        """Counts since the start; see :meth:`dre_fast.MemoryBank.cache_statistics`."""
        with self._lock:
            return {
                **self._counts,
                "slides_in_memory": len(self.slabs),
                "rows_in_memory": sum(slab.rows for slab in self.slabs.values()),
                "rows_cached": self.rows,
            }
