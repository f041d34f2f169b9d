"""What `import dre_fast` brings into a process, and how long it takes beside torch itself."""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

# What dre_fast adds to torch at import: itself and its one small dependency. Everything else comes when it is used.
ALLOWED = {"dre_fast", "einops"}
# Modules of the standard library that cost real time or start threads.
COSTLY = {
    "multiprocessing.pool",
    "concurrent.futures.process",
    "asyncio",
    "unittest",
    "http.server",
    "sqlite3",
}

ADDED = """
import sys, torch
before = set(sys.modules)
import {module}
print("\\n".join(sorted(set(sys.modules) - before)))
"""
SECONDS = """
from time import process_time
start = process_time()
import torch
torch_there = process_time()
import dre_fast
print((process_time() - start) / (torch_there - start))
"""


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", params=["dre_fast", "dre_fast.cli"])
def added(request: pytest.FixtureRequest) -> set[str]:
    """Modules that an import adds to those of torch."""
    return set(python(ADDED.format(module=request.param)).split())


def test_nothing_heavy_is_imported(added: set[str]):
    others = {name.partition(".")[0] for name in added} - ALLOWED - set(sys.stdlib_module_names)
    assert not others, "import these where they are used"
    assert not added & COSTLY


def test_of_torch_no_more_than_torch_imports_itself(added: set[str]):
    """torch._dynamo, inductor, torch.distributed.checkpoint and the like take seconds."""
    assert not {name for name in added if name.startswith(("torch.", "triton"))}


def test_the_package_stays_small(added: set[str]):
    """Kernels, training, data and evaluation are imported by who uses them."""
    own = {name for name in added if name.startswith("dre_fast.")}
    parts = (
        "dre_fast.kernels.",
        "dre_fast.train.",
        "dre_fast.eval.",
        "dre_fast.data.",
        "dre_fast.integrations.",
    )
    assert {name for name in own if name.startswith(parts)} <= {
        "dre_fast.data.files",
        "dre_fast.data.optional",
    }


@pytest.mark.slow
def test_import_takes_less_than_1_3_times_that_of_torch():
    """Processor time, both taken in the same fresh interpreter, so that other work on the machine hits both alike."""
    ratios: list[float] = []
    while len(ratios) < 5 and max(sum(r < 1.3 for r in ratios), sum(r >= 1.3 for r in ratios)) < 3:
        ratios.append(float(python(SECONDS)))
    assert statistics.median(ratios) < 1.3, f"import dre_fast against import torch: {ratios}"
