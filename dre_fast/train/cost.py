"""What a run took: hours, peak memory, seconds a slide and per 10,000 tiles."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dre_fast.data.files import write_text_atomic
from dre_fast.train.distributed import Group
from dre_fast.train.state import METRICS, read_metrics

COST = "cost.json"


@dataclass(frozen=True)
class Cost:
    """Cost of a run, over all its sessions as its log has them.

    Args:
        hardware: name of the device, and how many processes used one each.
        processes: their number, at the end.
        hours: wall-clock, of everything the log times: filling the bank, codebooks, steps, probes, validation.
        device_hours: hours times processes (GPU hours on GPUs).
        peak_gb: 10^9 bytes: GPU memory allocated by PyTorch at most in one process (CPU: resident memory of the first
            process); of the last session. None where the system does not say (Windows).
        seconds_per_slide: of a step, for each slide in it: with gradient, the rest of its tiles from the bank.
        seconds_per_10k_tiles: of a step, for each 10,000 tiles that its slides have.
        tiles_per_second: live tiles, those encoded with gradient, a second of steps.
    """

    hardware: str
    processes: int
    hours: float
    device_hours: float
    peak_gb: float | None
    seconds_per_slide: float
    seconds_per_10k_tiles: float
    tiles_per_second: float

    def line(self) -> str:
        """One line for a terminal or a paper."""
        peak = "not known" if self.peak_gb is None else f"{self.peak_gb:.3g} GB"
        return (
            f"cost: {self.device_hours:.3g} device hours ({self.processes} x {self.hardware}), peak {peak}, "
            f"{self.seconds_per_slide:.3g} s a slide, {self.seconds_per_10k_tiles:.3g} s per 10,000 tiles, "
            f"{self.tiles_per_second:.4g} live tiles/s"
        )

    def card(self) -> dict[str, Any]:
        """As JSON; numbers to four digits."""
        return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(self).items()}


def cost_of(
    log: Sequence[Mapping[str, Any]],
    tiles: Sequence[int],
    device: torch.device,
    processes: int,
    peak: int | None,
) -> Cost:
    """The cost of a finished run.

    Args:
        log: its lines.
        tiles: of each training slide; every epoch visits each slide once.
        device: it ran on.
        processes: it ran in.
        peak: bytes, or None.
    """
    hours = sum(row.get("seconds", 0.0) for row in log) / 3600
    steps = [row for row in log if row["kind"] == "step"]
    seconds = sum(row["seconds"] for row in steps)
    epochs = sum(row["kind"] == "epoch" for row in log)
    return Cost(
        hardware=hardware(device),
        processes=processes,
        hours=hours,
        device_hours=hours * processes,
        peak_gb=None if peak is None else peak / 1e9,
        seconds_per_slide=seconds / max(epochs * len(tiles), 1),
        seconds_per_10k_tiles=seconds / max(epochs * sum(tiles), 1) * 1e4,
        tiles_per_second=sum(row["tiles"] for row in steps) / max(seconds, 1e-9),
    )


def say_cost(out: Path, tiles: Sequence[int], device: torch.device, group: Group) -> None:
    """Write the cost of the finished run in folder ``out`` to its cost.json, and print it; by the first process."""
    peaks = group.everyones(peak_memory(device))
    if group.first:
        peak = max(peak or 0 for peak in peaks) if device.type == "cuda" else peaks[0]
        cost = cost_of(read_metrics(out / METRICS), tiles, device, group.world, peak)
        write_text_atomic(out / COST, json.dumps(cost.card(), indent=1) + "\n")
        print(cost.line(), file=sys.stderr)


def peak_memory(device: torch.device) -> int | None:
    """Bytes this process used at most: allocated on the GPU, or resident; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(highest if sys.platform == "darwin" else highest * 1024)


def hardware(device: torch.device) -> str:
    """The GPU's name, or that of the CPU with the threads PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
