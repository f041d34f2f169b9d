"""Tiles read ahead of their use by worker processes, in order, with faults and delays said by name."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset

from dre_fast.data.subset import Reader

Job = tuple[int, Tensor]  # slide, tiles int64 [m]


class ReadAhead:
    """What a data set gives, in order, while worker processes already make what comes next.

    At most two items of each worker wait to be used, so memory stays bounded.

    Args:
        dataset: given an index, or with ``batches`` the indices of a batch.
        names: of what is waited for, by the position in the order; for the warning.
        workers: processes; 0: each item is made when it is asked for.
        slow: seconds after which a warning names what is waited for.
        batches: indices of each batch; None: items one by one.
        collate: makes a batch of its items.
        pin: give tensors in pinned memory, for copies to a GPU that are not waited for.

    Attributes:
        seconds: waited for the last item.

    Raises:
        OSError: while iterating: a worker process died, for lack of memory say.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        names: Callable[[int], str],
        *,
        workers: int,
        slow: float,
        batches: Sequence[list[int]] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        pin: bool = False,
    ) -> None:
        self.names, self.slow, self.seconds = names, slow, 0.0
        self._loader = DataLoader(
            dataset,
            **({"batch_size": None} if batches is None else {"batch_sampler": batches}),  # type: ignore[arg-type]
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin,
            # its own generator: the loader must not draw from the global one, whose state a checkpoint records
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Any]:
        made = iter(self._loader)
        _without_signals(made)
        for position in range(len(self._loader)):
            started = time.perf_counter()
            alarm = threading.Timer(self.slow, self._warn, (position,))
            alarm.daemon = True
            alarm.start()
            try:
                item = next(made)
            except (RuntimeError, ConnectionError, EOFError) as error:
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                raise OSError(
                    f"a process that reads tiles died while {self.names(position)} was waited for; most often memory "
                    "was short: lower data.workers, memory.live or optim.batch_size"
                ) from None
            finally:
                alarm.cancel()
            self.seconds = time.perf_counter() - started
            yield item

    def _warn(self, position: int) -> None:
        warnings.warn(
            f"waiting for tiles of {self.names(position)} for more than {self.slow:g} s (data.slow_seconds)",
            stacklevel=2,
        )


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
    reader: Reader, jobs: Sequence[Job], names: Sequence[str], *, workers: int, slow: float, pin: bool = False
) -> Iterator[Tensor | ValueError]:
    """The tiles of each job, uint8 [m, 3, P, P], in order; or the error that names slide and tile.

    Args:
        names: of the reader's slides.
    """
    yield from ReadAhead(
        _Jobs(reader, jobs),
        lambda position: f"slide {names[jobs[position][0]]}",
        workers=workers,
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
