"""The parts of benchmarks/gpu.sh: `gpu_report.py SECTION --parts DIR [--dry-run]` writes DIR/SECTION.json.

`gpu_report.py table --parts DIR --out OUT` joins the parts, and the counters of OUT/ncu.csv where it is there, to
OUT/report.json and prints OUT/table.md. `sanitize-case` and `profile-case` are runs for other programs to watch.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before the kernels are imported: a dry run interprets them

from benchmarks.table import grid  # noqa: E402

SECTIONS = (
    "environment",
    "ceilings",
    "encode",
    "retrieve",
    "soft",
    "contrast",
    "bank",
    "codebook",
    "training",
    "kernels",
)
NEED_CEILINGS = ("encode", "retrieve", "soft", "contrast", "bank")


def environment() -> dict[str, Any]:
    """Versions, device and commit: what every figure of the report depends on."""
    import triton

    from dre_fast.ops import backends, native

    def output(*command: str) -> str | None:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=ROOT
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as problem:
            return f"not known: {problem}"

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "capability": torch.cuda.get_device_capability() if gpu else None,
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count if gpu else None,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "commit": output("git", "rev-parse", "HEAD"),
        "changed_files": output("git", "status", "--porcelain", "--untracked-files=no"),
        "backends": backends(),
        "native_cpu": native.why_not() or "built",
        "native_cuda": native.why_not("cuda") or "built",
    }


def measure(section: str, parts: Path, dry: bool) -> int:
    """Run one section and write its part, anew after each row, so that a time limit costs only what was not reached.

    The ceilings of the same run are read from their part. Returns how many measurements failed.
    """
    from benchmarks import gpu_bank, gpu_kernels, gpu_sections, gpu_training

    part = {"section": section, "dry_run": dry, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}

    def write(result: Any) -> None:
        temporary = parts / f"{section}.tmp"
        temporary.write_text(json.dumps({**part, "result": result}, indent=1))
        temporary.replace(parts / f"{section}.json")

    if section == "environment":
        write(environment())
        return 0
    elsewhere = {"bank": gpu_bank.bank, "training": gpu_training.training, "kernels": gpu_kernels.kernels}
    function = elsewhere.get(section) or getattr(gpu_sections, section)
    arguments: list[Any] = [dry]
    if section in NEED_CEILINGS:
        file = parts / "ceilings.json"
        if not file.exists():
            raise SystemExit(f"{section} needs {file}: the ceilings section did not finish")
        arguments.append(json.loads(file.read_text())["result"])
    rows: list[dict[str, Any]] = []
    for row in function(*arguments):
        rows.append(row)
        write(rows)
    return sum("error" in row for row in rows)


HEAD = ("id", "work", "implementation", "ms", "x floor", "GB/s", "TFLOP/s", "peak MB", "x in + out")


def _cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["id"], f"failed: {row['error']}", *["-"] * (len(HEAD) - 2)]
    what = row["what"] + (f" ({row['note']})" if "note" in row else "")
    return [
        row["id"],
        what,
        row["implementation"],
        f"{row['ms']:.4f}",
        f"{row['ms'] / row['floor_ms']:.2f}" if row.get("floor_ms") else "-",
        f"{row['bytes'] / row['ms'] / 1e6:.0f}" if "bytes" in row else "-",
        f"{row['flops'] / row['ms'] / 1e9:.1f}" if "flops" in row else "-",
        f"{row['peak_mb']:.0f}" if row.get("peak_mb") is not None else "-",
        f"{row['memory']:.2f}" if row.get("memory") is not None else "-",
    ]


def _peer_cells(row: dict[str, Any]) -> list[list[str]]:
    what = f"{row['id']} {re.split(', [NB]=', row['what'])[0]}: {row['implementation']}"
    peaks = row.get("peers_mb", {})
    return [
        [
            what,
            name,
            f"{ms:.4f}",
            f"{ms / row['ms']:.2f}",
            "-" if peaks.get(name) is None else f"{peaks[name]:.0f}",
        ]
        for name, ms in sorted(row["peers"].items(), key=lambda peer: peer[1])
    ]


KERNEL_HEAD = ("work", "kernel", "us a call", "launches a call")


def _kernel_cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["id"], f"failed: {row['error']}", "-", "-"]
    return [row["id"], row["kernel"][:70], f"{row['us']:.1f}", f"{row['launches']:g}"]


def counters(text: str) -> list[dict[str, str]]:
    """What ncu's raw page says of each launch: kernel, microseconds, DRAM MB read and written, shares of the peaks.

    Args:
        text: the CSV of `ncu --csv --page raw`: its own messages, a line of names, one of units, one a launch.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    head, units, *launches = csv.reader(lines)
    unit = dict(zip(head, units, strict=False))
    size = {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}
    span = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
    share_of_peak = "throughput.avg.pct_of_peak_sustained_elapsed"
    dram = [f"dram__{share_of_peak}", f"gpu__dram_{share_of_peak}"]
    tensor = [name for name in head if re.search(r"pipe_tensor.*pct_of_peak", name)]

    def number(launch: dict[str, str], name: str, scales: dict[str, float] | None = None) -> float | None:
        try:
            value = float(launch[name].replace(",", ""))
        except (KeyError, ValueError):  # a metric this chip or version does not have
            return None
        return value * (scales.get(unit[name], 1.0) if scales else 1.0)

    found = []
    for fields in launches:
        launch = dict(zip(head, fields, strict=False))
        busiest = [share for name in tensor if (share := number(launch, name)) is not None]
        values = {
            "us": number(launch, "gpu__time_duration.sum", span),
            "DRAM MB read": number(launch, "dram__bytes_read.sum", size),
            "DRAM MB written": number(launch, "dram__bytes_write.sum", size),
            "DRAM %": next((share for name in dram if (share := number(launch, name)) is not None), None),
            "SM %": number(launch, f"sm__{share_of_peak}"),
            "tensor pipe %": max(busiest, default=None),
        }
        shown = {name: "-" if value is None else f"{value:.1f}" for name, value in values.items()}
        found.append({"kernel": launch.get("Kernel Name", "?"), **shown})
    return found


def join(parts: Path, out: Path) -> dict[str, Any]:
    """What the sections left, how each ended, and the counters."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(parts.glob("*.json"))}
    status = [line.split("\t") for line in (parts / "status.tsv").read_text().splitlines()]
    profile = out / "ncu.csv"
    return {
        "sections": found,
        "status": [dict(zip(("section", "exit", "seconds"), s, strict=True)) for s in status],
        "counters": counters(profile.read_text()) if profile.exists() else [],
    }


def report_table(report: dict[str, Any]) -> str:
    """A joined report as Markdown; sections that left nothing are missing from the figures and named at the end."""
    found = report["sections"]
    about = found.get("environment", {}).get("result", {})
    timed = [section for section in SECTIONS if section not in ("environment", "kernels")]
    rows = [row for section in timed for row in found.get(section, {}).get("result", [])]
    lines = []
    if any(part["dry_run"] for part in found.values()):
        lines += ["**Dry run: small sizes, its times mean nothing.**", ""]
    changed = " with changes" if about.get("changed_files") else ""
    lines += [
        f"GPU: {about.get('gpu') or 'none'}, torch {about.get('torch')}, triton {about.get('triton')}, "
        f"CUDA {about.get('cuda')}, driver {about.get('driver')}, commit {about.get('commit')}{changed}",
        "",
        *grid(list(HEAD), [_cells(row) for row in rows], left=3),
        "",
        "x floor: over the least bytes at the copy rate, or the operations at the matrix product's, of this run. "
        "Peak: beyond the inputs. x in + out: inputs and peak over inputs and outputs.",
        "",
    ]
    peers = [cells for row in rows if "peers" in row for cells in _peer_cells(row)]
    if peers:
        lines += [*grid(["work", "peer", "ms", "x time", "peak MB"], peers, left=2), ""]
    if launches := found.get("kernels", {}).get("result"):
        lines += [*grid(list(KERNEL_HEAD), [_kernel_cells(row) for row in launches], left=2), ""]
    if report.get("counters"):
        head = list(report["counters"][0])
        lines += [*grid(head, [list(launch.values()) for launch in report["counters"]]), ""]
    ended = [list(entry.values()) for entry in report["status"]]
    lines += grid(["section", "exit status", "seconds"], ended, left=2)
    return "\n".join(lines) + "\n"


def table(parts: Path, out: Path) -> str:
    """Join the parts to OUT/report.json and OUT/table.md."""
    report = join(parts, out)
    text = report_table(report)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "table.md").write_text(text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=[*SECTIONS, "sanitize-case", "profile-case", "table"])
    parser.add_argument("--parts", type=Path, help="folder of the sections' JSON parts")
    parser.add_argument("--out", type=Path, help="folder of the joined report")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, on any device")
    arguments = parser.parse_args()
    if arguments.section in ("sanitize-case", "profile-case"):
        from benchmarks import gpu_cases

        (gpu_cases.sanitize if arguments.section == "sanitize-case" else gpu_cases.profile)()
    elif arguments.section == "table":
        print(table(arguments.parts, arguments.out))
    else:
        failed = measure(arguments.section, arguments.parts, arguments.dry_run)
        if failed:
            print(f"{failed} measurements of {arguments.section} failed", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
