"""Codebook files, which adapters take from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mil_bags import ASSIGNMENTS, CLASSES, CODEWORDS, DIM, fitted, some_bags

from dre_fast import ResidualMIL
from dre_fast.integrations.build import build_model, load_codebook, need_host, save_codebook


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_new_model_with_the_codebook_of_a_file(assignment: str, tmp_path: Path) -> None:
    model = fitted(assignment)
    save_codebook(model, tmp_path / "codebook.safetensors")
    other = build_model(
        DIM, 2, None, tmp_path / "codebook.safetensors", codewords=CODEWORDS, assignment=assignment, width=16
    )
    assert (other.classes, other.width, other.fitted) == (2, 16, True)
    assert torch.equal(other.sums(some_bags()[0]), model.sums(some_bags()[0]))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "codebook.safetensors"
    with pytest.raises(ValueError, match="not fitted"):
        save_codebook(ResidualMIL(DIM, 2), path)
    assert not list(tmp_path.iterdir())
    save_codebook(fitted(), path)
    for options in ({"codewords": 7}, {"codewords": CODEWORDS, "assignment": "soft"}):
        with pytest.raises(ValueError, match=r"codebook\.safetensors: .* the model needs"):
            load_codebook(ResidualMIL(DIM, 2, **options), path)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        load_codebook(ResidualMIL(DIM, 2), tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="dim=12 and classes=3, the host asks for 12 and 2"):
        build_model(DIM, CLASSES - 1, fitted(), None)


def test_a_missing_host_is_named(monkeypatch: Any) -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install no_such_host"):
        need_host("no_such_host.models", "no_such_host")
