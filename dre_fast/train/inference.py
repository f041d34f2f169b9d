"""Applying a slide model: every tile is encoded, the bank is not used (DRE-SLCL, inference)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dre_fast.data.cohort import Task
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.data.subset import Reader
from dre_fast.eval.metrics import auc, c_index
from dre_fast.nn.loss import SlideReportLoss
from dre_fast.nn.model import DRESLCL, SlideOutput
from dre_fast.progress import progress
from dre_fast.train import state as on_disk
from dre_fast.train.build import SlideSet, build_model, task_card
from dre_fast.train.config import Config, config_from_dict
from dre_fast.train.distributed import Group

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


@torch.no_grad()
def encode_tiles_of(
    model: DRESLCL,
    reader: Reader,
    slide: int,
    chunk: int,
    autocast: Autocast = contextlib.nullcontext,
) -> Tensor:
    """Every tile of a slide through the tile encoder in eval mode: L2-normalised fp32 features [n, D]."""
    model.eval()
    device = model.codebook.device
    n = reader.tiles_per_slide[slide]
    features = []
    for first in range(0, n, chunk):
        images = reader.read(slide, torch.arange(first, min(first + chunk, n)))
        with autocast():
            features.append(model.encode_tiles(images.to(device, non_blocking=True)))
    return torch.cat(features) if features else torch.zeros(0, model.bank.dim, device=device)


@torch.no_grad()
def encode_slide(
    model: DRESLCL,
    reader: Reader,
    slide: int,
    chunk: int,
    autocast: Autocast = contextlib.nullcontext,
) -> SlideOutput:
    """One slide, all its tiles -> :class:`SlideOutput` with B = 1."""
    features = encode_tiles_of(model, reader, slide, chunk, autocast)
    with autocast():
        return model.encode_bags(features)


@torch.no_grad()
def encode_slides(
    model: DRESLCL,
    slides: SlideSet,
    tasks: Sequence[Task],
    *,
    chunk: int = 256,
    autocast: Autocast = contextlib.nullcontext,
    desc: str = "encode",
) -> SlideEmbeddings:
    """Slide embeddings, projections into the report space and task logits of every slide of a set."""
    outputs = [
        encode_slide(model, slides.reader, i, chunk, autocast)
        for i in progress(range(len(slides)), desc, unit="slide")
    ]

    def stack(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).float().cpu()

    reports = [out.report for out in outputs if out.report is not None]
    return SlideEmbeddings(
        slide_ids=[record.slide_id for record in slides.records],
        embedding=stack([out.embedding for out in outputs]),
        report_embedding=stack(reports) if reports else None,
        logits={name: stack([out.logits[name] for out in outputs]) for name in model.heads},
        tasks={task.name: task_card(task) for task in tasks},
    )


def validate(
    model: DRESLCL,
    slides: SlideSet,
    tasks: Sequence[Task],
    loss: SlideReportLoss | None,
    report_matrix: Tensor | None,
    *,
    chunk: int,
    group: Group,
    supervised: Callable[[Task, Tensor, Tensor], Tensor],
    autocast: Autocast = contextlib.nullcontext,
) -> dict[str, float | int | str | None]:
    """Validation losses, AUCs and c-indices of a set of slides, shared out to the processes of a group.

    ``val_score``, by which the best model is kept, is the mean over the tasks of AUC (survival tasks: c-index), where it
    is defined, with the loss as tie-breaker (minus a thousandth of it); without any, it is minus the loss.

    Args:
        supervised: (task, logits, target) -> loss.
    """
    logits, projected = _encode_shared(model, slides, tasks, chunk, autocast, group)
    result: dict[str, float | int | str | None] = {}
    losses = []
    if loss is not None and report_matrix is not None and projected is not None:
        there = slides.report_rows >= 0
        if there.any():
            cases = slides.report_rows[there].to(report_matrix.device)
            with torch.no_grad():
                value = loss.among(projected[there].to(report_matrix.device), report_matrix[cases], cases)
            result["val_loss_contrastive"] = value.item()
            losses.append(value.item())
    scores = []
    for task in tasks:
        own, target = logits[task.name], slides.targets[task.name]
        result[f"val_loss_{task.name}"] = supervised(task, own, target).item()
        losses.append(float(result[f"val_loss_{task.name}"]))  # type: ignore[arg-type]
        if task.kind == "survival":
            metric, score = "c_index", c_index(task.method, own, target)
        else:
            metric, score = "auc", auc(task.kind, own, target)
        result[f"val_{metric}_{task.name}"] = score
        if score is not None:
            scores.append(score)
    total = sum(losses)
    result["val_loss"] = total
    result["val_score"] = sum(scores) / len(scores) - 1e-3 * total if scores else -total
    return result


def _encode_shared(
    model: DRESLCL, slides: SlideSet, tasks: Sequence[Task], chunk: int, autocast: Autocast, group: Group
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Logits and projections of all slides, on every process; each encodes every W-th one."""
    own = torch.arange(group.rank, len(slides), group.world)
    found = None
    if len(own):
        share = slides if group.world == 1 else slides.share(own)
        encoded = encode_slides(model, share, tasks, chunk=chunk, autocast=autocast, desc="validate")
        found = own, encoded.logits, encoded.report_embedding
    parts = [part for part in group.everyones(found) if part is not None]
    order = torch.cat([part[0] for part in parts]).argsort()
    logits = {name: torch.cat([part[1][name] for part in parts])[order] for name in parts[0][1]}
    projected = [part[2] for part in parts if part[2] is not None]
    return logits, torch.cat(projected)[order] if projected else None


@dataclass
class LoadedRun:
    """A trained model with what it needs to be applied: its config and its tasks."""

    model: DRESLCL
    config: Config
    tasks: list[Task]


def load_run(path: str | Path, device: str | torch.device = "cpu") -> LoadedRun:
    """Load the best model of a run folder, or a ``.safetensors`` model file, for inference.

    Raises:
        FileNotFoundError: no model there.
        ValueError: the file is damaged, or its weights do not fit its own config.
    """
    file = Path(path)
    if file.is_dir():
        file = file / on_disk.BEST
    state, card = on_disk.load_model(file)
    config: Config = config_from_dict(card["config"])
    config.model.encoder_weights = None  # the weights come from this file
    tasks = [Task.from_card(name, spec) for name, spec in card["tasks"].items()]
    model = build_model(
        config, [], card["report_dim"], {task.name: task.outputs for task in tasks}, torch.device(device)
    )
    codebook = state.pop("bank.codebook")
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.startswith("bank.")]
    if missing or unexpected:
        raise ValueError(f"{file}: weights do not fit the config: missing {missing}, unexpected {unexpected}")
    model.bank.set_codebook(codebook)
    return LoadedRun(model.eval(), config, tasks)
