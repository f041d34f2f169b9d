"""Tables of docstrings, which reStructuredText rules off by ``====``, as blocks of fixed width on the API page."""

from __future__ import annotations

import re
from typing import Any

import griffe

TABLE = re.compile(r"^( *)(=+(?: +=+)+)\n(?:.*\n)*?\1\2\n(?:.*\n)*?\1\2$", re.MULTILINE)


def fenced(text: str) -> str:
    """The text with its simple tables fenced; a table has a rule above and below its heads, and one at its end."""
    return TABLE.sub(lambda found: f"{found[1]}```text\n{found[0].replace('``', '  ')}\n{found[1]}```", text)


class DocstringTables(griffe.Extension):
    """Fences the tables of every docstring."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = fenced(obj.docstring.value)
