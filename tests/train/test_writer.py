"""What a run writes into its bank: the oldest rows again, and rows of a moving average of the encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_cohort import assert_resumes, tiny_config

from dre_fast.data.slides import SlideError
from dre_fast.train.config import ConfigError
from dre_fast.train.loop import Trainer
from dre_fast.train.state import read_metrics
from dre_fast.train.writer import BankWriter

MOVING = ("optim.head_warmup_epochs=0", "data.augment=false", "data.stain=0", "memory.drift_limit=0")


def test_the_oldest_rows_of_the_steps_slides_are_renewed(tiny_cohort: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tiny_cohort, *MOVING), tmp_path / "run")
    bank, writer = trainer.model.bank, trainer.writer
    writer.fill()
    n = trainer.train.tiles
    for step, tiles in ((1, [3, 4]), (2, [0, n[0] - 1])):  # make some rows younger than others
        bank.write(0, tiles, torch.randn(2, bank.dim), step=step)
    live = torch.tensor([[1, 2, -1], [0, 5, 6]])
    before = bank.read(0, torch.arange(n[0]))
    with torch.no_grad():
        for p in trainer.model.tile_encoder.parameters():
            p.add_(0.1)
    writer.renew(torch.tensor([0, 1]), live, 7, step=9)
    # the first 7 of slide 0 that are neither live nor written since the fill
    assert (bank.ages(0) == 9).nonzero().squeeze(1).tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert not (bank.ages(1) == 9).any()
    now = bank.read(0, torch.arange(n[0]))
    same = (now == before).all(1)
    assert same.nonzero().squeeze(1).tolist() == [t for t in range(n[0]) if not 5 <= t <= 11]
    expected = trainer.model.eval().encode_tiles(trainer.train.reader.read(0, torch.arange(5, 12)))
    assert (now[5:12] - expected).abs().max() < 0.01  # int8
    writer.renew(torch.tensor([0, 1]), live, 1000, step=10)
    assert [int((bank.ages(s) == 10).sum()) for s in (0, 1)] == [n[0] - 2, n[1] - 3]  # all but the live ones


def test_a_tile_that_cannot_be_read_does_not_keep_the_others_old(tiny_cohort: Path, tmp_path: Path) -> None:
    """It stays the oldest of its slide, and so is in every share of the budget."""
    trainer = Trainer(tiny_config(tiny_cohort, *MOVING, "data.on_error=skip"), tmp_path / "run")
    read = trainer.train.reader.read

    def damaged(slide: int, tiles: torch.Tensor) -> torch.Tensor:
        if slide == 0 and 2 in tiles.tolist():
            raise SlideError("slide s0, tile 2: damaged")
        return read(slide, tiles)

    trainer.train.reader.read = damaged  # type: ignore[method-assign]
    with pytest.warns(
        UserWarning, match=r"1 of \d+ tiles left out of the bank so far: slide s0, tile 2: damaged"
    ):
        trainer.writer.fill()
    assert trainer.model.bank.written(0).logical_not().nonzero().tolist() == [[2]]
    trainer.train.reader.read = read  # type: ignore[method-assign]
    trainer.writer.fill()
    trainer.train.reader.read = damaged  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="row not renewed: slide s0, tile 2: damaged"):
        trainer.writer.renew(torch.tensor([0]), torch.tensor([[0]]), 6, step=3)
    assert (trainer.model.bank.ages(0) == 3).nonzero().squeeze(1).tolist() == [1, 3, 4, 5, 6]


def test_a_refresh_budget_makes_a_bank_younger(tiny_cohort: Path, tmp_path: Path) -> None:
    ages = {}
    for refresh in (0, 12):
        config = tiny_config(tiny_cohort, *MOVING, "optim.epochs=3", f"memory.refresh={refresh}")
        Trainer(config, tmp_path / str(refresh)).fit()
        rows = read_metrics(tmp_path / str(refresh) / "metrics.jsonl")
        ages[refresh] = next(row for row in reversed(rows) if row["kind"] == "epoch")["bank_age_mean"]
    assert ages[12] < 0.8 * ages[0]


def test_the_moving_average_writes_the_rows(tiny_cohort: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_cohort, *MOVING, "memory.writer_decay=0.5", "optim.epochs=1")
    trainer = Trainer(config, tmp_path / "run")
    name, parameter = next(iter(trainer.model.tile_encoder.named_parameters()))
    weights = [parameter.detach().clone()]
    follow = trainer.writer.follow

    def recorded() -> None:
        follow()
        weights.append(parameter.detach().clone())

    trainer.writer.follow = recorded  # type: ignore[method-assign]
    trainer.fit()
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.5 * expected + 0.5 * weight
    average = trainer.writer.average
    assert average is not None
    torch.testing.assert_close(average.module.get_parameter(name), expected)
    # what was written last is what the average gives
    bank = trainer.model.bank
    slide = next(s for s in range(bank.num_slides) if bank.ages(s).max() == bank.age.max())
    tiles = (bank.ages(slide) == bank.age.max()).nonzero().squeeze(1)
    images = trainer.train.reader.read(slide, tiles)
    for encoder, near in ((average.eval(), True), (trainer.model.tile_encoder.eval(), False)):
        with torch.no_grad():
            found = trainer.model.encode_tiles(images, encoder)
        assert ((bank.read(slide, tiles) - found).abs().max() < 0.02) == near


@pytest.mark.parametrize("mode", ["full", "sampled"])
def test_a_run_with_both_resumes_as_it_was(tiny_cohort: Path, tmp_path: Path, mode: str) -> None:
    config = tiny_config(
        tiny_cohort,
        f"memory.mode={mode}",
        "memory.retrieved=6",
        "memory.refresh=5",
        "memory.writer_decay=0.9",
    )
    assert_resumes(config, tmp_path, step=7)


def test_a_feature_that_is_not_finite_is_named(tiny_cohort: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tiny_cohort), tmp_path / "run")
    writer: BankWriter = trainer.writer
    features = torch.randn(3, trainer.model.bank.dim)
    features[1, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"slide s2, tile 8: .*not finite at step 5"):
        writer.keep(2, torch.tensor([4, 8, 9]), features, step=5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["memory.refresh=-1"], r"memory\.refresh"),
        (["memory.writer_decay=1"], r"memory\.writer_decay=1.*must be in \[0, 1\)"),
        (["memory.mode=exact", "memory.refresh=4"], r"no use with memory\.mode=exact"),
        (["memory.mode=exact", "memory.writer_decay=0.9"], r"no use with memory\.mode=exact"),
    ],
)
def test_bad_settings_are_named(tiny_cohort: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tiny_cohort, *overrides).validate()
