"""``dre-fast probe``: a linear probe on frozen slide embeddings, over folds of cases."""

from __future__ import annotations

import argparse
import sys

from dre_fast.cli.common import add_judging


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "probe",
        help="cross-validated logistic regression on slide embeddings",
        description="Fit a logistic regression on slide embeddings, once a fold of cases, with the penalty picked by "
        "inner folds, and judge every slide by the regression that did not see its case. The folds are those of the "
        "cohort's column `fold`, or are dealt so that labels are alike in all.",
        epilog="example: dre-fast probe all.safetensors --cohort cohort.csv --tasks subtype genes=EGFR,TP53 --out probe",
    )
    parser.add_argument("embeddings", help="file that `dre-fast encode` wrote, .safetensors or .h5")
    parser.add_argument("--cohort", required=True, help="cohort CSV with slide_id, case_id and label columns")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="label columns, tasks of the embeddings, or NAME=COLUMN,COLUMN for several yes/no columns (default: all)",
    )
    parser.add_argument("--folds", type=int, help="how many (default: those of the column `fold`, else 5)")
    parser.add_argument(
        "--split", choices=("train", "val", "test"), help="probe only these slides (default: every slide)"
    )
    add_judging(parser)
    parser.add_argument("--seed", type=int, default=0, help="of folds and resampling (default: 0)")
    parser.add_argument(
        "--allow-missing", action="store_true", help="leave out slides that have no embedding"
    )
    parser.add_argument(
        "--missing",
        nargs="+",
        default=(),
        metavar="VALUE",
        help="label cells that mean 'unknown', besides empty ones and NA",
    )
    parser.add_argument(
        "--out", help="folder for scores.csv, scores.md, folds.csv, strengths.csv and out_of_fold.safetensors"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dre_fast.cli.evaluate import probe_tasks
    from dre_fast.data.cohort import MISSING, Cohort
    from dre_fast.data.embeddings import SlideEmbeddings
    from dre_fast.eval.fold_scores import fold_scores, score_grid
    from dre_fast.eval.folds import fold_numbers, freeze_folds
    from dre_fast.eval.grids import Cell, Grid
    from dre_fast.eval.metrics import MetricRow, evaluate_predictions
    from dre_fast.eval.probe_folds import probe_folds

    embeddings = SlideEmbeddings.load(args.embeddings)
    cohort = Cohort.read(args.cohort, require_path=False, missing_values=[*MISSING, *args.missing])
    tasks = probe_tasks(embeddings, cohort, args.tasks)
    cohort = cohort.subset(args.split)
    known = set(embeddings.slide_ids)
    absent = [slide for slide in cohort.ids if slide not in known]
    if absent and (len(absent) == len(cohort) or not args.allow_missing):
        raise ValueError(
            f"{args.cohort}: {len(absent)} of {len(cohort)} slides have no embedding, the first {absent[0]!r}; encode "
            "them, or leave them out knowingly (--allow-missing)"
        )
    cohort = cohort.select([slide for slide in cohort.ids if slide in known])
    trained = cohort.splits.get("train", 0)
    if trained and args.split is None and embeddings.tasks:
        print(
            f"note: {trained} of these slides are in the train split; if the model learned from their labels, its "
            "embeddings know them (--split test)",
            file=sys.stderr,
        )
    probe = probe_folds(embeddings, cohort, tasks, folds=args.folds, seed=args.seed)
    folds = fold_numbers(probe.cohort)

    def rows(ids: list[str], bootstrap: int) -> list[MetricRow]:
        return evaluate_predictions(
            probe.predictions,
            probe.cohort.select(ids),
            level=args.level,
            bootstrap=bootstrap,
            seed=args.seed,
        )

    per_fold = {fold: rows([r.slide_id for r in probe.cohort.records if r.fold == fold], 0) for fold in folds}
    grid = score_grid(fold_scores(per_fold, rows(probe.cohort.ids, args.bootstrap)), "pooled")
    print(grid.text())
    if args.out:
        out = Path(args.out)
        columns = list(dict.fromkeys(column for task in tasks for column in task.columns))
        freeze_folds(probe.cohort, out / "folds.csv", columns)
        probe.predictions.save(out / "out_of_fold.safetensors")
        picked: list[list[Cell]] = [
            [*key, *(found[fold] for fold in folds)] for key, found in probe.strengths.items()
        ]
        Grid(["task", "column", *(f"fold {fold}" for fold in folds)], picked).write(out / "strengths")
        for file in grid.write(out / "scores"):
            print(file)
    return 0
