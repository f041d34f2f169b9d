"""Items of a data set made ahead of their use by threads of the process that uses them, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


def made_ahead(
    dataset: Dataset[Any],
    batches: Sequence[Sequence[int]],
    collate: Callable[[list[Any]], Any],
    *,
    threads: int,
    pin: bool,
) -> Iterator[Any]:
    """Each batch, collated, in order, while ``threads`` threads make the items of the next ones.

    A thread takes the next item whichever batch it belongs to, so none waits for the slowest item of a batch. Beyond the
    batch that is waited for, batches are begun until they have ``2 * threads`` items, which bounds memory.

    Args:
        batches: indices of the items of each batch.
        collate: makes a batch of its items; called by the thread that made the last of them.
        pin: tensors in pinned memory.

    Raises:
        Exception: what making an item raised, when its batch is asked for.
    """
    # A thread pins for the device that is its current one, which would be the first GPU.
    device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if pin else (None, ())
    pool = ThreadPoolExecutor(threads, "read-ahead", *device)

    def finish(items: list[Any]) -> Any:
        return _pinned(collate(items)) if pin else collate(items)

    begun: deque[tuple[int, Future[Any]]] = deque()
    coming = iter(batches)

    def begin() -> bool:
        indices = next(coming, None)
        if indices is not None:
            begun.append((len(indices), _begin(pool, dataset, indices, finish)))
        return indices is not None

    try:
        while begun or begin():
            while sum(items for items, _ in islice(begun, 1, None)) < 2 * threads and begin():
                pass
            yield begun.popleft()[1].result()
    finally:
        # What is being read is waited for: its slide may be closed next.
        pool.shutdown(cancel_futures=True)


def _begin(
    pool: ThreadPoolExecutor,
    dataset: Dataset[Any],
    indices: Sequence[int],
    finish: Callable[[list[Any]], Any],
) -> Future[Any]:
    """The items of a batch on their way, and with the last of them, whichever it is, the whole."""
    if len(indices) == 1:
        return pool.submit(lambda: finish([dataset[indices[0]]]))
    whole: Future[Any] = Future()
    items = [pool.submit(dataset.__getitem__, index) for index in indices]
    number = count(1)  # its next() is one step for all threads

    def another(_: Future[Any]) -> None:
        if next(number) == len(indices):
            complete()

    def complete() -> None:
        try:
            whole.set_result(finish([item.result() for item in items]))
        except BaseException as error:  # raised again where the batch is asked for
            whole.set_exception(error)
        items.clear()  # they hold this function, and would outlive the batch with their tensors

    if not items:
        complete()
    for item in list(items):
        item.add_done_callback(another)
    return whole


def _pinned(item: Any) -> Any:
    """An item with its tensors in pinned memory; tuples as tuples, anything else as it is."""
    if isinstance(item, Tensor):
        return item.pin_memory()
    return tuple(_pinned(part) for part in item) if isinstance(item, tuple) else item
