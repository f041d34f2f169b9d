"""Benchmark results as Markdown tables: `python -m benchmarks.table RESULT.json ... [--match REGEX] [--out FILE]`.

RESULT.json is what `pytest --benchmark-json` or `benchmarks/gpu.sh` (report.json) wrote. The same tables are printed
after a benchmark run, so no figure in the docs needs to be typed.

A benchmark says what it is in its ``extra_info``; everything but ``implementation`` may be missing:

    implementation   name in the table; groups without one are left out
    ours             True for dre_fast, the one the others are compared with (the first of a group)
    backend, variant what ran, shown beside the name
    calls            calls a timed round (1)
    bytes            what the work must move at least, for the rate
    peak             bytes taken beyond the inputs at most
    inputs, outputs  their bytes, for the memory in multiples of both together
    difference       |V - V of dre_fast| / |V of dre_fast|
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The compiled bank write, from before benchmarks said "ours".
_OURS = ("dre_fast", "native_write")
HEAD = ("implementation", "ms", "x time", "GB/s", "peak MB", "x in + out", "difference")


@dataclass(frozen=True)
class Timing:
    """One implementation at one size: seconds a call (median of the rounds), and what it says about itself."""

    group: str
    seconds: float
    info: dict[str, Any]

    @property
    def name(self) -> str:
        """The implementation, with what ran behind it."""
        beside = self.info.get("variant") or (self.info.get("backend") if self.ours else None)
        return self.info["implementation"] + (f" ({beside})" if beside else "")

    @property
    def ours(self) -> bool:
        """Whether this is dre_fast."""
        return bool(self.info.get("ours", self.info["implementation"] in _OURS))


def timing(group: str | None, seconds: float, info: dict[str, Any]) -> Timing | None:
    """A benchmark from the median of its rounds; None for one that does not name its implementation."""
    if group is None or not info.get("implementation"):
        return None
    return Timing(group, seconds / int(info.get("calls", 1)), info)


def read(result: dict[str, Any]) -> list[Timing]:
    """The timings of a pytest-benchmark result."""
    found = (timing(b["group"], b["stats"]["median"], b["extra_info"]) for b in result["benchmarks"])
    return [one for one in found if one is not None]


def tables(timings: Iterable[Timing]) -> list[str]:
    """A Markdown table a group, in the order of the timings, as lines; columns with nothing in them left out."""
    groups: dict[str, list[Timing]] = defaultdict(list)
    for one in timings:
        groups[one.group].append(one)
    lines: list[str] = []
    for group, members in groups.items():
        ours = next((one for one in members if one.ours), None)
        lines += ["", f"**{group}**", ""]
        rows = [list(HEAD), *(_row(one, ours) for one in members)]
        told = [column for column in zip(*rows, strict=True) if set(column[1:]) != {"-"}]
        head, *cells = (list(row) for row in zip(*told, strict=True))
        lines += grid(head, cells)
    return lines


def _row(one: Timing, ours: Timing | None) -> list[str]:
    info = one.info
    rate, peak = "-", "-"
    if "bytes" in info:
        rate = f"{info['bytes'] / one.seconds / 1e9:.1f}"
    multiple = "-"
    if info.get("peak") is not None:
        peak = f"{info['peak'] / 1e6:.1f}"
        if "inputs" in info and "outputs" in info:
            multiple = f"{(info['inputs'] + info['peak']) / (info['inputs'] + info['outputs']):.2f}"
    ratio = f"{one.seconds / ours.seconds:.2f}" if ours is not None else "-"
    difference = f"{info['difference']:.0e}" if info.get("difference") is not None else "-"
    return [one.name, f"{one.seconds * 1e3:.3f}", ratio, rate, peak, multiple, difference]


def grid(head: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table, its columns padded; the first ``left`` ones to the left, the others to the right."""
    width = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(size) if column < left else cell.rjust(size)
            for column, (cell, size) in enumerate(zip(cells, width, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        ":" + "-" * (size + 1) if column < left else "-" * (size + 1) + ":"
        for column, size in enumerate(width)
    ]
    return [line(head), f"|{'|'.join(rule)}|", *(line(row) for row in rows)]


KEY = (
    "x time: time over that of dre_fast. GB/s: least bytes over time. Peak: beyond the inputs, results included. "
    "x in + out: inputs and peak over inputs and outputs. Difference: of V from dre_fast's, relative."
)


def about(result: dict[str, Any]) -> str:
    """One line on machine, versions, threads and commit of a pytest-benchmark result."""
    machine, commit = result.get("machine_info", {}), result.get("commit_info", {})
    cpu = machine.get("cpu", {})
    extra = [b["extra_info"] for b in result["benchmarks"]]

    def all_of(key: str) -> str:
        return ", ".join(sorted({str(info[key]) for info in extra if key in info})) or "unknown"

    parts = [
        f"{cpu.get('brand_raw', 'unknown CPU')}, {cpu.get('count', '?')} CPUs, {all_of('threads')} threads",
        f"torch {all_of('torch')}",
        f"Python {machine.get('python_version', 'unknown')}",
        f"commit {str(commit.get('id', 'unknown'))[:10]}{' with changes' if commit.get('dirty') else ''}",
        str(result.get("datetime", ""))[:10],
    ]
    if any("gpu" in info for info in extra):
        parts.insert(0, all_of("gpu"))
    return "; ".join(part for part in parts if part)


def render(path: Path, match: str = "") -> str:
    """The tables of one result file, those whose group matches.

    Raises:
        ValueError: the file is no result of pytest-benchmark or benchmarks/gpu.sh, or no group matches.
    """
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as problem:
        raise ValueError(f"{path} is not JSON: {problem}") from None
    if isinstance(result, dict) and "sections" in result:
        from benchmarks.gpu_report import report_table

        return report_table(result)
    if not isinstance(result, dict) or "benchmarks" not in result:
        raise ValueError(f"{path} is no result of pytest --benchmark-json or benchmarks/gpu.sh")
    found = [one for one in read(result) if re.search(match, one.group)]
    if not found:
        raise ValueError(f"{path} holds no group that matches {match!r}")
    return "\n".join([about(result), *tables(found), "", KEY]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--match", default="", help="only groups whose name this regular expression finds")
    parser.add_argument("--out", type=Path, help="file to write, instead of standard output")
    arguments = parser.parse_args()
    try:
        text = "\n".join(render(path, arguments.match) for path in arguments.results)
    except (OSError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 1
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
