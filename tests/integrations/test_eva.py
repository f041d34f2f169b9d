"""eva's use of a network: built by the names of a YAML file, fed with bags that -inf fills up."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
import yaml
from mil_bags import ASSIGNMENTS, CLASSES, CODEWORDS, DIM, fitted, padded, plain_logits, some_bags
from torch import nn

from dre_fast.integrations.build import save_codebook
from dre_fast.integrations.eva import ResidualEva

CONFIGURATION = """
class_path: dre_fast.integrations.eva.ResidualEva
init_args:
  input_size: 12
  output_size: 1
  codewords: 5
  codebook: {codebook}
"""


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_logits_are_those_of_the_plain_model(assignment: str) -> None:
    model = ResidualEva(DIM, CLASSES, model=fitted(assignment)).eval()
    x, valid = padded(some_bags(), -math.inf)
    torch.testing.assert_close(model(x), plain_logits(model.mil))
    assert torch.equal(model.contributions(x, 1), model.mil.contributions(x, 1, mask=valid))
    model.pad_value = -1.0
    x, _ = padded(some_bags(), -1.0)
    torch.testing.assert_close(model(x), plain_logits(model.mil))
    model.pad_value = None
    alone = torch.cat(
        [model(bag[None]) for bag in some_bags()]
    )  # batches of one, one of them without any tile
    torch.testing.assert_close(alone, plain_logits(model.mil))


def test_built_from_yaml_and_trained(tmp_path: Path) -> None:
    save_codebook(fitted(), tmp_path / "codebook.safetensors")
    said = yaml.safe_load(CONFIGURATION.format(codebook=tmp_path / "codebook.safetensors"))
    module, _, name = said["class_path"].rpartition(".")
    model = getattr(importlib.import_module(module), name)(**said["init_args"])
    assert model.mil.codewords == CODEWORDS
    x, _ = padded(some_bags(), -math.inf)
    target = torch.tensor([0.0, 1, 1, 0, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert model.eval()(x).shape == (5, 1)


def test_a_row_that_is_partly_infinite_is_no_padding() -> None:
    model = ResidualEva(DIM, CLASSES, model=fitted())
    x = torch.randn(1, 4, DIM)
    x[0, 2, 0] = -math.inf
    with pytest.raises(ValueError, match="row 2 of bag 0"):
        model(x)
