"""GPU benchmarks skip without a GPU; after a run the ratios of dre_fast to its peers are printed."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch sees none (benchmarks/gpu.sh runs it)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line a group: how many times faster dre_fast is than each peer (below 1: slower), medians of the rounds."""
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, tuple[float, dict[str, object]]]] = defaultdict(dict)
    for entry in getattr(session, "benchmarks", []):
        name = entry.extra_info.get("implementation")
        if name and entry.stats.data:
            groups[entry.group][name] = (median(entry.stats.data), entry.extra_info)
    if not groups:
        return
    terminalreporter.section("speed-up of dre_fast (time of the peer / time of dre_fast)")
    for group, timings in groups.items():
        ours = next((name for name in ("dre_fast", "native_write") if name in timings), None)
        if ours is None:
            continue
        seconds, info = timings[ours]
        seconds /= int(str(info.get("calls", 1)))
        line = f"{group}: {seconds * 1e3:.3f} ms"
        if "bytes" in info:
            line += f", {int(str(info['bytes'])) / seconds / 1e9:.1f} GB/s"
        for name, (other, other_info) in timings.items():
            if name != ours:
                line += f", {other / int(str(other_info.get('calls', 1))) / seconds:.2f}x {name}"
        terminalreporter.write_line(f"{line} ({info.get('backend', ours)})")
