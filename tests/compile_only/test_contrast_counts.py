"""New numbers of slides, reports and features compile nothing new in the loss against all reports."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from test_triton_compile import check_resources, run_json


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


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_every_shipped_configuration_of_the_loss(capability: int) -> None:
    arguments = ("--json", "--arch", str(capability), "--match", "contrast")
    entries = run_json("-m", "dre_fast.kernels.resources", *arguments)
    assert len(entries) == 42
    check_resources(entries)
    products = [entry for entry in entries if any(f"K={n} " in entry["name"] for n in (32, 64))]
    assert len(products) == 32
    assert all(entry["matrix"] for entry in products)
