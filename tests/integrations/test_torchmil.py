"""ResidualMIL in the real torchmil: its Trainer, its dataset of processed bags, its collate function and wrapper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mil_bags import CLASSES, CODEWORDS, DIM, fitted, padded, plain_logits, some_bags
from torch.utils.data import DataLoader

pytest.importorskip("torchmil", reason="needs torchmil: pip install torchmil")

from torchmil import datasets
from torchmil.data import collate_fn
from torchmil.models import MILModel, MILModelWrapper
from torchmil.utils import Trainer

from dre_fast.integrations.torchmil import ResidualTorchMIL


def adapted(classes: int = 1) -> ResidualTorchMIL:
    return ResidualTorchMIL((DIM,), classes, model=fitted(classes=classes)).eval()


def batch() -> Any:
    """The odd bags as torchmil collates them."""
    labels = torch.tensor([0.0, 1, 1, 0, 1])
    return collate_fn([{"X": bag, "Y": label} for bag, label in zip(some_bags(), labels)])


@pytest.mark.parametrize("classes", [1, CLASSES])
def test_logits_are_those_of_the_plain_model(classes: int) -> None:
    model = adapted(classes)
    expected = plain_logits(model.mil)
    expected = expected[:, 0] if classes == 1 else expected
    together = batch()
    assert together["mask"].dtype == torch.uint8
    wrapped = MILModelWrapper(model)
    torch.testing.assert_close(wrapped(together), expected)
    torch.testing.assert_close(torch.cat([model(bag[None]) for bag in some_bags()]), expected)
    logits, losses = wrapped.compute_loss(together)
    torch.testing.assert_close(logits, expected)
    ((name, loss),) = losses.items()
    assert name == ("BCEWithLogitsLoss" if classes == 1 else "CrossEntropyLoss")
    assert loss.ndim == 0
    model.compute_loss(together["Y"][:, None], together["X"], together["mask"])  # labels of shape (1,)


def test_instance_predictions() -> None:
    model = adapted()
    assert isinstance(model, MILModel)
    x, mask = padded(some_bags(), 0.0)
    logits, scores = MILModelWrapper(model).predict(batch(), return_inst_pred=True)
    assert torch.equal(scores, model.mil.contributions(x, 0, mask=mask))
    with torch.no_grad():
        again, attention = model(x, mask.to(torch.uint8), return_att=True)
    torch.testing.assert_close(again, logits)
    assert torch.equal(attention, scores)
    assert torch.equal(model.predict(x, mask, return_inst_pred=False), logits)


def write_bags(folder: Path) -> tuple[dict[str, str], list[np.ndarray]]:
    """Bags whose label is whether any tile is shifted, in the folders that torchmil's dataset reads."""
    generator = np.random.default_rng(0)
    names = ("features", "labels", "inst_labels", "coords")
    for name in names:
        (folder / name).mkdir()
    bags = []
    for number in range(24):
        tiles = int(generator.integers(3, 20)) if number else 1
        positive = generator.random(tiles) < 0.5 * (number % 2)
        X = generator.normal(size=(tiles, DIM)).astype(np.float32) + 1
        X[positive, :4] -= 4
        bags.append(X)
        np.save(folder / f"features/bag{number:02}.npy", X)
        np.save(folder / f"labels/bag{number:02}.npy", np.array(int(positive.any())))
        np.save(folder / f"inst_labels/bag{number:02}.npy", positive.astype(np.int64))
        np.save(
            folder / f"coords/bag{number:02}.npy", generator.permutation(400)[:tiles, None] // [20, 1] % 20
        )
    return {f"{name}_path": str(folder / name) for name in names}, bags


def test_trainer_runs_it_unchanged(tmp_path: Path) -> None:
    paths, bags = write_bags(tmp_path)
    dataset = datasets.ProcessedMILDataset(**paths, verbose=False)
    loader = DataLoader(dataset, batch_size=5, shuffle=True, collate_fn=collate_fn)
    assert {"X", "Y", "y_inst", "adj", "coords", "mask"} <= set(next(iter(loader)).keys())

    model = ResidualTorchMIL((DIM,), codewords=CODEWORDS, width=32, depth=1)
    model.mil.fit_codebook(bags)
    logged: list[dict[str, float]] = []
    trainer = Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=3e-3),
        device="cpu",
        disable_pbar=True,
        verbose=False,
        logger=type("Logger", (), {"log": staticmethod(logged.append)})(),
    )
    trainer.train(15, loader, val_dataloader=loader, test_dataloader=loader)
    losses = [entry["train/BCEWithLogitsLoss"] for entry in logged if "train/loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    best = trainer.get_best_model()
    assert best is model
    assert trainer.best_obj_metric >= 0.9

    fresh = ResidualTorchMIL((DIM,), codewords=CODEWORDS, width=32, depth=1)
    fresh.load_state_dict(trainer.get_best_model_state_dict())
    assert fresh.mil.fitted
    together = collate_fn([dataset[number] for number in range(24)])
    best.eval()
    with torch.no_grad():
        logits, scores = MILModelWrapper(fresh.eval()).predict(together)
        torch.testing.assert_close(logits, torch.cat([best.mil(torch.from_numpy(X))[:, 0] for X in bags]))
    assert scores.shape == together["y_inst"].shape  # what its heatmaps and instance metrics take
    assert not scores[together["mask"] == 0].any()
