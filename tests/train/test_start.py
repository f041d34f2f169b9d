"""model.init: what a run takes over from a trained model, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_cohort import tiny_config

from dre_fast.train.config import ConfigError
from dre_fast.train.loop import Trainer
from dre_fast.train.state import load_model

ALONE = ("loss.contrastive=null", "data.reports=null", "optim.epochs=1")


@pytest.fixture(scope="module")
def trained(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start") / "run"
    return Trainer(tiny_config(tiny_cohort, *ALONE, "optim.lr=0.01"), out).fit()


def test_all_that_fits_is_taken_and_said(trained: Path, tiny_cohort: Path, tmp_path: Path, capsys):
    state, _ = load_model(trained / "best.safetensors")
    config = tiny_config(
        tiny_cohort,
        *("data.reports=null", "loss.contrastive=null", f"model.init={trained}"),
        # the same task kind; another of the same name and size but with its classes turned; a new one
        "loss.tasks=[{name: kind, classes: [stripes, dots]}, {name: EGFR, kind: binary}, "
        "{name: other, kind: binary, columns: [EGFR]}]",
    )
    trainer = Trainer(config, tmp_path / "run")
    said = capsys.readouterr().err
    own = trainer.model.state_dict()
    for key, value in state.items():
        if not key.startswith(("bank.", "heads.kind")):
            assert torch.equal(own[key], value), key
    assert state["heads.kind.weight"].shape == own["heads.kind.weight"].shape
    assert not torch.equal(state["heads.kind.weight"], own["heads.kind.weight"])
    assert str(trained / "best.safetensors") in said
    assert "heads 2 of 6" in said
    assert "anew: head kind, head other, codebook" in said
    trainer.fit()
    assert not torch.equal(state["bank.codebook"], trainer.model.codebook)


def test_what_has_another_shape_starts_anew(trained: Path, tiny_cohort: Path, tmp_path: Path, capsys):
    init = f"model.init={trained / 'best.safetensors'}"
    wider = tiny_config(tiny_cohort, *ALONE, init, "model.width=32", "loss.tasks=[{name: kind}]")
    trainer = Trainer(wider, tmp_path / "run")
    said = capsys.readouterr().err
    state, _ = load_model(trained / "best.safetensors")
    for name, value in trainer.model.tile_encoder.state_dict().items():
        assert torch.equal(value, state[f"tile_encoder.{name}"]), name
    assert "head kind" in said.partition("anew: ")[2]
    assert "slide_encoder" in said.partition("anew: ")[2]


def test_a_resumed_run_does_not_need_it_again(tiny_cohort: Path, trained: Path, tmp_path: Path):
    copy = tmp_path / "start.safetensors"
    copy.write_bytes((trained / "best.safetensors").read_bytes())
    config = tiny_config(tiny_cohort, *ALONE, f"model.init={copy}")
    once = Trainer(config, tmp_path / "run")
    once.fit()
    copy.unlink()
    again = Trainer(config, tmp_path / "run", resume=True)
    again.fit()
    for key, value in once.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key


def test_faults_are_named(tiny_cohort: Path, trained: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="gone"):
        Trainer(tiny_config(tiny_cohort, *ALONE, f"model.init={tmp_path / 'gone'}"), tmp_path / "run")
    with pytest.raises(ConfigError, match="encoder_weights=null"):
        tiny_config(tiny_cohort, *ALONE, f"model.init={trained}", "model.encoder_weights=x").validate()
    assert not (tmp_path / "run" / "config.yaml").exists()
