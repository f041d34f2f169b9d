"""Builds the compiled parts of dre_fast: C++ ops, their CUDA half, and the build-info module.

pyproject.toml holds everything else. The parts, planned in native_build/, and what each of them needs:

    dre_fast/_ops.so               C++ compiler, torch >= 2.10 in the target environment
    dre_fast/_ops_cuda.so          the same, a CUDA build of torch, nvcc
    dre_fast/_host.<python tag>    C++ compiler, pybind11, Python.h

What cannot be built is left out, the package works without it, and one line says what is missing and how to
get it. pip hides build output unless asked with -v, so the same line goes into dre_fast/_build_status.json,
which `dre_fast.ops.native.why_not()` and `dre-fast info` show. Where nothing is built the wheel is pure Python
(py3-none-any).

Environment variables:
    DRE_FAST_NATIVE=auto|0|1   auto: what can be built; 0: nothing; 1: fail where the C++ ops cannot be built
    DRE_FAST_CUDA=auto|0|1     auto: where torch has CUDA and nvcc is found; 1: fail where it cannot be built
    DRE_FAST_CUDA_ARCHS        default "80;90;100;120"; PTX of the last one is added for newer GPUs
    CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, MAX_JOBS have their usual meaning
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build backends run this file without its folder on the path

from native_build.find import version_of  # noqa: E402
from native_build.parts import Part, plan  # noqa: E402

# Objects outlive one build, editable or not, so that only what changed is compiled again.
CACHE = ROOT / "build" / f"native-{platform.system()}-{platform.machine()}".lower()
STATUS = "_build_status.json"


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr)
    if done.returncode:
        raise SystemExit(
            f"dre_fast: this command failed (DRE_FAST_NATIVE=0 installs without the compiled parts):\n"
            f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        )


def compile_object(part: Part, source: str) -> Path:
    """The object of ``source``, named by all it depends on: compiled once, safe beside other builds."""
    command = part.compilation(source)
    digest = hashlib.sha256(json.dumps([command, version_of(tuple(part.compiler))]).encode())
    for path in [ROOT / source, *sorted((ROOT / "csrc").rglob("*.h"))]:
        digest.update(path.read_bytes())
    include = [flag[2:] for flag in part.flags if flag.startswith("-I")]
    for folder in include:
        version = Path(folder) / "torch/headeronly/version.h"
        digest.update(version.read_bytes() if version.is_file() else b"")
    out = CACHE / f"{Path(source).stem}-{digest.hexdigest()[:20]}.o"
    if not out.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(f".{os.getpid()}.partial.o")
        print(f"dre_fast: compiling {source}", flush=True)
        run([*command, "-o", str(partial)])
        os.replace(partial, out)
    return out


class BuildNative(build_ext):
    """Compiles with the commands of `plan`, several files at a time, and replaces libraries atomically."""

    def get_ext_filename(self, fullname: str) -> str:
        name = fullname.split(".")[-1]
        if name in ("_ops", "_ops_cuda"):  # no Python in them: any version loads them
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        super().run()
        if self.inplace:
            write_status(ROOT / "dre_fast")

    def build_extensions(self) -> None:
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            objects = {p.name: [pool.submit(compile_object, p, s) for s in p.sources] for p in PARTS}
            for part in PARTS:
                out = Path(self.get_ext_fullpath(f"dre_fast.{part.name}")).resolve()
                out.parent.mkdir(parents=True, exist_ok=True)
                partial = out.with_name(f".{out.name}.{os.getpid()}")
                linked = [str(o.result()) for o in objects[part.name]]
                run([*part.link, "-o", str(partial), *linked, *part.libs])
                os.replace(partial, out)

    def copy_extensions_to_source(self) -> None:
        for extension in self.extensions:
            name = self.get_ext_filename(extension.name)
            partial = ROOT / f"{name}.{os.getpid()}.partial"
            shutil.copyfile(Path(self.build_lib) / name, partial)
            os.replace(partial, ROOT / name)  # a process that has the old one mapped keeps it


class BuildPython(build_py):
    """Adds the build record; leaves out libraries that an in-place build put beside the sources."""

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        found = super().find_data_files(package, src_dir)
        return [f for f in found if not f.endswith(".so") and Path(f).name != STATUS]

    def run(self) -> None:
        super().run()
        write_status(ROOT / "dre_fast" if self.editable_mode else Path(self.build_lib) / "dre_fast")


def write_status(package: Path) -> None:
    """Record what was built; a library that this build left out must not stay behind from an earlier one."""
    for name in ("_ops", "_ops_cuda"):
        if name not in RECORD["built"]:
            (package / f"{name}.so").unlink(missing_ok=True)
    if "_host" not in RECORD["built"]:
        for stale in package.glob(f"_host*{sysconfig.get_config_var('EXT_SUFFIX')}"):
            stale.unlink()
    partial = package / f"{STATUS}.{os.getpid()}.partial"
    partial.write_text(json.dumps(RECORD, indent=2) + "\n")
    os.replace(partial, package / STATUS)


def announce() -> None:
    for reason in dict.fromkeys(RECORD["why_not"].values()):
        parts = ", ".join(part for part, why in RECORD["why_not"].items() if why == reason)
        print(f"dre_fast: built without its compiled part ({parts}): {reason}", file=sys.stderr, flush=True)


# What is built, and the record of it: filled in when this file runs as the setup script.
PARTS: list[Part] = []
RECORD: dict[str, Any] = {}

if __name__ == "__main__":
    PARTS, RECORD = plan()
    if {"build", "bdist_wheel", "editable_wheel", "build_ext", "develop", "install"} & set(sys.argv):
        announce()
    setup(
        ext_modules=[Extension(f"dre_fast.{part.name}", part.sources) for part in PARTS],
        cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    )
