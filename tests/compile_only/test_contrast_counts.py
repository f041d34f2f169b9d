"""New numbers of slides, reports and features compile nothing new in the loss against all reports."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from test_triton_compile import run_json


def test_a_thousand_cohorts_compile_nothing_new() -> None:
    counted = run_json("tests/compile_only/contrast_counts.py")
    assert counted["runs"] > 1000
    # InfoNCE and sigmoid loss, where they differ
    expected = {
        "slides_kernel": 1,
        "forward_kernel": 2,
        "merge_kernel": 2,
        "weights_kernel": 2,
        "sums_kernel": 1,
        "finish_kernel": 1,
    }
    assert counted["first"] == counted["last"] == expected, counted
