"""What is installed, what runs where, what is missing and how to get it."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from dataclasses import dataclass

# package -> (what it is for, how to get it)
OPTIONAL = {
    "triton": ("GPU kernels", "pip install triton"),
    "openslide-python": ("slide files", "pip install 'dre_fast[wsi]'"),
    "openslide-bin": ("slide files", "pip install 'dre_fast[wsi]'"),
    "tifffile": ("slide files", "pip install 'dre_fast[wsi]'"),
    "h5py": ("tile coordinates, bags", "pip install 'dre_fast[wsi]'"),
    "zarr": ("zarr bags", "pip install 'dre_fast[zarr]'"),
    "cucim-cu13": ("fast slide reading", "pip install 'dre_fast[cucim]' (2.3 GB)"),
    "transformers": ("ViT and text encoders", "pip install 'dre_fast[train]'"),
    "safetensors": ("model files", "pip install 'dre_fast[train]'"),
    "scikit-learn": ("metrics, default report embedding", "pip install 'dre_fast[train]'"),
    "matplotlib": ("curves and heatmaps", "pip install 'dre_fast[train]'"),
    "tensorboard": ("live curves", "pip install 'dre_fast[train]'"),
    "pyyaml": ("config files", "pip install 'dre_fast[train]'"),
    "tqdm": ("progress bars", "pip install 'dre_fast[train]'"),
    "timm": ("timm tile encoders", "pip install timm torchvision (matching your torch)"),
}


@dataclass(frozen=True)
class Line:
    """One line of the report: ``name``, ``value`` and, when something is missing, ``remedy``."""

    name: str
    value: str
    remedy: str = ""


def collect() -> dict[str, list[Line]]:
    """Sections of lines: versions, devices, backends, packages."""
    import torch

    from dre_fast import __version__, ops
    from dre_fast.ops import native

    cuda = torch.version.cuda or "not in this build of torch"
    devices = [
        Line("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            Line(
                f"cuda:{i}",
                f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB",
            )
        )
    if len(devices) == 1:
        devices.append(Line("cuda", "none", "everything runs on the CPU; GPU kernels need an NVIDIA GPU"))
    return {
        "versions": [
            Line("dre_fast", __version__),
            Line("python", platform.python_version()),
            Line("torch", torch.__version__),
            Line("CUDA of torch", cuda),
            Line("platform", platform.platform()),
        ],
        "devices": devices,
        "backends": [
            *(Line(name, backend) for name, backend in ops.backends().items()),
            Line("C++ ops", "built" if native.available() else "missing", native.why_not()),
            Line("banks in a file", "missing" if native.why_not("host") else "built", native.why_not("host")),
            Line(
                "CUDA ops",
                "built" if native.cuda_available() else "missing",
                ""
                if native.cuda_available()
                else "needs a CUDA build of torch and nvcc: DRE_FAST_CUDA=1 pip install --no-build-isolation .",
            ),
        ],
        "packages": [_package(name, *about) for name, about in OPTIONAL.items()],
    }


def _package(name: str, purpose: str, remedy: str) -> Line:
    try:
        return Line(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Line(name, "missing", f"for {purpose}: {remedy}")


def render(sections: dict[str, list[Line]]) -> str:
    """Plain text for a terminal."""
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        width = max(len(row.name) for row in rows)
        for row in rows:
            remedy = f"   <- {row.remedy}" if row.remedy else ""
            lines.append(f"  {row.name:<{width}}  {row.value}{remedy}")
        lines.append("")
    return "\n".join(lines).rstrip()
