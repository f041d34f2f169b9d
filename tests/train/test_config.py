from __future__ import annotations

import dataclasses

import pytest

from dre_fast.train.config import Config, ConfigError, load_config, save_config


def test_yaml_then_overrides_and_round_trip(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "data: {cohort: c.csv, tiles: t}\nloss: {contrastive: null, tasks: [{name: a}]}\noptim: {lr: 1.0e-2}\n"
    )
    config = load_config(file, ["optim.lr=1e-4", "memory.mode=sampled", "memory.grad_scale=2.5"]).validate()
    assert config.optim.lr == 1e-4
    assert config.memory.mode == "sampled"
    assert config.memory.grad_scale == 2.5
    assert config.loss.contrastive is None
    assert config.loss.tasks[0].name == "a"
    save_config(config, tmp_path / "out.yaml")
    assert load_config(tmp_path / "out.yaml") == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean 'lr'"]),
        ("optin.lr=1", ["optin", "optim"]),
        ("optim.epochs=many", ["optim.epochs", "int"]),
        ("optim.epochs=1.5", ["optim.epochs", "int"]),
        ("data.augment=3", ["data.augment", "bool"]),
        ("optim=3", ["optim"]),
        ("optim.lr.deep=3", ["optim.lr"]),
        ("epochs", ["epochs", "section.key=value"]),
        ("loss.tasks=[{nam: a}]", ["loss.tasks[0].nam", "name"]),
        ("optim.lr=[", ["YAML"]),
    ],
)
def test_bad_overrides_name_the_key(override, words):
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("memory", "mode", "ful", "memory.mode"),
        ("loss", "contrastive", "clip", "loss.contrastive"),
        ("optim", "amp", "fp8", "optim.amp"),
        ("model", "codewords", 0, "model.codewords"),
        ("data", "cohort", "", "data.cohort"),
        ("data", "tiles", "", "data.tiles"),
        ("data", "reports", None, "data.reports"),
        ("memory", "grad_scale", "unbias", "memory.grad_scale"),
        ("optim", "lr", 0.0, "optim.lr"),
    ],
)
def test_bad_values_name_the_key(section, key, value, words):
    config = load_config(None, ["data.cohort=c", "data.tiles=t", "data.reports=r"])
    config.validate()
    setattr(getattr(config, section), key, value)
    with pytest.raises(ConfigError, match=words):
        config.validate()


def test_nothing_to_train_on_is_refused():
    config = load_config(None, ["data.cohort=c", "data.tiles=t", "loss.contrastive=null"])
    with pytest.raises(ConfigError, match="nothing to train on"):
        config.validate()


def test_every_default_survives_the_yaml_round_trip(tmp_path):
    save_config(Config(), tmp_path / "c.yaml")
    assert dataclasses.asdict(load_config(tmp_path / "c.yaml")) == dataclasses.asdict(Config())


def test_negatives_of_a_loss_that_is_left_out_are_refused():
    with pytest.raises(ConfigError, match=r"loss\.negatives=all is for loss\.contrastive"):
        load_config(
            None, ["loss.contrastive=null", "loss.negatives=all", "loss.tasks=[{name: a}]", "data.cohort=c"]
        ).validate()
