"""Fine-tuning: the weights that a model takes over from a trained one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dre_fast.data.cohort import Task
from dre_fast.nn.model import DRESLCL
from dre_fast.train import state as on_disk
from dre_fast.train.build import task_card


def start_from(model: DRESLCL, tasks: Sequence[Task], path: str | Path) -> str:
    """Gives a model all weights of a trained one that fit by name and shape.

    A head is taken only where its task is the same in kind, classes and columns: equal shapes may mean other classes.
    The codebook and the bank stay as they are.

    Args:
        tasks: of ``model``, resolved.
        path: run folder, or a ``.safetensors`` model file.

    Returns:
        What was taken and what starts anew, in a line.

    Raises:
        FileNotFoundError: no model there.
        ValueError: the file is damaged, or none of its weights fits.
    """
    file = Path(path) / on_disk.BEST if Path(path).is_dir() else Path(path)
    state, card = on_disk.load_model(file)
    same = {task.name for task in tasks if card["tasks"].get(task.name) == task_card(task)}
    own = on_disk.without_bank(model.state_dict())
    taken = {
        key: state[key]
        for key, value in own.items()
        if key in state and state[key].shape == value.shape and (_head(key) is None or _head(key) in same)
    }
    if not taken:
        raise ValueError(f"model.init={file}: none of its weights fits this model by name and shape")
    model.load_state_dict(taken, strict=False)
    return (
        f"model.init: from {file}: {_count(own, taken)}; anew: {', '.join([*_anew(own, taken), 'codebook'])}"
    )


def _head(key: str) -> str | None:
    """The task of a weight of a head."""
    parts = key.split(".")
    return parts[1] if parts[0] == "heads" else None


def _count(own: dict[str, Tensor], taken: dict[str, Tensor]) -> str:
    """Weights taken of each part of the model."""
    parts = dict.fromkeys(key.split(".")[0] for key in own)

    def count(keys: dict[str, Tensor], part: str) -> int:
        return sum(key.split(".")[0] == part for key in keys)

    return ", ".join(f"{part} {count(taken, part)} of {count(own, part)}" for part in parts)


def _anew(own: dict[str, Tensor], taken: dict[str, Tensor]) -> list[str]:
    """What keeps its random start: weights by name; a head, or a part of which nothing was taken, as a whole."""
    found: dict[str, None] = {}
    for key in own:
        if key in taken:
            continue
        part = key.split(".")[0]
        whole = not any(other.split(".")[0] == part for other in taken)
        found[f"head {_head(key)}" if _head(key) else part if whole else key] = None
    return list(found)
