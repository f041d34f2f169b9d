"""Shared by every test: the Triton interpreter without a GPU, poisoned allocations, seeds, real data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Triton reads this when a kernel is defined (its own library of kernels included), so it comes before any
# import of triton. With a CUDA device the same tests run the compiled kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DATA_VARIABLE = "DRE_FAST_TEST_DATA"
_ALLOCATORS = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:
            if "kernel_device" in getattr(item, "fixturenames", ()):
                item.add_marker("gpu")
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch sees none (benchmarks/gpu.sh runs it)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        out = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or out.device.type == "meta":
            return out
        with torch.no_grad():
            if out.is_floating_point() or out.is_complex():
                out.fill_(float("nan"))
            elif out.dtype != torch.bool:
                out.fill_(torch.iinfo(out.dtype).max)
        return out

    return allocate_poisoned


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is often zero, which hides what was never written: here it is NaN or the largest int."""
    for owner, name in _ALLOCATORS:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real slides and bags, named by the environment variable DRE_FAST_TEST_DATA."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        pytest.skip(f"needs real slides and bags: set {DATA_VARIABLE} to the folder that holds them")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"{DATA_VARIABLE}={folder} is not a folder")
    return path


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """Where the Triton kernels run: on the GPU where there is one, else interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
