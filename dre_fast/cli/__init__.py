"""The command line: one file per command, each with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

COMMANDS = (
    *("demo", "tile", "embed_reports", "train", "encode", "evaluate", "heatmap", "codewords"),
    *("report", "export", "cross_validate", "compare", "probe", "mil", "mil_deploy", "info"),
)


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


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line, without the source line that gave it; our own are meant for the user."""
    source = "" if f"{os.sep}dre_fast{os.sep}" in filename else f"{filename}: {category.__name__}: "
    print(f"note: {source}{message}", file=sys.stderr)


def _like_setting(words: Sequence[str]) -> bool:
    return any(word.startswith("--") and "." in word.partition("=")[0] for word in words)


def _how_to_get(error: ImportError) -> str:
    """The pip command for an optional package, where the message of ``error`` does not name one already."""
    from dre_fast.info import remedy_of

    remedy = remedy_of(error.name or "")
    return f": {remedy}" if remedy and "pip install" not in str(error) else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0; 2 for a fault of the user's input (printed as one line); 130 after Ctrl-C."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes the section.key=value of `train` from one place only; people write them around the options
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        hint = "; settings are written without dashes: section.key=value" if _like_setting(rest) else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        args.overrides += rest
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = int(args.run(args))
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # `dre-fast evaluate ... | head`: who read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor does the flush at exit complain
        return 1
    except ImportError as error:
        print(f"error: {error}{_how_to_get(error)}", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; it is not imported for its name alone
            raise
        print(
            f"error: {error}\nLower memory.live, optim.batch_size or run.encode_chunk (train), --chunk (encode, heatmap)",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
