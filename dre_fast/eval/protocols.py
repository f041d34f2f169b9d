"""Cross-validation by case: one run a fold, predictions of every slide by a model that never saw its case."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dre_fast.data.bag_cohort import refuse_shared_report
from dre_fast.data.cohort import Cohort, Task
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.data.files import write_text_atomic
from dre_fast.data.multiscale import scales_of
from dre_fast.data.tiles import fingerprint
from dre_fast.eval.fold_scores import (
    FoldScore,
    average_predictions,
    fold_scores,
    pool_predictions,
    score_grid,
)
from dre_fast.eval.folds import (
    fold_numbers,
    freeze_folds,
    frozen_folds,
    refuse_overlap,
    split_for,
    with_folds,
    write_cohort,
)
from dre_fast.eval.metrics import LEVELS, MetricRow, evaluate_predictions
from dre_fast.train.build import SlideSet, slide_set
from dre_fast.train.checks import check_folder, check_same_config, pick_device
from dre_fast.train.config import Config, ConfigError, DataConfig, save_config
from dre_fast.train.inference import encode_slides, load_run
from dre_fast.train.loop import Trainer
from dre_fast.train.shards import with_shards
from dre_fast.train.state import CONFIG, METRICS

FOLDS, PROTOCOL = "folds.csv", "protocol.json"
PREDICTIONS, OUT_OF_FOLD = "predictions.safetensors", "out_of_fold.safetensors"


@dataclass(frozen=True)
class Judging:
    """How predictions are judged; see :func:`dre_fast.eval.metrics.evaluate_predictions`."""

    level: str = "slide"
    bootstrap: int = 1000
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.level not in LEVELS or self.bootstrap < 0 or not 0 < self.confidence < 1:
            raise ValueError(
                f"level must be slide or patient, bootstrap >= 0 and confidence in (0, 1), got {self.level!r}, "
                f"{self.bootstrap} and {self.confidence}"
            )


@dataclass(frozen=True)
class External:
    """A cohort that no fold's model has seen: its slides with labels, their tiles, the tasks judged on it."""

    cohort: Cohort
    slides: SlideSet
    tasks: list[str]


class CrossValidation:
    """A cross-validation in one folder.

    Files: config.yaml; protocol.json (how validation slides are chosen); folds.csv, the folds as they were when it
    began; fold-N/, each a run of its own with its cohort.csv and predictions of its test slides;
    out_of_fold.safetensors, scores.csv and scores.md; external/ where another cohort was judged.

    Args:
        config: of every run; its cohort's column ``split`` is not used, ``fold`` is if there.
        out: folder.
        folds: how many; None: as many as the cohort's ``fold`` column has, or 5, or as many as the folder has.
        validation: ``"fold"`` (the next fold), ``"none"``, or a share of the other cases in (0, 1); None: ``"fold"``,
            or what the folder says.
        resume: go on in a folder that holds a cross-validation; without it such a folder is refused.

    Raises:
        ValueError: bad config or cohort (named), no task to judge, a folder that holds a cross-validation or one of
            other settings, folds or data.
    """

    def __init__(
        self,
        config: Config,
        out: str | Path,
        *,
        folds: int | None = None,
        validation: str | float | None = None,
        resume: bool = False,
    ) -> None:
        self.out, self.resume = Path(out), resume
        config = with_shards(config, None, 1).validate().with_absolute_paths()
        self.config = config
        if not config.loss.tasks:
            raise ConfigError("loss.tasks is empty: cross-validation judges the predictions of tasks")
        if "RANK" in os.environ:
            raise ValueError(
                "cross-validate runs in one process; to train a fold in several, use `torchrun ... dre-fast train` with "
                "its cohort.csv as data.cohort"
            )
        if (self.out / FOLDS).exists() and not resume:
            raise ValueError(
                f"{self.out} already holds a cross-validation: pass --resume to go on with it, or name another folder"
            )
        began = (self.out / FOLDS).exists()  # it is written last
        if began:
            check_same_config(self.out / CONFIG, config)
        elif (self.out / METRICS).exists():
            raise ValueError(f"{self.out} holds a run; name another folder for a cross-validation")
        cohort = Cohort.read(config.data.cohort, missing_values=config.data.missing_values)
        self.tasks = [
            cohort.resolve(
                Task(task.name, task.kind, tuple(task.classes), tuple(task.columns), task.method, task.bins)
            )
            for task in config.loss.tasks
        ]
        if cohort.splits and not began:
            warnings.warn(
                f"{cohort.source}: column 'split' is not used; every slide is in a fold", stacklevel=2
            )
        self.validation = self._validation(validation, began)
        columns = list(dict.fromkeys(column for task in self.tasks for column in task.columns))
        file = self.out / FOLDS
        if began:
            self.cohort = frozen_folds(cohort, file, columns, folds=folds)
        else:
            self.cohort = with_folds(cohort, self.tasks, folds=folds, seed=config.run.seed)
        refuse_shared_report(self.cohort, "fold")
        self.folds = fold_numbers(self.cohort)
        rounds = {fold: self._split(fold) for fold in self.folds}  # all of them before anything is written
        write_text_atomic(self.out / PROTOCOL, json.dumps({"validation": self.validation}) + "\n")
        save_config(config, self.out / CONFIG)
        for fold, splits in rounds.items():
            write_cohort(splits, self.folder(fold) / "cohort.csv")
        if not began:
            freeze_folds(self.cohort, file, columns)

    def folder(self, fold: int) -> Path:
        """Of the run of a fold."""
        return self.out / f"fold-{fold}"

    def train(self) -> None:
        """Train every fold that is not finished, and predict its test slides."""
        for fold in self.folds:
            config, folder = self._fold_config(fold), self.folder(fold)
            if (folder / PREDICTIONS).exists():
                check_folder(folder, config, resume=True)
                continue
            print(f"fold {fold}: {self._describe(fold)}", file=sys.stderr)
            Trainer(config, folder, resume=self.resume).fit()
            cohort = self._split(fold).subset("test")
            encode_with(folder, _open(cohort, config.data.tiles, config.data), config).save(
                folder / PREDICTIONS
            )

    def judge(self, how: Judging) -> list[FoldScore]:
        """Scores of the out-of-fold predictions; writes them all to out_of_fold.safetensors, scores.csv and scores.md.

        The joint score ranks predictions of different models against each other, with an interval by case; c-indices
        compare slides of one fold only.
        """
        parts = {fold: SlideEmbeddings.load(self.folder(fold) / PREDICTIONS) for fold in self.folds}
        pooled = pool_predictions(list(parts.values()))
        pooled.save(self.out / OUT_OF_FOLD)
        per_fold = {
            fold: self._rows(part, self._split(fold).subset("test"), how, bootstrap=0)
            for fold, part in parts.items()
        }
        fold_of = {slide: fold for fold, part in parts.items() for slide in part.slide_ids}
        scores = fold_scores(per_fold, self._rows(pooled, self.cohort, how, model_of=fold_of))
        score_grid(scores, "pooled").write(self.out / "scores")
        return scores

    def open_external(self, table: str | Path, tiles: str | Path) -> External:
        """Another cohort, checked: it shares nothing with the one trained on, and has labels and tiles.

        Tasks whose columns it lacks are left out with a warning.

        Raises:
            ValueError: a case, slide or file of the cohort is among those trained on, it has the labels of no task, or
                a label that the models do not know.
        """
        data = self.config.data
        cohort = Cohort.read(table, missing_values=data.missing_values)
        refuse_overlap(self.cohort, cohort)
        tasks = [task for task in self.tasks if set(task.columns) <= set(cohort.label_names)]
        absent = ", ".join(task.name for task in self.tasks if task not in tasks)
        if not tasks:
            raise ValueError(f"{table}: has the label columns of no task ({absent})")
        if absent:
            warnings.warn(f"{table}: no label columns for {absent}; not judged", stacklevel=2)
        for task in tasks:
            cohort.encode(task)
        return External(cohort, _open(cohort, tiles, data), [task.name for task in tasks])

    def judge_external(self, external: External, how: Judging) -> list[FoldScore]:
        """Scores of every fold's model, and jointly of the average of their probabilities, on another cohort.

        Writes external/fold-N.safetensors, external/averaged.safetensors, external/scores.csv and scores.md. What is
        there of other slides or tiles is removed.
        """
        folder = self.out / "external"
        _keep_only_of(external.slides, folder)
        parts = {}
        for fold in self.folds:
            file = folder / f"fold-{fold}.safetensors"
            if not file.exists():
                encode_with(self.folder(fold), external.slides, self.config).save(file)
            parts[fold] = SlideEmbeddings.load(file)
        averaged = average_predictions(list(parts.values()))
        averaged.save(folder / "averaged.safetensors")
        cohort, tasks = external.cohort, external.tasks
        per_fold = {fold: self._rows(part, cohort, how, tasks, bootstrap=0) for fold, part in parts.items()}
        scores = fold_scores(per_fold, self._rows(averaged, cohort, how, tasks))
        score_grid(scores, "averaged").write(folder / "scores")
        return scores

    def _rows(
        self,
        part: SlideEmbeddings,
        cohort: Cohort,
        how: Judging,
        tasks: Sequence[str] | None = None,
        bootstrap: int | None = None,
        model_of: Mapping[str, int] | None = None,
    ) -> list[MetricRow]:
        return evaluate_predictions(
            part,
            cohort,
            tasks=tasks,
            level=how.level,
            bootstrap=how.bootstrap if bootstrap is None else bootstrap,
            confidence=how.confidence,
            seed=self.config.run.seed,
            allow_missing=self.config.data.skip_untiled,
            model_of=model_of,
        )

    def _validation(self, asked: str | float | None, began: bool) -> str | float:
        file = self.out / PROTOCOL
        kept = json.loads(file.read_text(encoding="utf-8"))["validation"] if began else None
        if asked is None:
            return "fold" if kept is None else kept  # type: ignore[no-any-return]
        if kept is not None and kept != asked:
            raise ValueError(f"{file}: validation was {kept!r} when it began and is {asked!r} now")
        if asked not in ("fold", "none") and not (isinstance(asked, float) and 0 < asked < 1):
            raise ValueError(f"validation must be 'fold', 'none' or a share between 0 and 1, got {asked!r}")
        return asked

    def _split(self, fold: int) -> Cohort:
        return split_for(self.cohort, fold, self.validation, self.tasks, self.config.run.seed)

    def _fold_config(self, fold: int) -> Config:
        config = copy.deepcopy(self.config)
        config.data.cohort = str(self.folder(fold) / "cohort.csv")
        config.data.train_split = "train"
        config.data.val_split = None if self.validation == "none" else "val"
        if config.data.cache:
            config.data.cache = str(Path(config.data.cache) / f"fold-{fold}")
        return config.with_absolute_paths()

    def _describe(self, fold: int) -> str:
        slides = self._split(fold).splits
        return (
            ", ".join(f"{slides[split]} {split}" for split in ("train", "val", "test") if split in slides)
            + " slides"
        )


def encode_with(run: str | Path, slides: SlideSet, config: Config) -> SlideEmbeddings:
    """Embeddings and predictions of some slides by the best model of a run, with the device and autocast of a config."""
    device = pick_device(config.run.device)
    loaded = load_run(run, device)
    loaded.check_tiles(slides)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.optim.amp)

    def autocast() -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()

    return encode_slides(loaded.model, slides, loaded.tasks, chunk=config.run.encode_chunk, autocast=autocast)


def _open(cohort: Cohort, tiles: str | Path | list[str], data: DataConfig) -> SlideSet:
    return slide_set(
        cohort,
        cohort.records,
        tiles,
        backend=data.backend,
        mpp=data.mpp,
        max_open=data.max_open,
        skip_untiled=data.skip_untiled,
    )


def _keep_only_of(slides: SlideSet, folder: Path) -> None:
    """Removes predictions that were made for other slides or tiles, and notes whose are made now."""
    marks = [fingerprint(t) for joined in slides.reader.tilings for t in scales_of(joined)]
    mark = hashlib.sha256("".join(marks).encode()).hexdigest()[:32]
    note = folder / "slides.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")).get("tiles") != mark:
        shutil.rmtree(folder)
    write_text_atomic(note, json.dumps({"slides": len(slides), "tiles": mark}) + "\n")
