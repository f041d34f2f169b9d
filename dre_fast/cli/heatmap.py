"""``dre-fast heatmap``: which codeword each tile belongs to, and what each tile adds to a prediction."""

from __future__ import annotations

import argparse

from dre_fast.cli.common import add_model_and_slides, open_model_and_slides


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "heatmap",
        help="codeword and contribution maps over the slide thumbnail",
        description="Draw, for each slide, its tiles coloured by codeword and by their first-order contribution to a "
        "logit: <d logit / d V_k, x_i - c_k>, over the thumbnail.",
        epilog="example: dre-fast heatmap runs/a --cohort cohort.csv --tiles tiles --slide S1 --task subtype --out maps",
    )
    add_model_and_slides(parser)
    parser.add_argument("--out", required=True, help="folder for ID_codewords.png and ID_TASK_CLASS.png")
    parser.add_argument(
        "--slide", action="append", help="slide id; repeat for several (default: every slide)"
    )
    parser.add_argument("--task", help="task of the contribution map (default: the model's first)")
    parser.add_argument(
        "--class", dest="target", help="class or column of the map (default: the predicted one)"
    )
    parser.add_argument(
        "--geojson",
        action="store_true",
        help="also ID.geojson, which QuPath opens: codewords and contributions",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dre_fast.data.cohort import Cohort
    from dre_fast.progress import progress
    from dre_fast.train.explain import draw_slide

    cohort = Cohort.read(args.cohort)
    if args.slide:
        cohort = cohort.select(args.slide)
    loaded, slides = open_model_and_slides(args, cohort)
    for i in progress(range(len(slides)), "heatmap", unit="slide"):
        files = draw_slide(
            loaded,
            slides,
            i,
            args.out,
            task=args.task,
            target=args.target,
            chunk=args.chunk,
            geojson=args.geojson,
        )
        for file in files:
            print(file)
    return 0
