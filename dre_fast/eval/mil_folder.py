"""The folder of a run of ``dre-fast mil``: what it holds, and whether it may be gone on with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dre_fast.data.cohort import Cohort, CohortError, Task
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.data.files import write_text_atomic
from dre_fast.eval.calibration import calibrate, write_calibration
from dre_fast.eval.metrics import MetricRow, evaluate_predictions
from dre_fast.eval.protocols import Judging
from dre_fast.train.bag_set import BagSet
from dre_fast.train.mil_settings import MILSettings

FOLDS, SPLITS, BAGS, SETTINGS = "folds.csv", "splits.csv", "bags.csv", "settings.json"
PREDICTIONS, OUT_OF_FOLD, HISTORY = "predictions.safetensors", "out_of_fold.safetensors", "history.csv"


def judged_rows(
    part: SlideEmbeddings,
    cohort: Cohort,
    how: Judging,
    seed: int,
    *,
    bootstrap: int | None = None,
    model_of: Mapping[str, int] | None = None,
    tasks: Sequence[str] | None = None,
) -> list[MetricRow]:
    """:func:`dre_fast.eval.metrics.evaluate_predictions` as ``how`` says."""
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


def judge_calibration(
    predictions: SlideEmbeddings, cohort: Cohort, how: Judging, out: Path, tasks: Sequence[str] | None = None
) -> list[Path]:
    """Writes calibration.csv and .png, if a task has probabilities; returns the files."""
    found = calibrate(predictions, cohort, level=how.level, tasks=tasks)
    return write_calibration(found, out) if found else []


def open_bags(cohort: Cohort, settings: MILSettings, memory_gb: float) -> BagSet:
    """The bags of a cohort, checked, with the sample of tiles that codebooks are fitted to; copies are refused."""
    bags = BagSet(cohort, sample=settings.codebook_tiles, seed=settings.seed, memory_gb=memory_gb)
    bags.refuse_copies()
    return bags


def began_in(out: Path, file: str, resume: bool) -> bool:
    """Whether the folder holds a run of this kind, the one that writes ``file``, to go on with.

    Raises:
        ValueError: it holds a run, and ``resume`` is False, or one of another kind.
    """
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


def check_same_settings(written: Path, said: Mapping[str, Any]) -> None:
    """Raises ValueError when a resumed run has other settings than it began with; names the first."""
    before, now = json.loads(written.read_text(encoding="utf-8")), json.loads(json.dumps(said))
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{written}: {key} was {before.get(key)!r} when it began and is {now.get(key)!r} now; a resumed run "
                "keeps its settings: to change them, name another folder"
            )


def write_bags(bags: BagSet, path: Path) -> None:
    """Writes number of tiles and mark of every slide."""
    rows = [[r.slide_id, n, mark] for r, n, mark in zip(bags.records, bags.tiles, bags.marks)]
    write_text_atomic(path, csv_text([["slide_id", "tiles", "mark"], *rows]))


def read_bags(path: Path) -> dict[str, str]:
    """Slide -> mark of its features."""
    with open(path, encoding="utf-8", newline="") as file:
        return {row["slide_id"]: row["mark"] for row in csv.DictReader(file)}


def check_same_bags(bags: BagSet, path: Path) -> None:
    """Raises ValueError when the features of a slide are not those that a run began with."""
    before = read_bags(path)
    for record, mark in zip(bags.records, bags.marks):
        if before.get(record.slide_id) != mark:
            raise ValueError(
                f"{record.path}: the features of slide {record.slide_id!r} are not those that the run began with "
                f"({path}); restore them, or begin in another folder"
            )


def refuse_seen(bags: BagSet, run: Path) -> None:
    """Raises CohortError when a bag holds the features of a slide that the models of a run have seen."""
    seen = {mark: slide for slide, mark in read_bags(run / BAGS).items()}
    for record, mark in zip(bags.records, bags.marks):
        if mark in seen:
            raise CohortError(
                f"{bags.source}: slide {record.slide_id!r} ({record.path}) holds the same features as slide "
                f"{seen[mark]!r} of {run}, which the models have seen; take it out"
            )


def trained_on(run: Path) -> Cohort:
    """The slides and cases of a run, with their labels."""
    file = run / FOLDS if (run / FOLDS).exists() else run / SPLITS
    return Cohort.read(file, require_path=False, missing_values=[""])


def columns_of(tasks: Sequence[Task]) -> list[str]:
    """Label columns of some tasks, each once."""
    return list(dict.fromkeys(column for task in tasks for column in task.columns))


def cards_of(tasks: Sequence[Task]) -> dict[str, Any]:
    """Task name -> its card."""
    return {task.name: task.card() for task in tasks}


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    """Rows as CSV; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [["" if cell is None else cell for cell in row] for row in rows]
    )
    return text.getvalue()
