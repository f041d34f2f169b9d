"""setup.py and native_build: what they find, what they say when something is missing, what works without it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dre_fast.ops import native
from native_build import find
from native_build.check_wheel import problems
from native_build.parts import plan

ROOT = Path(__file__).resolve().parents[2]
Build = Callable[..., subprocess.CompletedProcess[str]]
CPU_TORCH = torch.version.cuda is None


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DRE_FAST_NATIVE", "DRE_FAST_CUDA", "DRE_FAST_CUDA_ARCHS", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module: nothing is built on import."""
    spec = importlib.util.spec_from_file_location("dre_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def fake_torch(folder: Path, version: str, cuda: str | None, headers: bool = True) -> Path:
    """A package called torch with a version and, as links, the headers and libraries of the real one."""
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    (package / "version.py").write_text(
        f"from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
    )
    if headers:
        real = Path(torch.__file__).parent
        (package / "include").symlink_to(real / "include")
        (package / "lib").mkdir()
        (package / "lib/libtorch_cpu.so").symlink_to(real / "lib/libtorch_cpu.so")
    return package


def test_no_compiler_is_one_clear_line(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    parts, record = plan()
    assert parts == []
    assert record["built"] == []
    reason = record["why_not"]["ops"]
    assert "CXX=/nonexistent does not exist" in reason
    assert "apt install g++" in reason
    setup_script.RECORD.update(record)
    setup_script.announce()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert reason in said


def test_a_compiler_that_cannot_compile_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: vector: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    reason = plan()[1]["why_not"]["ops"]
    assert "does not compile C++17 (fatal error: vector" in reason


def test_no_torch_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(find, "site_folders", lambda: [])
    parts, record = plan()
    assert parts == []
    assert "pip install 'torch>=2.10'" in record["why_not"]["ops"]
    assert set(record["why_not"]) == {"ops", "cuda", "host"}


def test_demanding_the_ops_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("DRE_FAST_NATIVE", "1")
    with pytest.raises(SystemExit, match="DRE_FAST_NATIVE=1: the C"):
        plan()


def test_native_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRE_FAST_NATIVE", "0")
    parts, record = plan()
    assert parts == []
    assert "DRE_FAST_NATIVE=0" in record["why_not"]["ops"]


@pytest.mark.skipif(not CPU_TORCH, reason="this torch has CUDA: demanding it is no error here")
def test_demanding_cuda_of_a_cpu_torch_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRE_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match=r"DRE_FAST_CUDA=1: torch .* is built without CUDA"):
        plan()


def test_unknown_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRE_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="DRE_FAST_CUDA=yes: must be auto, 0 or 1"):
        plan()


def test_torch_is_found_without_being_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in pip's isolated build: torch is not on sys.path, the prefix is the target environment's."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = find.find_torch()
    assert found.folder.resolve() == Path(torch.__file__).parent.resolve()
    assert found.version == torch.__version__
    assert found.cuda == torch.version.cuda


@pytest.mark.parametrize(
    ("version", "headers", "message"),
    [("2.9.1+cpu", True, "torch 2.9.1.cpu is older than 2.10"), ("2.12.0", False, "has no C.. headers")],
)
def test_torch_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: str,
    headers: bool,
    message: str,
) -> None:
    fake_torch(tmp_path, version, None, headers)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(find, "site_folders", lambda: [tmp_path])
    with pytest.raises(find.Missing, match=message):
        find.find_torch()


def test_cuda_torch_without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_torch(tmp_path, "2.11.0+cu130", "13.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(find, "site_folders", lambda: [tmp_path])
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "nvcc" else real(name))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    parts, record = plan()
    assert "_ops" in [p.name for p in parts]
    assert "nvcc is not in CUDA_HOME=" in record["why_not"]["cuda"]
    monkeypatch.setenv("DRE_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="DRE_FAST_CUDA=1: nvcc is not in"):
        plan()


def test_what_was_built_here_is_on_record() -> None:
    assert native.build_info()["built"], "the tests run on an installation made from this checkout"
    for part, library in (("ops", "_ops"), ("cuda", "_ops_cuda"), ("host", "_host")):
        assert bool(native.why_not(part)) == (library not in native.build_info()["built"])
    with pytest.raises(ValueError, match="'gpu'"):
        native.why_not("gpu")


@pytest.mark.slow
def test_package_without_compiler_works(checkout: Path, build: Build, tmp_path: Path) -> None:
    """A wheel made without a compiler is pure Python, imports, writes to a bank, and says what is missing."""
    (checkout / "dre_fast/_ops.so").write_bytes(b"left behind by an earlier build in place")
    done = build(checkout, "build_wheel", CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "built without" in line]
    assert len(lines) == 1
    (wheel,) = (checkout / "out").glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(site)
    script = """
import json, torch, dre_fast
from dre_fast.ops import bank, native
write = bank.write
payload, code = torch.zeros(4, 16, dtype=torch.int8), torch.full((4,), -1, dtype=torch.int16)
age, zeros = torch.full((4,), -1, dtype=torch.int32), torch.zeros(4)
write(payload, torch.zeros(4), code, age, zeros, torch.zeros(1, 2, 16, dtype=torch.int64),
      torch.zeros(1, 2, dtype=torch.int64), torch.randn(2, 16), torch.zeros(1, dtype=torch.int64),
      torch.zeros(2, dtype=torch.int64), torch.arange(2), torch.randn(2, 16), 7)
print(json.dumps([dre_fast.__file__, native.available(), native.why_not(), age.tolist()]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    path, available, why_not, age = json.loads(ran.stdout)
    assert path.startswith(str(site))
    assert not available
    assert why_not in lines[0]
    assert age == [7, 7, -1, -1]


@pytest.mark.slow
def test_source_distribution_holds_the_sources(checkout: Path, build: Build) -> None:
    (checkout / "dre_fast/_ops.so").write_bytes(b"built in place")
    done = build(checkout, "build_sdist", CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout / "out").glob("*.tar.gz")
    listed = subprocess.run(["tar", "tzf", archive], capture_output=True, text=True, check=True).stdout
    inside = {line.split("/", 1)[1] for line in listed.splitlines() if "/" in line}
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    wanted |= {
        "native_build/find.py",
        "native_build/parts.py",
        "LICENSE",
        "CHANGELOG.md",
        "dre_fast/py.typed",
    }
    assert wanted <= inside
    assert not [name for name in inside if name.endswith((".so", "_build_status.json"))]
    assert not [name for name in inside if name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.slow
def test_cuda_library_builds_and_links(checkout: Path, build: Build, tmp_path: Path) -> None:
    """With a CUDA torch in sight, DRE_FAST_CUDA=1 builds the CUDA library; no GPU is asked for."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc: there is none on PATH")
    package = fake_torch(tmp_path / "fake", "2.11.0+cu130", "13.0")
    empty = ["g++", "-shared", "-x", "c++", "/dev/null", "-o", str(package / "lib/libtorch_cuda.so")]
    subprocess.run(empty, check=True)
    environment = {"DRE_FAST_CUDA": "1", "DRE_FAST_CUDA_ARCHS": "90", "PYTHONPATH": str(package.parent)}
    done = build(checkout, "build_wheel", **environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {"dre_fast/_ops.so", "dre_fast/_ops_cuda.so"} <= set(archive.namelist())
        record = json.loads(archive.read("dre_fast/_build_status.json"))
        archive.extract("dre_fast/_ops_cuda.so", tmp_path)
    assert problems(wheel) == []
    assert record["cuda_archs"] == ["90"]
    assert record["why_not"] == {}
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", tmp_path / "dre_fast/_ops_cuda.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "aoti_torch_get_current_cuda_stream" in undefined
    again = build(checkout, "build_wheel", **environment)
    assert again.returncode == 0, again.stderr
    assert "compiling" not in again.stdout  # nothing changed, so nothing is compiled twice


def test_a_checkout_without_its_ops_is_no_silent_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_PACKAGE", tmp_path / "dre_fast")
    monkeypatch.setattr(native, "_status", lambda: {"built": [], "why_not": {}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an installed package without ops says so in `dre-fast info`
        assert "not built in" in native._load.__wrapped__("ops")
    (tmp_path / "csrc").mkdir()
    with pytest.warns(RuntimeWarning, match=r"from the checkout .*pip install -e \."):
        assert "not built in" in native._load.__wrapped__("ops")
