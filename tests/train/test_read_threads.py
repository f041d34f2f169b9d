"""Reading ahead by threads: how much is under way at once and how little is kept, order, faults, the same run."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from train_cohort import tiny_config

from dre_fast.data.slides import SlideError
from dre_fast.train.config import ConfigError
from dre_fast.train.loop import Trainer
from dre_fast.train.read_ahead import ReadAhead, chunks_of, read_jobs
from dre_fast.train.state import read_metrics

SOON = 5.0  # seconds that a test waits for what happens at once


class Meeting(Dataset[int]):
    """Items that are made only while ``least`` of them are made at the same time."""

    def __init__(self, least: int, items: int) -> None:
        self.items = items
        self.barrier = threading.Barrier(least)

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> int:
        self.barrier.wait(SOON)
        return index


@pytest.mark.parametrize("batches", [None, [[0, 1, 2], [3], [4, 5, 6, 7]]])
def test_all_threads_are_at_work_whatever_batch_their_items_belong_to(
    batches: list[list[int]] | None,
) -> None:
    """Four threads over batches of three, one and four items: one call at a time, or a batch at a time, never meets."""
    ahead = ReadAhead(
        Meeting(4, 8),
        str,
        workers=0,
        threads=4,
        slow=60.0,
        batches=batches,
        collate=None if batches is None else list,
    )
    assert list(ahead) == (list(range(8)) if batches is None else batches)


class Counting(Dataset[torch.Tensor]):
    """Items that know how many of them were begun."""

    def __init__(self, items: int) -> None:
        self.items, self.begun, self.lock = items, 0, threading.Lock()

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> torch.Tensor:
        with self.lock:
            self.begun += 1
        return torch.full((3,), index)


@pytest.mark.parametrize(("size", "most"), [(1, 5), (3, 9), (50, 100)])
def test_few_items_wait_while_a_batch_is_in_use(size: int, most: int) -> None:
    """Two threads: four items beyond the batch that was waited for, whole batches."""
    made = Counting(300)
    batches = [list(range(first, first + size)) for first in range(0, 300, size)]
    for number, batch in enumerate(
        ReadAhead(made, str, workers=0, threads=2, slow=60.0, batches=batches, collate=torch.stack)
    ):
        assert batch[:, 0].tolist() == batches[number]
        if number in (0, 3):
            time.sleep(0.05)  # all that may be begun is
            assert made.begun <= number * size + most
            assert made.begun >= min(300, number * size + size + min(4, size))
    assert made.begun == 300


def test_a_batch_is_freed_when_it_was_used() -> None:
    gc.disable()  # by reference counts alone: megabytes must not wait for the collector
    try:
        seen: list[weakref.ref[torch.Tensor]] = []
        made = iter(
            ReadAhead(
                Counting(40), str, workers=0, threads=2, slow=60.0, batches=[[2 * i, 2 * i + 1] for i in range(20)],
                collate=_watched(seen),
            )
        )  # fmt: skip
        for _ in range(20):
            next(made)
        assert next(made, None) is None
        assert len(seen) == 60  # items and batches
        assert not [one for one in seen if one() is not None]
    finally:
        gc.enable()


def _watched(seen: list[weakref.ref[torch.Tensor]]) -> Any:
    def collate(items: list[torch.Tensor]) -> torch.Tensor:
        whole = torch.stack(items)
        seen.extend(weakref.ref(one) for one in (*items, whole))
        return whole

    return collate


class Reader:
    """Tiles that hold their own numbers; some slides are slow, broken or faulty."""

    def __init__(self, slow: int = -1, broken: int = -1, faulty: int = -1) -> None:
        self.slow, self.broken, self.faulty = slow, broken, faulty
        self.reading = 0

    def read(self, slide: int, tiles: torch.Tensor) -> torch.Tensor:
        self.reading += 1
        if slide == self.slow:
            time.sleep(0.3)
        if slide == self.broken:
            raise SlideError(f"slide s{slide}, tile {int(tiles[0])}: damaged")
        if slide == self.faulty:
            raise RuntimeError("a fault of the program")
        self.reading -= 1
        return (tiles + 10 * slide).to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


def read(reader: Any, threads: int, slow: float = 60.0) -> list[Any]:
    jobs = chunks_of([5, 0, 3, 4], 2)
    return list(read_jobs(reader, jobs, [f"s{i}" for i in range(4)], workers=0, threads=threads, slow=slow))


@pytest.mark.parametrize("threads", [1, 3])
def test_jobs_come_in_order_with_their_errors(threads: int) -> None:
    found = read(Reader(broken=2, slow=0), threads)
    values = [item if isinstance(item, ValueError) else item[:, 0, 0, 0].tolist() for item in found]
    assert [v for v in values if not isinstance(v, ValueError)] == [[0, 1], [2, 3], [4], [30, 31], [32, 33]]
    assert [str(v) for v in values if isinstance(v, ValueError)] == [
        "slide s2, tile 0: damaged",
        "slide s2, tile 2: damaged",
    ]


def test_a_slow_slide_is_named_while_it_is_waited_for() -> None:
    with pytest.warns(UserWarning, match=r"waiting for tiles of slide s2 for more than 0\.1 s"):
        assert len(read(Reader(slow=2), 2, slow=0.1)) == 7


def test_a_fault_of_the_program_ends_the_run_with_its_own_words() -> None:
    with pytest.raises(RuntimeError, match="a fault of the program"):
        read(Reader(faulty=3), 2)


def test_nothing_is_read_any_more_once_the_loop_was_left() -> None:
    reader = Reader(slow=0)
    before = set(threading.enumerate())  # a traceback that pytest keeps can keep another test's loop
    for _ in read_jobs(reader, chunks_of([400], 2), ["s0"], workers=0, threads=2, slow=60.0):
        assert {thread.name.split("_")[0] for thread in {*threading.enumerate()} - before} == {
            "read-ahead",
            "slow-tiles",
        }
        break
    assert reader.reading == 0
    assert not {*threading.enumerate()} - before


def test_the_same_run_with_and_without_threads(tiny_cohort: Path, tmp_path: Path) -> None:
    logs = []
    for threads in (0, 3):
        config = tiny_config(tiny_cohort, f"data.threads={threads}", "data.stain=0.2", "optim.epochs=1")
        Trainer(config, tmp_path / str(threads)).fit()
        rows = read_metrics(tmp_path / str(threads) / "metrics.jsonl")
        logs.append([{k: v for k, v in row.items() if k not in ("seconds", "data_seconds")} for row in rows])
    assert logs[0] == logs[1]


def test_settings_that_make_no_sense_are_refused(tiny_cohort: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.workers=2 and data\.threads=3: .*set one of them to 0"):
        tiny_config(tiny_cohort, "data.workers=2", "data.threads=3").validate()
    with pytest.raises(ConfigError, match=r"data\.threads must be 0 or more"):
        tiny_config(tiny_cohort, "data.threads=-1").validate()
    with pytest.raises(ValueError, match="by 2 processes or by 3 threads, not both"):
        ReadAhead(Counting(4), str, workers=2, threads=3, slow=60.0)
