"""The call sequences of CLAM: training with instance clustering, validation, evaluation of a checkpoint, heatmap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mil_bags import ASSIGNMENTS, CLASSES, DIM, fitted, plain_logits, some_bags
from torch import nn

from dre_fast.integrations.build import save_codebook
from dre_fast.integrations.clam import ResidualMB, ResidualSB


def adapted(cls: type[ResidualSB] = ResidualSB, assignment: str = "hard", **options: Any) -> ResidualSB:
    model = fitted(assignment)
    return cls(n_classes=CLASSES, embed_dim=DIM, k_sample=4, model=model, **options).eval()


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_logits_are_those_of_the_plain_model(assignment: str) -> None:
    model = adapted(assignment=assignment)
    with torch.inference_mode():
        found = torch.cat([model(bag)[0] for bag in some_bags()])
    assert torch.equal(found, plain_logits(model.mil))


@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("cls", [ResidualSB, ResidualMB])
def test_training_with_instance_clustering(cls: type[ResidualSB], subtyping: bool) -> None:
    model = adapted(cls, subtyping=subtyping, instance_loss_fn=nn.CrossEntropyLoss()).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for bag, label in zip(some_bags(), torch.tensor([[0], [1], [2], [0], [1]])):
        logits, Y_prob, Y_hat, _, results = model(bag, label=label, instance_eval=True)
        loss = 0.7 * nn.functional.cross_entropy(logits, label) + 0.3 * results["instance_loss"]
        k = min(4, len(bag) // 2)
        expected = []
        for c in range(CLASSES):
            if c == label:
                expected += [1] * k + [0] * k
            elif subtyping:
                expected += [0] * k
        assert results["inst_labels"].tolist() == expected
        assert isinstance(results["inst_preds"], np.ndarray)
        assert results["inst_preds"].shape == results["inst_labels"].shape
        assert set(np.unique(results["inst_preds"])) <= {0, 1}
        assert results["instance_loss"].item() == 0 if k == 0 else results["instance_loss"].item() > 0
        assert logits.shape == Y_prob.shape == (1, CLASSES)
        torch.testing.assert_close(Y_prob.sum(), torch.tensor(1.0))
        assert Y_hat.shape == (1, 1)
        assert 0 <= int(Y_hat) < CLASSES
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        optimizer.step()


def test_instances_are_the_tiles_that_contribute_most_and_least() -> None:
    model, seen = adapted(), []
    bag, label = some_bags()[4], 2
    scores = model.mil.contributions(bag, label)
    order = scores.argsort(descending=True)
    model.instance_classifiers[label].register_forward_hook(lambda _, given, __: seen.append(given[0]))
    model(bag, label=torch.tensor([label]), instance_eval=True)
    tiles = [*order[:4].tolist(), *order[-4:].tolist()]
    torch.testing.assert_close(seen[0], torch.cat([model.mil.embed(bag[t : t + 1]) for t in tiles]))


def test_instance_loss_trains_the_encoder_of_the_slide() -> None:
    model = adapted().train()
    loss = model(some_bags()[0], label=torch.tensor([1]), instance_eval=True)[4]["instance_loss"]
    loss.backward()
    assert model.mil.head.tokens.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("cls", [ResidualSB, ResidualMB])
def test_validation_records_no_gradient(cls: type[ResidualSB]) -> None:
    model = adapted(cls)
    assert model.k_sample == 4
    with torch.inference_mode():
        for bag in some_bags():
            data = bag.clone()  # an inference tensor, as a loader's moved to a device here
            logits, _, Y_hat, A_raw, results = model(data, label=torch.tensor([1]), instance_eval=True)
            assert np.isfinite(results["instance_loss"].item())
            assert A_raw.shape == ((CLASSES if cls is ResidualMB else 1), len(bag))
            assert Y_hat.item() == logits.argmax()


def test_attention_of_a_heatmap() -> None:
    single, multi, bag = adapted(), adapted(ResidualMB), some_bags()[0]
    with torch.inference_mode():
        logits, _, Y_hat, A, _ = single(bag)
        every = multi(bag)[3]
    likely = Y_hat.item()
    plain = single.mil.contributions(bag)
    assert torch.equal(A.view(-1, 1)[:, 0], plain)
    assert torch.equal(every[likely].view(-1, 1)[:, 0], plain)
    for c in range(CLASSES):
        assert torch.equal(every[c], single.mil.contributions(bag, c))
    assert torch.equal(single(bag, attention_only=True), A)
    features = single(bag, return_features=True)[4]["features"]
    assert torch.equal(features, single.mil.embed(bag))
    torch.testing.assert_close(single.mil.classifier(features), logits)


def test_a_checkpoint_as_its_evaluation_loads_it(tmp_path: Path) -> None:
    save_codebook(fitted(), tmp_path / "codebook.safetensors")

    class CLAM_SB(ResidualSB):  # the lines of the page
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments, codewords=5, codebook=tmp_path / "codebook.safetensors")

    arguments = {"dropout": 0.25, "n_classes": 2, "embed_dim": DIM, "size_arg": "big"}
    trained = CLAM_SB(**arguments, k_sample=8, instance_loss_fn=nn.CrossEntropyLoss()).eval()
    assert trained.mil.width == 384
    torch.save(trained.state_dict(), tmp_path / "s_0_checkpoint.pt")
    state = torch.load(tmp_path / "s_0_checkpoint.pt", weights_only=True)
    model = CLAM_SB(**arguments)
    model.load_state_dict(
        {k.replace(".module", ""): v for k, v in state.items() if "instance_loss_fn" not in k}, strict=True
    )
    model.eval()
    assert all(torch.equal(model(bag)[0], trained(bag)[0]) for bag in some_bags())


def test_arguments_in_the_order_and_forms_of_the_host() -> None:
    torch.manual_seed(0)
    model = ResidualSB(True, "small", True, 2, 2, nn.CrossEntropyLoss(), True, DIM, codewords=5)
    assert (model.mil.width, model.k_sample, model.subtyping) == (256, 2, True)
    assert {part.p for part in model.modules() if isinstance(part, nn.Dropout)} == {0.25}
    assert {part.p for part in ResidualSB(dropout=False).modules() if isinstance(part, nn.Dropout)} == {0.0}


def test_errors() -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        ResidualSB(n_classes=1)
    with pytest.raises(ValueError, match="'small' or 'big'"):
        ResidualSB(size_arg="tiny")
    with pytest.raises(ValueError, match=r"one bag \[N, D\]"):
        adapted()(torch.randn(1, 4, DIM))
    with pytest.raises(ValueError, match="needs the bag's label"):
        adapted()(torch.randn(4, DIM), instance_eval=True)
