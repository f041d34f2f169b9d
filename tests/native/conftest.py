"""For the tests of building: a checkout without what was built in place, and the build backend's hooks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "native_build", "dre_fast")
FILES = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "constraints.txt"),
)


@pytest.fixture(scope="session")
def copy_checkout() -> Callable[[Path], Path]:
    """Copies what the source distribution holds to a folder that does not exist yet, and returns it."""

    def copy(to: Path) -> Path:
        skip = shutil.ignore_patterns("*.so", "__pycache__", "_build_status.json")
        for name in FOLDERS:
            shutil.copytree(ROOT / name, to / name, ignore=skip)
        for name in FILES:
            shutil.copy(ROOT / name, to)
        return to

    return copy


@pytest.fixture
def checkout(copy_checkout: Callable[[Path], Path], tmp_path: Path) -> Path:
    """Such a copy for one test."""
    return copy_checkout(tmp_path / "checkout")


Build = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def build() -> Build:
    """Calls a hook of the build backend (``build_wheel`` ...) as pip does; results go to checkout/out."""

    def call(checkout: Path, hook: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (checkout / "out").mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", f"import setuptools.build_meta as b; print(b.{hook}('out'))"],
            cwd=checkout,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )

    return call
