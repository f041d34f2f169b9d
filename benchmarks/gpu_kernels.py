"""Where the time of each operation goes: device time of every kernel, for benchmarks/gpu.sh."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import retrieval, test_contrast, test_encode, test_soft
from benchmarks.gpu_sections import Row, device_of
from benchmarks.registry import (
    GPU_CONTRAST,
    GPU_ENCODE,
    GPU_RETRIEVAL,
    GPU_SOFT,
    SMALL_CONTRAST,
    SMALL_ENCODE,
    SMALL_RETRIEVAL,
    SMALL_SOFT,
    make,
)

CALLS = 5
LEAST_US = 0.5  # what is not listed


def kernels(dry: bool) -> Iterator[Row]:
    """A row a kernel: id of the work, kernel, microseconds and launches a call; in a dry run of torch's operators."""
    device = device_of(dry)
    for name, build in _works(dry, device):
        try:
            yield from _kernels_of(name, build(), device)
        except Exception as problem:
            yield {"id": name, "error": f"{type(problem).__name__}: {str(problem).splitlines()[0]}"}


def _works(dry: bool, device: str) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    for shape in SMALL_ENCODE if dry else GPU_ENCODE:
        yield shape.id, lambda shape=shape: partial(test_encode.ours, *make(shape, device))
    for shape in SMALL_RETRIEVAL if dry else GPU_RETRIEVAL:
        stored = retrieval.fill(shape, device)
        yield f"{shape.id} op", lambda stored=stored: partial(retrieval.op, stored, rows=stored.rows)
        yield f"{shape.id} MemoryBank.encode", lambda stored=stored: partial(retrieval.bank_encode, stored)
    for shape in SMALL_SOFT if dry else GPU_SOFT:
        for by in test_soft.ASSIGNMENTS:
            given = partial(test_soft.inputs, shape, device, by)
            yield f"{shape.id} {by}", lambda given=given: partial(test_soft.step, given(), "dre_fast")
    for shape in SMALL_CONTRAST if dry else GPU_CONTRAST:
        ours = test_contrast.ways(shape, device)[0]
        yield (
            shape.id,
            lambda shape=shape, ours=ours: partial(
                test_contrast.step, test_contrast.inputs(shape, device), ours
            ),
        )


def _kernels_of(name: str, run: Callable[[], object], device: str) -> list[dict[str, Any]]:
    on_gpu = device == "cuda"
    run()  # compiles
    cold = torch.empty(1 << 28 if on_gpu else 1, dtype=torch.int8, device=device)  # more than the L2 cache
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for _ in range(CALLS):
            cold.zero_()
            run()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    times: dict[str, list[float]] = defaultdict(list)
    for event in found.events():
        if event.device_type == wanted:
            times[event.name].append(event.time_range.elapsed_us())
    rows = [
        {"id": name, "kernel": kernel, "us": sum(us) / CALLS, "launches": len(us) / CALLS}
        for kernel, us in sorted(times.items(), key=lambda item: -sum(item[1]))
    ]
    return [row for row in rows if row["us"] >= LEAST_US]
