"""The command line: one file per command, each with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = ("demo", "tile", "embed_reports", "train", "encode", "evaluate", "heatmap", "info")


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``dre-fast`` with all its commands."""
    parser = argparse.ArgumentParser(
        prog="dre-fast",
        description="Train and apply whole-slide models end to end: tile, embed reports, train, encode, evaluate, look.",
        epilog="A first look: dre-fast demo. What is installed and what is missing: dre-fast info.",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"dre_fast.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0; 2 for a fault of the user's input (printed as one line); 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, FileNotFoundError, FileExistsError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
