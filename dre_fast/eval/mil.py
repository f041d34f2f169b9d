"""Protocols of a classifier of bags: cross-validation by case, and one model on given splits."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dre_fast.data.bag_cohort import refuse_shared_file, refuse_shared_report
from dre_fast.data.cohort import Cohort, Task
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.data.files import check_writable, write_text_atomic
from dre_fast.eval.fold_scores import (
    FoldScore,
    fold_scores,
    pool_predictions,
    score_grid,
)
from dre_fast.eval.folds import (
    fold_numbers,
    freeze_folds,
    frozen_folds,
    split_for,
    with_folds,
)
from dre_fast.eval.metrics import MetricRow, write_tables
from dre_fast.eval.mil_folder import (
    BAGS,
    FOLDS,
    HISTORY,
    OUT_OF_FOLD,
    PREDICTIONS,
    SETTINGS,
    SPLITS,
    began_in,
    cards_of,
    check_same_bags,
    check_same_settings,
    columns_of,
    csv_text,
    judge_calibration,
    judged_rows,
    open_bags,
    write_bags,
)
from dre_fast.eval.predictions_csv import write_predictions
from dre_fast.eval.protocols import Judging
from dre_fast.train.bag_set import BagSet
from dre_fast.train.checks import check_targets, pick_device
from dre_fast.train.cost import cost_of_features, read_cost, together, write_cost
from dre_fast.train.mil import TrainedMIL, train_mil
from dre_fast.train.mil_files import save_mil
from dre_fast.train.mil_settings import MILSettings


class MILCrossValidation:
    """One model a fold of cases, in one folder.

    Files: settings.json; folds.csv, the folds as they were when it began; bags.csv, number of tiles and a mark of the
    features of each slide; fold-N/ with model.safetensors, model.json (its card), history.csv and the predictions of
    its test slides; out_of_fold.safetensors and predictions.csv; scores.csv and scores.md; calibration.csv and .png;
    cost.json, of each fold as well.

    Args:
        cohort: of :func:`dre_fast.data.bag_cohort.bag_cohort`; its column ``split`` is not used, ``fold`` is if there.
        tasks: resolved, see :func:`dre_fast.data.task_words.parse_tasks`.
        out: folder.
        settings: of every model.
        folds: how many; None: as many as the cohort's ``fold`` column has, or 5.
        validation: ``"fold"`` (the next fold), ``"none"`` (the last epoch counts), or a share of the other cases.
        resume: go on in a folder that holds a cross-validation of the same settings, folds, labels and bags.
        device: auto, cpu, cuda, cuda:N.
        memory_gb: of features kept in memory.

    Raises:
        ValueError: a cohort or bags that do not fit (named), a folder in use, or one of other settings or data.
    """

    def __init__(
        self,
        cohort: Cohort,
        tasks: Sequence[Task],
        out: str | Path,
        settings: MILSettings | None = None,
        *,
        folds: int | None = None,
        validation: str | float = "fold",
        resume: bool = False,
        device: str = "auto",
        memory_gb: float = 4.0,
    ) -> None:
        self.out, self.settings, self.validation = Path(out), settings or MILSettings(), validation
        self.device = pick_device(device)
        self.tasks = list(tasks)
        check_writable(self.out)
        began = began_in(self.out, FOLDS, resume)
        columns = columns_of(self.tasks)
        if began:
            cohort = frozen_folds(cohort, self.out / FOLDS, columns, folds=folds)
        else:
            cohort = with_folds(cohort, self.tasks, folds=folds, seed=self.settings.seed)
        refuse_shared_file(cohort, "fold")
        refuse_shared_report(cohort, "fold")
        self.cohort, self.folds = cohort, fold_numbers(cohort)
        said = {**asdict(self.settings), "validation": validation, "tasks": cards_of(self.tasks)}
        if began:
            check_same_settings(self.out / SETTINGS, said)
        self._rounds = {
            fold: self._split(fold) for fold in self.folds
        }  # all of them before anything is written
        self._check_labels()
        self.bags = open_bags(cohort, self.settings, memory_gb)
        if began:
            check_same_bags(self.bags, self.out / BAGS)
            return
        write_bags(self.bags, self.out / BAGS)
        write_text_atomic(self.out / SETTINGS, json.dumps(said, indent=2) + "\n")
        freeze_folds(cohort, self.out / FOLDS, columns)

    def folder(self, fold: int) -> Path:
        """Of the model of a fold."""
        return self.out / f"fold-{fold}"

    def train(self) -> None:
        """Train every fold that is not finished, and predict its test slides."""
        targets = self.cohort.encode_labels(self.tasks)
        for fold in self.folds:
            if (self.folder(fold) / PREDICTIONS).exists():
                continue
            parts = _parts(self._rounds[fold], self.bags)
            trained = _train(
                self.bags,
                targets,
                self.tasks,
                parts,
                self.settings,
                self.folder(fold),
                device=self.device,
                seed=self.settings.seed * 1009 + fold,
                name=f"fold {fold}",
            )
            trained.predict(self.bags, parts["test"]).save(self.folder(fold) / PREDICTIONS)
        cost = together([found for fold in self.folds if (found := read_cost(self.folder(fold))) is not None])
        write_cost(cost, self.out)
        print(cost.line(), file=sys.stderr)

    def judge(self, how: Judging | None = None) -> list[FoldScore]:
        """Scores of the out-of-fold predictions, with their files.

        The joint score ranks predictions of different models against each other, with an interval by case; c-indices
        compare slides of one fold only.
        """
        how = how or Judging()
        parts = {fold: SlideEmbeddings.load(self.folder(fold) / PREDICTIONS) for fold in self.folds}
        pooled = pool_predictions(list(parts.values()))
        pooled.save(self.out / OUT_OF_FOLD)
        fold_of = {slide: fold for fold, part in parts.items() for slide in part.slide_ids}
        write_predictions(pooled, self.cohort, self.out / "predictions.csv", {"fold": fold_of})
        per_fold = {
            fold: judged_rows(part, self._rounds[fold].subset("test"), how, self.settings.seed, bootstrap=0)
            for fold, part in parts.items()
        }
        joint = judged_rows(pooled, self.cohort, how, self.settings.seed, model_of=fold_of)
        scores = fold_scores(per_fold, joint)
        score_grid(scores, "pooled").write(self.out / "scores")
        judge_calibration(pooled, self.cohort, how, self.out)
        return scores

    def _check_labels(self) -> None:
        """Refuse a fold that cannot learn now, rather than after the training of those before it."""
        targets = self.cohort.encode_labels(self.tasks)
        for fold, splits in self._rounds.items():
            train = [i for i, record in enumerate(splits.records) if record.split == "train"]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # they are said at the fold's training
                    check_targets(self.tasks, {name: target[train] for name, target in targets.items()}, None)
            except ValueError as error:
                raise ValueError(
                    f"{self.cohort.source}, fold {fold}: {error}; label more cases, or leave the task out"
                ) from None

    def _split(self, fold: int) -> Cohort:
        return split_for(self.cohort, fold, self.validation, self.tasks, self.settings.seed)


def train_on_splits(
    cohort: Cohort,
    tasks: Sequence[Task],
    out: str | Path,
    settings: MILSettings | None = None,
    how: Judging | None = None,
    *,
    device: str = "auto",
    memory_gb: float = 4.0,
) -> list[MetricRow]:
    """One model on the splits of a cohort's column ``split``; slides without split are left out.

    Files: settings.json; splits.csv; bags.csv; model.safetensors, model.json, history.csv; and for the test split
    predictions.safetensors and .csv, scores and calibration, as in :class:`MILCrossValidation`.

    Returns:
        Scores of the test slides; none without a test split.

    Raises:
        ValueError: as of :class:`MILCrossValidation`, or no slide is in the train split.
    """
    out, settings, how, tasks = Path(out), settings or MILSettings(), how or Judging(), list(tasks)
    check_writable(out)
    began_in(out, SPLITS, False)
    cohort = cohort.subset(list(cohort.splits) or ["train"])
    cohort.subset("train")
    refuse_shared_file(cohort, "split")
    refuse_shared_report(cohort, "split")
    bags = open_bags(cohort, settings, memory_gb)
    write_bags(bags, out / BAGS)
    write_text_atomic(
        out / SETTINGS, json.dumps({**asdict(settings), "tasks": cards_of(tasks)}, indent=2) + "\n"
    )
    columns = columns_of(tasks)
    rows = [[r.slide_id, r.case_id, r.split, *(r.labels[c] for c in columns)] for r in cohort.records]
    write_text_atomic(out / SPLITS, csv_text([["slide_id", "case_id", "split", *columns], *rows]))
    parts = _parts(cohort, bags)
    trained = _train(
        bags,
        cohort.encode_labels(tasks),
        tasks,
        parts,
        settings,
        out,
        device=pick_device(device),
        seed=settings.seed,
        name="one model",
    )
    if not parts["test"]:
        return []
    test = cohort.subset("test")
    predictions = trained.predict(bags, parts["test"])
    predictions.save(out / PREDICTIONS)
    write_predictions(predictions, test, out / "predictions.csv")
    found = judged_rows(predictions, test, how, settings.seed)
    write_tables(found, out / "scores")
    judge_calibration(predictions, test, how, out)
    return found


def _train(
    bags: BagSet,
    targets: Mapping[str, Any],
    tasks: Sequence[Task],
    parts: Mapping[str, list[int]],
    settings: MILSettings,
    folder: Path,
    *,
    device: Any,
    seed: int,
    name: str,
) -> TrainedMIL:
    """One model, trained and saved, with a line on stderr."""
    started = time.perf_counter()
    trained = train_mil(
        bags, targets, tasks, parts["train"], parts["val"], settings, device=device, seed=seed
    )
    rows = trained.history
    header = list(dict.fromkeys(key for row in rows for key in row if key != "seconds"))
    write_text_atomic(
        folder / HISTORY, csv_text([header, *([row.get(key) for key in header] for row in rows)])
    )
    save_mil(trained, folder)
    seconds = time.perf_counter() - started
    tiles = [bags.tiles[slide] for slide in parts["train"]]
    write_cost(cost_of_features(seconds, settings.epochs, tiles, device), folder)
    slides = ", ".join(f"{len(numbers)} {split}" for split, numbers in parts.items() if numbers)
    kept = rows[trained.epoch]
    shown = [
        f"{key.replace('_', ' ')} {value:.3f}"
        for key, value in kept.items()
        if key.startswith(("val_auc", "val_c_index")) and isinstance(value, float)
    ]
    print(
        f"{name}: {slides} slides; epoch {trained.epoch + 1} of {settings.epochs} kept"
        f"{', ' if shown else ''}{', '.join(shown)} ({seconds:.1f} s)",
        file=sys.stderr,
    )
    return trained


def _parts(cohort: Cohort, bags: BagSet) -> dict[str, list[int]]:
    """Split -> numbers of its slides in ``bags``."""
    place = {record.slide_id: i for i, record in enumerate(bags.records)}
    found: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for record in cohort.records:
        if record.split is not None:
            found[record.split].append(place[record.slide_id])
    return found
