"""``dre-fast demo``: the whole path on synthetic slides, in minutes, on a CPU."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="train on synthetic slides and look at the result (minutes, no GPU, no download)",
        description="Paint a synthetic cohort of slides with reports, tile it, train end to end and with a frozen "
        "encoder, evaluate on unseen slides, and write one HTML page with curves and heatmaps.",
    )
    parser.add_argument(
        "--out", default="demo", help="folder (default: demo); a former demo in it is replaced"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--slides",
        type=int,
        nargs=3,
        default=(160, 32, 64),
        metavar=("TRAIN", "VAL", "TEST"),
        help="number of slides (default: 160 32 64)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dre_fast.demo import run_demo

    summary = run_demo(args.out, seed=args.seed, slides=tuple(args.slides))
    print("\nAUC on unseen slides   end to end   frozen encoder")
    for name, key in (
        ("subtyping", "subtyping"),
        ("tumour or normal", "recognition"),
        ("mutation", "mutation"),
    ):
        ours, frozen = summary[f"{key}_auc"], summary[f"frozen_{key}_auc"]
        shown = ["  n/a" if value is None else f"{value:.3f}" for value in (ours, frozen)]
        print(f"  {name:<20} {shown[0]:>10} {shown[1]:>16}")
    print(
        f"\n{summary['seconds']:.0f} s, peak {summary['peak_rss_mb']:.0f} MB. Look at {args.out}/index.html"
    )
    return 0
