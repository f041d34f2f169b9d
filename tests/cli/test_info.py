"""dre-fast info: what it lists, what it says is missing, and that its lists fit the package."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dre_fast import info
from dre_fast.cli import COMMANDS, main
from dre_fast.data.optional import need
from dre_fast.ops import native

ROOT = Path(__file__).parents[2]
SECTIONS = ["versions", "devices", "build", "backends", "extras", "packages", "environment"]


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Lets these packages look as if they were not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for package in packages:
        if package in info.OPTIONAL:
            module = info.OPTIONAL[package].module
            for name in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
                monkeypatch.delitem(sys.modules, name)
            monkeypatch.setitem(sys.modules, module, None)  # importing it raises ModuleNotFoundError


def extra(name: str) -> list[str]:
    return [package for package, about in info.OPTIONAL.items() if about.extra == name]


def line(section: str, name: str) -> info.Line:
    return next(found for found in info.collect()[section] if found.name == name)


def test_plain_and_json_agree(capsys, monkeypatch):
    monkeypatch.setenv("DRE_FAST_CPU", "avx2")
    assert main(["info"]) == 0
    plain = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == SECTIONS
    for title, rows in listed.items():
        assert f"{title}\n" in plain
        for row in rows:
            assert set(row) == {"name", "value", "remedy"}
            assert row["value"]
            assert re.search(rf"^  {re.escape(row['name'])} +{re.escape(row['value'])}", plain, re.MULTILINE)
    versions = {row["name"]: row["value"] for row in listed["versions"]}
    assert versions["torch"] == torch.__version__
    assert {"dre_fast", "python", "triton", "CUDA of torch", "NVIDIA driver", "platform"} <= set(versions)
    assert {"name": "DRE_FAST_CPU", "value": "avx2", "remedy": ""} in listed["environment"]


def test_nothing_but_the_core(monkeypatch, capsys):
    hide(monkeypatch, "triton", "triton-windows", *info.OPTIONAL)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name, about in info.EXTRAS.items():
        found = line("extras", name)
        assert found.value == "missing"
        assert about.remedy in found.remedy
        assert about.needed_by in found.remedy
    assert line("versions", "triton").value == "missing"
    assert "in [wsi]" in line("packages", "h5py").remedy
    assert "h5py" in out


def test_an_extra_in_part(monkeypatch):
    hide(monkeypatch, "h5py")
    assert line("extras", "wsi").value == "lacks h5py"
    assert line("extras", "train").value == "complete"


@pytest.mark.skipif(not native.available(), reason="needs the C++ ops")
def test_how_the_ops_were_built():
    assert line("build", "C++ ops").value == "built"
    assert line("build", "torch at build").value.startswith("2.")
    assert line("build", "CPU instructions").value.startswith(native.cpu_level())
    for found in info.collect()["build"]:
        assert (found.value == "missing") == bool(found.remedy)


def test_a_pure_python_build_says_so(monkeypatch):
    reason = "left out of a pure-Python build"
    monkeypatch.setattr(native, "why_not", lambda part="ops": reason)
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "build_info", lambda: {"built": [], "cuda_archs": []})
    for name in ("C++ ops", "banks in a file", "CUDA ops"):
        assert line("build", name) == info.Line(name, "missing", reason)
    assert "compiler" not in [found.name for found in info.collect()["build"]]


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [
        ("", None, "GPU kernels need an NVIDIA GPU"),
        ("580.65.06", None, "install a CUDA build of torch"),
        ("450.80", "13.0", "CUDA 13.0 may want a newer driver than 450.80"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, driver, cuda, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(info, "_driver", lambda: driver)
    assert said in line("devices", "cuda").remedy


def test_the_extras_are_those_of_pyproject():
    """By the lines of pyproject.toml: tomllib is not in Python 3.10."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = {
        name: re.findall(r'"([A-Za-z0-9_-]+)[><=]', inside)
        for name, inside in re.findall(r"^(\w+) = \[(.*?)\]$", block, re.DOTALL | re.MULTILINE)
    }
    for name in ("wsi", "zarr", "cucim", "train", "loggers", "lightning"):
        assert sorted(extras[name]) == sorted(extra(name))
    assert set(info.EXTRAS) == {"wsi", "zarr", "cucim", "train", "loggers", "lightning", "timm"}


def test_every_command_is_accounted_for():
    said = " ".join(about.needed_by for about in info.EXTRAS.values())
    for command in COMMANDS:
        assert (command.replace("_", "-") in said) == (command != "info")


def test_a_missing_package_is_named_with_its_command(monkeypatch, capsys, tmp_path):
    """Also where the code imports it without more ado."""
    hide(monkeypatch, *extra("train"))
    for wrong in (["train", "--print-config"], ["compare", str(tmp_path), "--out", str(tmp_path / "c")]):
        code = main(wrong)
        said = capsys.readouterr().err
        assert code == 2
        assert said.count("\n") == 1
        if wrong[0] == "train":
            assert (
                said == "error: import of yaml halted; None in sys.modules: pip install 'dre_fast[train]'\n"
            )


def test_remedies():
    assert info.remedy_of("sklearn.linear_model") == "pip install 'dre_fast[train]'"
    assert info.remedy_of("timm") == info.EXTRAS["timm"].remedy
    assert info.remedy_of("somebody_elses") == ""


def test_tiling_needs_no_train_extra(monkeypatch, tmp_path, capsys):
    hide(monkeypatch, *extra("train"))
    np.save(tmp_path / "s.npy", np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8))
    (tmp_path / "cohort.csv").write_text("slide_id,path\nS,s.npy\n")
    arguments = ["tile", str(tmp_path / "cohort.csv"), "--out", str(tmp_path / "t"), "--mpp", "0.5"]
    assert main([*arguments, "--tissue", "none"]) == 0, capsys.readouterr().err


def test_embedding_reports_needs_no_wsi_extra(monkeypatch, tmp_path, capsys):
    hide(monkeypatch, *extra("wsi"))
    (tmp_path / "cohort.csv").write_text(
        "slide_id,case_id,path,report\nA,P,a,keratin pearls seen\nB,Q,b,acinar pattern seen\n"
    )
    arguments = ["embed-reports", str(tmp_path / "cohort.csv"), "--out", str(tmp_path / "r.safetensors")]
    assert main(arguments) == 0, capsys.readouterr().err


def test_sources_that_are_not_installed_have_no_name(monkeypatch):
    hide(monkeypatch, "dre_fast", "zarr")
    root = Path(info.__file__).parents[1]
    assert line("extras", "zarr").remedy.endswith(f": pip install '.[zarr]' in {root}")
    assert info.remedy_of("zarr") == f"pip install '.[zarr]' in {root}"
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[zarr\]' in "):
        need("zarr", "zarr")
