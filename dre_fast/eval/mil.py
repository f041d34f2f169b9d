"""Protocols of a classifier of bags: cross-validation by case, one model on given splits, another cohort."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dre_fast.data.bag_cohort import refuse_shared_file, refuse_shared_report
from dre_fast.data.cohort import Cohort, CohortError, Task
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.data.files import write_text_atomic
from dre_fast.eval.calibration import calibrate, write_calibration
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
)
from dre_fast.eval.metrics import MetricRow, evaluate_predictions, write_tables
from dre_fast.eval.predictions_csv import write_predictions
from dre_fast.eval.protocols import Judging
from dre_fast.train.bag_set import BagSet
from dre_fast.train.checks import pick_device
from dre_fast.train.mil import TrainedMIL, train_mil
from dre_fast.train.mil_files import MODEL, load_mil, save_mil
from dre_fast.train.mil_settings import MILSettings

FOLDS, SPLITS, BAGS, SETTINGS = "folds.csv", "splits.csv", "bags.csv", "settings.json"
PREDICTIONS, OUT_OF_FOLD, HISTORY = "predictions.safetensors", "out_of_fold.safetensors", "history.csv"


class MILCrossValidation:
    """One model a fold of cases, in one folder.

    Files: settings.json; folds.csv, the folds as they were when it began; bags.csv, number of tiles and a mark of the
    features of each slide; fold-N/ with model.safetensors, model.json (its card), history.csv and the predictions of
    its test slides; out_of_fold.safetensors and predictions.csv; scores.csv and scores.md; calibration.csv and .png.

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
        began = _began(self.out, FOLDS, resume)
        columns = _columns(self.tasks)
        if began:
            cohort = frozen_folds(cohort, self.out / FOLDS, columns, folds=folds)
        else:
            cohort = with_folds(cohort, self.tasks, folds=folds, seed=self.settings.seed)
        refuse_shared_file(cohort, "fold")
        refuse_shared_report(cohort, "fold")
        self.cohort, self.folds = cohort, fold_numbers(cohort)
        said = {**asdict(self.settings), "validation": validation, "tasks": _cards(self.tasks)}
        if began:
            _check_same(self.out / SETTINGS, said)
        self._rounds = {
            fold: self._split(fold) for fold in self.folds
        }  # all of them before anything is written
        self.bags = _open(cohort, self.settings, memory_gb)
        if began:
            _check_same_bags(self.bags, self.out / BAGS)
            return
        _write_bags(self.bags, self.out / BAGS)
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
            fold: _rows(part, self._rounds[fold].subset("test"), how, self.settings.seed, bootstrap=0)
            for fold, part in parts.items()
        }
        joint = _rows(pooled, self.cohort, how, self.settings.seed, model_of=fold_of)
        scores = fold_scores(per_fold, joint)
        score_grid(scores, "pooled").write(self.out / "scores")
        _calibration(pooled, self.cohort, how, self.out)
        return scores

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
    _began(out, SPLITS, False)
    cohort = cohort.subset(list(cohort.splits) or ["train"])
    cohort.subset("train")
    refuse_shared_file(cohort, "split")
    refuse_shared_report(cohort, "split")
    bags = _open(cohort, settings, memory_gb)
    _write_bags(bags, out / BAGS)
    write_text_atomic(
        out / SETTINGS, json.dumps({**asdict(settings), "tasks": _cards(tasks)}, indent=2) + "\n"
    )
    columns = _columns(tasks)
    rows = [[r.slide_id, r.case_id, r.split, *(r.labels[c] for c in columns)] for r in cohort.records]
    write_text_atomic(out / SPLITS, _csv([["slide_id", "case_id", "split", *columns], *rows]))
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
    found = _rows(predictions, test, how, settings.seed)
    write_tables(found, out / "scores")
    _calibration(predictions, test, how, out)
    return found


@dataclass(frozen=True)
class Deployed:
    """What saved models say of another cohort: averaged predictions, and scores where it has labels."""

    predictions: SlideEmbeddings
    scores: list[FoldScore]
    files: list[Path]


def deploy(
    run: str | Path,
    cohort: Cohort,
    out: str | Path,
    how: Judging | None = None,
    *,
    device: str = "auto",
) -> Deployed:
    """Apply the models of a run to the bags of a cohort that none of them has seen.

    Files: fold-N.safetensors, the predictions of each model; averaged.safetensors and predictions.csv, of their mean
    probabilities; with labels scores.csv and scores.md, calibration.csv and .png.

    Args:
        run: folder of :class:`MILCrossValidation` or :func:`train_on_splits`.
        cohort: of ``bag_cohort`` or ``cohort_of_bags``; tasks whose columns it lacks are not judged.

    Raises:
        ValueError: no models there, a case, slide or bag that they were trained on, bags of another D, or labels that
            they do not know.
    """
    run, out, how = Path(run), Path(out), how or Judging()
    models = _models_of(run, pick_device(device))
    refuse_overlap(_trained_on(run), cohort)
    tasks = next(iter(models.values())).tasks
    judged = [task for task in tasks if set(task.columns) <= set(cohort.label_names)]
    for task in judged:
        cohort.encode(task)
    bags = BagSet(cohort, memory_gb=4.0)
    bags.refuse_copies()
    _refuse_seen(bags, run)
    parts = {}
    for number, model in models.items():
        parts[number] = model.predict(bags)
        parts[number].save(out / f"fold-{number}.safetensors")
    averaged = average_predictions(list(parts.values()))
    averaged.save(out / "averaged.safetensors")
    files = [write_predictions(averaged, cohort, out / "predictions.csv")]
    scores: list[FoldScore] = []
    if judged:
        seed, names = next(iter(models.values())).settings.seed, [task.name for task in judged]
        per_fold = {n: _rows(part, cohort, how, seed, bootstrap=0, tasks=names) for n, part in parts.items()}
        scores = fold_scores(per_fold, _rows(averaged, cohort, how, seed, tasks=names))
        files += score_grid(scores, "averaged").write(out / "scores")
        files += _calibration(averaged, cohort, how, out, names)
    elif cohort.label_names:
        warnings.warn(
            f"{cohort.source}: no label columns for {', '.join(task.name for task in tasks)}; not judged",
            stacklevel=2,
        )
    return Deployed(averaged, scores, files)


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
    write_text_atomic(folder / HISTORY, _csv([header, *([row.get(key) for key in header] for row in rows)]))
    save_mil(trained, folder)
    slides = ", ".join(f"{len(numbers)} {split}" for split, numbers in parts.items() if numbers)
    kept = rows[trained.epoch]
    shown = [
        f"{key.replace('_', ' ')} {value:.3f}"
        for key, value in kept.items()
        if key.startswith(("val_auc", "val_c_index")) and isinstance(value, float)
    ]
    print(
        f"{name}: {slides} slides; epoch {trained.epoch + 1} of {settings.epochs} kept"
        f"{', ' if shown else ''}{', '.join(shown)} ({time.perf_counter() - started:.1f} s)",
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


def _rows(
    part: SlideEmbeddings,
    cohort: Cohort,
    how: Judging,
    seed: int,
    *,
    bootstrap: int | None = None,
    model_of: Mapping[str, int] | None = None,
    tasks: Sequence[str] | None = None,
) -> list[MetricRow]:
    return evaluate_predictions(
        part,
        cohort,
        tasks=tasks,
        level=how.level,
        bootstrap=how.bootstrap if bootstrap is None else bootstrap,
        confidence=how.confidence,
        seed=seed,
        model_of=model_of,
    )


def _calibration(
    predictions: SlideEmbeddings, cohort: Cohort, how: Judging, out: Path, tasks: Sequence[str] | None = None
) -> list[Path]:
    found = calibrate(predictions, cohort, level=how.level, tasks=tasks)
    return write_calibration(found, out) if found else []


def _open(cohort: Cohort, settings: MILSettings, memory_gb: float) -> BagSet:
    bags = BagSet(cohort, sample=settings.codebook_tiles, seed=settings.seed, memory_gb=memory_gb)
    bags.refuse_copies()
    return bags


def _began(out: Path, file: str, resume: bool) -> bool:
    """Whether the folder holds a run of this kind to go on with."""
    used = next((out / name for name in (FOLDS, SPLITS, SETTINGS) if (out / name).exists()), None)
    if used is None:
        return False
    if not (out / file).exists():
        if used.name == SETTINGS and resume:  # killed before it began
            return False
        raise ValueError(f"{out} holds another run ({used.name}); name another folder")
    if not resume:
        hint = "pass --resume to go on with it, or name" if file == FOLDS else "name"
        raise ValueError(f"{out} already holds a run: {hint} another folder")
    return True


def _check_same(written: Path, said: Mapping[str, Any]) -> None:
    before, now = json.loads(written.read_text(encoding="utf-8")), json.loads(json.dumps(said))
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{written}: {key} was {before.get(key)!r} when it began and is {now.get(key)!r} now; a resumed run "
                "keeps its settings: to change them, name another folder"
            )


def _write_bags(bags: BagSet, path: Path) -> None:
    rows = [[r.slide_id, n, mark] for r, n, mark in zip(bags.records, bags.tiles, bags.marks)]
    write_text_atomic(path, _csv([["slide_id", "tiles", "mark"], *rows]))


def _read_bags(path: Path) -> dict[str, str]:
    """Slide -> mark of its features."""
    with open(path, encoding="utf-8", newline="") as file:
        return {row["slide_id"]: row["mark"] for row in csv.DictReader(file)}


def _check_same_bags(bags: BagSet, path: Path) -> None:
    before = _read_bags(path)
    for record, mark in zip(bags.records, bags.marks):
        if before.get(record.slide_id) != mark:
            raise ValueError(
                f"{record.path}: the features of slide {record.slide_id!r} are not those that the run began with "
                f"({path}); restore them, or begin in another folder"
            )


def _refuse_seen(bags: BagSet, run: Path) -> None:
    seen = {mark: slide for slide, mark in _read_bags(run / BAGS).items()}
    for record, mark in zip(bags.records, bags.marks):
        if mark in seen:
            raise CohortError(
                f"{bags.source}: slide {record.slide_id!r} ({record.path}) holds the same features as slide "
                f"{seen[mark]!r} of {run}, which the models have seen; take it out"
            )


def _models_of(run: Path, device: Any) -> dict[int, TrainedMIL]:
    """Number -> model: of the folds, or 0 -> the one."""
    if (run / FOLDS).exists():
        folds = fold_numbers(Cohort.read(run / FOLDS, require_path=False))
        unfinished = [fold for fold in folds if not (run / f"fold-{fold}" / MODEL).exists()]
        if unfinished:
            raise ValueError(
                f"{run}: fold {unfinished[0]} has no model yet; finish it with dre-fast mil ... --out {run} --resume"
            )
        return {fold: load_mil(run / f"fold-{fold}", device) for fold in folds}
    if (run / SPLITS).exists():
        return {0: load_mil(run, device)}
    raise ValueError(f"{run}: no run of `dre-fast mil` there (neither {FOLDS} nor {SPLITS})")


def _trained_on(run: Path) -> Cohort:
    file = run / FOLDS if (run / FOLDS).exists() else run / SPLITS
    return Cohort.read(file, require_path=False, missing_values=[""])


def _columns(tasks: Sequence[Task]) -> list[str]:
    return list(dict.fromkeys(column for task in tasks for column in task.columns))


def _cards(tasks: Sequence[Task]) -> dict[str, Any]:
    return {task.name: task.card() for task in tasks}


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [["" if cell is None else cell for cell in row] for row in rows]
    )
    return text.getvalue()
