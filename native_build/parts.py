"""The compiled parts: sources, flags, links, and which of them can be built here."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from native_build.find import AGAIN, STD, Missing, Torch, find_compiler, find_nvcc, find_torch

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_ARCHS = "80;90;100;120"
# No contraction of a*b+c: fused multiply-adds are written out where they are meant, so that AVX2 and AVX-512
# give the same bits. No-trapping-math lets comparisons and selections vectorise; it changes no value.
CXX_FLAGS = shlex.split(
    f"{STD} -O3 -fPIC -fvisibility=hidden -Wall -ffp-contract=off -fno-math-errno -fno-trapping-math"
)
NVCC_FLAGS = [STD, "-O3", "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
# A source whose name ends so is compiled with these flags, on x86 only; the CPU chooses among them at run time.
X86_VARIANTS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}


def variant_flags(source: str) -> list[str]:
    """The instruction set that the name of ``source`` asks for; none where it names none."""
    return X86_VARIANTS.get(Path(source).stem.rpartition("_")[2], [])


def sources(pattern: str) -> list[str]:
    """The files under csrc that match, relative to the checkout, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{pattern}"))


class Toolchain:
    """What the parts are built with."""

    def __init__(self, compiler: list[str], torch: Torch) -> None:
        self.compiler = compiler
        self.torch = torch
        self.archs: list[str] = []  # CUDA architectures, once they are known
        self.cxxflags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        self.ldflags = shlex.split(os.environ.get("LDFLAGS", ""))
        self.link = [*compiler, *shared, *self.ldflags]


@dataclass
class Part:
    """One shared library: how its objects are compiled and linked."""

    name: str
    sources: list[str]
    compiler: list[str]
    flags: list[str]
    link: list[str]
    libs: list[str] = field(
        default_factory=list
    )  # after the objects: a linker drops what nothing before needs

    def compilation(self, source: str) -> list[str]:
        """The command that compiles ``source``, without its -o."""
        return [*self.compiler, *self.flags, *variant_flags(source), "-c", source]


def switch(name: str) -> str:
    """An environment variable that is auto, 0 or 1."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={value}: must be auto, 0 or 1")
    return value


def cuda_archs(nvcc: Path) -> list[str]:
    """The architectures to build for: DRE_FAST_CUDA_ARCHS, or those of the default that nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"sm_(\d+)", listed))
    asked = os.environ.get("DRE_FAST_CUDA_ARCHS")
    archs = [a for a in re.split(r"[;,\s]+", asked or DEFAULT_ARCHS) if a]
    unknown = [a for a in archs if a not in known]
    if asked and unknown:
        raise SystemExit(
            f"DRE_FAST_CUDA_ARCHS={asked}: {nvcc} knows {sorted(known)}, not {', '.join(unknown)}"
        )
    # By default an older toolkit builds what it can; build info lists the result.
    return [a for a in archs if a in known]


def arch_flags(archs: list[str]) -> list[str]:
    """nvcc's flags for machine code of each architecture, and PTX of the last for newer GPUs."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def ops_part(chain: Toolchain) -> Part:
    """_ops.so: the ops of csrc/ops.cpp and csrc/cpu."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    cpu = [s for s in sources("cpu/*.cpp") if x86 or not variant_flags(s)]
    flags = [*chain.cxxflags, *chain.torch.flags]
    return Part("_ops", ["csrc/ops.cpp", *cpu], chain.compiler, flags, chain.link, chain.torch.libs)


def cuda_part(chain: Toolchain) -> Part:
    """_ops_cuda.so: their CUDA half, csrc/cuda."""
    if switch("DRE_FAST_CUDA") == "0":
        raise Missing("left out by DRE_FAST_CUDA=0 at build time: install dre_fast again without it")
    torch = chain.torch
    if torch.cuda is None:
        raise Missing(f"torch {torch.version} is built without CUDA: install a CUDA build of it, {AGAIN}")
    nvcc = find_nvcc(chain.compiler)
    chain.archs = cuda_archs(nvcc)
    flags = [*NVCC_FLAGS, "-ccbin", chain.compiler[-1], *arch_flags(chain.archs), *torch.flags]
    # nvcc links, for it knows its own libraries: the static runtime, which loads beside any that torch brings.
    ldflags = ["-Xcompiler=" + f.replace(",", "\\,") for f in chain.ldflags]
    link = [str(nvcc), "-shared", "-ccbin", chain.compiler[-1], *arch_flags(chain.archs), *ldflags]
    return Part("_ops_cuda", sources("cuda/*.cu"), [str(nvcc)], flags, link, [*torch.libs, "-ltorch_cuda"])


def host_part(chain: Toolchain) -> Part:
    """_host: the pybind11 module of csrc/host, which carries the facts of the build."""
    try:
        import pybind11
    except ImportError:
        raise Missing(f"pybind11 is not installed: pip install pybind11, {AGAIN}") from None
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        how = "Debian/Ubuntu: apt install python3-dev"
        raise Missing(f"{python}/Python.h is missing: install Python's headers ({how}), {AGAIN}")
    facts = {
        "TORCH": chain.torch.version,
        "FLAGS": " ".join(chain.cxxflags),
        "CUDA_ARCHS": ";".join(chain.archs),
    }
    flags = [*chain.cxxflags, f"-I{python}", f"-I{pybind11.get_include()}"]
    flags += [f"-DDRE_FAST_{key}={json.dumps(value)}" for key, value in facts.items()]
    return Part("_host", sources("host/*.cpp"), chain.compiler, flags, [*chain.link, "-pthread"])


def plan() -> tuple[list[Part], dict[str, Any]]:
    """The parts that can be built here, and the record of what was built or why not."""
    parts: list[Part] = []
    why: dict[str, str] = {}
    chain = None
    try:
        if switch("DRE_FAST_NATIVE") == "0":
            raise Missing(
                "left out of a pure-Python build (DRE_FAST_NATIVE=0): with a C++ compiler, "
                "pip install --force-reinstall --no-deps . in a checkout of dre_fast"
            )
        chain = Toolchain(find_compiler(), find_torch())
    except Missing as reason:
        if switch("DRE_FAST_NATIVE") == "1":
            raise SystemExit(f"DRE_FAST_NATIVE=1: {reason}") from None
        why["ops"] = str(reason)
    for name, make in (("ops", ops_part), ("cuda", cuda_part), ("host", host_part)):
        try:
            if chain is None:
                raise Missing(why["ops"])
            parts.append(make(chain))
        except Missing as reason:
            if name == "cuda" and switch("DRE_FAST_CUDA") == "1":
                raise SystemExit(f"DRE_FAST_CUDA=1: {reason}") from None
            why[name] = str(reason)
    record = {
        "built": [part.name for part in parts],
        "why_not": why,
        "torch": chain.torch.version if chain else None,
        "compiler": shlex.join(chain.compiler) if chain else None,
        "cuda_archs": chain.archs if chain else [],
    }
    return parts, record
