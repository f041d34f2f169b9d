"""docs/performance.md from the raw results in benchmarks/results: `python -m benchmarks.performance_page --write FILE`.

One line a group: dre_fast beside the quickest other implementation, whichever is faster, with the raw file it comes from.
Without --write the page is printed. A test holds the committed page to this command.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.table import Timing, about, grid, read

RESULTS = Path(__file__).parent / "results"
INTRODUCTION = """# Performance

Made from the raw files in `benchmarks/results` by `python -m benchmarks.performance_page --write docs/performance.md`;
no figure here was typed. Milliseconds a call, the median of the rounds. A line has dre_fast and the quickest of the other
implementations that were timed beside it; "times" is the other's time over dre_fast's, so below 1.00 dre_fast is the
slower one. `python -m benchmarks.table FILE` prints everything a raw file holds. What the parts of the method are worth
in AUC is on [another page](study.md).
"""
OWN_PARTS = ("op, ",)  # what a group times beside the whole and is dre_fast's too
HEAD = ["what", "dre_fast, ms", "quickest other", "ms", "times"]


def is_result(content: Any) -> bool:
    """Whether a JSON file is a result of pytest-benchmark or of benchmarks/gpu.sh."""
    return isinstance(content, dict) and ("benchmarks" in content or "sections" in content)


def rows(timings: list[Timing]) -> list[list[str]]:
    """A row a group, in the order of the file."""
    groups: dict[str, list[Timing]] = {}
    for one in timings:
        groups.setdefault(one.group, []).append(one)
    lines = []
    for group, members in groups.items():
        ours = [one for one in members if one.ours]
        rest = (one for one in members if not one.ours and not one.name.startswith(OWN_PARTS))
        others = sorted(rest, key=lambda one: one.seconds)
        if not ours:  # parts of dre_fast beside each other
            every = ", ".join(f"{one.name} {milliseconds(one)}" for one in members)
            lines.append([cell(group), "-", cell(every), "-", "-"])
            continue
        mine = min(ours, key=lambda one: one.seconds)
        best = others[0] if others else None
        lines.append(
            [
                cell(group),
                milliseconds(mine),
                cell(best.name) if best else "-",
                milliseconds(best) if best else "-",
                f"{best.seconds / mine.seconds:.2f}" if best else "-",
            ]
        )
    return lines


def cell(text: str) -> str:
    """Text of a table's cell."""
    return text.replace("|", "\\|")


def milliseconds(one: Timing) -> str:
    """With three significant digits."""
    value = one.seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def page(results: Path = RESULTS, where: Path = RESULTS.parents[1] / "docs") -> str:
    """The page, its links relative to the folder ``where``."""
    parts = [INTRODUCTION]
    for machine in sorted(path for path in results.iterdir() if path.is_dir()):
        parts.append(f"## {machine.name}\n")
        for path in sorted(machine.rglob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            if not is_result(content):
                continue
            link = os.path.relpath(path, where).replace(os.sep, "/")
            parts.append(f"### {path.relative_to(machine).with_suffix('')}\n")
            if "sections" in content:
                from benchmarks.gpu_report import report_table

                parts.append(f"[Raw file]({link}).\n\n{report_table(content).strip()}\n")
            else:
                table = "\n".join(grid(HEAD, rows(read(content))))
                parts.append(f"[Raw file]({link}): {about(content)}.\n\n{table}\n")
        parts.append(other(machine, where))
    return "\n".join(part for part in parts if part)


def other(machine: Path, where: Path) -> str:
    """Runs that are no timings of calls: whole demos and long runs, from their summaries."""
    lines = []
    for path in sorted(machine.rglob("summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if "seconds" in summary and "peak_rss_mb" in summary:
            link = os.path.relpath(path, where).replace(os.sep, "/")
            name, seconds, peak = path.parent.name, summary["seconds"], summary["peak_rss_mb"] / 1e3
            lines.append([f"[{name}]({link})", f"{seconds:.0f}", f"{peak:.1f}"])
    if not lines:
        return ""
    table = "\n".join(grid(["`dre-fast demo`, from slides to page", "seconds", "peak GB"], lines))
    return f"### Whole runs\n\n{table}\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="file to write, instead of standard output"
    )
    arguments = parser.parse_args()
    if arguments.write is None:
        sys.stdout.write(page())
    else:
        arguments.write.write_text(
            page(where=arguments.write.resolve().parent), encoding="utf-8", newline="\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
