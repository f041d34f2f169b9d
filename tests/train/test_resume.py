"""Killed at any moment, a run resumes to the very same metrics log."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_cohort import interrupt, tiny_config

from dre_fast.nn.bank import MemoryBank
from dre_fast.train import loop
from dre_fast.train.config import save_config
from dre_fast.train.inference import load_run
from dre_fast.train.loop import Trainer
from dre_fast.train.state import load_checkpoint, read_metrics, save_checkpoint

CLOCKS = {"seconds", "data_seconds"}


def timeless(file: Path) -> bytes:
    """The log with its clock fields taken out, byte for byte otherwise."""
    return b"\n".join(
        json.dumps({k: v for k, v in row.items() if k not in CLOCKS}).encode() for row in read_metrics(file)
    )


def start(config: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dre_fast.cli",
            "train",
            "--config",
            str(config),
            "--out",
            str(out),
            "--resume",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def whole(out: Path) -> None:
    """Every file that is there can be read."""
    if (out / "last.pt").exists():
        state = load_checkpoint(out / "last.pt")
        MemoryBank.load_shards(out / state["bank"])
        assert (out / "metrics.jsonl").stat().st_size >= state["log_size"]
    if (out / "best.safetensors").exists():
        load_run(out)
    if (out / "metrics.jsonl").exists():
        read_metrics(out / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "sampled"])
def test_sigkill_at_any_moment_then_resume_gives_the_same_log(tiny_cohort, tmp_path, mode):
    config = tiny_config(tiny_cohort, f"memory.mode={mode}", "memory.retrieved=6", "optim.epochs=6")
    save_config(config, tmp_path / "config.yaml")
    whole_run = tmp_path / "uninterrupted"
    process = start(tmp_path / "config.yaml", whole_run)
    began = time.perf_counter()
    output, _ = process.communicate(timeout=300)
    duration = time.perf_counter() - began
    assert process.returncode == 0, output.decode()
    expected = timeless(whole_run / "metrics.jsonl")
    lines = len(expected.splitlines())

    killed = tmp_path / "killed"
    rng = random.Random(1)
    kills = 0
    for _ in range(6):
        process = start(tmp_path / "config.yaml", killed)
        # kills wait for the log to grow by a random number of lines, so that they fall anywhere in the training
        before = _lines(killed)
        deadline = time.perf_counter() + 4 * duration
        target = before + rng.randint(0, 9)
        while process.poll() is None and time.perf_counter() < deadline and _lines(killed) < target:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        whole(killed)
        if _lines(killed) >= lines and kills >= 4:
            break
    process = start(tmp_path / "config.yaml", killed)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    assert kills >= 3
    assert timeless(killed / "metrics.jsonl") == expected
    assert (killed / "best.safetensors").read_bytes() == (whole_run / "best.safetensors").read_bytes()
    leftovers = [p.name for p in killed.iterdir() if p.name.startswith(".")]
    assert not leftovers
    assert [p.name for p in killed.glob("bank-*")] == [load_checkpoint(killed / "last.pt")["bank"]]


def _lines(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_resume_mid_epoch_in_process(tiny_cohort, tmp_path, monkeypatch):
    config = tiny_config(tiny_cohort)
    Trainer(config, tmp_path / "a").fit()

    class Stop(Exception):
        pass

    original = Trainer._train_step

    def stop_at_four(self, batch, epoch):
        if self.step == 4 and not self._resumed:
            raise Stop
        return original(self, batch, epoch)

    monkeypatch.setattr(Trainer, "_train_step", stop_at_four)
    with pytest.raises(Stop):
        Trainer(config, tmp_path / "b").fit()
    Trainer(config, tmp_path / "b", resume=True).fit()
    assert timeless(tmp_path / "a" / "metrics.jsonl") == timeless(tmp_path / "b" / "metrics.jsonl")


def test_a_run_begun_with_another_form_of_the_optimiser_goes_on(tiny_cohort, tmp_path):
    """A checkpoint's groups say which form of AdamW steps; the fp16 scaler asks the optimiser as it was made."""
    config = tiny_config(tiny_cohort, "optim.amp=fp16", "optim.epochs=2")
    interrupt(config, tmp_path, 3)
    state = load_checkpoint(tmp_path / "last.pt")
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    save_checkpoint(tmp_path / "last.pt", state)
    trainer = Trainer(config, tmp_path, resume=True)
    trainer.fit()
    assert trainer.epoch == 2
    assert all(group["fused"] for group in trainer.optimizer.param_groups)


def test_a_resumed_run_trains_all_of_its_encoder(tiny_cohort, tmp_path, monkeypatch):
    """Encoders of some libraries come with parts in evaluation mode; the first fill of the bank used to wake them."""
    build = loop.build_model

    def asleep(*args):
        model = build(*args)
        for part in model.tile_encoder.children():
            part.eval()
        return model

    monkeypatch.setattr(loop, "build_model", asleep)
    settings = (
        "optim.epochs=1",
        "optim.head_warmup_epochs=0",
        "memory.drift_limit=0",
        "run.checkpoint_every=1",
    )
    config = tiny_config(tiny_cohort, *settings)
    interrupt(config, tmp_path, 1)
    trainer = Trainer(config, tmp_path, resume=True)
    modes, forward = [], trainer._forward

    def seen(*args):
        modes.append({module.training for module in trainer.model.tile_encoder.modules()})
        return forward(*args)

    monkeypatch.setattr(trainer, "_forward", seen)
    trainer.fit()
    assert modes
    assert all(mode == {True} for mode in modes)


def test_a_score_that_is_no_number_is_not_kept_for_good(tiny_cohort, tmp_path, monkeypatch):
    config = tiny_config(tiny_cohort, "optim.epochs=3")
    scores = iter([float("nan"), 0.5, float("nan")])
    trainer = Trainer(config, tmp_path)
    monkeypatch.setattr(trainer, "_validate", lambda: {"val_score": next(scores)})
    trainer.fit()
    assert (trainer.best, trainer.best_epoch) == (0.5, 1)


def test_a_folder_with_a_run_is_not_overwritten(tiny_cohort, tmp_path):
    config = tiny_config(tiny_cohort, "optim.epochs=1")
    Trainer(config, tmp_path / "a").fit()
    with pytest.raises(ValueError, match="already holds a run"):
        Trainer(config, tmp_path / "a")
    with pytest.raises(ValueError, match=r"optim\.lr"):
        Trainer(tiny_config(tiny_cohort, "optim.epochs=1", "optim.lr=0.5"), tmp_path / "a", resume=True)


def test_a_damaged_bank_file_is_named(tiny_cohort, tmp_path):
    config = tiny_config(tiny_cohort, "optim.epochs=1")
    out = Trainer(config, tmp_path / "a").fit()
    (bank,) = (out / load_checkpoint(out / "last.pt")["bank"]).iterdir()
    data = bytearray(bank.read_bytes())
    data[-5] ^= 1
    bank.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=rf"{bank.name}: damaged"):
        Trainer(config, out, resume=True).fit()
    bank.unlink()
    with pytest.raises(FileNotFoundError, match=bank.parent.name):
        Trainer(config, out, resume=True).fit()
