"""Live tiles drawn by their effect on the loss of the tasks (memory.guide=loss): runs, labels, what is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_cohort import assert_resumes, tiny_config

from dre_fast.train.checks import labelled
from dre_fast.train.guided import LossGuide
from dre_fast.train.loop import Trainer
from dre_fast.train.planner import planner_of

# the encoder moves fast and the bank with it, so that what is drawn depends on when it is asked
GUIDED = (
    "memory.guided=0.5",
    "memory.guide=loss",
    "memory.candidates=12",
    "optim.epochs=2",
    "optim.lr=0.02",
    "optim.head_warmup_epochs=0",
    "memory.drift_limit=0",
)


@pytest.mark.parametrize("mode", ["full", "sampled", "none"])
def test_a_run_resumed_within_an_epoch_is_the_same(tiny_cohort: Path, tmp_path: Path, mode: str) -> None:
    config = tiny_config(tiny_cohort, *GUIDED, f"memory.mode={mode}", "run.checkpoint_every=1")
    assert_resumes(config.validate(), tmp_path, 4)


def test_it_needs_no_reports(tiny_cohort: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_cohort, *GUIDED, "data.reports=null", "loss.contrastive=null")
    trainer = Trainer(config.validate(), tmp_path / "run")
    trainer.fit()
    assert isinstance(trainer.planner.guide, LossGuide)


def test_the_loss_is_that_of_the_slides_asked_for(tiny_cohort: Path, tmp_path: Path) -> None:
    """Numbers of the bank's slides are those of the training slides: labels must not be mixed up."""
    trainer = Trainer(tiny_config(tiny_cohort, *GUIDED), tmp_path / "run")
    trainer.fit()
    guide = trainer.planner.guide
    assert isinstance(guide, LossGuide)
    slides = torch.tensor([3, 1])
    found = guide.gradient(slides)
    residuals = trainer.model.bank.encode(
        slides, torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0, trainer.model.bank.dim)
    )
    assert isinstance(residuals, torch.Tensor)
    residuals.requires_grad_(True)
    out = trainer.model.eval().represent(residuals)
    targets = trainer.data.train.targets
    # of each slide by itself: who is scored together must not count
    loss = sum(
        trainer.objective.supervised(task, out.logits[task.name][[i]], targets[task.name][slides[[i]]])
        for task in trainer.tasks
        for i in range(2)
    )
    assert isinstance(loss, torch.Tensor)
    torch.testing.assert_close(found, torch.autograd.grad(loss, residuals)[0])
    torch.testing.assert_close(found[:1], guide.gradient(slides[:1]))


def test_slides_without_labels_take_their_turn(tiny_cohort: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tiny_cohort, *GUIDED), tmp_path / "run")
    trainer.fit()
    unlabelled = {}
    for name, target in trainer.data.train.targets.items():
        unlabelled[name] = target.clone()
        unlabelled[name][2] = torch.nan if target.is_floating_point() else -1
    trainer.objective.targets = unlabelled
    known = trainer.objective.labelled
    assert not known[2]
    assert known.sum() == len(known) - 1
    guided = planner_of(trainer.config, trainer.data, trainer.model, trainer.objective)
    plain = Trainer(tiny_config(tiny_cohort, *GUIDED, "memory.guided=0"), tmp_path / "plain").planner
    tiles = [
        {s: planner.tiles_of(s).tolist() for s in (0, 2)} for planner in (guided, plain) if planner.plan(0)
    ]
    assert tiles[0][2] == tiles[1][2]
    assert tiles[0][0] != tiles[1][0]


def test_labels_without_a_loss_of_their_slide_alone_do_not_count(tiny_cohort: Path, tmp_path: Path) -> None:
    """All tiles would score zero, and chance would draw what a permutation brings in turn."""
    tasks = "loss.tasks=[{name: kind, weight: 0}, {name: EGFR, kind: binary}]"
    objective = Trainer(tiny_config(tiny_cohort, *GUIDED, tasks), tmp_path / "run").objective
    given = labelled(objective.targets["EGFR"])
    assert not given.all()
    assert objective.labelled.equal(given.view(len(given), -1).any(1))
    task = objective.tasks[1]
    objective.tasks[1] = replace(task, kind="survival", method="cox", columns=("time", "event"))
    assert not objective.labelled.any()
