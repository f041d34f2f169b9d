"""New lengths, bags and sizes of the store compile nothing new in soft encoding, forward and backward."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from test_triton_compile import run_json


def test_a_thousand_lengths_compile_nothing_new() -> None:
    counted = run_json("tests/compile_only/soft_counts.py")
    assert counted["runs"] > 1000
    # two kinds of rows each; prepared are codewords and weights, each way, and gradients
    expected = {
        "parts_kernel": 5,
        "products_kernel": 4,
        "assign_kernel": 2,
        "sums_kernel": 2,
        "gather_kernel": 1,
        "logits_backward_kernel": 2,
        "rows_kernel": 2,
        "parameters_kernel": 2,
        "add_kernel": 2,
        "codebook_kernel": 2,
    }
    assert counted["first"] == counted["last"] == expected, counted
