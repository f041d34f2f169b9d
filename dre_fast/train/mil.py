"""Training a ResidualMIL on bags: codebook from the training bags, tasks, the best epoch by validation."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dre_fast.data.cohort import Task
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.nn.residual_mil import ResidualMIL
from dre_fast.nn.supervised import class_weights, supervised_loss
from dre_fast.progress import progress
from dre_fast.train.bag_set import BagSet
from dre_fast.train.checks import check_targets, labelled
from dre_fast.train.inference import judge_epoch
from dre_fast.train.mil_settings import MILSettings
from dre_fast.train.supervision import fit_survival

Row = dict[str, float | int | str | None]


@dataclass
class TrainedMIL:
    """A trained classifier of bags.

    Attributes:
        model: with its codebook, in evaluation mode.
        tasks: in the order of its logits, survival heads with their intervals.
        settings: it was trained with.
        epoch: whose weights it has, from 0.
        history: a row an epoch: train_loss, val_loss, val_auc_TASK, val_score ...
    """

    model: ResidualMIL
    tasks: list[Task]
    settings: MILSettings
    epoch: int
    history: list[Row] = field(default_factory=list)

    def predict(self, bags: BagSet, slides: Sequence[int] | None = None) -> SlideEmbeddings:
        """Embeddings and logits of some slides (default: all).

        Raises:
            ValueError: bags of another D than those of the training.
        """
        if bags.dim != self.model.dim:
            raise ValueError(
                f"{bags.source}: features of D={bags.dim}, the model was trained on D={self.model.dim}; extract them "
                "with the encoder of the training"
            )
        chosen = list(range(len(bags)) if slides is None else slides)
        device = self.model.classifier.weight.device
        parts = []
        with torch.no_grad(), _autocast(self.settings, device):
            self.model.eval()
            for x, offsets in bags.in_batches(chosen, "predict"):
                parts.append(self.model.embed(x.to(device), offsets.to(device)))
            embedding = torch.cat(parts)
            logits = self.model.classifier(embedding).float().cpu()
        return SlideEmbeddings(
            [bags.records[slide].slide_id for slide in chosen],
            embedding.float().cpu(),
            logits=_by_task(self.tasks, logits),
            tasks={task.name: task.card() for task in self.tasks},
        )


def train_mil(
    bags: BagSet,
    targets: Mapping[str, Tensor],
    tasks: Sequence[Task],
    train: Sequence[int],
    val: Sequence[int] = (),
    settings: MILSettings | None = None,
    *,
    device: str | torch.device = "cpu",
    seed: int | None = None,
) -> TrainedMIL:
    """Train a :class:`~dre_fast.ResidualMIL` on some slides of a set.

    The codebook is fitted to tiles of the training slides alone. With hard assignment it stands still, so every bag is
    encoded once and the epochs go over the encodings; learnable ones read the bags anew each epoch. The loss is the sum
    of the tasks' losses. The kept epoch is the one with the best validation score
    (:func:`dre_fast.train.inference.judge_epoch`), without validation slides the last.

    Args:
        bags: with a sample of tiles (``BagSet(sample=...)``).
        targets: task -> targets of all slides of ``bags``, see :meth:`dre_fast.data.cohort.Cohort.encode`.
        tasks: resolved.
        train, val: numbers of slides in ``bags``.
        device: of the model.
        seed: of this model in place of ``settings.seed``; two runs with one seed are equal.

    Raises:
        ValueError: a task that cannot learn from the training slides (named), or fewer sampled tiles than codewords.
        FloatingPointError: the loss is not finite.
    """
    settings, device = settings or MILSettings(), torch.device(device)
    seed = settings.seed if seed is None else seed
    own = {name: target[list(train)] for name, target in targets.items()}
    check_targets(tasks, own, {name: t[list(val)] for name, t in targets.items()} if val else None)
    tasks = fit_survival(tasks, own)
    learners = [i for i in train if any(_has_label(targets[task.name][i]) for task in tasks)]
    weights = {
        task.name: None
        if task.kind == "survival"
        else class_weights(task.kind, own[task.name], task.outputs, settings.balance)
        for task in tasks
    }

    def loss_of(task: Task, logits: Tensor, target: Tensor) -> Tensor:
        weight = weights[task.name]
        return supervised_loss(
            task.kind, logits, target.to(logits.device), weight=weight, method=task.method, edges=task.edges
        )

    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked):
        torch.manual_seed(seed)
        model = settings.build(bags.dim, sum(task.outputs for task in tasks)).to(device)
        _fit_codebook(model, bags, train, settings, seed)
        forward = _forward_of(model, bags, [*learners, *val])
        found = _run_epochs(model, tasks, targets, learners, val, settings, forward, loss_of, seed, device)
    return TrainedMIL(model.eval(), list(tasks), settings, *found)


def _run_epochs(
    model: ResidualMIL,
    tasks: Sequence[Task],
    targets: Mapping[str, Tensor],
    train: Sequence[int],
    val: Sequence[int],
    settings: MILSettings,
    forward: Callable[[Sequence[int]], Tensor],
    loss_of: Callable[[Task, Tensor, Tensor], Tensor],
    seed: int,
    device: torch.device,
) -> tuple[int, list[Row]]:
    """All epochs; leaves the best weights in the model, and returns their epoch and the history."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    order = torch.Generator().manual_seed(seed)
    batches = -(-len(train) // settings.batch_size)
    steps, step = settings.epochs * batches, 0
    best: tuple[float, int, dict[str, Tensor]] | None = None
    history: list[Row] = []
    for epoch in progress(range(settings.epochs), "epochs", unit="epoch"):
        model.train()
        total, started = 0.0, time.perf_counter()
        for part in torch.randperm(len(train), generator=order).tensor_split(batches):
            slides = [train[i] for i in part.tolist()]
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _rate(step, steps)
            with _autocast(settings, device):
                logits = forward(slides)
            loss = _total(tasks, logits, targets, slides, loss_of)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is not finite in epoch {epoch} (slides {', '.join(map(str, slides[:5]))} ...); lower --lr"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
            optimizer.step()
            total, step = total + loss.item() * len(slides), step + 1
        row: Row = {"epoch": epoch, "train_loss": total / len(train)}
        if val:
            found, score = _judge(model, tasks, targets, val, settings, forward, loss_of, device)
            row |= {**found, "val_score": score}
            if best is None or math.isnan(best[0]) or score > best[0]:
                best = score, epoch, copy.deepcopy(model.state_dict())
        history.append({**row, "seconds": time.perf_counter() - started})
    if best is not None:
        model.load_state_dict(best[2])
    return settings.epochs - 1 if best is None else best[1], history


def _judge(
    model: ResidualMIL,
    tasks: Sequence[Task],
    targets: Mapping[str, Tensor],
    val: Sequence[int],
    settings: MILSettings,
    forward: Callable[[Sequence[int]], Tensor],
    loss_of: Callable[[Task, Tensor, Tensor], Tensor],
    device: torch.device,
) -> tuple[Row, float]:
    model.eval()
    with torch.no_grad(), _autocast(settings, device):
        parts = [forward(val[i : i + settings.batch_size]) for i in range(0, len(val), settings.batch_size)]
    logits = _by_task(tasks, torch.cat(parts).float().cpu())
    own = {task.name: targets[task.name][list(val)] for task in tasks}
    return judge_epoch(tasks, logits, own, loss_of, {task.name: 1.0 for task in tasks})


def _total(
    tasks: Sequence[Task],
    logits: Tensor,
    targets: Mapping[str, Tensor],
    slides: Sequence[int],
    loss_of: Callable[[Task, Tensor, Tensor], Tensor],
) -> Tensor:
    parts = _by_task(tasks, logits)
    return sum(
        (loss_of(task, parts[task.name], targets[task.name][list(slides)]) for task in tasks),
        logits.new_zeros(()).float(),
    )


def _forward_of(model: ResidualMIL, bags: BagSet, slides: Sequence[int]) -> Callable[[Sequence[int]], Tensor]:
    """Slides -> logits [B, C] in the model's present state."""
    device = model.classifier.weight.device
    if model.encoding.learnable:

        def read(some: Sequence[int]) -> Tensor:
            x, offsets = bags.ragged(some)
            return model(x.to(device), offsets.to(device))  # type: ignore[no-any-return]

        return read
    with torch.no_grad():
        sums = torch.cat(
            [
                model.sums(x.to(device), offsets.to(device)).cpu()
                for x, offsets in bags.in_batches(slides, "encode")
            ]
        )
    place = {slide: row for row, slide in enumerate(slides)}

    def look_up(some: Sequence[int]) -> Tensor:
        chosen = sums[[place[slide] for slide in some]].to(device)
        return model.classifier(model.embed_sums(chosen))  # type: ignore[no-any-return]

    return look_up


def _fit_codebook(
    model: ResidualMIL, bags: BagSet, train: Sequence[int], settings: MILSettings, seed: int
) -> None:
    if not bags.samples:
        raise ValueError(
            "these bags hold no sample of tiles to fit a codebook to: BagSet(..., sample=100_000)"
        )
    device = model.classifier.weight.device
    samples = torch.cat([bags.samples[slide] for slide in train])
    model.fit_codebook(samples.to(device), seed=seed, iterations=settings.kmeans_iterations)


def _by_task(tasks: Sequence[Task], logits: Tensor) -> dict[str, Tensor]:
    parts = logits.split([task.outputs for task in tasks], dim=1)
    return {task.name: part for task, part in zip(tasks, parts)}


def _has_label(target: Tensor) -> bool:
    return bool(labelled(target).any())


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: it rises over the first twentieth of the steps, then falls along a cosine."""
    return min(1.0, (step + 1) / max(steps / 20, 1.0)) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def _autocast(settings: MILSettings, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.amp == "bf16")
