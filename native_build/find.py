"""Finds torch, the C++ compiler and nvcc, tries them, and says what is missing and how to get it.

torch is read as files (headers, version.py), never imported: pip's isolated build environment cannot import
it, yet runs under the target environment's prefix, so `pip install .` builds against the torch that is there.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIN_TORCH = (2, 10)
STD = "-std=c++17"
AGAIN = "then install dre_fast again"


class Missing(Exception):
    """A part cannot be built: the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Torch:
    """The torch of the target environment, read from its files."""

    folder: Path
    version: str
    cuda: str | None

    @property
    def flags(self) -> list[str]:
        # The stable ABI as of 2.10: one binary serves every later torch.
        return [f"-I{self.folder / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]

    @property
    def libs(self) -> list[str]:
        # Found again by name when the library loads, since torch is loaded by then: no run path.
        return [f"-L{self.folder / 'lib'}", "-ltorch_cpu"]


def site_folders() -> list[Path]:
    """Where the target environment keeps packages, also when this runs isolated from them."""
    prefixes = [sys.prefix]
    config = Path(sys.prefix) / "pyvenv.cfg"
    shared = sys.prefix == sys.base_prefix or (
        config.is_file() and re.search(r"include-system-site-packages\s*=\s*true", config.read_text(), re.I)
    )
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if shared:
        prefixes.append(sys.base_prefix)
        folders.append(site.getusersitepackages())
    folders += site.getsitepackages(list(dict.fromkeys(prefixes)))
    return [Path(folder) for folder in dict.fromkeys(folders)]


def find_torch() -> Torch:
    """The torch to build against.

    Raises:
        Missing: there is none, it is older than `MIN_TORCH`, or it has no headers.
    """
    spec = importlib.util.find_spec("torch")  # locates, does not import
    candidates = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    candidates += [folder / "torch" for folder in site_folders()]
    found = next((c for c in candidates if (c / "version.py").is_file()), None)
    if found is None:
        raise Missing(
            f"torch was not installed under {sys.prefix} at build time: pip install 'torch>=2.10', {AGAIN} "
            "(with --no-build-isolation where the installer builds in an environment of its own)"
        )
    values: dict[str, Any] = {}
    for node in ast.parse((found / "version.py").read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            values[target.id] = value.value
    version = values.get("__version__", "0")
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        raise Missing(f"torch {version} is older than 2.10: pip install -U torch, {AGAIN}")
    if not (found / "include/torch/csrc/stable/library.h").is_file():
        raise Missing(f"torch {version} in {found} has no C++ headers: install torch from its own wheel")
    return Torch(found, version, values.get("cuda"))


def find_compiler() -> list[str]:
    """The C++ compiler's command, tried on a two-line program.

    Raises:
        Missing: there is none, or it does not compile C++17.
    """
    named = os.environ.get("CXX")
    how = "Debian/Ubuntu: apt install g++; conda: conda install cxx-compiler; macOS: xcode-select --install"
    if os.name == "nt":
        raise Missing("the C++ parts are built on Linux and macOS only")
    if named:
        command = shlex.split(named)
        if shutil.which(command[0]) is None:
            raise Missing(f"the C++ compiler CXX={named} does not exist: unset CXX or install one ({how})")
    else:
        found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        if found is None:
            raise Missing(f"no C++ compiler (c++, g++, clang++): install one ({how}), {AGAIN}")
        command = [found]
    probe = subprocess.run(
        [*command, STD, "-fsyntax-only", "-x", "c++", "-"],
        input="#include <vector>\nint main() { return std::vector<int>().size(); }\n",
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        said = (probe.stderr.strip().splitlines() or ["no message"])[0]
        raise Missing(
            f"{shlex.join(command)} does not compile C++17 ({said}): install a C++ compiler ({how})"
        )
    return command


def find_nvcc(compiler: list[str]) -> Path:
    """nvcc, tried with the C++ compiler: each version of it accepts only some of them.

    Raises:
        Missing: there is none, or it does not work with ``compiler``.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    at_home = Path(home or "") / "bin/nvcc"
    found = str(at_home) if home and at_home.is_file() else shutil.which("nvcc")
    if found is None:
        where = f"in CUDA_HOME={home} or on PATH" if home else "on PATH, and CUDA_HOME is not set"
        raise Missing(f"nvcc is not {where}: install the CUDA toolkit or set CUDA_HOME, {AGAIN}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text("int main() { return 0; }\n")
        probe = subprocess.run([found, "-ccbin", compiler[-1], "-E", source], capture_output=True, text=True)
    if probe.returncode:
        said = next((line for line in probe.stderr.splitlines() if "error" in line), probe.stderr.strip())
        raise Missing(
            f"{found} does not work with {compiler[-1]} ({said}): name another compiler in CXX, {AGAIN}"
        )
    return Path(found)


@functools.cache
def version_of(command: tuple[str, ...]) -> str:
    """What a compiler says of itself, so that objects of another one are not taken for its own."""
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
