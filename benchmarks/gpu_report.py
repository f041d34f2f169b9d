"""The parts of benchmarks/gpu.sh: `gpu_report.py SECTION --parts DIR [--dry-run]` writes DIR/SECTION.json.

`gpu_report.py table --parts DIR --out OUT` joins the parts to OUT/report.json and prints OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

SECTIONS = ("environment", "ceilings", "encode", "soft", "bank", "codebook")


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


def measure(section: str, parts: Path, dry: bool) -> None:
    """Run one section and write its part. The ceilings of the same run are read from their part."""
    from benchmarks import gpu_sections

    if section == "environment":
        result: Any = environment()
    elif section in ("encode", "bank"):
        file = parts / "ceilings.json"
        if not file.exists():
            raise SystemExit(f"{section} needs {file}: the ceilings section did not finish")
        result = getattr(gpu_sections, section)(dry, json.loads(file.read_text())["result"])
    else:
        result = getattr(gpu_sections, section)(dry)
    part = {"section": section, "dry_run": dry, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    target = parts / f"{section}.json"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps({**part, "result": result}, indent=1))
    temporary.replace(target)


def _line(row: dict[str, Any]) -> str:
    rate = f"{row['bytes'] / row['ms'] / 1e6:.0f}" if "bytes" in row else "-"
    flops = f"{row['flops'] / row['ms'] / 1e9:.1f}" if "flops" in row else "-"
    floor = f"{row['ms'] / row['floor_ms']:.2f}" if row.get("floor_ms") else "-"
    ratios = ", ".join(f"{ms / row['ms']:.2f}x {name}" for name, ms in row.get("peers", {}).items()) or "-"
    peak = f"{row['peak_mb']:.0f}" if row.get("peak_mb") is not None else "-"
    what = row["what"] + (f" ({row['note']})" if "note" in row else "")
    return (
        f"| {row['id']} | {what} | {row['implementation']} | {row['ms']:.4f} | {floor} | {rate} | {flops} "
        f"| {ratios} | {peak} |"
    )


def table(parts: Path, out: Path) -> str:
    """Join what the sections left; sections that left nothing are named."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(parts.glob("*.json"))}
    status = [line.split("\t") for line in (parts / "status.tsv").read_text().splitlines()]
    report = {
        "sections": found,
        "status": [dict(zip(("section", "exit", "seconds"), s, strict=True)) for s in status],
    }
    lines = []
    about = found.get("environment", {}).get("result", {})
    if any(part["dry_run"] for part in found.values()):
        lines += ["**Dry run: small sizes, its times mean nothing.**", ""]
    lines += [
        f"GPU: {about.get('gpu') or 'none'}, torch {about.get('torch')}, triton {about.get('triton')}, "
        f"CUDA {about.get('cuda')}, driver {about.get('driver')}, commit {about.get('commit')}",
        "",
        "| id | work | implementation | ms | x floor | GB/s | TFLOP/s | speed-up over peers | peak MB |",
        "|" + " --- |" * 9,
    ]
    for section in SECTIONS[1:]:
        lines += [_line(row) for row in found.get(section, {}).get("result", [])]
    lines += ["", "| section | exit status | seconds |", "|" + " --- |" * 3]
    lines += [f"| {' | '.join(entry)} |" for entry in status]
    text = "\n".join(lines) + "\n"
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "table.md").write_text(text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=[*SECTIONS, "sanitize-case", "table"])
    parser.add_argument("--parts", type=Path, help="folder of the sections' JSON parts")
    parser.add_argument("--out", type=Path, help="folder of the joined report")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, on any device")
    arguments = parser.parse_args()
    if arguments.section == "sanitize-case":
        from benchmarks import gpu_sections

        gpu_sections.sanitize_case()
    elif arguments.section == "table":
        print(table(arguments.parts, arguments.out))
    else:
        measure(arguments.section, arguments.parts, arguments.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
