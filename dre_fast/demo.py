"""The whole path in one go: synthetic slides and reports, tiling, training, evaluation, one page to look at."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from dre_fast.data.files import write_text_atomic
from dre_fast.train.config import Config, load_config

SUMMARY = "summary.json"
MARKER = ".dre_fast_demo"
TILE, MPP = 64, 1.0
SLIDE_SIZE = (1152, 896)
WARM_UP_STEPS = 50
CONFIG = """
data: {backend: openslide, stain: 0.25}
model:
  encoder: conv-tiny
  encoder_args: {dim: 32, width: 16}
  codewords: 8
  width: 64
  depth: 1
  heads: 4
  dropout: 0.1
memory: {mode: full, dtype: int8, live: 24, refit_every: 1, kmeans_iterations: 5}
loss:
  contrastive: infonce
  contrastive_weight: 0.5
  tasks:
    - {name: subtype, kind: multiclass}
    - {name: tumour, kind: multiclass}
    - {name: genes, kind: multilabel, columns: [EGFR, TP53], weight: 0.5}
optim: {epochs: 45, batch_size: 8, lr: 2.0e-3, encoder_lr_scale: 0.05, head_warmup_epochs: 3, weight_decay: 0.05}
run: {validate_every: 3, checkpoint_every: 1000}
"""


def run_demo(
    out: str | Path, *, seed: int = 0, slides: tuple[int, int, int] = (160, 32, 64)
) -> dict[str, Any]:
    """Generate, tile, embed, train end to end and frozen, evaluate, draw. Returns the summary.

    Args:
        out: folder; a finished demo in it is moved aside (``demo-1``, ``demo-2``, ...), an unfinished one replaced, any
            other content refused.
        seed: of everything.
        slides: training, validation and test slides.

    Files: ``summary.json``, ``index.html`` (self-contained), ``cohort/``, ``tiles/``, ``reports.safetensors``,
    ``warm_encoder.safetensors`` (where both runs start), ``end_to_end/`` and ``frozen/`` (runs with predictions and
    tables), ``figures/``.

    Raises:
        ValueError: ``out`` holds something else than a demo.
    """
    started = time.perf_counter()
    out = Path(out)
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise ValueError(f"{out} is not empty and not a former demo; name another folder with --out")
    if (out / SUMMARY).exists():
        aside = next(path for n in count(1) if not (path := out.with_name(f"{out.name}-{n}")).exists())
        out.rename(aside)
        print(f"note: the demo of before is in {aside} now", file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()

    step = _Steps(8)
    step("painting a synthetic cohort of slides")
    cohort_csv = _cohort(out / "cohort", slides, seed)
    step("finding tissue and tiling")
    _tile(cohort_csv, out / "tiles")
    step("embedding the reports")
    _embed_reports(cohort_csv, out / "reports.safetensors")
    step("warming up the tile encoder without labels")
    config = _config(cohort_csv, out, seed)
    _warm_up(config)
    step("training end to end")
    train(config, out / "end_to_end")
    step("training the same model with its tile encoder frozen")
    train(replace(config, optim=replace(config.optim, freeze_encoder=True)), out / "frozen")
    step("evaluating on unseen slides")
    tables = {name: evaluate(out / name, cohort_csv, out / "tiles") for name in ("end_to_end", "frozen")}
    step("drawing curves and heatmaps")
    summary = {
        "subtyping_auc": tables["end_to_end"]["subtype"],
        "frozen_subtyping_auc": tables["frozen"]["subtype"],
        "recognition_auc": tables["end_to_end"]["tumour"],
        "frozen_recognition_auc": tables["frozen"]["tumour"],
        "mutation_auc": tables["end_to_end"]["genes"],
        "frozen_mutation_auc": tables["frozen"]["genes"],
        "slides": dict(zip(("train", "val", "test"), slides)),
        "seed": seed,
    }
    from dre_fast.demo_page import draw_page

    draw_page(out, cohort_csv, config, summary)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    summary["peak_rss_mb"] = round(_peak_rss_mb(), 1)
    write_text_atomic(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


class _Steps:
    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.perf_counter()

    def __call__(self, what: str) -> None:
        self.done += 1
        elapsed = time.perf_counter() - self.started
        print(f"[{self.done}/{self.total}] {elapsed:5.0f} s  {what}", file=sys.stderr, flush=True)


def _cohort(folder: Path, slides: tuple[int, int, int], seed: int) -> Path:
    from dre_fast.data.synthetic import make_cohort

    train_slides, val, test = slides
    return make_cohort(
        folder, train=train_slides, val=val, test=test, seed=seed, size=SLIDE_SIZE, stain_variation=2.0
    )


def _tile(cohort_csv: Path, folder: Path) -> None:
    from dre_fast.cli import main

    _must(
        main(["tile", str(cohort_csv), "--out", str(folder), "--tile-size", str(TILE), "--mpp-out", str(MPP)])
    )


def _embed_reports(cohort_csv: Path, file: Path) -> None:
    from dre_fast.cli import main

    _must(main(["embed-reports", str(cohort_csv), "--out", str(file)]))


def _must(code: int) -> None:
    if code:
        raise ValueError("the demo stopped: the command above failed")


def _config(cohort_csv: Path, out: Path, seed: int) -> Config:
    import yaml

    path = out / "demo.yaml"
    tree = yaml.safe_load(CONFIG)
    tree["data"].update(
        cohort=str(cohort_csv),
        tiles=str(out / "tiles"),
        reports=str(out / "reports.safetensors"),
        cache=str(out / "cache"),
    )
    tree["model"]["encoder_weights"] = str(out / "warm_encoder.safetensors")
    tree["run"]["seed"] = seed
    write_text_atomic(path, yaml.safe_dump(tree, sort_keys=False))
    return load_config(path)


def _warm_up(config: Config) -> None:
    """Encoders usually come pretrained. Nothing is downloaded here, so a short label-free start stands in for that."""
    import torch

    from dre_fast.data.cohort import Cohort
    from dre_fast.nn.tile_encoders import build_tile_encoder
    from dre_fast.train.build import slide_set
    from dre_fast.train.pretrain import pretrain_encoder, save_encoder

    assert config.model.encoder_weights is not None
    assert config.data.cache is not None
    train_slides = Cohort.read(config.data.cohort).subset("train")
    cache = Path(config.data.cache) / "train.h5"
    slides = slide_set(train_slides, train_slides.records, config.data.tiles, cache=cache)
    torch.manual_seed(config.run.seed)
    encoder = build_tile_encoder(config.model.encoder, **config.model.encoder_args)
    pretrain_encoder(encoder, slides.reader, steps=WARM_UP_STEPS, seed=config.run.seed)
    save_encoder(encoder, config.model.encoder_weights)


def train(config: Config, folder: Path) -> None:
    """One run of the demo."""
    from dre_fast.train.loop import Trainer

    Trainer(config, folder).fit()


def evaluate(run: Path, cohort_csv: Path, tiles: Path) -> dict[str, float | None]:
    """Encode the test slides, write predictions and tables into the run's folder; return task -> AUC."""
    from dre_fast.data.cohort import Cohort
    from dre_fast.eval.metrics import evaluate_predictions, write_tables
    from dre_fast.train.build import slide_set
    from dre_fast.train.inference import encode_slides, load_run

    loaded = load_run(run)
    cohort = Cohort.read(cohort_csv)
    test = cohort.subset("test")
    slides = slide_set(test, test.records, tiles)
    encoded = encode_slides(loaded.model, slides, loaded.tasks)
    encoded.save(run / "test.safetensors")
    rows = evaluate_predictions(encoded, cohort, split="test")
    write_tables(rows, run / "test_metrics")
    return {task.name: _auc(rows, task.name) for task in loaded.tasks}


def _auc(rows: list[Any], task: str) -> float | None:
    found = [row.value for row in rows if row.task == task and row.metric == "auc" and row.column is None]
    return found[0] if found else None


def _peak_rss_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
