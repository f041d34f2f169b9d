"""Tiles read ahead of their use by worker processes or threads, in order, with faults and delays said by name."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset

from dre_fast.data.subset import Reader
from dre_fast.train.read_threads import made_ahead

Job = tuple[int, Tensor]  # slide, tiles int64 [m]


class ReadAhead:
    """What a data set gives, in order, while worker processes, or threads, already make what comes next.

    At most two items of each worker wait to be used (with threads and batches, or one batch where that is more), so
    memory stays bounded.

    Args:
        dataset: given an index, or with ``batches`` the indices of a batch.
        names: of what is waited for, by the position in the order; for the warning.
        workers: processes; 0, without threads: each item is made when it is asked for.
        threads: of this process, in place of worker processes: nothing is copied from one process to another, and tiles
            of one batch are read side by side. For data sets that let other threads run, as slide readers do.
        slow: seconds after which a warning names what is waited for.
        batches: indices of each batch; None: items one by one.
        collate: makes a batch of its items.
        pin: give tensors in pinned memory, for copies to a GPU that are not waited for.

    Attributes:
        seconds: waited for the last item.

    Raises:
        ValueError: both ``workers`` and ``threads``.
        OSError: while iterating: a worker process died, for lack of memory say.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        names: Callable[[int], str],
        *,
        workers: int,
        threads: int = 0,
        slow: float,
        batches: Sequence[list[int]] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        pin: bool = False,
    ) -> None:
        if workers and threads:
            raise ValueError(f"read ahead by {workers} processes or by {threads} threads, not both")
        self.names, self.slow, self.seconds = names, slow, 0.0
        self._batches = len(dataset) if batches is None else len(batches)  # type: ignore[arg-type]
        self._made: Callable[[], Iterator[Any]]
        if threads:
            whole = collate or _itself
            self._made = partial(
                made_ahead,
                dataset,
                [[index] for index in range(self._batches)] if batches is None else batches,
                (lambda items: whole(items[0])) if batches is None else whole,
                threads=threads,
                pin=pin,
            )
        else:
            loader = DataLoader(
                dataset,
                **({"batch_size": None} if batches is None else {"batch_sampler": batches}),  # type: ignore[arg-type]
                collate_fn=collate,
                num_workers=workers,
                pin_memory=pin,
                # its own generator: the loader must not draw from the global one, whose state a checkpoint records
                generator=torch.Generator(),
            )
            self._made = partial(iter, loader)

    def __iter__(self) -> Iterator[Any]:
        made = self._made()
        _without_signals(made)
        with _Watch(self.slow, self._warn) as watch:
            for position in range(self._batches):
                started = time.perf_counter()
                try:
                    with watch.waiting_for(position):
                        item = next(made)
                except (RuntimeError, ConnectionError, EOFError) as error:
                    if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                        raise
                    raise OSError(
                        f"a process that reads tiles died while {self.names(position)} was waited for; most often "
                        "memory was short: lower data.workers, memory.live or optim.batch_size"
                    ) from None
                self.seconds = time.perf_counter() - started
                yield item

    def _warn(self, position: int) -> None:
        warnings.warn(
            f"waiting for tiles of {self.names(position)} for more than {self.slow:g} s (data.slow_seconds)",
            stacklevel=2,
        )


class _Watch:
    """Calls ``warn`` with the position that is waited for longer than ``slow`` seconds, once for each.

    One thread for all positions, which sleeps until the earliest moment at which it may have to speak: a timer for each
    would cost more than reading some of them.
    """

    def __init__(self, slow: float, warn: Callable[[int], None]) -> None:
        self._slow, self._warn = slow, warn
        self._waiting: tuple[int, float] | None = None  # position, and since when
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slow-tiles", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()  # one that is still on its way out when the interpreter ends can abort the process

    @contextmanager
    def waiting_for(self, position: int) -> Iterator[None]:
        self._waiting = position, time.monotonic()
        try:
            yield
        finally:
            self._waiting = None

    def _run(self) -> None:
        warned, sleep = -1, self._slow
        while not self._over.wait(sleep):
            waiting, sleep = self._waiting, self._slow
            if waiting is None or waiting[0] == warned:
                continue
            left = waiting[1] + self._slow - time.monotonic()
            if left > 0:
                sleep = left
            else:
                warned = waiting[0]
                self._warn(warned)


def _itself(item: Any) -> Any:
    return item


def _without_signals(made: Any) -> None:
    """Let the death of a worker be seen where its item is waited for, within five seconds, and nowhere else.

    torch's own handler of SIGCHLD raises wherever the main thread happens to be: in the midst of a step or of writing a
    checkpoint, or when the error was dealt with long ago. It has no public switch.
    """
    if getattr(made, "_worker_pids_set", False):
        _remove_worker_pids(id(made))
        made._worker_pids_set = False


class _Jobs(Dataset["Tensor | ValueError"]):
    def __init__(self, reader: Reader, jobs: Sequence[Job]) -> None:
        self.reader, self.jobs = reader, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Tensor | ValueError:
        return read_or_error(self.reader, *self.jobs[index])


def read_or_error(reader: Reader, slide: int, tiles: Tensor) -> Tensor | ValueError:
    """Tiles, or the error that names slide and tile: a DataLoader would bury it in a worker's traceback."""
    try:
        return reader.read(slide, tiles)
    except ValueError as error:
        return error


def read_jobs(
    reader: Reader,
    jobs: Sequence[Job],
    names: Sequence[str],
    *,
    workers: int,
    threads: int = 0,
    slow: float,
    pin: bool = False,
) -> Iterator[Tensor | ValueError]:
    """The tiles of each job, uint8 [m, 3, P, P], in order; or the error that names slide and tile.

    Args:
        names: of the reader's slides.
        workers, threads: as of :class:`ReadAhead`.
    """
    yield from ReadAhead(
        _Jobs(reader, jobs),
        lambda position: f"slide {names[jobs[position][0]]}",
        workers=workers,
        threads=threads,
        slow=slow,
        pin=pin,
    )


def chunks_of(tiles_per_slide: Sequence[int], chunk: int) -> list[Job]:
    """All tiles of all slides, slide by slide, ``chunk`` at a time."""
    return [
        (slide, tiles)
        for slide, n in enumerate(tiles_per_slide)
        for tiles in torch.arange(n).split(chunk)
        if n
    ]
