"""One progress bar for the whole package: there when someone is looking, absent in logs and pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(iterable: Iterable[T], desc: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterates over ``iterable`` and shows a bar on stderr.

    The bar appears when tqdm is installed and stderr is a terminal. ``DRE_FAST_PROGRESS=1`` shows it in a
    pipe or a log as well, ``DRE_FAST_PROGRESS=0`` never.

    Args:
        iterable: what is iterated over, one element at a time.
        desc: the words before the bar.
        total: number of elements; taken from ``len(iterable)`` where that exists.
        unit: what one element is called, e.g. ``"slide"``.
    """
    if not enabled():
        yield from iterable
        return
    from tqdm import tqdm

    yield from tqdm(iterable, desc=desc, total=total, unit=unit, dynamic_ncols=True, leave=True)


def enabled() -> bool:
    """True when ``progress`` draws a bar."""
    wish = os.environ.get("DRE_FAST_PROGRESS", "")
    if wish == "0":
        return False
    if wish != "1" and not sys.stderr.isatty():
        return False
    try:
        import tqdm  # noqa: F401
    except ImportError:
        return False
    return True
