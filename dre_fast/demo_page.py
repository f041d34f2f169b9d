"""The demo's page: curves, heatmaps and tables of an end-to-end run beside a frozen one."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from dre_fast.train.config import Config


def draw_page(out: Path, cohort_csv: Path, config: Config, summary: dict[str, Any]) -> Path:
    """Draw figures into ``out/figures`` and write ``out/index.html``, which holds them all."""
    import dataclasses

    import yaml

    from dre_fast.data.cohort import Cohort
    from dre_fast.eval.plots import draw_curves, draw_staleness
    from dre_fast.eval.report import Figure, Table, build_page
    from dre_fast.train.build import slide_set
    from dre_fast.train.explain import draw_slide
    from dre_fast.train.inference import load_run
    from dre_fast.train.state import read_metrics

    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    logs = {name: read_metrics(out / name / "metrics.jsonl") for name in ("end_to_end", "frozen")}
    draw_curves(figures / "curves.png", logs)
    draw_staleness(figures / "staleness.png", logs["end_to_end"])

    cohort = Cohort.read(cohort_csv).subset("test")
    shown = [
        next(r for r in cohort.records if (r.labels or {}).get("subtype") == subtype)
        for subtype in cohort.label_values("subtype")
    ]
    slides = slide_set(cohort, shown, out / "tiles")
    loaded = load_run(out / "end_to_end")
    maps = [
        Figure(file, f"{record.slide_id} ({(record.labels or {})['subtype']}): {file.stem.split('_', 1)[1]}")
        for i, record in enumerate(shown)
        for file in draw_slide(loaded, slides, i, figures, task="subtype")
    ]
    tables = []
    for name, title in (
        ("end_to_end", "End to end, unseen slides"),
        ("frozen", "Frozen encoder, unseen slides"),
    ):
        with open(out / name / "test_metrics.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        tables.append(Table(title, rows[0], rows[1:]))
    return build_page(
        out / "index.html",
        title="dre_fast demo",
        lead="A slide model trained end to end on synthetic slides and reports, tile encoder included, "
        "beside the same model with its encoder frozen. Both start from the same encoder, warmed up without labels.",
        summary=summary,
        figures=[
            Figure(figures / "curves.png", "Training and validation, end to end and frozen"),
            *maps,
            Figure(figures / "staleness.png", "How old the bank's rows are, and how far features move"),
        ],
        tables=tables,
        config=yaml.safe_dump(dataclasses.asdict(config), sort_keys=False),
    )
