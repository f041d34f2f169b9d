"""Maps of one slide: codeword of each tile, and each tile's first-order contribution to a logit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dre_fast.data.cohort import SlideRecord, Task
from dre_fast.data.multiscale import scales_of
from dre_fast.data.slides import open_slide
from dre_fast.eval.geojson import write_geojson
from dre_fast.eval.heatmap import draw_codewords, draw_contributions
from dre_fast.eval.metrics import probabilities
from dre_fast.nn.aggregators import RowAggregator
from dre_fast.nn.contributions import contributions
from dre_fast.nn.model import padded
from dre_fast.reference.encode import hard_assign
from dre_fast.train.build import SlideSet
from dre_fast.train.inference import LoadedRun, encode_tiles_of


@dataclass
class Explanation:
    """``codes`` int64 [N] and ``contribution`` fp32 [N] of the tiles of a slide to the logit named ``target``.

    ``logit`` is its value, ``probability`` what that means; None for survival tasks, whose logits are risks and hazards.
    """

    codes: Tensor
    contribution: Tensor
    target: str
    logit: float
    probability: float | None

    @property
    def score(self) -> str:
        """The logit or its probability in words."""
        return (
            f"logit {self.logit:.2f}" if self.probability is None else f"probability {self.probability:.2f}"
        )


def pick_task(loaded: LoadedRun, name: str | None) -> Task:
    """The task called ``name``, or the first.

    Raises:
        ValueError: the model has no such task, or none at all.
    """
    names = [task.name for task in loaded.tasks]
    if not names:
        raise ValueError("this model has no supervised task: there is no logit to explain")
    if name is not None and name not in names:
        raise ValueError(f"no task {name!r}; this model has: {', '.join(names)}")
    return loaded.tasks[names.index(name) if name else 0]


def explain(loaded: LoadedRun, features: Tensor, task: Task, target: str | None = None) -> Explanation:
    """Contributions of the rows ``features`` [N, D] (L2-normalised) of one slide to a logit of ``task``.

    The logit is a function of V; its first-order term splits over the tiles as <d logit / d V_k, x_i - c_k> with
    k = a_i, so the contributions sum to <d logit / d V, V>. With an aggregator of rows it is <d logit / d x_i, x_i>.

    Args:
        target: class or column (survival: "risk", or "hazard 1" ...); default: the one with the largest logit.

    Raises:
        ValueError: ``target`` is not a class or column of the task.
    """
    model = loaded.model
    by_rows = isinstance(model.slide_encoder, RowAggregator)
    with torch.no_grad():
        summary = features if by_rows else model.encode_bags(features).residuals
    assert summary is not None
    summary = summary.detach().clone().requires_grad_(True)
    out = model.represent_rows(*padded(summary)) if by_rows else model.represent(summary)
    logits = out.logits[task.name][0]
    names = list(task.output_names)
    if target is None:
        index = int(logits.argmax())
    elif target in names:
        index = names.index(target)
    else:
        raise ValueError(f"task {task.name!r} has no {target!r}; it has: {', '.join(names)}")
    (gradient,) = torch.autograd.grad(logits[index], summary)
    codes = hard_assign(features, model.codebook)
    if by_rows:
        values = (gradient * features).sum(1)
    else:
        values = contributions(gradient[0], features, model.codebook, codes)
    chance = None if task.kind == "survival" else float(probabilities(task.kind, logits[None])[0, index])
    return Explanation(codes, values, names[index], float(logits[index].detach()), chance)


def label_of(record: SlideRecord, task: Task, target: str) -> str:
    """What the cohort says of a slide: the cell of the task's column, of a panel that of the column ``target``."""
    columns = [target] if task.kind == "multilabel" else list(task.columns)
    cells = [record.labels.get(column) for column in columns]
    return "not labelled" if None in cells else f"label {', '.join(map(str, cells))}"


def _file_name(*parts: str) -> str:
    """Names of tasks and classes as a part of a file name: classes are called "Stage I/II", too."""
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts))


def draw_slide(
    loaded: LoadedRun,
    slides: SlideSet,
    index: int,
    out: str | Path,
    *,
    task: str | None = None,
    target: str | None = None,
    chunk: int = 256,
    geojson: bool = False,
    features: Tensor | None = None,
) -> list[Path]:
    """Write the maps of one slide as PNG, with ``geojson`` also for QuPath; return their paths.

    Without a task only the codeword maps are drawn.

    A slide tiled at several magnifications gets a map of each, ``scale0``, ``scale1``, ... in its file's name.

    Args:
        features: of the slide's tiles, [n, D], where they are encoded already.
    """
    record, scales = slides.records[index], scales_of(slides.reader.tilings[index])
    if features is None:
        features = encode_tiles_of(loaded.model, slides.reader, index, chunk)
    assert record.path is not None
    slide = open_slide(record.path, mpp=scales[0].slide_mpp)
    thumbnail = slide.thumbnail(1024)
    slide.close()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    codes = hard_assign(features, loaded.model.codebook)
    explained = explain(loaded, features, pick_task(loaded, task), target) if loaded.tasks else None
    heading, task_name = record.slide_id, ""
    if explained is not None:
        explained_task = pick_task(loaded, task)
        task_name = explained_task.name
        label = label_of(record, explained_task, explained.target)
        heading += f" · {task_name} {explained.target}: {explained.score} ({label})"
    files, first = [], 0
    for scale, tiling in enumerate(scales):
        own = slice(first, first + len(tiling))
        first = own.stop
        if not len(tiling):
            continue
        name = record.slide_id if len(scales) == 1 else f"{record.slide_id}_scale{scale}"
        shown = heading if len(scales) == 1 else f"{heading} · scale {scale}"
        files.append(
            draw_codewords(
                folder / f"{name}_codewords.png",
                thumbnail,
                tiling,
                codes[own],
                len(loaded.model.codebook),
                title=shown,
            )
        )
        if explained is not None:
            stem = _file_name(task_name, explained.target)
            files.append(
                draw_contributions(
                    folder / f"{name}_{stem}.png",
                    thumbnail,
                    tiling,
                    explained.contribution[own],
                    title=shown,
                    label=f"contribution to the logit of {explained.target}",
                )
            )
        if geojson:
            measured = (
                {} if explained is None else {f"{task_name} {explained.target}": explained.contribution[own]}
            )
            files.append(
                write_geojson(
                    folder / f"{name}.geojson", tiling, codes[own], len(loaded.model.codebook), measured
                )
            )
    return files
