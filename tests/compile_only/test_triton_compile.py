"""Every shipped configuration compiles for every architecture without spilling; bag lengths compile nothing new.

In subprocesses without TRITON_INTERPRET: interpreted kernels do not compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

ROOT = Path(__file__).resolve().parents[2]


def run_json(*command: str) -> Any:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check_resources(entries: list[dict[str, Any]]) -> None:
    wrong = []
    for entry in entries:
        if entry["stack"] or entry["local"]:
            wrong.append(f"{entry['name']}: spills, {entry['stack']} bytes of stack")
        if entry["shared"] > entry["shared_limit"]:
            wrong.append(
                f"{entry['name']}: {entry['shared']} bytes of shared memory, {entry['shared_limit']} allowed"
            )
        if entry["matrix"] and not entry["wgmma" if entry["capability"] == 90 else "mma"]:
            wrong.append(f"{entry['name']}: the products do not use the matrix units")
        if entry["wide"] and not entry["wide_loads"]:
            wrong.append(f"{entry['name']}: rows are not loaded 16 bytes at a time")
        if entry["asynchronous"] and not entry["async_copies"]:
            wrong.append(f"{entry['name']}: no asynchronous copies")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_every_shipped_configuration_on_hopper() -> None:
    entries = run_json("-m", "dre_fast.kernels.resources", "--json", "--arch", "90")
    check_resources(entries)
    assert {entry["label"] for entry in entries} >= {"prepare", "single", "assign", "aggregate", "reduce"}
    single = next(entry for entry in entries if entry["label"] == "single")
    assert single["async_copies"]
    assert single["wgmma"]
    loss = [entry for entry in entries if "contrast" in entry["name"]]
    assert len(loss) == 42
    products = [entry for entry in loss if any(f"K={n} " in entry["name"] for n in (32, 64))]
    assert len(products) == 32
    assert all(entry["matrix"] for entry in products)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 100, 120])
def test_a_third_of_the_shipped_configurations_elsewhere(capability: int) -> None:
    """All of them are in the table of docs/kernels.md, which is made anew when kernels or plans change."""
    command = ("-m", "dre_fast.kernels.resources", "--json", "--every", "3", "--arch", str(capability))
    entries = run_json(*command)
    check_resources(entries)
    kernels = {entry["label"].split()[0] for entry in entries}
    assert kernels >= {"single", "assign", "aggregate", "reduce", "gather", "soft", "contrast"}


def test_a_thousand_lengths_compile_nothing_new() -> None:
    """Of rows in order, rows by index, stored rows and rows with known codes."""
    counted = run_json("tests/compile_only/compile_counts.py")
    assert counted["runs"] > 1000
    expected = {
        "prepare_kernel": 2,
        "single_kernel": 3,
        "assign_kernel": 0,
        "aggregate_kernel": 1,
        "reduce_kernel": 1,
    }
    assert counted["first"] == counted["last"] == expected, counted
