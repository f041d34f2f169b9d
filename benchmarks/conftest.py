"""GPU benchmarks skip without a GPU; after a run the tables of benchmarks/table.py are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import memory, table

Peak = Callable[..., int | None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch sees none (benchmarks/gpu.sh runs it)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def peak_memory() -> Iterator[Peak]:
    """peak(run, device, job, *arguments): bytes taken beyond the inputs, None where they cannot be watched.

    On a GPU ``run`` is watched here, on a CPU the job ("module:function") in a process of its own.
    """
    watchable = not memory.why_not()
    with memory.Watcher() as watcher:

        def peak(run: Callable[[], object], device: str, job: str, *arguments: object) -> int | None:
            if device == "cuda":
                return memory.peak_on_gpu(run)
            return watcher.peak(job, *arguments) if watchable else None

        yield peak


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A table a group: time, ratio to dre_fast, rate, peak memory."""
    session = getattr(config, "_benchmarksession", None)
    found = (
        table.timing(entry.group, entry.stats.median, entry.extra_info)
        for entry in getattr(session, "benchmarks", [])
        if entry.stats.data  # a benchmark that failed has no round
    )
    timings = [one for one in found if one is not None]
    if not timings:
        return
    terminalreporter.section("dre_fast and its peers")
    for line in [*table.tables(timings), "", table.KEY]:
        terminalreporter.write_line(line)
    if memory.why_not():
        terminalreporter.write_line(f"No peak memory of CPU runs: {memory.why_not()}")
