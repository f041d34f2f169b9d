"""The examples run as their docstrings say, on small sizes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _threads() -> Any:
    """Training sets the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> Any:
    script = FOLDER / f"{name}.py"
    monkeypatch.setattr("sys.argv", [str(script), "--small", *map(str, arguments)])
    return runpy.run_path(str(script), run_name="example")["main"]()


def test_clam_style_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, "clam_style_loop", "--out", tmp_path) > 0.8
    with h5py.File(tmp_path / "blockmap.h5") as file:
        assert file["attention_scores"].shape == (len(file["coords"]), 1)
    assert torch.load(tmp_path / "s_0_checkpoint.pt", weights_only=True)


def test_end_to_end_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, "end_to_end_folder", "--out", tmp_path)
    assert (tmp_path / "run" / "best.safetensors").is_file()
    assert "| auc" in (tmp_path / "results" / "metrics.md").read_text().lower()
    assert len(list((tmp_path / "maps").glob("*.png"))) == 2


def test_netvlad_place_recognition(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(monkeypatch, "netvlad_place_recognition")
    assert found["NetVLAD, trained"] > found["mean"]
    assert found["VLAD"] > found["mean"]


def test_kmeans_million_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, "kmeans_million_rows", "--out", tmp_path) > 0.8
    assert not list(tmp_path.iterdir())


def test_every_example_is_tested_and_says_how_to_run_it() -> None:
    scripts = {path.stem: path.read_text() for path in FOLDER.glob("*.py")}
    assert {f"test_{name}" for name in scripts} <= set(globals())
    for name, text in scripts.items():
        assert re.search(rf"^    python examples/{name}\.py", text, re.MULTILINE)
