"""Tables are written from raw results: of pytest-benchmark, of benchmarks/gpu.sh, and of ncu."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_report, gpu_sections, table

ROOT = Path(__file__).resolve().parents[2]


def benchmark(group: str, median: float, **info: object) -> dict[str, object]:
    return {"group": group, "stats": {"median": median}, "extra_info": info}


RESULT = {
    "machine_info": {"cpu": {"brand_raw": "A CPU", "count": 2}, "python_version": "3.11.7"},
    "commit_info": {"id": "0123456789abcdef", "dirty": False},
    "datetime": "2026-01-02T03:04:05",
    "benchmarks": [
        benchmark(
            "encode P10",
            0.02,
            implementation="dre_fast",
            ours=True,
            backend="C++",
            bytes=40_000_000,
            calls=2,
            inputs=8_000_000,
            outputs=2_000_000,
            peak=3_000_000,
            threads=2,
            torch="2.13.0",
        ),
        benchmark("encode P10", 0.025, implementation="gemm", variant="one-hot", difference=0.00012),
        benchmark("a table of something else", 1.0),
    ],
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_times_ratios_rates_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT))
    lines = table.render(path).splitlines()
    assert lines[0] == "A CPU, 2 CPUs, 2 threads; torch 2.13.0; Python 3.11.7; commit 0123456789; 2026-01-02"
    assert "**encode P10**" in lines
    rows = [cells(line) for line in lines if line.startswith("| ")]
    assert rows == [
        list(table.HEAD),
        ["dre_fast (C++)", "10.000", "1.00", "4.0", "3.0", "1.10", "-"],
        ["gemm (one-hot)", "25.000", "2.50", "-", "-", "-", "1e-04"],
    ]
    assert "something else" not in "\n".join(lines)


def test_columns_with_nothing_in_them_are_left_out() -> None:
    found = table.read({"benchmarks": [benchmark("g", 0.5, implementation="native_write")]})
    assert [cells(line) for line in table.tables(found) if line.startswith("| ")] == [
        ["implementation", "ms", "x time"],
        ["native_write", "500.000", "1.00"],
    ]


def test_command_line(tmp_path: Path) -> None:
    good, bad, out = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "table.md"
    good.write_text(json.dumps(RESULT))
    bad.write_text("{}")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.table", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    assert run(good, "--match", "P10", "--out", out).returncode == 0
    assert out.read_text() == table.render(good)
    wrong = run(bad)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "is no result of" in wrong.stderr
    assert "no group that matches" in run(good, "--match", "P99").stderr


@pytest.mark.parametrize("text", ["", "not json", "[1, 2]"])
def test_what_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        table.render(path)


NCU = """==PROF== Connected to process 7
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","dram__bytes_write.sum",\
"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","sm__throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active"
"","","us","Mbyte","Kbyte","%","%","%"
"0","_single_kernel","1,200.5","768.25","512","81.5","40.25","33.1"
"1","_reduce_kernel","0.002","n/a","3,000","1","2","0"
==PROF== Disconnected
"""


def test_counters_of_ncu() -> None:
    first, second = gpu_report.counters(NCU)
    assert first == {
        "kernel": "_single_kernel",
        "us": "1200.5",
        "DRAM MB read": "768.2",
        "DRAM MB written": "0.5",
        "DRAM %": "81.5",
        "SM %": "40.2",
        "tensor pipe %": "33.1",
    }
    assert (second["DRAM MB read"], second["DRAM MB written"]) == ("-", "3.0")
    assert gpu_report.counters("==ERROR== ERR_NVGPUCTRPERM\n") == []


def test_a_failed_measurement_is_reported_and_stops_no_other() -> None:
    def good() -> list[gpu_sections.Row]:
        return [
            {"id": "P1", "what": "hard encode, N=4", "implementation": "Triton", "ms": 2.0, "floor_ms": 1.0}
        ]

    def bad() -> list[gpu_sections.Row]:
        raise RuntimeError("out of registers\nand more")

    rows = list(gpu_sections.collect([("P9", bad), ("P1", good)]))
    assert [row["id"] for row in rows] == ["P9", "P1"]
    rows[1]["peers"], rows[1]["peers_mb"] = {"slow": 8.0, "quick": 3.0}, {"slow": 12.0}
    report = {
        "sections": {"encode": {"dry_run": False, "result": rows}},
        "status": [{"section": "encode", "exit": "1", "seconds": "3"}],
        "counters": gpu_report.counters(NCU),
    }
    text = gpu_report.report_table(report)
    found = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    assert ["P9", "failed: RuntimeError: out of registers", *["-"] * 7] in found
    assert ["P1", "hard encode, N=4", "Triton", "2.0000", "2.00", "-", "-", "-", "-"] in found
    peers = [row for row in found if row[0] == "P1 hard encode: Triton"]
    assert [row[1:] for row in peers] == [["quick", "3.0000", "1.50", "-"], ["slow", "8.0000", "4.00", "12"]]
    assert any(row[0] == "_single_kernel" for row in found)
    assert "Dry run" not in text
