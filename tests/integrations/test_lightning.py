"""ResidualMIL in the real Lightning: its Trainer on ragged batches, its checkpoints, its predictions."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mil_bags import CODEWORDS, DIM, fitted, plain_logits, some_bags

lightning = pytest.importorskip(
    "lightning",
    reason="needs lightning (pip install lightning), which is no part of the project's environment",
)

from torch.utils.data import DataLoader  # noqa: E402

from dre_fast import ResidualMIL  # noqa: E402
from dre_fast.integrations.lightning import Bags, ResidualMILModule, collate_bags  # noqa: E402


def dataset(classes: int) -> list[tuple[torch.Tensor, float | int]]:
    """Bags of any size whose label is whether some of their tiles are shifted; the last one is not labelled."""
    generator = torch.Generator().manual_seed(0)
    items: list[Any] = []
    for number in range(24):
        bag = torch.randn(int(torch.randint(0, 30, (), generator=generator)), DIM, generator=generator) + 1
        if number % 2:
            bag = torch.cat([bag, torch.randn(6, DIM, generator=generator) - 3])
        items.append((bag, float(number % 2) if classes == 1 else number % 2))
    items.append((bag, float("nan") if classes == 1 else -1))
    return items


def loader(classes: int, **options: Any) -> DataLoader:
    return DataLoader(dataset(classes), batch_size=5, collate_fn=collate_bags, **options)  # type: ignore[arg-type]


def trainer(folder: Path, **options: Any) -> Any:
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize("classes", [1, 2])
def test_it_trains_and_comes_back_from_its_checkpoint(classes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ResidualMIL(DIM, classes, CODEWORDS, width=32, depth=1)
    bags = [bag for bag, _ in dataset(classes)]
    model.fit_codebook(bags)
    module = ResidualMILModule(model, lr=3e-3)
    fit = trainer(tmp_path, max_epochs=8, enable_checkpointing=True)
    fit.fit(module, loader(classes, shuffle=True), loader(classes))
    assert float(fit.callback_metrics["val_auc"]) >= 0.95
    assert float(fit.callback_metrics["train_loss"]) < 0.5
    assert float(fit.callback_metrics["val_loss"]) < 0.5

    again = ResidualMILModule.load_from_checkpoint(fit.checkpoint_callback.best_model_path)
    assert again.model.fitted
    assert (again.lr, again.model.options) == (3e-3, model.options)
    found = torch.cat(trainer(tmp_path, enable_checkpointing=False).predict(again, loader(classes)))
    with torch.no_grad():
        expected = torch.cat([model.eval()(bag) for bag in bags])
    torch.testing.assert_close(found, expected)


def test_ragged_batches_hold_every_bag() -> None:
    batch = collate_bags([(bag, number % 2) for number, bag in enumerate(some_bags())])
    assert isinstance(batch, Bags)
    assert batch.target.tolist() == [0, 1, 0, 1, 0]
    model = fitted()
    with torch.no_grad():
        logits = ResidualMILModule(model).eval()(batch.x, batch.cu_seqlens)
    torch.testing.assert_close(logits, plain_logits(model))
    with pytest.raises(ValueError, match=rf"bag 1 of the batch is \[3, {DIM + 1}\]"):
        collate_bags([(torch.zeros(2, DIM), 0), (torch.zeros(3, DIM + 1), 1)])


def test_bags_without_label_have_no_part_in_the_loss() -> None:
    module = ResidualMILModule(fitted(classes=2))
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    alone = module._loss(logits[:1], torch.tensor([0]))
    assert torch.equal(module._loss(logits, torch.tensor([0, -1])), alone)
    nothing = module._loss(logits, torch.tensor([-1, -1]))
    nothing.backward()
    assert float(nothing) == 0


def test_the_score_is_that_of_all_processes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose bags are of one class has no AUC of its own, and waiting for the others' would never end."""
    module = ResidualMILModule(fitted(classes=1))
    module._trainer = SimpleNamespace(world_size=2)  # type: ignore[assignment]
    mine = [(torch.tensor([[0.3], [0.9]]), torch.tensor([1.0, 1.0]))]
    other = [(torch.tensor([[0.5], [0.1]]), torch.tensor([0.0, 0.0]))]

    def gather(found: list[Any], own: Any) -> None:
        found[:] = [own, other]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    logged: dict[str, float] = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    monkeypatch.setattr(ResidualMILModule, "trainer", property(lambda self: self._trainer))
    module._judged = mine
    module.on_validation_epoch_end()
    assert logged["val_auc"] == 0.75
    logits, target = (torch.cat([a, b]) for a, b in zip(mine[0], other[0]))
    assert logged["val_loss"] == pytest.approx(float(module._loss(logits, target)))
    module._judged = []  # no bag at all in this process
    module.on_validation_epoch_end()


def test_an_unfitted_codebook_is_said_at_the_start(tmp_path: Path) -> None:
    module = ResidualMILModule(options={"dim": DIM, "classes": 2, "codewords": CODEWORDS, "width": 32})
    with pytest.raises(RuntimeError, match=r"model\.fit_codebook\(bags\)"):
        trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, loader(2))
    with pytest.raises(ValueError, match="give a model"):
        ResidualMILModule()


def test_lightning_does_not_ask_for_torchvision() -> None:
    """torchvision has no build beside the small CPU build of torch."""
    for package in ("lightning", "pytorch-lightning", "torchmetrics"):
        asked = importlib.metadata.requires(package) or []
        always = {re.split(r"[^\w.-]", line)[0].lower() for line in asked if "extra ==" not in line}
        assert always
        assert "torchvision" not in always
