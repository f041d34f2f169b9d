"""``dre-fast evaluate``: scores of predictions with bootstrap intervals."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from dre_fast.cli.common import add_judging

if TYPE_CHECKING:
    from dre_fast.data.cohort import Cohort, Task
    from dre_fast.data.embeddings import SlideEmbeddings


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="AUC, F1, accuracy, c-index of predictions, with bootstrap intervals",
        description="Judge what `dre-fast encode` wrote against the labels of a cohort: AUC, average precision, F1, "
        "accuracy and balanced accuracy, the c-index of survival tasks, with percentile bootstrap intervals over "
        "cases. Slides without a label are left out, for each label column on its own. Needs only the label columns "
        "of the cohort, no slide files.",
        epilog="examples: dre-fast evaluate test.safetensors --cohort cohort.csv --split test --out scores | "
        "dre-fast evaluate all.h5 --cohort cohort.csv --split test --linear-probe --tasks subtype "
        "genes=EGFR,TP53",
    )
    parser.add_argument("predictions", help="file that `dre-fast encode` wrote, .safetensors or .h5")
    parser.add_argument("--cohort", required=True, help="cohort CSV with slide_id, case_id and label columns")
    parser.add_argument(
        "--split", choices=("train", "val", "test"), help="judge only these slides (default: every slide)"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="tasks to judge (default: all). With --linear-probe also label columns, or NAME=COLUMN,COLUMN "
        "for several "
        "yes/no columns",
    )
    add_judging(parser)
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: 0)")
    parser.add_argument(
        "--linear-probe",
        action="store_true",
        help="fit a logistic regression on the embeddings of the train split and judge that instead of the "
        "logits",
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="leave out slides that have no prediction"
    )
    parser.add_argument(
        "--missing",
        nargs="+",
        default=(),
        metavar="VALUE",
        help="label cells that mean 'unknown', besides empty ones and NA; e.g. NS in cBioPortal tables",
    )
    parser.add_argument(
        "--out",
        help="folder for metrics.csv, metrics.md and metrics.json, calibration.csv and calibration.png",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dre_fast.data.cohort import MISSING, Cohort
    from dre_fast.data.embeddings import SlideEmbeddings
    from dre_fast.eval.metrics import evaluate_predictions, format_rows, write_tables

    embeddings = SlideEmbeddings.load(args.predictions)
    cohort = Cohort.read(args.cohort, require_path=False, missing_values=[*MISSING, *args.missing])
    names = args.tasks
    if args.linear_probe and args.split is None:
        raise ValueError(
            "--linear-probe is fitted on the train split: say which slides to judge it on with --split val or test"
        )
    if args.linear_probe:
        from dre_fast.eval.probe import linear_probe

        tasks = probe_tasks(embeddings, cohort, args.tasks)
        embeddings = linear_probe(embeddings, cohort, tasks)
        names = [task.name for task in tasks]
    rows = evaluate_predictions(
        embeddings,
        cohort,
        split=args.split,
        tasks=names,
        level=args.level,
        bootstrap=args.bootstrap,
        confidence=args.confidence,
        seed=args.seed,
        allow_missing=args.allow_missing,
    )
    print(format_rows(rows))
    predicted = set(embeddings.slide_ids)
    trained = sum(record.split == "train" and record.slide_id in predicted for record in cohort.records)
    if args.split is None and trained:
        print(
            f"note: {trained} of these slides are in the train split; judge others with --split, unless "
            "they were predicted out of fold",
            file=sys.stderr,
        )
    if args.out:
        from dre_fast.eval.calibration import calibrate, write_calibration

        found = calibrate(
            embeddings,
            cohort,
            split=args.split,
            tasks=names,
            level=args.level,
            allow_missing=args.allow_missing,
        )
        files = write_tables(rows, Path(args.out) / "metrics")
        for file in [*files, *(write_calibration(found, args.out) if found else [])]:
            print(file)
    return 0


def probe_tasks(embeddings: SlideEmbeddings, cohort: Cohort, names: list[str] | None) -> list[Task]:
    """Tasks of a linear probe: those of the predictions by name, else label columns of the cohort.

    ``NAME=A,B`` is a multilabel task of columns A and B. A plain column is binary when all its values mean
    yes or no, else multiclass. Without names: every task of the predictions, or every label column that has
    two values or more.

    Raises:
        ValueError: a name that is neither a task nor a label column.
    """
    from dre_fast.data.task_words import column_task, panel_task
    from dre_fast.eval.metrics import task_of

    if names is None:
        names = list(embeddings.tasks) or [
            name for name in cohort.label_names if len(cohort.label_values(name)) > 1
        ]
    tasks = []
    for name in names:
        if name.partition("=")[2]:
            tasks.append(panel_task(name))
        elif name in embeddings.tasks:
            tasks.append(task_of(name, embeddings.tasks[name]))
        elif name in cohort.label_names:
            tasks.append(column_task(name, cohort))
        else:
            raise ValueError(
                f"{name!r} is neither a task of the predictions ({', '.join(embeddings.tasks) or 'none'}) "
                f"nor a label "
                f"column of the cohort ({', '.join(cohort.label_names) or 'none'})"
            )
    if not tasks:
        raise ValueError(f"{cohort.source}: no label column with two values or more to fit a probe for")
    return tasks
