"""The call sequence of MIL_BASELINE: train loop, validation loop, exports of attention and features."""

from __future__ import annotations

import pytest
import torch
from mil_bags import CLASSES, DIM, fitted, plain_logits, some_bags
from torch import nn

from dre_fast.integrations.mil_baseline import ResidualBaseline


def adapted() -> ResidualBaseline:
    return ResidualBaseline(num_classes=CLASSES, in_dim=DIM, model=fitted()).eval()


def test_logits_are_those_of_the_plain_model() -> None:
    model = adapted()
    for bags in (some_bags(), [bag[None] for bag in some_bags()]):
        with torch.no_grad():
            found = torch.cat([model(bag)["logits"] for bag in bags])
        assert torch.equal(found, plain_logits(model.mil))


def test_train_and_validation_loop() -> None:
    model = ResidualBaseline(num_classes=2, in_dim=DIM, dropout=0.1, codewords=5, width=32)
    model.mil.fit_codebook(some_bags())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    epochs = []
    for _ in range(4):
        losses = []
        for number, bag in enumerate(some_bags()):
            label = torch.tensor([number % 2])
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(bag[None].float())["logits"], label)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        epochs.append(sum(losses))
    assert epochs[-1] < epochs[0]
    model.eval()
    with torch.no_grad():
        for bag in some_bags():
            found = model(bag[None])
            assert set(found) == {"logits"}
            assert torch.softmax(found["logits"].squeeze(0), 0).shape == (2,)


def test_exports() -> None:
    model, bag = adapted(), some_bags()[0]
    with torch.no_grad():
        attention = model(bag[None], return_WSI_attn=True)["WSI_attn"]
        feature = model(bag[None], return_WSI_feature=True)["WSI_feature"]
        empty = model(bag[None, :0], return_WSI_attn=True)["WSI_attn"]
    assert attention.shape == (len(bag), 1)
    assert empty.shape == (0, 1)
    assert torch.equal(attention[:, 0], model.mil.contributions(bag))
    torch.testing.assert_close(feature, model.mil.embed(bag))


def test_several_bags_are_refused() -> None:
    with pytest.raises(ValueError, match="one bag"):
        adapted()(torch.randn(2, 4, DIM))
