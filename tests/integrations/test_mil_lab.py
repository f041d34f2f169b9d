"""The call sequence of MIL-Lab's models."""

from __future__ import annotations

import pytest
import torch
from mil_bags import CLASSES, DIM, fitted, padded, plain_logits, some_bags
from torch import nn

from dre_fast.integrations.mil_lab import ResidualMILLab


def adapted() -> ResidualMILLab:
    return ResidualMILLab(in_dim=DIM, num_classes=CLASSES, model=fitted()).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_logits_are_those_of_the_plain_model(dtype: torch.dtype) -> None:
    model = adapted()
    x, mask = padded(some_bags())
    results, log = model(x, attn_mask=mask.to(dtype))
    torch.testing.assert_close(results["logits"], plain_logits(model.mil))
    assert results["loss"] is None
    assert (log["loss"], log["attention"]) == (-1, None)
    alone = torch.cat([model(bag)[0]["logits"] for bag in some_bags()])
    torch.testing.assert_close(alone, plain_logits(model.mil))


def test_train_step_and_validation() -> None:
    model = ResidualMILLab(in_dim=DIM, embed_dim=32, num_classes=CLASSES, codewords=5, dropout=0.1)
    model.mil.fit_codebook(some_bags())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, mask = padded(some_bags())
    label = torch.tensor([0, 1, 2, 1, 0])
    losses = []
    for _ in range(5):
        results, log = model(x, loss_fn=nn.CrossEntropyLoss(), label=label, attn_mask=mask)
        optimizer.zero_grad()
        results["loss"].backward()
        optimizer.step()
        losses.append(log["loss"])
    assert isinstance(losses[0], float)
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        results, log = model(
            x[:1],
            nn.CrossEntropyLoss(),
            label[:1],
            attn_mask=mask[:1],
            return_attention=True,
            return_slide_feats=True,
        )
    assert log["slide_feats"].shape == (1, 32) == (1, model.embed_dim)
    assert torch.equal(model.forward_head(log["slide_feats"]), results["logits"])


def test_attention() -> None:
    model = adapted()
    x, mask = padded(some_bags())
    scores = model.forward_attention(x, mask)
    assert scores.shape == (len(x), 1, x.shape[1])
    assert torch.equal(scores[:, 0], model.mil.contributions(x, mask=mask))
    tiles, again = model.forward_attention(x, mask, attn_only=False)
    assert tiles is x
    assert torch.equal(scores, again)
    features, log = model.forward_features(x, mask, return_attention=True)
    assert torch.equal(log["attention"], scores)
    assert torch.equal(model.forward_head(features), model(x, attn_mask=mask)[0]["logits"])


def test_initialize_classifier() -> None:
    model, bag = adapted(), some_bags()[0]
    before = model(bag)[0]["logits"]
    model.initialize_classifier()
    assert not torch.equal(model(bag)[0]["logits"], before)
    model.initialize_classifier(7)
    assert model(bag)[0]["logits"].shape == (1, 7)
    assert model.num_classes == 7
