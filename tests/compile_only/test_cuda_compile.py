"""The CUDA sources compile for every architecture we support, without a GPU, and spill nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from native_build.find import Torch
from native_build.parts import NVCC_FLAGS

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("80", "90", "100", "120")
FORMATS = ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn")
# What two blocks of 256 threads (writing) or eight of 128 (reading) a multiprocessor leave a thread.
MAX_REGISTERS = {"bank": 128, "bank_read": 64}
KERNELS = {
    "bank": {f"write_kernel<{f}, {rows}>" for f in FORMATS for rows in (8, 2)} | {"claim_kernel"},
    "bank_read": {f"read_kernel<{f}, {four}>" for f in FORMATS for four in (0, 1)}
    | {f"rest_kernel<{f}, {out}>" for f in FORMATS for out in "fd"},
}
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    at_home = Path(home or "") / "bin/nvcc"
    found = str(at_home) if home and at_home.is_file() else shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc (the CUDA toolkit): none on PATH, and CUDA_HOME names none")
    return found


def build_flags() -> list[str]:
    """The flags of the build, so that what is tested is what is built."""
    found = Torch(Path(torch.__file__).parent, torch.__version__, None)
    return [*NVCC_FLAGS, *found.flags]


def kernel_name(mangled: str) -> str:
    """ "write_kernel<int8, 8>" from the mangled name."""
    found = re.search(r"(write|read|rest)_kernelILNS_6FormatE(\d)E(?:L[ib](\d+)E|([fd]))", mangled)
    return f"{found[1]}_kernel<{FORMATS[int(found[2])]}, {found[3] or found[4]}>" if found else "claim_kernel"


Report = dict[str, dict[str, dict[str, int]]]


@pytest.fixture(scope="module", params=list(KERNELS))
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Report]:
    """Source, and architecture -> kernel -> registers, stack, spills, from one compilation for all architectures."""
    source = request.param
    out = tmp_path_factory.mktemp("cuda") / f"{source}.o"
    command = [nvcc(), *build_flags(), "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    done = subprocess.run(
        [*command, "-c", f"csrc/cuda/{source}.cu", "-o", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report: Report = {arch: {} for arch in ARCHS}
    for found in REPORT.finditer(done.stderr):
        use = {key: int(found[key]) for key in ("registers", "stack", "stores", "loads")}
        report[found["arch"]][kernel_name(found["name"])] = use
    return source, report


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_bank_compiles_without_spills(arch: str, kernels: tuple[str, Report], record_property) -> None:
    source, report = kernels
    assert set(report[arch]) == KERNELS[source]
    record_property(f"{source} sm_{arch}", report[arch])
    print(f"\n{source} sm_{arch}: registers, bytes spilled")
    for name, use in sorted(report[arch].items()):
        print(f"  {name:<34}{use['registers']:>4}{use['stores'] + use['loads']:>4}")
    for name, use in report[arch].items():
        assert use["stack"] == use["stores"] == use["loads"] == 0, (name, use)
        assert use["registers"] <= MAX_REGISTERS[source], (name, use)
