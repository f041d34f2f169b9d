"""The ring of slabs: what is in use stays, what is needed comes, and what could not be written back is not lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dre_fast.nn.bank_ring import Slab, SlabRing
from dre_fast.ops import native

if native.why_not("host"):
    pytest.skip(f"needs the compiled host part: {native.why_not('host')}", allow_module_level=True)

from dre_fast._host import RowFile

N, WIDTH, CACHED = 10, 16, 45  # rows of a slide, bytes of a row, rows of the ring: room for four slides
SLIDES = 20


class Kernel:
    """An event that passes when told, or when waited for."""

    def __init__(self) -> None:
        self.over = self.waited = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.over = self.waited = True


class Setup:
    def __init__(self, folder: Path, threads: int = 3) -> None:
        self.file = RowFile(str(folder), SLIDES * N, WIDTH, CACHED, threads)
        self.content = self.file.map().reshape(SLIDES * N, WIDTH)
        self.content[:] = np.arange(SLIDES * N)[:, None]
        self.memory = self.file.ring().reshape(CACHED, WIDTH)
        self.ring = SlabRing(self.file, CACHED)

    def places(self, *slides: int) -> list[tuple[int, int, int]]:
        return [(slide, slide * N, N) for slide in slides]

    def lease(self, *slides: int, event: Kernel | None = None):  # type: ignore[no-untyped-def]
        return self.ring.lease(self.places(*slides), lambda: event)

    def holds(self, slab: Slab) -> bool:
        """Whether the slab's rows are those of its slide."""
        expected = self.content[slab.start : slab.start + N]
        return bool(np.array_equal(self.memory[slab.first : slab.end], expected))

    def use(self, *slides: int, event: Kernel | None = None) -> None:
        with self.lease(*slides, event=event) as slabs:
            assert [slab.slide for slab in slabs] == list(slides)
            assert all(self.holds(slab) for slab in slabs)

    def resident(self) -> set[int]:
        return set(self.ring.slabs)


@pytest.fixture
def given(tmp_path: Path) -> Iterator[Setup]:
    setup = Setup(tmp_path)
    yield setup
    setup.file.close()


def test_slides_come_and_go_around_the_ring(given: Setup) -> None:
    for i in range(100):
        given.use(*{i % SLIDES, (i * 7 + 1) % SLIDES})
        places = sorted((slab.first, slab.end) for slab in given.ring.slabs.values())
        assert all(a[1] <= b[0] for a, b in pairwise(places))
    found = given.ring.statistics()
    assert found["misses"] == given.file.statistics()["reads"]
    assert found["slides_in_memory"] == len(given.ring.slabs) <= 4


def test_what_was_read_ahead_is_a_hit(given: Setup) -> None:
    assert given.ring.prefetch(given.places(3, 4, 5)) == 3
    for slab in given.ring.slabs.values():
        given.file.wait(slab.read)
    given.use(3, 4, 5)
    assert {k: given.ring.statistics()[k] for k in ("hits", "late", "misses")} == {
        "hits": 3,
        "late": 0,
        "misses": 0,
    }


def test_reading_ahead_stops_where_there_is_no_room(given: Setup) -> None:
    assert given.ring.prefetch(given.places(*range(8))) == 4
    assert given.resident() == {0, 1, 2, 3}
    given.use(0)
    assert given.ring.prefetch(given.places(1, 2, 3, 4, 5)) == 4  # 0 was used: its place is free again
    assert given.resident() == {1, 2, 3, 4}
    assert given.ring.prefetch(given.places(7)) == 1  # the others are not awaited any more
    assert 7 in given.resident()


def test_a_slide_needed_now_takes_the_place_of_one_read_ahead(given: Setup) -> None:
    given.ring.prefetch(given.places(0, 1, 2, 3))
    given.use(9)
    assert 9 in given.resident()
    assert given.ring.statistics()["dropped"] == 1


def test_slides_in_use_are_never_overwritten(given: Setup) -> None:
    with given.lease(0, 1) as held:
        for slide in range(2, SLIDES):
            given.use(slide)
            given.ring.prefetch(given.places((slide + 1) % SLIDES, (slide + 2) % SLIDES))
            assert {0, 1} <= given.resident()
            assert all(given.holds(slab) for slab in held)
    given.use(*range(5, 9))
    assert not {0, 1} & given.resident()


def test_kernels_under_way_keep_their_slides(given: Setup) -> None:
    kernels = {slide: Kernel() for slide in range(3)}
    for slide, kernel in kernels.items():
        given.use(slide, event=kernel)
    assert given.ring.prefetch(given.places(3, 4, 5)) == 1
    assert {0, 1, 2, 3} == given.resident()
    kernels[1].over = True
    assert given.ring.prefetch(given.places(4, 5)) == 2  # 3 is not awaited any more, 1 is not in use
    assert {0, 2, 4, 5} == given.resident()
    assert not any(kernel.waited for kernel in kernels.values())
    given.use(6, 7, 8, 9)  # needed at once: waits for the kernels
    assert kernels[0].waited
    assert kernels[2].waited
    assert given.resident() == {6, 7, 8, 9}


def test_slides_that_do_not_fit_together_are_refused_and_nothing_stays_leased(given: Setup) -> None:
    with pytest.raises(
        ValueError,
        match=r"slide 4 \(10 tiles\) finds no room: the slides of this call \(5\).*50 rows.*holds 45",
    ):
        given.use(0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="finds no room"), given.ring.lease([(19, 0, 46)], lambda: None):
        pass
    assert not any(slab.leases for slab in given.ring.slabs.values())
    given.use(5, 6, 7, 8)


def test_gaps_too_small_for_a_slide_are_closed(given: Setup) -> None:
    given.use(0, 1)  # rows 0 .. 19
    given.ring.prefetch(given.places(3))  # 20 .. 29
    with given.lease(3):
        pass
    with given.ring.lease(
        [(3, 30, 10), (19, 0, 30)], lambda: None
    ) as slabs:  # 15 rows before, 15 after slide 3
        assert sorted((slab.first, slab.end) for slab in slabs) == [(0, 10), (10, 40)]
    assert given.resident() == {3, 19}


def test_written_rows_reach_the_file_when_their_place_is_needed(given: Setup) -> None:
    with given.lease(2) as (slab,):
        given.memory[slab.first + 3] = 255
        given.memory[slab.first + 4] = 254
        given.ring.wrote(2, np.array([4, 3, 3]))
    given.use(*range(5, 9))  # overwrites it
    assert given.content[[23, 24, 25], 0].tolist() == [255, 254, 25]
    given.use(2)
    assert given.file.statistics()["bytes_written"] == 2 * WIDTH


def test_a_slide_read_again_sees_what_was_written(given: Setup) -> None:
    for value in range(100, 200):
        with given.lease(0) as (slab,):
            given.memory[slab.first : slab.end] = value
            given.ring.wrote(0, np.arange(N))
        given.use(1, 2, 3, 4)
        with given.lease(0) as (slab,):
            assert (given.memory[slab.first : slab.end] == value).all()


def full_disk(file: RowFile) -> int:
    """From now on every write to the file fails; returns what puts it right again."""
    kept = os.dup(file.fileno())
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, file.fileno())
    os.close(full)
    return kept


def mend(file: RowFile, kept: int) -> None:
    os.dup2(kept, file.fileno())
    os.close(kept)


def read_all_ahead(given: Setup) -> None:
    """One slide after another, each read until it is there or has failed."""
    for slide in range(5, 12):
        given.ring.prefetch(given.places(slide))
        for slab in list(given.ring.slabs.values()):
            with suppress(OSError):
                given.file.wait(slab.read)


def test_rows_that_could_not_be_written_back_are_kept(given: Setup) -> None:
    with given.lease(2) as (slab,):
        given.memory[slab.first + 3] = 255
        given.ring.wrote(2, np.array([3]))
    kept = full_disk(given.file)
    with pytest.raises(OSError, match=r"slide 2: .*No space left.*kept in memory"):
        read_all_ahead(given)
    with given.lease(2) as (again,):
        assert (given.memory[again.first + 3] == 255).all()
    with pytest.raises(OSError, match=r"slide 2: .*No space left"):
        given.ring.flush()
    mend(given.file, kept)
    given.ring.clear()  # what the broken file gave for the others is no concern here
    assert (given.content[23] == 255).all()
    given.use(*range(5, 9))
    given.use(2)


def test_a_read_that_fails_names_the_slide_and_can_be_tried_again(given: Setup) -> None:
    size = SLIDES * N * WIDTH
    os.ftruncate(given.file.fileno(), size // 2)
    given.ring.prefetch(given.places(15))
    for _ in range(2):
        with pytest.raises(OSError, match=r"slide 15: .*cut short"):
            given.use(15)
    given.use(1, 2, 3, 4)
    given.use(5, 6, 7)  # also over the place of the one that failed
    os.ftruncate(given.file.fileno(), size)
    with given.lease(15):
        pass


def test_forgetting_drops_what_was_written(given: Setup) -> None:
    with given.lease(2) as (slab,):
        given.memory[slab.first] = 255
        given.ring.wrote(2, np.array([0]))
        with pytest.raises(RuntimeError, match="slide 2 is in use"):
            given.ring.forget(2)
    given.ring.forget(2)
    given.ring.forget(2)
    assert 2 not in given.resident()
    given.use(2)
    assert given.content[20, 0] == 20


def test_no_write_comes_after_a_slide_was_forgotten(tmp_path: Path) -> None:
    """Its rows in the file may be given to another slide at once."""
    given = Setup(tmp_path, threads=1)
    with given.lease(2) as (slab,):
        given.memory[slab.first] = 255
        given.ring.wrote(2, np.array([0]))
    given.use(5, 6, 7)
    busy = [given.file.read(0, 5, 40, []) for _ in range(20_000)]  # what the only thread does first
    given.ring.prefetch(given.places(8, 9))  # takes the place of slide 2, whose row goes to the file now
    assert 2 not in given.resident()
    given.ring.forget(2)
    given.content[20:30] = 0
    for job in busy:
        given.file.wait(job)
    given.ring.flush()
    assert not given.content[20:30].any()
    given.file.close()


def test_clear_writes_everything_first(given: Setup) -> None:
    with given.lease(1, 2) as slabs:
        for slab in slabs:
            given.memory[slab.first] = 255
            given.ring.wrote(slab.slide, np.array([0]))
    given.ring.clear()
    assert given.resident() == set()
    assert given.content[[10, 20], 0].tolist() == [255, 255]


def test_threads_share_a_ring(given: Setup) -> None:
    """One thread reads ahead while others use slides: every slab holds its slide's rows for as long as it is leased."""
    problems: list[str] = []
    stop = threading.Event()

    def read_ahead() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            given.ring.prefetch(given.places(i % SLIDES, (i + 1) % SLIDES))

    def use(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            slide = int(rng.integers(SLIDES))
            with given.lease(slide) as (slab,):
                if not given.holds(slab):
                    problems.append(f"slide {slide}")

    ahead = threading.Thread(target=read_ahead)
    ahead.start()
    users = [threading.Thread(target=use, args=(seed,)) for seed in range(2)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    stop.set()
    ahead.join()
    assert not problems
    assert given.ring.statistics()["evicted"] > 0
