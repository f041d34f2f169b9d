"""What a run leaves on disk: checkpoints, the deployable model, the metrics log. Every file is whole at every moment."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dre_fast.data.files import atomic_path, write_tensors

EXPORTED = "model.safetensors"  # in a folder of dre_fast.integrations.hub
CHECKPOINT, BEST, METRICS, CONFIG = "last.pt", "best.safetensors", "metrics.jsonl", "config.yaml"
CHECKPOINT_FORMAT = "dre_fast-checkpoint-3"
MODEL_FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint (tensors and plain values only) atomically and flush it to disk.

    Raises:
        OSError: it cannot be written, the disk is full say; the former checkpoint stays.
    """
    with atomic_path(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save({"format": CHECKPOINT_FORMAT, **state}, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            # torch's zip writer raises an error of its own on top of the file's
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(cause.errno, cause.strerror, str(path)) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling code (``weights_only=True``).

    Raises:
        ValueError: the file is damaged or not a dre_fast checkpoint; the message names it.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: not a dre_fast checkpoint of format {CHECKPOINT_FORMAT}")
    return state


def bank_folder(out: Path, step: int, last: str | None) -> Path:
    """An empty folder for the bank of a step's checkpoint: beside it, since it may be larger than memory.

    Args:
        last: name of the folder of the checkpoint that is on disk, which stays.
    """
    name = f"bank-{step:09d}"
    folder = out / (name if name != last else f"{name}-again")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir()
    return folder


def remove_other_banks(out: Path, kept: Path) -> None:
    """Once a checkpoint that names ``kept`` is on disk: delete those of earlier or unfinished checkpoints."""
    for folder in out.glob("bank-*"):
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)


def without_bank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's state that a checkpoint holds itself."""
    return {key: value for key, value in state.items() if not key.startswith("bank.")}


def deployable(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's state without the rows of the bank: weights and codebook, all that inference needs."""
    return {
        key: value for key, value in state.items() if not key.startswith("bank.") or key == "bank.codebook"
    }


def save_model(path: Path, state: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write a deployable model as safetensors with its card (config, tasks, dimensions) as JSON metadata.

    The card's "format" is :data:`MODEL_FORMAT`.
    """
    write_tensors(path, deployable(state), {"dre_fast": json.dumps({"format": MODEL_FORMAT, **card})})


def load_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read (state, card) of a deployable model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, not written by :func:`save_model`, or by that of a newer dre_fast.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"{path}: no trained model there")
    try:
        with safe_open(path, framework="pt") as file:
            card = (file.metadata() or {}).get("dre_fast")
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from error
    if card is None:
        raise ValueError(f"{path}: a safetensors file, but not a model saved by dre_fast")
    card = json.loads(card)
    if card.get("format", 1) > MODEL_FORMAT:
        raise ValueError(
            f"{path}: written by a newer dre_fast (format {card['format']}, this one reads up to {MODEL_FORMAT}); "
            "upgrade dre_fast"
        )
    return state, card


class MetricsLog:
    """Append-only JSON lines. A checkpoint records :attr:`size`; resuming cuts the log back to it."""

    def __init__(self, path: Path, size: int = 0) -> None:
        self._file: BinaryIO = open(path, "ab")  # noqa: SIM115
        if self._file.tell() < size:
            raise ValueError(f"{path}: shorter than its checkpoint says ({self._file.tell()} < {size} bytes)")
        self._file.truncate(size)
        self._file.seek(size)
        self.size = size

    def write(self, **fields: Any) -> None:
        line = (json.dumps(fields) + "\n").encode()
        self._file.write(line)
        self._file.flush()
        self.size += len(line)

    def sync(self) -> None:
        """Flush to disk, so that a checkpoint never knows of more log than there is."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics log; a last line cut short by a kill is left out."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line.strip()]
