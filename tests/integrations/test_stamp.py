"""The call sequence of STAMP: training on filled-up bags, prediction, and its two ways of drawing a heatmap."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from mil_bags import ASSIGNMENTS, CLASSES, CODEWORDS, DIM, fitted, padded, plain_logits, some_bags
from torch import nn

from dre_fast.integrations.build import save_codebook
from dre_fast.integrations.stamp import ResidualSTAMP


def adapted(assignment: str = "hard") -> ResidualSTAMP:
    return ResidualSTAMP(DIM, CLASSES, model=fitted(assignment)).eval()


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_logits_are_those_of_the_plain_model(assignment: str) -> None:
    model = adapted(assignment)
    expected = plain_logits(model.mil)
    x, valid = padded(some_bags())
    coords = torch.zeros(*x.shape[:2], 2)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        torch.testing.assert_close(model(x, coords=coords, mask=(~valid).to(dtype)), expected)
    # as STAMP's own loop: zeros where a bag is short, and no mask
    x, _ = padded(some_bags(), 0.0)
    torch.testing.assert_close(model(x, coords=coords, mask=None), expected)
    torch.testing.assert_close(model(x), expected)
    alone = [
        model(bag[None], coords=torch.zeros(1, len(bag), 2), mask=None) for bag in some_bags()
    ]  # prediction
    torch.testing.assert_close(torch.cat(alone), expected)


def test_built_from_hyperparameters_and_trained(tmp_path: Path) -> None:
    save_codebook(fitted(), tmp_path / "codebook.safetensors")
    known = inspect.signature(ResidualSTAMP.__init__).parameters
    settings = {
        "codebook": str(tmp_path / "codebook.safetensors"),
        "codewords": CODEWORDS,
        "dropout": 0.1,
        "total_steps": 10,
        "max_lr": 1e-4,
    }
    model = ResidualSTAMP(dim_input=DIM, dim_output=2, **{k: v for k, v in settings.items() if k in known})  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    bags, _ = padded(some_bags(), 0.0)
    targets = nn.functional.one_hot(torch.tensor([0, 1, 1, 0, 1]), 2)
    losses = []
    for _ in range(5):
        logits = model(bags, coords=torch.zeros(*bags.shape[:2], 2), mask=None)
        loss = nn.functional.cross_entropy(logits, targets.type_as(logits), weight=torch.ones(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("assignment", ["hard", "soft"])
def test_heatmap(assignment: str) -> None:
    model, feats = adapted(assignment), some_bags()[0]
    coords = torch.rand(len(feats), 2)
    jacobian = torch.func.jacrev(
        lambda bags: (
            model.forward(bags=bags.unsqueeze(0), coords=coords.unsqueeze(0), mask=None).softmax(1).squeeze(0)
        )
    )(feats)
    gradcam = (feats * jacobian).mean(-1).abs().permute(-1, -2)
    assert gradcam.shape == (len(feats), CLASSES)
    assert torch.isfinite(gradcam).all()
    assert gradcam.max() > 0
    single = torch.softmax(
        model.forward(
            bags=feats.unsqueeze(-2),
            coords=coords.unsqueeze(-2),
            mask=torch.zeros(len(feats), 1, dtype=torch.bool),
        ),
        dim=1,
    )
    torch.testing.assert_close(single, torch.cat([model.mil(tile[None]) for tile in feats]).softmax(1))


def test_contributions() -> None:
    model = adapted()
    x, valid = padded(some_bags())
    expected = model.mil.contributions(x, 1, mask=valid)
    assert torch.equal(model.contributions(x, 1, mask=~valid), expected)
    zeros, _ = padded(some_bags(), 0.0)
    assert torch.equal(model.contributions(zeros, 1), expected)
