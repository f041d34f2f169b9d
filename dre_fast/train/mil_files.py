"""A trained classifier of bags as a file: weights as safetensors, its card beside them as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from dre_fast.data.cohort import Task
from dre_fast.data.files import write_text_atomic
from dre_fast.train.mil import TrainedMIL
from dre_fast.train.mil_settings import MILSettings
from dre_fast.train.state import load_model, save_model

MODEL, CARD = "model.safetensors", "model.json"
_KIND = "mil"


def save_mil(trained: TrainedMIL, folder: str | Path) -> Path:
    """Writes ``model.safetensors``, whose header holds the card, and the card again as ``model.json`` to be read."""
    card = {
        "kind": _KIND,
        "dim": trained.model.dim,
        "tasks": {task.name: task.card() for task in trained.tasks},
        "settings": asdict(trained.settings),
        "epoch": trained.epoch,
    }
    path = Path(folder) / MODEL
    save_model(path, trained.model.state_dict(), card)
    write_text_atomic(Path(folder) / CARD, json.dumps(card, indent=2) + "\n")
    return path


def load_mil(path: str | Path, device: str | torch.device = "cpu") -> TrainedMIL:
    """Reads what :func:`save_mil` wrote, from its folder or file; no code is unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, a model of another kind, or weights that do not fit its card.
    """
    file = Path(path) / MODEL if Path(path).is_dir() else Path(path)
    state, card = load_model(file)
    if card.get("kind") != _KIND:
        raise ValueError(
            f"{file}: not a model of `dre-fast mil` (models of `dre-fast train`: dre-fast encode)"
        )
    try:
        settings = MILSettings(**card["settings"])
        tasks = [Task.from_card(name, said) for name, said in card["tasks"].items()]
        model = settings.build(card["dim"], sum(task.outputs for task in tasks))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: its card is not one that this version of dre_fast reads ({type(error).__name__}: {error})"
        ) from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file}: its weights do not fit its card ({error})") from None
    return TrainedMIL(model.to(device).eval(), tasks, settings, card["epoch"])
