"""What is installed, how it was built, what runs where, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from dre_fast.data.optional import as_installed


@dataclass(frozen=True)
class Package:
    """A package that parts of dre_fast use: the module it brings, the extra it is in ("" in none), and what for."""

    module: str
    extra: str
    purpose: str


@dataclass(frozen=True)
class Extra:
    """Packages installed together: the command that does it, and who needs them."""

    remedy: str
    needed_by: str


# package -> what it is for; a test holds the extras to those of pyproject.toml
OPTIONAL = {
    "openslide-python": Package("openslide", "wsi", "slide files"),
    "openslide-bin": Package("openslide_bin", "wsi", "slide files"),
    "tifffile": Package("tifffile", "wsi", "writing the slides of the demo"),
    "imagecodecs": Package("imagecodecs", "wsi", "writing the slides of the demo"),
    "h5py": Package("h5py", "wsi", "tile coordinates, bags"),
    "pillow": Package("PIL", "wsi", "pictures, resampling"),
    "zarr": Package("zarr", "zarr", "zarr bags"),
    "cucim-cu13": Package("cucim", "cucim", "faster slide reading"),
    "transformers": Package("transformers", "train", "ViT and text encoders"),
    "safetensors": Package("safetensors", "train", "model, checkpoint and embedding files"),
    "scikit-learn": Package("sklearn", "train", "the default report embedding, probes"),
    "matplotlib": Package("matplotlib", "train", "curves and heatmaps"),
    "tensorboard": Package("tensorboard", "train", "live curves"),
    "tqdm": Package("tqdm", "train", "progress bars"),
    "pyyaml": Package("yaml", "train", "config files"),
    "huggingface_hub": Package("huggingface_hub", "train", "model folders, the Hub"),
    "wandb": Package("wandb", "loggers", "curves at Weights & Biases"),
    "mlflow": Package("mlflow", "loggers", "curves in MLflow"),
    "lightning": Package("lightning", "lightning", "the Lightning module"),
    "timm": Package("timm", "", "tile encoders of timm"),
}
EXTRAS = {
    "wsi": Extra(
        "pip install 'dre_fast[wsi]'",
        "needed by tile, train, encode, heatmap, codewords, report, cross-validate, mil, mil-deploy, demo",
    ),
    "train": Extra(
        "pip install 'dre_fast[train]'",
        "needed by embed-reports, train, encode, evaluate, heatmap, codewords, report, export, cross-validate, "
        "compare, probe, mil, mil-deploy, demo",
    ),
    "zarr": Extra("pip install 'dre_fast[zarr]'", "needed by no command but for bags kept in zarr"),
    "cucim": Extra("pip install 'dre_fast[cucim]' (2.3 GB)", "needed by no command: reads slides faster"),
    "loggers": Extra("pip install 'dre_fast[loggers]'", "needed by run.loggers=[wandb] and [mlflow] alone"),
    "lightning": Extra(
        "pip install 'dre_fast[lightning]'", "needed by dre_fast.integrations.lightning alone"
    ),
    "timm": Extra(
        "pip install timm torchvision (matching your torch)", "needed by model.encoder=timm:NAME alone"
    ),
}
# What a user sets that changes what runs.
VARIABLES = ("DRE_FAST_", "TRITON_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_")


@dataclass(frozen=True)
class Line:
    """One line of the report: ``name``, ``value`` and, when something is missing, ``remedy``."""

    name: str
    value: str
    remedy: str = ""


def remedy_of(module: str) -> str:
    """The pip command that brings an optional module, or "" where it is none of ours.

    Args:
        module: its name, as in an ImportError: ``"yaml"``, ``"sklearn.linear_model"``.
    """
    top = module.partition(".")[0]
    for package, about in OPTIONAL.items():
        if about.module == top:
            return as_installed(EXTRAS[about.extra or package].remedy)
    return ""


def collect() -> dict[str, list[Line]]:
    """Sections of lines: "versions", "devices", "build", "backends", "extras", "packages", "environment"."""
    from dre_fast import ops

    reference = Line("reference", "plain torch: dre_fast.reference")
    return {
        "versions": _versions(),
        "devices": _devices(),
        "build": _build(),
        "backends": [*(Line(name, runs) for name, runs in ops.backends().items()), reference],
        "extras": [_extra(name, about) for name, about in EXTRAS.items()],
        "packages": [_package(name, about) for name, about in OPTIONAL.items()],
        "environment": [
            Line(name, value) for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        ],
    }


def _version(package: str) -> str:
    """The installed version of a package, "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    """The version of the NVIDIA kernel driver, "" where there is none (or not on Linux)."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\s(\d+\.\d+[.\d]*)\s", path.read_text()) if path.is_file() else None
    return found[1] if found else ""


def _versions() -> list[Line]:
    import torch

    from dre_fast import __version__

    triton = _version("triton") or _version("triton-windows")
    no_triton = "" if triton else "GPU kernels need it: pip install triton (Linux)"
    return [
        Line("dre_fast", __version__),
        Line("python", platform.python_version()),
        Line("torch", torch.__version__),
        Line("triton", triton or "missing", no_triton),
        Line("CUDA of torch", torch.version.cuda or "not in this build of torch"),
        Line("NVIDIA driver", _driver() or "none found"),
        Line("numpy", _version("numpy")),
        Line("einops", _version("einops")),
        Line("platform", platform.platform()),
    ]


def _devices() -> list[Line]:
    import torch

    devices = [
        Line("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        devices.append(
            Line(f"cuda:{i}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}")
        )
    if len(devices) > 1:
        return devices
    why = "everything runs on the CPU; GPU kernels need an NVIDIA GPU"
    if _driver() and torch.version.cuda is None:
        why = "a driver is here, but this torch is built without CUDA: install a CUDA build of torch"
    elif _driver():
        why = f"torch sees no GPU: its CUDA {torch.version.cuda} may want a newer driver than {_driver()}"
    return [*devices, Line("cuda", "none", why)]


def _build() -> list[Line]:
    from dre_fast.ops import native

    facts = native.build_info()
    lines = [
        Line(name, "missing" if native.why_not(part) else "built", native.why_not(part))
        for name, part in (("C++ ops", "ops"), ("banks in a file", "host"), ("CUDA ops", "cuda"))
    ]
    if facts["built"]:
        compiler = " ".join(filter(None, (facts.get("compiler"), facts.get("compiler_version"))))
        lines += [
            Line("torch at build", f"{facts['torch']} (the ops load in every torch >= 2.10)"),
            Line("compiler", compiler),
            Line("flags", facts.get("flags", "unknown")),
            Line("CUDA architectures", ", ".join(f"sm_{arch}" for arch in facts["cuda_archs"]) or "none"),
        ]
    if native.available():
        lines.append(Line("CPU instructions", f"{native.cpu_level()} (DRE_FAST_CPU lowers it)"))
    return [*lines, Line("folder", str(Path(__file__).parent))]


def _extra(name: str, about: Extra) -> Line:
    packages = [package for package, it in OPTIONAL.items() if (it.extra or package) == name]
    missing = [package for package in packages if not _version(package)]
    if not missing:
        return Line(name, "complete" if len(packages) > 1 else "installed")
    what = "missing" if len(missing) == len(packages) else f"lacks {', '.join(missing)}"
    return Line(name, what, f"{about.needed_by}: {as_installed(about.remedy)}")


def _package(name: str, about: Package) -> Line:
    where = f", in [{about.extra}]" if about.extra else ""
    version = _version(name)
    return Line(name, version or "missing", "" if version else f"for {about.purpose}{where}")


def render(sections: dict[str, list[Line]]) -> str:
    """Plain text for a terminal; sections without a line are left out."""
    lines = []
    for title, rows in sections.items():
        if not rows:
            continue
        lines.append(title)
        width = max(len(row.name) for row in rows)
        for row in rows:
            remedy = f"   <- {row.remedy}" if row.remedy else ""
            lines.append(f"  {row.name:<{width}}  {row.value}{remedy}")
        lines.append("")
    return "\n".join(lines).rstrip()
