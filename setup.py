"""Builds the compiled parts of dre_fast: C++ ops, their CUDA half, and the build-info module.

pyproject.toml holds everything else. The parts and what each of them needs:

    dre_fast/_ops.so               C++ compiler, torch >= 2.10 in the target environment
    dre_fast/_ops_cuda.so          the same, a CUDA build of torch, nvcc
    dre_fast/_host.<python tag>    C++ compiler, pybind11, Python.h

What cannot be built is left out, the package works without it, and one line says what is missing and how to
get it. pip hides build output unless asked with -v, so the same line goes into dre_fast/_build_status.json,
which `dre_fast.ops.native.why_not()` and `dre-fast info` show.

torch is read as files (headers, version.py), never imported: pip's isolated build environment cannot import
it, yet runs under the target environment's prefix, so `pip install .` builds against the torch that is there.

Environment variables:
    DRE_FAST_NATIVE=auto|0|1   auto: what can be built; 0: nothing; 1: fail where the C++ ops cannot be built
    DRE_FAST_CUDA=auto|0|1     auto: where torch has CUDA and nvcc is found; 1: fail where it cannot be built
    DRE_FAST_CUDA_ARCHS        default "80;90;100;120"; PTX of the last one is added for newer GPUs
    CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, MAX_JOBS have their usual meaning
"""

from __future__ import annotations

import ast
import concurrent.futures
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Objects outlive one build, editable or not, so that only what changed is compiled again.
CACHE = ROOT / "build" / f"native-{platform.system()}-{platform.machine()}".lower()
STATUS = "_build_status.json"
MIN_TORCH = (2, 10)
DEFAULT_ARCHS = "80;90;100;120"
STD = "-std=c++17"
# No contraction of a*b+c: fused multiply-adds are written out where they are meant, so that AVX2 and AVX-512
# give the same bits. No-trapping-math lets comparisons and selections vectorise; it changes no value.
CXX_FLAGS = shlex.split(
    f"{STD} -O3 -fPIC -fvisibility=hidden -Wall -ffp-contract=off -fno-math-errno -fno-trapping-math"
)
NVCC_FLAGS = [STD, "-O3", "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"
CPU_SOURCES = (
    "bank",
    "bank_read",
    "row_kernels",
    "row_kernels_default",
    "encode_rows",
    "encode_assign",
    "encode_hard",
    "encode_hard_backward",
    "encode_kernels_default",
    "encode_soft_assign",
    "encode_soft",
    "encode_soft_backward",
    "soft_kernels_default",
)
X86_VARIANTS = {
    "row_kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "row_kernels_avx512.cpp": AVX512.split(),
    "encode_kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "encode_kernels_avx512.cpp": AVX512.split(),
    "encode_kernels_avx512bf16.cpp": [*AVX512.split(), "-mavx512bf16"],
    "soft_kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "soft_kernels_avx512.cpp": AVX512.split(),
}
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
    extra: dict[str, list[str]] = field(default_factory=dict)


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
    spec = importlib.util.find_spec("torch")  # locates, does not import
    candidates = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    candidates += [folder / "torch" for folder in site_folders()]
    found = next((c for c in candidates if (c / "version.py").is_file()), None)
    if found is None:
        raise Missing(
            f"torch is not installed under {sys.prefix}: pip install 'torch>=2.10', {AGAIN} "
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
    """The C++ compiler, tried on a two-line program."""
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
    """nvcc, tried with the C++ compiler: each version of it accepts only some of them."""
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


def cuda_archs(nvcc: Path) -> list[str]:
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
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def switch(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={value}: must be auto, 0 or 1")
    return value


def ops_part(chain: Toolchain) -> Part:
    sources = ["csrc/ops.cpp"] + [f"csrc/cpu/{name}.cpp" for name in CPU_SOURCES]
    if platform.machine().lower() in ("x86_64", "amd64"):
        sources += [f"csrc/cpu/{name}" for name in X86_VARIANTS]
    flags = [*chain.cxxflags, *chain.torch.flags]
    return Part("_ops", sources, chain.compiler, flags, chain.link, chain.torch.libs, X86_VARIANTS)


def cuda_part(chain: Toolchain) -> Part:
    if switch("DRE_FAST_CUDA") == "0":
        raise Missing("left out by DRE_FAST_CUDA=0: install dre_fast again without it")
    torch = chain.torch
    if torch.cuda is None:
        raise Missing(f"torch {torch.version} is built without CUDA: install a CUDA build of it, {AGAIN}")
    nvcc = find_nvcc(chain.compiler)
    chain.archs = cuda_archs(nvcc)
    flags = [*NVCC_FLAGS, "-ccbin", chain.compiler[-1], *arch_flags(chain.archs), *torch.flags]
    # nvcc links, for it knows its own libraries: the static runtime, which loads beside any that torch brings.
    ldflags = ["-Xcompiler=" + f.replace(",", "\\,") for f in chain.ldflags]
    link = [str(nvcc), "-shared", "-ccbin", chain.compiler[-1], *arch_flags(chain.archs), *ldflags]
    libs = [*torch.libs, "-ltorch_cuda"]
    sources = ["csrc/cuda/bank.cu", "csrc/cuda/bank_read.cu"]
    return Part("_ops_cuda", sources, [str(nvcc)], flags, link, libs)


def host_part(chain: Toolchain) -> Part:
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
    sources = ["csrc/host/module.cpp", "csrc/host/row_file.cpp"]
    return Part("_host", sources, chain.compiler, flags, [*chain.link, "-pthread"])


def plan() -> tuple[list[Part], dict[str, Any]]:
    """The parts that can be built here, and the record of what was built or why not."""
    parts: list[Part] = []
    why: dict[str, str] = {}
    chain = None
    try:
        if switch("DRE_FAST_NATIVE") == "0":
            raise Missing("left out by DRE_FAST_NATIVE=0: install dre_fast again without it")
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
    command = [*part.compiler, *part.flags, *part.extra.get(Path(source).name, []), "-c", source]
    digest = hashlib.sha256(json.dumps(command).encode())
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
