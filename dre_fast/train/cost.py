"""What a run took: hours, peak memory, seconds a slide and per 10,000 tiles."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dre_fast.data.files import write_text_atomic
from dre_fast.train.distributed import Group
from dre_fast.train.state import METRICS, read_metrics

COST = "cost.json"
# Published costs of training end to end: hours, GB, seconds for a slide of 10,000 tiles (ABMILX, Tang et al. 2025; its
# table has the others as well). All on one RTX 3090, with cohorts of their own: compare only on like hardware.
PUBLISHED = (
    ("ABMILX, ResNet-18", 9.0, 9.0, 1.7),
    ("ABMILX, ResNet-50", 22.0, None, None),
    ("C2C, ResNet-18", 84.0, None, None),
    ("WSI-FT, ResNet-50", 45.0, None, None),
)
PUBLISHED_ON = "one RTX 3090"


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
        tiles_are: "live", or "stored" where features were given and no tile was encoded.
    """

    hardware: str
    processes: int
    hours: float
    device_hours: float
    peak_gb: float | None
    seconds_per_slide: float
    seconds_per_10k_tiles: float
    tiles_per_second: float
    tiles_are: str = "live"

    def line(self) -> str:
        """One line for a terminal or a paper."""
        peak = "not known" if self.peak_gb is None else f"{self.peak_gb:.3g} GB"
        return (
            f"cost: {self.device_hours:.3g} device hours ({self.processes} x {self.hardware}), peak {peak}, "
            f"{self.seconds_per_slide:.3g} s a slide, {self.seconds_per_10k_tiles:.3g} s per 10,000 tiles, "
            f"{self.tiles_per_second:.4g} {self.tiles_are} tiles/s"
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


def cost_of_features(seconds: float, epochs: int, tiles: Sequence[int], device: torch.device) -> Cost:
    """The cost of a model trained on stored features, in this process.

    Args:
        seconds: all of it: codebook, epochs, validation, reading.
        epochs: in each of which every slide is visited once.
        tiles: of each training slide.
        device: it ran on.
    """
    peak, visits = peak_memory(device), max(epochs, 1)
    return Cost(
        hardware=hardware(device),
        processes=1,
        hours=seconds / 3600,
        device_hours=seconds / 3600,
        peak_gb=None if peak is None else peak / 1e9,
        seconds_per_slide=seconds / (visits * max(len(tiles), 1)),
        seconds_per_10k_tiles=seconds / (visits * max(sum(tiles), 1)) * 1e4,
        tiles_per_second=visits * sum(tiles) / max(seconds, 1e-9),
        tiles_are="stored",
    )


def together(costs: Sequence[Cost]) -> Cost:
    """The cost of several models, one after the other: hours add up, the peak is the highest, rates are means."""
    peaks = [cost.peak_gb for cost in costs if cost.peak_gb is not None]

    def mean(name: str) -> float:
        return sum(getattr(cost, name) for cost in costs) / len(costs)

    return replace(
        costs[-1],
        hours=sum(cost.hours for cost in costs),
        device_hours=sum(cost.device_hours for cost in costs),
        peak_gb=max(peaks, default=None),
        seconds_per_slide=mean("seconds_per_slide"),
        seconds_per_10k_tiles=mean("seconds_per_10k_tiles"),
        tiles_per_second=mean("tiles_per_second"),
    )


def write_cost(cost: Cost, folder: Path) -> None:
    """Keep a cost as cost.json in a folder."""
    write_text_atomic(folder / COST, json.dumps(cost.card(), indent=1) + "\n")


def read_cost(folder: Path) -> Cost | None:
    """What :func:`write_cost` kept; None where there is none."""
    file = folder / COST
    return Cost(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def say_cost(out: Path, tiles: Sequence[int], device: torch.device, group: Group) -> None:
    """Write the cost of the finished run in folder ``out`` to its cost.json, and print it; by the first process."""
    peaks = group.everyones(peak_memory(device))
    if group.first:
        peak = max(peak or 0 for peak in peaks) if device.type == "cuda" else peaks[0]
        cost = cost_of(read_metrics(out / METRICS), tiles, device, group.world, peak)
        write_cost(cost, out)
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
