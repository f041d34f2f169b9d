"""``dre-fast info``: what is installed, what runs where, what is missing."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "info",
        help="versions, devices, backends, and how to get what is missing",
        description="Print versions, devices, the backend of every op, and how to get what is missing.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, to paste into an issue")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dre_fast.info import collect, render

    sections = collect()
    if args.json:
        import dataclasses
        import json

        print(
            json.dumps({k: [dataclasses.asdict(line) for line in v] for k, v in sections.items()}, indent=2)
        )
    else:
        print(render(sections))
    return 0
