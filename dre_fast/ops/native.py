"""The compiled ops: loads dre_fast/_ops.so and dre_fast/_ops_cuda.so, says why when they are not there.

Importing this module registers ``torch.ops.dre_fast_native.bank_write`` where the C++ part was built; its
arguments are those of :func:`dre_fast.reference.bank.write`. The libraries use the stable ABI of torch 2.10.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARIES = {"ops": "_ops.so", "cuda": "_ops_cuda.so"}
PARTS = ("ops", "cuda", "host")


@functools.cache
def _status() -> dict[str, Any]:
    """What the installation recorded: the parts it built, and why not the others."""
    path = _PACKAGE / "_build_status.json"
    return json.loads(path.read_text()) if path.is_file() else {"built": [], "why_not": {}}


def _reason_not_built(part: str) -> str:
    how = "pip install --no-build-isolation -v -e . in a checkout of dre_fast"
    return _status()["why_not"].get(part) or f"not built in {_PACKAGE}: {how}"


@functools.cache
def _load(part: str) -> str:
    """Load a library once; "" when it is there, else why not."""
    path = _PACKAGE / _LIBRARIES[part]
    if not path.is_file():
        if part == "ops" and (_PACKAGE.parent / "csrc").is_dir():
            # an installed copy with its ops, perhaps; from within the checkout Python takes the sources
            warnings.warn(
                f"dre_fast is imported from the checkout {_PACKAGE.parent}, where its ops are not built: it runs, "
                "slowly, on plain torch. Run `pip install -e .` there; where it is installed already, Python takes that "
                "copy from any other folder",
                RuntimeWarning,
                stacklevel=2,
            )
        return _reason_not_built(part)
    if part == "cuda":
        if _load("ops"):
            return _load("ops")
        if torch.version.cuda is None:
            return f"torch {torch.__version__} has no CUDA: install a CUDA build of torch to use {path.name}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"{path} does not load with torch {torch.__version__} ({error}): install dre_fast again"
        warnings.warn(f"dre_fast runs without its compiled ops: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return ""


def available() -> bool:
    """True where the C++ ops run on CPU tensors."""
    return not _load("ops")


def provides(op: str) -> bool:
    """True where the C++ library is there and has an op of this name."""
    return available() and hasattr(torch.ops.dre_fast_native, op)


def cuda_available() -> bool:
    """True where the CUDA ops were built and load; says nothing about a GPU being present."""
    return not _load("cuda")


@functools.cache
def triton_available() -> bool:
    """True where Triton is installed (it is not on Windows and macOS); says nothing about a GPU being present."""
    return importlib.util.find_spec("triton") is not None


def why_not(part: str = "ops") -> str:
    """What is missing for a part and how to get it, or "" where it is there.

    Args:
        part: "ops" (C++), "cuda", or "host" (the pybind11 module).

    Raises:
        ValueError: no such part.
    """
    if part not in PARTS:
        raise ValueError(f"no compiled part is called {part!r}: one of {', '.join(PARTS)}")
    if part != "host":
        return _load(part)
    try:
        importlib.import_module("dre_fast._host")
    except ImportError as error:
        return _status()["why_not"].get("host") or f"{error}: install dre_fast again"
    return ""


def cpu_level() -> str:
    """The instruction set of the C++ kernels here: "avx512", "avx2" or "default".

    The environment variable DRE_FAST_CPU=avx2|default, read at the first call, lowers it.

    Raises:
        RuntimeError: the C++ ops are not there.
    """
    if not available():
        raise RuntimeError(f"no C++ ops: {why_not()}")
    return torch.ops.dre_fast_native.cpu_level()


def build_info() -> dict[str, Any]:
    """Compiler, flags, torch and CUDA architectures of the build, and why any part is missing.

    Keys: "built" (list of library names), "why_not" (part -> reason), "torch", "compiler", "cuda_archs"; with
    the pybind11 module also "compiler_version", "flags" and "cuda" (bool).
    """
    info = dict(_status())
    if not why_not("host"):
        info.update(importlib.import_module("dre_fast._host").build_info())
    return info


available()
cuda_available()
