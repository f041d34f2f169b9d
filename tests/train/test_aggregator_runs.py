"""Every aggregator in the training loop, in every memory mode; what exact gradients are with them; applying them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_odd_cohorts import shrink
from train_cohort import assert_resumes, tiny_config, write_cohort

from dre_fast import DRESLCL, MemoryBank
from dre_fast.cli import main
from dre_fast.nn.aggregators import AGGREGATORS, SoftResiduals
from dre_fast.nn.tile_encoders import build_tile_encoder
from dre_fast.train.config import ConfigError
from dre_fast.train.exact import ExactBatch
from dre_fast.train.loop import Trainer
from dre_fast.train.state import read_metrics


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort with a slide of one tile and one of three."""
    root = tmp_path_factory.mktemp("ragged")
    write_cohort(root)
    shrink(root, 1, 1)
    shrink(root, 4, 3)
    return root


def steps(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "step"]


@pytest.mark.parametrize("mode", ["full", "sampled", "none", "exact"])
@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_every_aggregator_trains_in_every_mode(ragged: Path, tmp_path: Path, name: str, mode: str) -> None:
    config = tiny_config(
        ragged,
        f"model.aggregator={name}",
        f"memory.mode={mode}",
        "memory.retrieved=6",
        "memory.drift_tiles=8",
        "memory.dtype=float32",
        "data.augment=false",
        "optim.epochs=2",
        f"run.probe_every={0 if mode == 'exact' else 4}",
    )
    trainer = Trainer(config, tmp_path / "run")
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.fit()
    assert all(math.isfinite(row["loss"]) for row in steps(tmp_path / "run"))
    still = [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])]
    assert not still
    fidelity = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "fidelity"]
    assert len(fidelity) == (0 if mode == "exact" else 1)
    assert all(-1 <= row["embedding"] <= 1.0001 for row in fidelity)
    if mode == "full":  # one step after the fill, no row is far from what it would be now
        assert fidelity[0]["embedding"] > 0.9


@pytest.mark.parametrize("name", ["soft", "abmil"])
def test_a_run_resumes_as_it_was(tiny_cohort: Path, tmp_path: Path, name: str) -> None:
    config = tiny_config(tiny_cohort, f"model.aggregator={name}", "memory.mode=sampled", "memory.retrieved=6")
    assert_resumes(config, tmp_path, step=4)


def test_learnable_codewords_start_from_the_bank_and_move(tiny_cohort: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tiny_cohort, "model.aggregator=soft"), tmp_path / "run")
    soft = trainer.model.slide_encoder
    assert isinstance(soft, SoftResiduals)
    fitted, fit = [], trainer._fit_codebook

    def recorded(*, warm: bool) -> None:
        fit(warm=warm)
        fitted.append((trainer.model.bank.codebook.clone(), soft.encoding.codebook.detach().clone()))

    trainer._fit_codebook = recorded  # type: ignore[method-assign]
    trainer.fit()
    assert fitted[0][0].equal(fitted[0][1])
    assert all(not bank.equal(own) for bank, own in fitted[1:])  # a refit of the bank's codebook leaves them
    assert not soft.encoding.codebook.detach().equal(fitted[0][1])
    plain = [g for g in trainer.optimizer.param_groups if not g["encoder"] and g["weight_decay"] == 0]
    assert any(p is soft.encoding.codebook for group in plain for p in group["params"])


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_exact_gradients_are_those_of_all_tiles_at_once(name: str) -> None:
    torch.manual_seed(0)
    images = [torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8) for n in (13, 5)]
    options = {"codewords": 3} if name == "soft" else {}
    encoder = build_tile_encoder("conv-tiny", dim=8, width=4)
    aggregator = AGGREGATORS[name](8, 16, None, heads=4, depth=1, dropout=0.0, **options)
    bank = MemoryBank([], 8, codebook=torch.randn(3, 8))
    model = DRESLCL(encoder, bank, aggregator, tasks={"t": 2}).eval()
    exact = ExactBatch(model, [0, 1], lambda slide, tiles: images[slide][tiles], [13, 5], chunk=4)
    target = torch.tensor([0, 1])
    torch.nn.functional.cross_entropy(exact.forward().logits["t"], target).backward()
    exact.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    features = torch.cat([model.encode_tiles(own) for own in images])
    whole = model.encode_bags(features, torch.tensor([0, 13, 18])).logits["t"]
    torch.nn.functional.cross_entropy(whole, target).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert any(n.startswith("tile_encoder") for n in found)
    for n, grad in expected.items():
        assert grad is not None
        torch.testing.assert_close(found[n], grad, rtol=1e-4, atol=1e-6)


def test_encode_and_heatmap_of_a_trained_aggregator(tiny_cohort: Path, tmp_path: Path) -> None:
    for name in ("abmil", "soft"):
        out = Trainer(
            tiny_config(tiny_cohort, f"model.aggregator={name}", "optim.epochs=1"), tmp_path / name
        ).fit()
        common = [
            str(out),
            "--cohort",
            str(tiny_cohort / "cohort.csv"),
            "--tiles",
            str(tiny_cohort / "tiles"),
        ]
        mpp = ["--mpp", "1.0"]
        assert main(["encode", *common, *mpp, "--out", str(tmp_path / f"{name}.safetensors")]) == 0
        assert main(["heatmap", *common, *mpp, "--slide", "s7", "--out", str(tmp_path / f"{name}-maps")]) == 0
        assert len(list((tmp_path / f"{name}-maps").glob("s7_*.png"))) == 2


def test_names_and_combinations_that_do_not_exist(tiny_cohort: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.aggregator='attention': must be one of residual, mean"):
        tiny_config(tiny_cohort, "model.aggregator=attention").validate()
    with pytest.raises(ConfigError, match=r"memory\.guided .* needs model\.aggregator=residual"):
        tiny_config(tiny_cohort, "model.aggregator=mean", "memory.guided=0.5").validate()
