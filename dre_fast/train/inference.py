"""Applying a slide model: every tile is encoded, the bank is not used (DRE-SLCL, inference)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from dre_fast.train.checks import labelled
from dre_fast.train.config import Config, DataConfig, config_from_dict
from dre_fast.train.distributed import Group
from dre_fast.train.read_ahead import chunks_of, read_jobs
from dre_fast.train.tile_scales import check_scales

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
def encode_slides(
    model: DRESLCL,
    slides: SlideSet,
    tasks: Sequence[Task],
    *,
    chunk: int = 256,
    data: DataConfig | None = None,
    autocast: Autocast = contextlib.nullcontext,
    desc: str = "encode",
) -> SlideEmbeddings:
    """Slide embeddings, projections into the report space and task logits of every slide of a set.

    Args:
        data: ``workers`` processes read ahead; with ``on_error="skip"`` slides that cannot be read are left out.

    Raises:
        ValueError: a slide that cannot be read (named), or none that can.
        OSError: a process that reads died.
    """
    data = DataConfig() if data is None else data
    outputs: list[SlideOutput] = []
    there: list[int] = []
    for slide, features in progress(
        _features_of(model, slides, chunk, autocast, data), desc, total=len(slides), unit="slide"
    ):
        if isinstance(features, ValueError):
            if data.on_error == "stop" or (slide + 1 == len(slides) and not outputs):
                raise features
            warnings.warn(f"left out: {features}", stacklevel=2)
            continue
        with autocast():
            outputs.append(model.encode_bags(features))
        there.append(slide)

    def stack(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).float().cpu()

    reports = [out.report for out in outputs if out.report is not None]
    return SlideEmbeddings(
        slide_ids=[slides.records[slide].slide_id for slide in there],
        embedding=stack([out.embedding for out in outputs]),
        report_embedding=stack(reports) if reports else None,
        logits={name: stack([out.logits[name] for out in outputs]) for name in model.heads},
        tasks={task.name: task_card(task) for task in tasks},
    )


def _features_of(
    model: DRESLCL, slides: SlideSet, chunk: int, autocast: Autocast, data: DataConfig
) -> Iterator[tuple[int, Tensor | ValueError]]:
    """Each slide with its features [n, D], or with the first error of reading it."""
    model.eval()
    device = model.codebook.device
    jobs = chunks_of(slides.reader.tiles_per_slide, chunk)
    names = [record.slide_id for record in slides.records]
    read = read_jobs(
        slides.reader, jobs, names, workers=data.workers, threads=data.threads, slow=data.slow_seconds
    )
    parts: list[Tensor] = []
    error: ValueError | None = None
    for position, ((slide, _), images) in enumerate(zip(jobs, read)):
        if isinstance(images, ValueError):
            error = error or images
        elif error is None:
            with torch.no_grad(), autocast():
                parts.append(model.encode_tiles(images.to(device, non_blocking=True)))
        if position + 1 == len(jobs) or jobs[position + 1][0] != slide:
            yield slide, torch.cat(parts) if error is None else error
            parts, error = [], None


def validate(
    model: DRESLCL,
    slides: SlideSet,
    tasks: Sequence[Task],
    loss: SlideReportLoss | None,
    report_matrix: Tensor | None,
    *,
    chunk: int,
    group: Group,
    data: DataConfig,
    supervised: Callable[[Task, Tensor, Tensor], Tensor],
    weights: Mapping[str, float],
    autocast: Autocast = contextlib.nullcontext,
) -> dict[str, float | int | str | None]:
    """Validation losses, AUCs and c-indices of a set of slides, shared out to the processes of a group.

    ``val_score``, by which the best model is kept, is the mean over the tasks of AUC (survival tasks: c-index), where it
    is defined, with the loss L as tie-breaker (less L / (1 + L) / 1000); without any, it is minus the loss. ``val_loss``
    is the run's own, its parts by their weights; a task without a label among the slides has no part in it.

    Args:
        supervised: (task, logits, target) -> loss.
        weights: of ``contrastive`` and of each task in the loss of the run.
    """
    there, logits, projected = _encode_shared(model, slides, tasks, chunk, autocast, group, data)
    rows, targets = slides.report_rows[there], {name: t[there] for name, t in slides.targets.items()}
    result: dict[str, float | int | str | None] = {}
    total = 0.0
    if loss is not None and report_matrix is not None and projected is not None:
        known = rows >= 0
        if known.any():
            cases = rows[known].to(report_matrix.device)
            with torch.no_grad():
                value = loss.among(projected[known].to(report_matrix.device), report_matrix[cases], cases)
            result["val_loss_contrastive"] = value.item()
            total += weights["contrastive"] * value.item()
    found, score = judge_epoch(tasks, logits, targets, supervised, weights, total)
    return {**result, **found, "val_score": score}


def judge_epoch(
    tasks: Sequence[Task],
    logits: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    supervised: Callable[[Task, Tensor, Tensor], Tensor],
    weights: Mapping[str, float],
    other_loss: float = 0.0,
) -> tuple[dict[str, float | int | str | None], float]:
    """What a model says of validation slides, judged by their labels; tasks without a label among them are passed over.

    Args:
        logits, targets: by task. supervised: (task, logits, target) -> loss. weights: of the tasks' losses.
        other_loss: of the validation slides, besides that of the tasks.

    Returns:
        ``val_loss_TASK``, ``val_auc_TASK`` or ``val_c_index_TASK``, and ``val_loss``, all of it together; and the score
        of :func:`validate`.
    """
    result: dict[str, float | int | str | None] = {}
    scores, total = [], other_loss
    for task in tasks:
        own, target = logits[task.name], targets[task.name]
        if not labelled(target).any():
            continue
        judged = supervised(task, own, target).item()
        result[f"val_loss_{task.name}"] = judged
        total += weights[task.name] * judged
        if task.kind == "survival":
            metric, score = "c_index", c_index(task.method, own, target)
        else:
            metric, score = "auc", auc(task.kind, own, target)
        result[f"val_{metric}_{task.name}"] = score
        if score is not None:
            scores.append(score)
    result["val_loss"] = total
    return result, sum(scores) / len(scores) - 1e-3 * (1 - 1 / (1 + total)) if scores else -total


def _encode_shared(
    model: DRESLCL,
    slides: SlideSet,
    tasks: Sequence[Task],
    chunk: int,
    autocast: Autocast,
    group: Group,
    data: DataConfig,
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Slides that could be read, their logits and projections, on every process; each encodes every W-th one."""
    own = torch.arange(group.rank, len(slides), group.world)
    found = None
    if len(own):
        share = slides if group.world == 1 else slides.share(own)
        encoded = encode_slides(
            model, share, tasks, chunk=chunk, data=data, autocast=autocast, desc="validate"
        )
        ids = [record.slide_id for record in share.records]
        kept = own[[ids.index(name) for name in encoded.slide_ids]]
        found = kept, encoded.logits, encoded.report_embedding
    parts = [part for part in group.everyones(found) if part is not None]
    there = torch.cat([part[0] for part in parts])
    order = there.argsort()
    logits = {name: torch.cat([part[1][name] for part in parts])[order] for name in parts[0][1]}
    projected = [part[2] for part in parts if part[2] is not None]
    return there[order], logits, torch.cat(projected)[order] if projected else None


@dataclass
class LoadedRun:
    """A trained model with what it needs to be applied: its config and its tasks."""

    model: DRESLCL
    config: Config
    tasks: list[Task]
    tiles: list[dict[str, float | None]] | None = None  # of the training, see `scales_seen`; None: not told

    def check_tiles(self, slides: SlideSet) -> None:
        """Raises ValueError where the tiles of some slides are of another size or resolution than the training's."""
        check_scales(slides.reader.tilings, self.tiles)


def load_run(path: str | Path, device: str | torch.device = "cpu") -> LoadedRun:
    """Load the best model of a run folder or of an exported one, or a ``.safetensors`` model file, for inference.

    Raises:
        FileNotFoundError: no model there.
        ValueError: the file is damaged, of another kind of model, or its weights do not fit its own config.
    """
    file = Path(path)
    if file.is_dir():
        exported = not (file / on_disk.BEST).exists() and (file / on_disk.EXPORTED).exists()
        file = file / (on_disk.EXPORTED if exported else on_disk.BEST)
    state, card = on_disk.load_model(file)
    if card.get("kind", "run") != "run":
        raise ValueError(
            f"{file}: a model of `dre-fast mil`, of stored features: dre-fast mil-deploy applies it"
        )
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
    return LoadedRun(model.eval(), config, tasks, card.get("tiles"))
