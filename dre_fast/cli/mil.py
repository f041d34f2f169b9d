"""``dre-fast mil``: from a folder of features and a table of labels to a table of scores."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import TYPE_CHECKING

from dre_fast.cli.common import add_judging, add_labels, counted, labelled_bags, positive, validation

if TYPE_CHECKING:
    from dre_fast.data.cohort import Cohort, Task


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "mil",
        help="train ResidualMIL on stored features, cross-validated by case",
        description="Train a ResidualMIL on bags of stored tile features, one model a fold of cases, each with a "
        "codebook of its own training bags; judge every slide by the model that never saw its case. With a column "
        "`split` in the table one model is trained on train, its epoch chosen on val, and judged on test.",
        epilog=(
            "examples:\n"
            "  dre-fast mil features labels.csv --out cv\n"
            "  dre-fast mil features labels.csv --out cv --tasks subtype genes=EGFR,TP53 --folds 10 --level patient\n"
            "  dre-fast mil features cbioportal.csv --out cv --tasks genes=EGFR,KRAS,TP53 --missing NS --skip-missing\n"
            "  dre-fast mil features labels.csv --out cv --survival os=OS_MONTHS,OS_STATUS\n"
            "  dre-fast mil features labels.csv --out s0 --splits splits_0.csv             # one model on CLAM's splits\n"
            "  dre-fast mil-deploy cv other_features --labels other.csv --out other    # the saved models on new slides"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("features", help="folder of bags, one feature file a slide, or a CSV of their paths")
    parser.add_argument(
        "labels", metavar="LABELS.csv", help="columns slide_id, case_id and labels; or a row a case"
    )
    parser.add_argument("--out", required=True, help="folder of models, predictions and scores")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="label columns, NAME=COLUMN,COLUMN for several yes/no columns, or YAML as in loss.tasks (default: the "
        "only label column)",
    )
    parser.add_argument(
        "--survival", nargs="+", default=(), metavar="NAME=TIME,EVENT", help="survival tasks (Cox)"
    )
    add_labels(parser)
    parser.add_argument(
        "--folds",
        type=int,
        help="cross-validation with so many (default: those of the column `fold`, else 5), also with a column `split`",
    )
    parser.add_argument(
        "--splits",
        metavar="FILE",
        help="one model on these splits: CLAM's splits_N.csv (columns train, val, test), or slide_id and split",
    )
    parser.add_argument(
        "--val",
        type=validation,
        default="fold",
        metavar="fold|SHARE|none",
        help="validation slides of a fold: the next fold, a share of the other cases such as 0.2, none (default: fold)",
    )
    add_judging(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the cross-validation in --out")
    _add_settings(parser.add_argument_group("model and training"))
    parser.set_defaults(run=run)


def _add_settings(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--codewords", type=positive, default=16, help="of the codebook (default: 16)")
    group.add_argument(
        "--assignment", choices=("hard", "soft", "netvlad"), default="hard", help="of tiles (default: hard)"
    )
    group.add_argument(
        "--head", choices=("transformer", "light"), default="transformer", help="(default: transformer)"
    )
    group.add_argument("--width", type=positive, default=256, help="of the slide embedding (default: 256)")
    group.add_argument("--dropout", type=float, default=0.1, help="(default: 0.1)")
    group.add_argument("--epochs", type=positive, default=30, help="(default: 30)")
    group.add_argument("--batch-size", type=positive, default=16, help="slides a step (default: 16)")
    group.add_argument("--lr", type=float, default=3e-4, help="learning rate of AdamW (default: 3e-4)")
    group.add_argument("--weight-decay", type=float, default=0.01, help="(default: 0.01)")
    group.add_argument(
        "--balance",
        choices=("none", "inverse", "effective"),
        default="none",
        help="weights against rare classes (default: none)",
    )
    group.add_argument(
        "--amp", choices=("none", "bf16"), default="none", help="autocast dtype (default: none)"
    )
    group.add_argument("--seed", type=int, default=0, help="of folds, models and resampling (default: 0)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    group.add_argument(
        "--memory-gb",
        type=float,
        default=4.0,
        help="features kept in memory, others are read again (default: 4)",
    )


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dre_fast.data.split_files import with_splits
    from dre_fast.data.task_words import parse_tasks
    from dre_fast.eval.fold_scores import score_grid
    from dre_fast.eval.metrics import check_patient_labels, format_rows
    from dre_fast.eval.mil import MILCrossValidation, train_on_splits
    from dre_fast.eval.protocols import Judging
    from dre_fast.train.mil_settings import MILSettings

    how = Judging(args.level, args.bootstrap)
    settings = MILSettings(
        codewords=args.codewords,
        assignment=args.assignment,
        head=args.head,
        width=args.width,
        dropout=args.dropout,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=args.weight_decay,
        balance=args.balance,
        amp=args.amp,
        seed=args.seed,
    )
    cohort = labelled_bags(args)
    if args.splits and args.folds is not None:
        raise ValueError("--splits trains one model on its splits, --folds one a fold; give one of them")
    if args.splits:
        cohort = with_splits(cohort, args.splits, skip_missing=args.skip_missing)
    tasks = parse_tasks(args.tasks, cohort, args.survival)
    print(f"{counted(len(cohort), 'slide')} of {counted(len(cohort.cases), 'case')}", file=sys.stderr)
    for task in tasks:
        print(f"task {task.name} ({task.kind}): {_counted(task, cohort)}", file=sys.stderr)
    if args.level == "patient":
        check_patient_labels(cohort, tasks)
    out = Path(args.out)
    dealt = any(record.fold is not None for record in cohort.records)
    if cohort.splits and args.folds is None:
        if dealt:
            raise ValueError(
                f"{args.labels}: has both a column 'split' and a column 'fold'; take one out, or say --folds N for folds"
            )
        if args.resume:
            raise ValueError(
                "--resume is of a cross-validation; one model on splits begins anew in another folder"
            )
        rows = train_on_splits(
            cohort, tasks, out, settings, how, device=args.device, memory_gb=args.memory_gb
        )
        print(
            format_rows(rows) if rows else f"no test slides to judge; the model: {out / 'model.safetensors'}"
        )
    else:
        if cohort.splits:
            print(
                f"note: {args.labels}: column 'split' is not used; every slide is in a fold", file=sys.stderr
            )
        rounds = MILCrossValidation(
            cohort,
            tasks,
            out,
            settings,
            folds=args.folds,
            validation=args.val,
            resume=args.resume,
            device=args.device,
            memory_gb=args.memory_gb,
        )
        rounds.train()
        print(score_grid(rounds.judge(how), "pooled").text())
    for name in ("scores.csv", "scores.md", "predictions.csv", "calibration.csv", "calibration.png"):
        if (out / name).exists():
            print(out / name)
    return 0


def _counted(task: Task, cohort: Cohort) -> str:
    """How many slides have which label."""
    if task.kind == "survival":
        event = cohort.encode(task)[:, 1]
        return f"{int((event == 1).sum())} events, {int((event == 0).sum())} censored"
    if task.kind == "multilabel":
        target = cohort.encode(task)
        each = zip(task.columns, (target == 1).sum(0).tolist(), (target == 0).sum(0).tolist())
        return ", ".join(f"{column} {yes} yes and {no} no" for column, yes, no in each)
    column = task.columns[0]
    counts = Counter(r.labels[column] for r in cohort.records if r.labels[column] is not None)
    return ", ".join(f"{value} {counts[value]}" for value in cohort.label_values(column))
