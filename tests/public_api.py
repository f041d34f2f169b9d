"""The public interface as text, one line a name: ``python tests/public_api.py`` renews tests/public_api.txt.

What is public, and what a change of these lines means for the version number: docs/api-stability.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LISTING = Path(__file__).with_name("public_api.txt")


def signature(function: Any) -> str:
    """Names, order, kinds and defaults of the arguments; types may become wider without a new line here."""
    shown = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in shown):
            shown.append("*")
        shown.append(f"{kind}{name}{default}")
    return f"({', '.join(shown)})"


def members(cls: type) -> Iterator[tuple[str, str]]:
    """Public methods, properties and fields of a class, those of its dre_fast bases included."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("dre_fast"):
            continue
        for name, value in vars(base).items():
            if name.startswith("_") or name in seen:
                continue
            if isinstance(value, property):
                seen.add(name)
                yield name, ""
            elif isinstance(value, staticmethod | classmethod) or inspect.isfunction(value):
                seen.add(name)
                yield name, signature(getattr(cls, name))
    if dataclasses.is_dataclass(cls):
        yield from ((field.name, "") for field in dataclasses.fields(cls) if field.name not in seen)


def described(path: str, value: Any) -> Iterator[str]:
    """The lines of one name: a function, or a class with its members."""
    if inspect.isclass(value):
        yield path + signature(value)
        yield from sorted(f"{path}.{name}{arguments}" for name, arguments in members(value))
    elif callable(value):
        yield path + signature(value)
    else:
        yield path


def python_names() -> Iterator[str]:
    """``dre_fast.__all__`` and ``dre_fast.reference.__all__``."""
    import dre_fast

    for name in sorted(dre_fast.__all__):
        if name != "reference":
            yield from described(f"dre_fast.{name}", getattr(dre_fast, name))
    for name in sorted(dre_fast.reference.__all__):
        yield from described(f"dre_fast.reference.{name}", getattr(dre_fast.reference, name))


def commands() -> Iterator[str]:
    """Commands with their arguments and options."""
    from dre_fast.cli import build_parser

    parser = build_parser()
    (choices,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command, its in sorted(choices.items()):
        for action in its._actions:
            name = "/".join(action.option_strings) or action.dest.upper()
            if not isinstance(action, argparse._HelpAction):
                yield f"dre-fast {command} {name}"


def settings() -> Iterator[str]:
    """The keys of a run's config, with their defaults."""
    from dre_fast.train.config import Config

    def walk(value: Any, key: str) -> Iterator[str]:
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield from walk(getattr(value, field.name), f"{key}.{field.name}" if key else field.name)
        else:
            yield f"{key} = {value!r}"

    yield from walk(Config(), "")


def file_formats() -> Iterator[str]:
    """The formats of files, with their version numbers."""
    from dre_fast.data import coords, embeddings, reports, tfidf, tiles
    from dre_fast.nn import bank_io
    from dre_fast.train import state

    yield f"tile coordinates: {coords.FORMAT} {coords.FORMAT_VERSION}"
    yield f"tile cache: dre_fast_tiles {tiles.CACHE_FORMAT_VERSION}"
    yield f"slide embeddings: {embeddings.FORMAT} {embeddings.VERSION}"
    yield f"report embeddings: {reports.FORMAT}"
    yield f"fitted report model: {tfidf.FORMAT}"
    yield f"memory bank: {bank_io.FORMAT} {bank_io.VERSION}"
    yield f"model: dre_fast {state.MODEL_FORMAT}"
    yield f"checkpoint: {state.CHECKPOINT_FORMAT}"


def listing() -> str:
    """All of it, as tests/public_api.txt holds it."""
    parts = {"Python": python_names, "Commands": commands, "Settings": settings, "Files": file_formats}
    return "\n".join("\n".join([f"# {title}", *lines(), ""]) for title, lines in parts.items())


if __name__ == "__main__":
    sys.path.insert(0, str(LISTING.parent.parent))
    LISTING.write_text(listing(), encoding="utf-8")
