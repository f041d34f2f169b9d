"""The call sequence of TransMIL's Lightning interface."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mil_bags import CODEWORDS, DIM, fitted, plain_logits, some_bags
from torch import nn

from dre_fast.integrations.build import save_codebook
from dre_fast.integrations.transmil import ResidualTransMIL


def test_logits_are_those_of_the_plain_model() -> None:
    mil = fitted()
    model = ResidualTransMIL(3, DIM, model=mil).eval()
    expected = plain_logits(mil)
    for number, bag in enumerate(some_bags()):
        found = model(data=bag[None], label=torch.tensor([0]))
        torch.testing.assert_close(found["logits"], expected[number : number + 1])
        torch.testing.assert_close(found["Y_prob"], expected[number : number + 1].softmax(1))
        assert found["Y_hat"].item() == expected[number].argmax()


def test_built_from_a_configuration_and_trained(tmp_path: Path) -> None:
    save_codebook(fitted(), tmp_path / "codebook.safetensors")

    class ResidualModel(ResidualTransMIL):  # the lines of the page
        def __init__(self, n_classes):  # type: ignore[no-untyped-def]
            super().__init__(n_classes, DIM, CODEWORDS, codebook=tmp_path / "codebook.safetensors")

    # the host matches the names of the constructor with its configuration, and takes no annotations
    names: Any = inspect.getfullargspec(ResidualModel.__init__)
    assert not names.kwonlyargs
    assert not names.annotations
    configured = SimpleNamespace(name="ResidualModel", n_classes=2)
    model = ResidualModel(**{name: getattr(configured, name) for name in names.args[1:]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    label = torch.tensor([1])
    losses = []
    for _ in range(3):
        results = model(data=some_bags()[0][None], label=label)
        loss = nn.functional.cross_entropy(results["logits"], label)
        assert int(results["Y_hat"]) in (0, 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    model.eval()
    with torch.no_grad():
        outputs = [model(data=bag[None], label=label) for bag in some_bags()]
    probabilities = torch.cat([out["Y_prob"] for out in outputs])
    assert probabilities.shape == (5, 2)
    assert (
        torch.stack([out["Y_hat"] for out in outputs]).squeeze().tolist() == probabilities.argmax(1).tolist()
    )
