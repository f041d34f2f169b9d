"""benchmarks/gpu.sh goes through every section without a GPU, and a failing section neither hides nor is hidden."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def dry_run(out: Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), str(out), "--dry-run"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": python},
        cwd=out.parent,
        check=False,
    )


def statuses(out: Path) -> dict[str, str]:
    return {
        entry["section"]: entry["exit"] for entry in json.loads((out / "report.json").read_text())["status"]
    }


def test_dry_run_goes_through_every_section(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = dry_run(out)
    assert run.returncode == 0, run.stdout + run.stderr
    ended = statuses(out)
    assert {name for name, status in ended.items() if status == "needs a GPU"} == {
        "build",
        "counters",
        "tests",
        "tests-kernels",
        "memcheck",
        "racecheck",
    }
    assert {status for status in ended.values() if status != "needs a GPU"} == {"0"}
    for command in (
        "setup.py build_ext --inplace",
        "--profile-from-start off",
        "-m pytest -m gpu",
        "--tool memcheck",
        "--tool racecheck",
    ):
        assert command in run.stdout

    sections = json.loads((out / "report.json").read_text())["sections"]
    kernels = sections.pop("kernels")["result"]
    assert {row["id"] for row in kernels} >= {"P1-small", "P3-small op", "P4-small NetVLAD", "all-small"}
    assert all(row["us"] > 0 for row in kernels)
    rows = [row for name, part in sections.items() if name != "environment" for row in part["result"]]
    assert {row["id"] for row in rows} >= {
        "copy",
        "gemm",
        "P1-small",
        "P2-small",
        "P3-small",
        "P4-small",
        "all-small",
        "P5",
        "P6",
        "P7",
        "P8 m=2",
        "P12",
    }
    assert not [row for row in rows if "error" in row]
    assert all(row["ms"] > 0 for row in rows)
    table = (out / "table.md").read_text()
    assert "Dry run" in table
    assert run.stdout.rstrip().endswith(table.rstrip())

    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(len(path.relative_to(out).parts) <= 3 for path in files)


def test_a_failing_section_hides_no_other(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    # the long sections are left out: the other test goes through them
    skipped = "|".join(
        f'*"gpu_report.py {name}"*'
        for name in ("retrieve", "soft", "contrast", "bank", "training", "kernels", "sanitize-case")
    )
    broken.write_text(
        f'#!/bin/sh\ncase "$*" in *"gpu_report.py ceilings"*) exit 3;; {skipped}) exit 0;; esac\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    broken.chmod(0o755)
    out = tmp_path / "out"
    run = dry_run(out, str(broken))
    assert run.returncode == 1
    ended = statuses(out)
    assert ended["ceilings"] == "3"
    assert ended["encode"] == "1"  # its floors need the ceilings of the same run
    assert ended["codebook"] == "0"
    assert "P12" in (out / "table.md").read_text()


def test_a_real_run_without_a_gpu_fails_clearly(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu_report.py", "ceilings", "--parts", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert run.returncode != 0
    assert "torch sees no CUDA device" in run.stderr


def test_the_limits_leave_room_in_nine_minutes() -> None:
    """Sections run one after the other, but tests and sanitizer side by side."""
    lines = (ROOT / "benchmarks" / "gpu.sh").read_text().splitlines()
    found = [re.match(r"\s*(section|gpu_only|counters) ([\w-]+) [\w-]+ (\d+) ", line) for line in lines]
    limits = {one[2]: int(one[3]) for one in found if one}
    for dry_alone in ("tests-collected", "sanitize-case"):
        del limits[dry_alone]
    beside = limits.pop("memcheck") + limits.pop("racecheck"), limits.pop("tests-kernels")
    assert len(limits) == 13
    assert max(beside) <= limits["tests"]
    assert sum(limits.values()) < 540


def test_usage(tmp_path: Path) -> None:
    run = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path), "--wet-run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "usage" in run.stderr
