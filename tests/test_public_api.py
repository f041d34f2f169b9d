"""The public interface is what tests/public_api.txt says it is: changed on purpose, or not at all."""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path

import pytest

import public_api

PAGE = Path(__file__).parent.parent / "docs" / "api-stability.md"


def test_nothing_public_changed_unnoticed():
    held = public_api.LISTING.read_text(encoding="utf-8").splitlines()
    change = [
        line
        for line in difflib.unified_diff(held, public_api.listing().splitlines(), lineterm="", n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]
    assert not change, (
        "the public interface changed. If that is meant, read docs/api-stability.md, tell it in CHANGELOG.md, and "
        "renew the listing with `python tests/public_api.py`:\n" + "\n".join(change)
    )


def test_no_line_depends_on_the_machine():
    held = public_api.LISTING.read_text(encoding="utf-8")
    assert not re.search(r" at 0x|/home|/root|/tmp|device\(", held)
    lines = [line for line in held.splitlines() if line]
    assert len(lines) == len(set(lines))


class Base:
    def inherited(self, a, *, b=2): ...


@dataclasses.dataclass
class Sample(Base):
    kept: int
    late: float = 0.5

    def _private(self): ...

    @property
    def size(self): ...

    @classmethod
    def load(cls, path): ...


Base.__module__ = Sample.__module__ = "dre_fast.sample"


def test_the_listing_sees_a_change():
    assert list(public_api.described("Sample", Sample)) == [
        "Sample(kept, late=0.5)",
        "Sample.inherited(self, a, *, b=2)",
        "Sample.kept",
        "Sample.late",
        "Sample.load(path)",
        "Sample.size",
    ]


@pytest.mark.parametrize("kind", ["# Python", "# Commands", "# Settings", "# Files"])
def test_every_kind_is_listed(kind):
    assert kind in public_api.LISTING.read_text(encoding="utf-8").splitlines()


def test_the_page_gives_every_file_format_with_its_number():
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+?) \|.*\| `([^`]+)` \|", page, re.MULTILINE)
    assert [f"{name}: {version}" for name, version in rows] == list(public_api.file_formats())
