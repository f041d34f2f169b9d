"""New lengths, bags, seeds and visits compile nothing new in the kernels around the encoding."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from test_triton_compile import run_json


def test_a_thousand_lengths_compile_nothing_new() -> None:
    counted = run_json("tests/compile_only/epilogue_counts.py")
    assert counted["runs"] > 1000
    # the normalisation and its backward, the gather with and without unit rows, the tiles
    assert counted["first"] == counted["last"] == 5, counted
