"""Checkpoints of a run: what they hold, and how a run goes on from one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dre_fast.train import state as on_disk

if TYPE_CHECKING:
    from dre_fast.train.loop import Trainer


def save(trainer: Trainer) -> None:
    """Write a checkpoint: every process its bank, then the first one the file that names them and makes them count."""
    group = trainer.group
    if trainer.log is not None:
        trainer.log.sync()
    folder = group.from_first(
        on_disk.bank_folder(trainer.out, trainer.step, trainer.bank_folder) if group.first else None
    )
    assert folder is not None
    trainer.model.bank.save_shard(
        folder,
        shard=group.rank,
        shards=group.world,
        slides=trainer.data.numbers,
        save_id=f"step-{trainer.step}",
    )
    random = group.everyones(_random_state(trainer.device))  # also waits until all banks are written
    plans = group.everyones(trainer.planner.state_dict())
    failures = [error for part in group.everyones(trainer.failures.state_dict()) for error in part]
    if trainer.log is not None:
        on_disk.save_checkpoint(
            trainer.out / on_disk.CHECKPOINT,
            {
                "model": on_disk.without_bank(trainer.model.state_dict()),
                "bank": folder.name,
                "writer": trainer.writer.state_dict(),
                "guard": trainer.guard.state_dict(),
                "plans": plans,
                "objective": trainer.objective.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "scaler": trainer.scaler.state_dict(),
                "random": random,
                "step": trainer.step,
                "epoch": trainer.epoch,
                "batch": trainer.batch,
                "failures": failures,
                "epoch_loss": trainer.epoch_loss,
                "epoch_steps": trainer.epoch_steps,
                "best": trainer.best,
                "best_epoch": trainer.best_epoch,
                "log_size": trainer.log.size,
                "data": trainer.data.fingerprint,
            },
        )
        on_disk.remove_other_banks(trainer.out, folder)
    trainer.bank_folder = folder.name


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Bring a run to where :func:`save` left it, with any number of processes.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is of another model, or its bank is missing or damaged (named).
    """
    missing, unexpected = trainer.model.load_state_dict(state["model"], strict=False)
    missing = [key for key in missing if not key.startswith("bank.")]
    if missing or unexpected:
        raise ValueError(f"{trainer.out / on_disk.CHECKPOINT}: of another model: {missing + unexpected}")
    trainer.bank_folder = state["bank"]
    trainer.model.bank.restore_shards(trainer.out / state["bank"], slides=trainer.data.numbers)
    trainer.writer.load_state_dict(state["writer"])
    trainer.guard.load_state_dict(state["guard"])
    trainer.planner.load_state_dict(state.get("plans", []))  # runs of before guided sampling have none
    trainer.objective.load_state_dict(state["objective"])
    for group in state["optimizer"]["param_groups"]:
        # runs of before had it otherwise: a loaded group's word would count, not the optimiser's
        group["fused"] = True
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.step, trainer.epoch, trainer.batch = state["step"], state["epoch"], state["batch"]
    trainer.epoch_loss, trainer.epoch_steps = state["epoch_loss"], state["epoch_steps"]
    trainer.best, trainer.best_epoch = state["best"], state["best_epoch"]
    trainer.log_size = state["log_size"]
    trainer.failures.load_state_dict(state["failures"])
    _set_random_state(trainer, state["random"])


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(trainer: Trainer, states: list[dict[str, Tensor]]) -> None:
    """Of each process; at another number of processes they are drawn anew."""
    if len(states) != trainer.group.world:
        torch.manual_seed((trainer.config.run.seed * 1_000_003 + trainer.step) * 1009 + trainer.group.rank)
        return
    own = states[trainer.group.rank]
    torch.set_rng_state(own["cpu"])
    if "cuda" in own and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], trainer.device)
