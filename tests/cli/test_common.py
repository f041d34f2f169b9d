"""What several commands share."""

from __future__ import annotations

import pytest

from dre_fast.cli.common import counted


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 slides"), (1, "1 slide"), (2, "2 slides"), (12345, "12,345 slides")]
)
def test_counted(number, said):
    assert counted(number, "slide") == said
