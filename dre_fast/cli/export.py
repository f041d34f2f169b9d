"""``dre-fast export``: a trained model as a folder for others, and on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "export",
        help="the best model of a run as a folder for others, with a model card; also on the Hugging Face Hub",
        description="Write model.safetensors, config.json and a model card (README.md) with data, splits, metrics and "
        "intended use. Paths of this machine are cut down to names. Commands that take a run take the folder, too.",
        epilog="example: dre-fast export runs/a --out exported --scores results --license cc-by-nc-4.0 --push me/model",
    )
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    parser.add_argument("--out", required=True, help="folder to write; a model card that is there stays")
    parser.add_argument(
        "--scores", metavar="FOLDER", help="what `dre-fast evaluate --out` wrote, for the card"
    )
    parser.add_argument("--data", default="", metavar="TEXT", help="where the slides come from, for the card")
    parser.add_argument("--license", help="of the model, as the Hub names it: apache-2.0, cc-by-nc-4.0, ...")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="also upload the folder to this repository of the Hub"
    )
    parser.add_argument(
        "--private", action="store_true", help="make the repository private, where --push makes it"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dre_fast.integrations.hub import FILES, README, Card, export_run, push_exported

    if (Path(args.out) / README).exists():
        print(f"note: {Path(args.out) / README} is there and stays; delete it for a new one", file=sys.stderr)
    card = Card(data=args.data, license=args.license)
    folder = export_run(args.run_folder, args.out, card=card, scores=args.scores, repo=args.push)
    for name in FILES:
        print(folder / name)
    if args.push:
        print(push_exported(folder, args.push, private=args.private or None))
    return 0
