"""Saved classifiers of bags on a cohort that none of them has seen."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dre_fast.data.cohort import Cohort
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.data.files import check_writable
from dre_fast.eval.fold_scores import FoldScore, average_predictions, fold_scores, score_grid
from dre_fast.eval.folds import fold_numbers, refuse_overlap
from dre_fast.eval.metrics import check_patient_labels
from dre_fast.eval.mil_folder import (
    FOLDS,
    SETTINGS,
    SPLITS,
    judge_calibration,
    judged_rows,
    refuse_seen,
    trained_on,
)
from dre_fast.eval.predictions_csv import write_predictions
from dre_fast.eval.protocols import Judging
from dre_fast.train.bag_set import BagSet
from dre_fast.train.checks import pick_device
from dre_fast.train.mil import TrainedMIL
from dre_fast.train.mil_files import MODEL, load_mil

AVERAGED = "averaged.safetensors"


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
        run: folder of :class:`dre_fast.eval.mil.MILCrossValidation` or :func:`dre_fast.eval.mil.train_on_splits`.
        cohort: of ``bag_cohort`` or ``cohort_of_bags``; tasks whose columns it lacks are not judged.

    Raises:
        ValueError: no models there, a case, slide or bag that they were trained on, bags of another D, labels that
            they do not know, or ``out`` holds a run, or the predictions for a cohort, already.
    """
    run, out, how = Path(run), Path(out), how or Judging()
    _refuse_used(out)
    models = _models_of(run, pick_device(device))
    refuse_overlap(trained_on(run), cohort)
    tasks = next(iter(models.values())).tasks
    judged = [task for task in tasks if set(task.columns) <= set(cohort.label_names)]
    for task in judged:
        cohort.encode(task)
    if how.level == "patient":
        check_patient_labels(cohort, judged)
    absent = [task.name for task in tasks if task not in judged]
    if absent and cohort.label_names:
        warnings.warn(f"{cohort.source}: no label columns for {', '.join(absent)}; not judged", stacklevel=2)
    bags = BagSet(cohort, memory_gb=4.0)
    bags.refuse_copies()
    refuse_seen(bags, run)
    parts = {}
    for number, model in models.items():
        parts[number] = model.predict(bags)
        parts[number].save(out / f"fold-{number}.safetensors")
    averaged = average_predictions(list(parts.values()))
    averaged.save(out / AVERAGED)
    files = [write_predictions(averaged, cohort, out / "predictions.csv")]
    scores: list[FoldScore] = []
    if judged:
        seed, names = next(iter(models.values())).settings.seed, [task.name for task in judged]
        per_fold = {
            n: judged_rows(part, cohort, how, seed, bootstrap=0, tasks=names) for n, part in parts.items()
        }
        scores = fold_scores(per_fold, judged_rows(averaged, cohort, how, seed, tasks=names))
        files += score_grid(scores, "averaged").write(out / "scores")
        files += judge_calibration(averaged, cohort, how, out, names)
    return Deployed(averaged, scores, files)


def _refuse_used(out: Path) -> None:
    """A run keeps its predictions and scores, and those of two cohorts are not mixed in one folder."""
    check_writable(out)
    for name, what in (
        *((name, "a run of `dre-fast mil`") for name in (FOLDS, SPLITS, SETTINGS)),
        (AVERAGED, "predictions of `dre-fast mil-deploy`"),
    ):
        if (out / name).exists():
            raise ValueError(f"{out} already holds {what} ({name}); name another folder with --out")


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
