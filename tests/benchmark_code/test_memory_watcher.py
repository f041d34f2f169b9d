"""The peak memory that benchmark tables print is the one a call takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import memory

MB = 1 << 20
JOBS = "memory_jobs"


@pytest.fixture
def watcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[memory.Watcher]:
    if memory.why_not():
        pytest.skip(memory.why_not())
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with memory.Watcher() as made:
        yield made


def test_peaks_are_those_of_each_job_alone(watcher: memory.Watcher) -> None:
    """A large job first: what it freed must not hide what the next ones take."""
    for sizes in ((200,), (64,), (8,), (16, 96, 24), (64,)):
        peak = watcher.peak(f"{JOBS}:allocate", *sizes)
        assert abs(peak - max(sizes) * MB) < 2 * MB, (sizes, peak / MB)


def test_failures_are_told_and_do_not_end_the_process(watcher: memory.Watcher) -> None:
    with pytest.raises(RuntimeError, match="ValueError: no such shape"):
        watcher.peak(f"{JOBS}:fail")
    assert abs(watcher.peak(f"{JOBS}:allocate", 32) - 32 * MB) < 2 * MB
    with pytest.raises(RuntimeError, match="ended with status 3"):
        watcher.peak(f"{JOBS}:leave")


def test_a_system_without_the_counters_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    assert "needs Linux" in memory.why_not()
