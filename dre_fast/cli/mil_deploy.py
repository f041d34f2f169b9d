"""``dre-fast mil-deploy``: the models of ``dre-fast mil`` on slides that none of them has seen."""

from __future__ import annotations

import argparse

from dre_fast.cli.common import add_judging, add_labels, counted, labelled_bags


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "mil-deploy",
        help="apply the models of `dre-fast mil` to the bags of another cohort",
        description="Predict the bags of another cohort with every model of a run of `dre-fast mil`, and with the "
        "average of their probabilities; with labels, judge both. A case, slide or feature file that the models were "
        "trained on is refused.",
        epilog="example: dre-fast mil-deploy cv other_features --labels other.csv --out other",
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder that `dre-fast mil` wrote")
    parser.add_argument(
        "features", help="folder of bags, or a CSV of their paths, from the encoder of the training"
    )
    parser.add_argument(
        "--labels", metavar="LABELS.csv", help="slides, cases and labels; without, every bag is predicted"
    )
    parser.add_argument("--out", required=True, help="folder for predictions and scores")
    add_labels(parser)
    add_judging(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dre_fast.data.bag_cohort import cohort_of_bags
    from dre_fast.eval.fold_scores import score_grid
    from dre_fast.eval.mil_deploy import deploy
    from dre_fast.eval.protocols import Judging

    cohort = cohort_of_bags(args.features) if args.labels is None else labelled_bags(args)
    found = deploy(args.run_folder, cohort, args.out, Judging(args.level, args.bootstrap), device=args.device)
    print(f"{counted(len(cohort), 'slide')} of {counted(len(cohort.cases), 'case')} predicted")
    if found.scores:
        print(score_grid(found.scores, "averaged").text())
    for file in found.files:
        print(file)
    return 0
