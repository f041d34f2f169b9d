"""``dre-fast codewords``: sheets of the tiles nearest to each codeword."""

from __future__ import annotations

import argparse

from dre_fast.cli.common import add_model_and_slides, open_model_and_slides, positive


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "codewords",
        help="what each codeword looks like: sheets of its nearest tiles",
        description="Encode every tile of the slides, and draw for each codeword the tiles nearest to it.",
        epilog="example: dre-fast codewords runs/a --cohort cohort.csv --tiles tiles --out sheets",
    )
    add_model_and_slides(parser)
    parser.add_argument("--out", required=True, help="folder for codewords_000.png, ... and codewords.csv")
    parser.add_argument("--count", type=positive, default=8, help="tiles a codeword (default: 8)")
    parser.add_argument("--per-slide", type=positive, default=2, help="of them from one slide (default: 2)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dre_fast.data.cohort import Cohort
    from dre_fast.train.top_tiles import write_sheets

    cohort = Cohort.read(args.cohort)
    loaded, slides = open_model_and_slides(args, cohort)
    for file in write_sheets(
        loaded, slides, args.out, count=args.count, per_slide=args.per_slide, chunk=args.chunk
    ):
        print(file)
    return 0
