"""The demo's whole path on very few slides: that it runs, and what it leaves behind."""

from __future__ import annotations

import json

import pytest

from dre_fast.cli import main
from dre_fast.demo import CONFIG

KEYS = {"subtyping_auc", "frozen_subtyping_auc", "recognition_auc", "mutation_auc", "seconds", "peak_rss_mb"}


@pytest.mark.slow
def test_demo_writes_summary_page_and_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("dre_fast.demo.WARM_UP_STEPS", 3)
    monkeypatch.setattr("dre_fast.demo.SLIDE_SIZE", (640, 512))
    monkeypatch.setattr("dre_fast.demo.CONFIG", CONFIG.replace("epochs: 45", "epochs: 2"))
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--slides", "12", "8", "10"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= KEYS
    assert summary["seconds"] > 0
    assert summary["peak_rss_mb"] > 50
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 6
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert (out / "end_to_end" / "best.safetensors").exists()
    assert main(["demo", "--out", str(out), "--slides", "0", "0", "0"]) == 2
    assert (tmp_path / "demo-1" / "index.html").read_text(encoding="utf-8") == page  # moved aside
    assert not (out / "index.html").exists()
    (out / "notes.txt").touch()
    assert main(["demo", "--out", str(out), "--slides", "0", "0", "0"]) == 2  # an unfinished one is replaced
    assert not (out / "notes.txt").exists()
    assert not (tmp_path / "demo-2").exists()


def test_demo_refuses_a_folder_with_other_things(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("important")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "not a former demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()
