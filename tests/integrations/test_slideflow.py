"""The call sequence of slideflow's MIL models, and their registration."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mil_bags import CLASSES, DIM, LENGTHS, fitted, padded, plain_logits, some_bags
from torch import nn

from dre_fast.integrations.build import save_codebook
from dre_fast.integrations.slideflow import ResidualSlideflow, register


def adapted() -> ResidualSlideflow:
    return ResidualSlideflow(DIM, CLASSES, model=fitted()).eval()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_logits_are_those_of_the_plain_model(dtype: torch.dtype) -> None:
    model, (x, _) = adapted(), padded(some_bags(), 0.0)
    assert ResidualSlideflow.use_lens
    torch.testing.assert_close(model(x, torch.tensor(LENGTHS, dtype=dtype)), plain_logits(model.mil))


def test_built_trained_and_validated() -> None:
    model = ResidualSlideflow(DIM, 2, codewords=5, width=32, dropout=0.1)
    model.mil.fit_codebook(some_bags())
    model.relocate()
    device = next(model.parameters()).device
    x, _ = padded(some_bags(), 0.0)
    x, lens, label = (
        x.to(device),
        torch.tensor(LENGTHS, device=device),
        torch.tensor([0, 1, 1, 0, 1], device=device),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(x, lens), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.inference_mode():  # one bag at a time
        for bag in some_bags():
            scores, attention = model(
                bag[None].to(device), torch.tensor([len(bag)], device=device), return_attention=True
            )
            assert scores.shape == (1, 2)
            assert attention.shape == (1, len(bag), 1)


def test_attention() -> None:
    model, (x, mask) = adapted(), padded(some_bags(), 0.0)
    lens = torch.tensor(LENGTHS)
    scores = model.calculate_attention(x, lens)
    assert torch.equal(scores[..., 0], model.mil.contributions(x, mask=mask))
    assert torch.equal(model(x, lens, return_attention=True)[1], scores)
    weights = model.calculate_attention(x, lens, apply_softmax=True)[..., 0]
    torch.testing.assert_close(weights.sum(1), (lens > 0).float())
    assert not weights[~mask].any()
    assert torch.equal(weights[0, :30].argsort(), scores[0, :30, 0].argsort())


def test_registration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models: dict[str, Callable[[], type]] = {}

    def register_model(tag: str) -> Callable[[Callable[[], type]], Callable[[], type]]:
        def decorator(function: Callable[[], type]) -> Callable[[], type]:
            models[tag] = function
            return function

        return decorator

    host, mil = ModuleType("slideflow"), ModuleType("slideflow.mil")
    mil.register_model = register_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slideflow", host)
    monkeypatch.setitem(sys.modules, "slideflow.mil", mil)
    register()
    assert isinstance(models["residual_mil"]()(DIM, 2, codewords=3), ResidualSlideflow)
    # slideflow builds by the two sizes alone, so the codebook is named here
    source = fitted()
    save_codebook(source, tmp_path / "codebook.safetensors")
    register("with_codebook", codewords=5, codebook=tmp_path / "codebook.safetensors")
    cls = models["with_codebook"]()
    assert (cls.__name__, cls.use_lens) == ("ResidualSlideflow", True)
    model, bag = cls(DIM, 2), some_bags()[0]
    assert torch.equal(model.mil.sums(bag), source.sums(bag))
    again = models["with_codebook"]()(DIM, 2)
    again.load_state_dict(model.state_dict())
    assert model(bag[None], torch.tensor([30])).shape == (1, 2)


@pytest.mark.skipif(importlib.util.find_spec("slideflow") is not None, reason="slideflow is installed")
def test_registration_without_slideflow() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install slideflow"):
        register()
