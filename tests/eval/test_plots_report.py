"""Curves from a metrics log, and the self-contained page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dre_fast.eval import plots
from dre_fast.eval.plots import draw_curves, draw_staleness, series, smoothed
from dre_fast.eval.report import Figure, Table, build_page


def log(epochs: int = 4, steps: int = 10) -> list[dict]:
    lines: list[dict] = [{"kind": "prefill", "tiles": 3, "seconds": 0.1}]
    for epoch in range(epochs):
        for i in range(steps):
            step = epoch * steps + i
            lines.append({"kind": "step", "step": step, "epoch": epoch, "loss": 1 / (1 + step)})
        lines.append(
            {
                "kind": "epoch",
                "epoch": epoch,
                "train_loss": 0.5,
                "val_loss": 1 - epoch / 10,
                "val_auc_subtype": None if epoch == 0 else 0.6 + epoch / 10,
                "bank_age_mean": 3.0 + epoch,
                "bank_age_max": 9 + epoch,
                "bank_never_refreshed": 1 / (1 + epoch),
                "bank_drift_mean": 0.01,
                "bank_drift_q90": 0.05,
            }
        )
    return lines


def is_picture(path: Path) -> bool:
    image = np.asarray(Image.open(path).convert("RGB"))
    return min(image.shape[:2]) > 100 and bool((image < 200).any())


def test_curves_of_two_runs(tmp_path: Path):
    assert is_picture(draw_curves(tmp_path / "c.png", {"end to end": log(), "frozen": log(2)}))


def test_curves_of_a_run_without_validation(tmp_path: Path):
    assert is_picture(draw_curves(tmp_path / "c.png", {"run": [r for r in log() if r["kind"] == "step"]}))


def test_no_steps_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="no training step"):
        draw_curves(tmp_path / "c.png", {"run": []})
    assert not list(tmp_path.iterdir())


def test_null_values_are_left_out_of_a_curve():
    x, y = series(log(), "epoch", "epoch", "val_auc_subtype")
    assert x.tolist() == [1, 2, 3]
    np.testing.assert_allclose(y, [0.7, 0.8, 0.9])


def test_smoothing_keeps_a_constant_and_follows_a_trend():
    np.testing.assert_allclose(smoothed(np.full(200, 3.0)), 3.0)
    ramp = np.linspace(0, 1, 200)
    smooth = smoothed(ramp)
    assert (np.diff(smooth) > 0).all()
    assert abs(smooth[-1] - 1) < 0.1


def test_a_curve_of_one_point_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    guard = {"kind": "drift", "step": 0, "load": 0.5, "factor": 0.1}
    draw_curves(tmp_path / "c.png", {"run": log(1, 1)})
    draw_staleness(tmp_path / "s.png", [*log(1, 1), guard])
    curves = [
        line
        for figure in drawn
        for axes in figure.axes
        for line in axes.lines
        if line.get_linestyle() == "-" and line.get_alpha() is None
    ]
    assert len(curves) == 9  # loss, its validation; two of ages, two of drift, first fill; load, factor
    assert all(line.get_marker() == "o" for line in curves)


def test_staleness_from_the_log_and_from_a_bank(tmp_path: Path):
    assert is_picture(draw_staleness(tmp_path / "s.png", log()))
    from dre_fast.nn.bank import MemoryBank

    bank = MemoryBank([6, 5], 4, dtype="float32")
    bank.write(torch.zeros(6).long(), torch.arange(6), torch.eye(6, 4) + 1, step=0)
    bank.write(torch.ones(5).long(), torch.arange(5), torch.eye(5, 4) + 1, step=3)
    assert is_picture(draw_staleness(tmp_path / "b.png", log(), statistics=bank.statistics(step=4)))
    fidelity = [
        {"kind": "fidelity", "step": 10 * i, "embedding": 0.9, "gradient": [0.5, None][i % 2]}
        for i in range(9)
    ]
    guard = [{"kind": "drift", "step": 10 * i, "load": 0.5, "factor": 0.1 * i} for i in range(9)]
    widths = [
        Image.open(draw_staleness(tmp_path / f"{i}.png", rows)).size
        for i, rows in enumerate((log(), log() + fidelity, log() + fidelity + guard))
    ]
    assert widths[0][0] < widths[1][0]  # a panel more,
    assert widths[1][1] < widths[2][1]  # and another, in a second row
    with pytest.raises(ValueError, match="memory bank"):
        draw_staleness(tmp_path / "n.png", [{"kind": "step", "loss": 1.0}])


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.urls += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_holds_everything_it_shows(tmp_path: Path):
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / "f.png")
    path = build_page(
        tmp_path / "index.html",
        title="A <run>",
        lead="What it is & does",
        summary={"subtyping_auc": 0.98765, "recognition_auc": None, "seconds": 412.3, "slides": {"train": 4}},
        figures=[Figure(tmp_path / "f.png", 'with "quotes"')],
        tables=[
            Table("Scores", ["task", "column", "value"], [["subtype", "", "0.9"], ["tumour", "", 0.81234]])
        ],
        config="a: <b>\n",
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.urls
    assert all(url.startswith("data:image/png;base64,") for url in page.urls)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    for shown in ("A <run>", "What it is & does", "0.988", "undefined", "412", "train 4", "0.812", "a: <b>"):
        assert shown in page.text
    assert "<th>column</th>" not in text  # an empty column is left out
    assert '<td class="number">0.9</td>' in text


def test_page_refuses_what_it_cannot_show(tmp_path: Path):
    with pytest.raises(ValueError, match=r"\.tif"):
        build_page(tmp_path / "i.html", title="t", figures=[Figure("x.tif", "c")])
    with pytest.raises(FileNotFoundError, match=r"x\.png"):
        build_page(tmp_path / "i.html", title="t", figures=[Figure(tmp_path / "x.png", "c")])
    with pytest.raises(ValueError, match="row 1"):
        build_page(tmp_path / "i.html", title="t", tables=[Table("T", ["a", "b"], [["1"]])])
    assert not (tmp_path / "i.html").exists()
