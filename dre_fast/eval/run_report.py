"""The page about one run: what it was trained on and with, how it went, how well it does, what it sees."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dre_fast.eval.compare import Run, flatten, read_runs, results
from dre_fast.eval.compare_figures import draw_comparison, validation_title
from dre_fast.eval.plots import draw_curves, draw_staleness
from dre_fast.eval.report import Figure, Section, Table, build_page
from dre_fast.eval.tables import SHOWN, MetricRow, read_tables, shown
from dre_fast.train.config import Config
from dre_fast.train.cost import PUBLISHED, PUBLISHED_ON, read_cost
from dre_fast.train.data_card import read_data_card
from dre_fast.train.state import METRICS

REPORT = "report.html"
_SPLITS = {
    "slides": "slides",
    "cases": "cases",
    "with_report": "with a report",
    "tiles": "tiles",
    "tiles_least": "fewest a slide",
    "tiles_median": "median a slide",
    "tiles_most": "most a slide",
}


def write_report(
    folder: str | Path,
    path: str | Path | None = None,
    *,
    scores: str | Path | None = None,
    slides: Sequence[Figure | Table | str] = (),
) -> Path:
    """Write one HTML file about a run that holds all it shows: it can be mailed, and opens without a network.

    Args:
        folder: of the run; it may still be training.
        path: of the page; None: report.html in the folder.
        scores: folder that `dre-fast evaluate --out` wrote: scores on unseen slides and their calibration.
        slides: what else to show under "Slides", such as maps and sheets of codewords.

    Returns:
        The path.

    Raises:
        ValueError: the folder holds no run, or several (a cross-validation); ``scores`` holds no scores. Named.
    """
    folder = Path(folder)
    (run,) = read_runs([folder])
    if not (folder / METRICS).exists():
        raise ValueError(
            f"{folder}: holds a cross-validation; report its runs one by one, {folder}/fold-0 say, or draw them together "
            f"with `dre-fast compare {folder}`"
        )
    found, card = results(run.logs[0]), read_data_card(folder)
    judged = None if scores is None else _read_scores(Path(scores))
    with tempfile.TemporaryDirectory() as scratch:
        sections = [
            Section("Data", _data(card)),
            Section("Settings", [_settings(run.config)]),
            Section("Training", _training(run, Path(scratch), found)),
            Section("Memory bank", _memory(run, Path(scratch))),
            Section("Validation", _validation(run.logs[0], found)),
            Section("Cost", _cost(folder)),
        ]
        if judged is not None:
            sections.append(Section("Unseen slides", _unseen(judged, Path(str(scores)))))
        if slides:
            sections.append(Section("Slides", slides))
        return build_page(
            path or folder / REPORT,
            title=f"Run {run.name}",
            lead=_lead(run.config, card, found),
            summary=_summary(found, card, judged),
            sections=[section for section in sections if section.parts],
            config=yaml.safe_dump(asdict(run.config), sort_keys=False),
        )


def _lead(config: Config, card: dict[str, Any] | None, found: dict[str, Any]) -> str:
    tasks = [task.name for task in config.loss.tasks]
    if config.loss.contrastive:
        tasks.append(f"reports ({config.loss.contrastive})")
    encoder = config.model.encoder + (" (frozen)" if config.optim.freeze_encoder else "")
    done = f"{found['epochs']} of {config.optim.epochs} epochs"
    text = (
        f"Tile encoder {encoder}, aggregator {config.model.aggregator}, memory {config.memory.mode}; {done}."
    )
    if tasks:
        text += f" Learns: {', '.join(tasks)}."
    if card is not None:
        sizes = [f"{scale['tile_size']:g} px" + _mpp(scale["mpp"]) for scale in card["tiles"]]
        text += f" Tiles of {' and '.join(sizes)}."
    return text


def _mpp(mpp: float | None) -> str:
    return "" if mpp is None else f" at {mpp:g} µm/px"


def _summary(
    found: dict[str, Any], card: dict[str, Any] | None, judged: list[MetricRow] | None
) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if card is not None:
        train = card["splits"]["train"]
        shown["training slides"] = train["slides"]
        shown["training tiles"] = train["tiles"]
    if found["best epoch"] is not None:
        shown["best epoch"] = found["best epoch"]
    for key, value in found.items():
        if key.startswith(("val_auc_", "val_c_index_")):
            shown[f"validation {validation_title(key)}"] = value
    for row in judged or ():
        if row.column is None and row.metric in ("auc", "c_index"):
            name = "AUC" if row.metric == "auc" else "c-index"
            shown[f"unseen slides {name}: {row.task}"] = row.value
    return shown


def _data(card: dict[str, Any] | None) -> list[Table | str]:
    if card is None:
        return ["This run was made before runs kept counts of their slides (data.json)."]
    splits = card["splits"]
    parts: list[Table | str] = [
        Table(
            "Slides",
            ["split", *_SPLITS.values()],
            [[name, *(counts[key] for key in _SPLITS)] for name, counts in splits.items()],
        )
    ]
    rows = [
        [
            row["task"],
            row["column"],
            "not labelled" if row["label"] is None else row["label"],
            *(row[name] for name in splits),
        ]
        for row in card["labels"]
    ]
    if rows:
        parts.append(Table("Labels, slides", ["task", "column", "label", *splits], rows))
    return parts


def _settings(config: Config) -> Table | str:
    own, plain = flatten(config), flatten(Config())
    rows = [
        [key, _setting(own[key]), _setting(plain[key])] for key in own if repr(own[key]) != repr(plain[key])
    ]
    if not rows:
        return "Every setting is at its default."
    return Table("Settings that are not at their defaults", ["setting", "this run", "default"], rows)


def _setting(value: object) -> str:
    return "null" if value is None else '""' if value == "" else str(value)


def _training(run: Run, scratch: Path, found: dict[str, Any]) -> list[Figure | Table | str]:
    (log,) = run.logs
    if not any(record.get("kind") == "step" for record in log):
        return ["No step has been taken yet."]
    parts: list[Figure | Table | str] = [
        Figure(
            draw_curves(scratch / "curves.png", {run.name: log}),
            "Loss of each step, thin, and smoothed; losses and scores on the validation slides. Dotted: chance",
        )
    ]
    others = {Path(figure.path).stem: figure for figure in draw_comparison(scratch, [run])}
    several = len({key for record in log for key in record if key.startswith("loss_")}) > 1
    parts += [others[name] for name in ("loss", "speed") if name in others and (several or name != "loss")]
    rows = [[key, value] for key, value in found.items() if value is not None and not key.startswith("val_")]
    parts.append(Table("In numbers", ["quantity", "value"], rows))
    skipped = sum(record.get("skipped_slides", 0) for record in log if record.get("kind") == "epoch")
    if skipped:
        parts.append(
            f"{skipped} visits of slides that could not be read were left out (data.on_error=skip); the log names them."
        )
    return parts


def _memory(run: Run, scratch: Path) -> list[Figure | Table | str]:
    (log,) = run.logs
    if not any(record.get("kind") == "epoch" and "bank_age_mean" in record for record in log):
        return []
    drawn, logged = run.folder / "staleness.png", run.folder / METRICS
    if not drawn.exists() or drawn.stat().st_mtime < logged.stat().st_mtime:  # it has histograms, if of now
        drawn = draw_staleness(scratch / "staleness.png", log)
    caption = "Age of the bank's rows, and how far features moved when rows were written anew (1 - cosine)"
    if any(record.get("kind") == "fidelity" for record in log):
        caption += "; cosine of slide embedding and encoder gradient with those of all tiles encoded now"
    if any(record.get("kind") == "drift" for record in log):
        caption += (
            "; the drift guard: load (1: at memory.drift_limit), and the factor it puts on the encoder's rate"
        )
    return [Figure(drawn, caption)]


def _validation(log: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[Figure | Table | str]:
    validated = [record for record in log if record.get("val_score") is not None]
    if not validated:
        return []
    last = validated[-1]
    keys = [key for key in found if key.startswith("val_")]
    return [
        Table(
            "Scores on the validation slides",
            ["score", f"epoch {found['best epoch']}, kept", f"epoch {last['epoch'] + 1}, last"],
            [[validation_title(key), found[key], last.get(key)] for key in keys],
        )
    ]


def _cost(folder: Path) -> list[Figure | Table | str]:
    cost = read_cost(folder)
    if cost is None:
        return []
    text = cost.line().removeprefix("cost: ")
    own: list[object] = [
        "this run",
        cost.hardware,
        cost.device_hours,
        cost.peak_gb,
        cost.seconds_per_10k_tiles,
    ]
    rows = [own, *([name, PUBLISHED_ON, *numbers] for name, *numbers in PUBLISHED)]
    return [
        text[:1].upper() + text[1:] + ". A slide and its tiles: of a training step.",
        Table(
            "Beside published costs of training end to end, each on a cohort of its own",
            ["model", "hardware", "device hours", "peak GB", "s per 10,000 tiles"],
            [[f"{v:.3g}" if isinstance(v, float) else "" if v is None else v for v in row] for row in rows],
        ),
    ]


def _read_scores(folder: Path) -> list[MetricRow]:
    file = folder / "metrics.json"
    if not file.exists():
        raise ValueError(f"{folder}: holds no metrics.json; `dre-fast evaluate ... --out {folder}` writes it")
    return read_tables(file)


def _unseen(rows: Sequence[MetricRow], folder: Path) -> list[Figure | Table | str]:
    parts: list[Figure | Table | str] = [
        Table("Scores with bootstrap intervals by case", list(SHOWN), [shown(row) for row in rows])
    ]
    table, picture = folder / "calibration.csv", folder / "calibration.png"
    if table.exists():
        with open(table, newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file)
        fit = [[_number(cell) for cell in line] for line in lines]
        names = {"ece": "expected calibration error", "brier": "Brier score"}
        parts.append(Table("Calibration", [names.get(name, name) for name in header], fit))
    if picture.exists():
        parts.append(
            Figure(picture, "Reliability: how often it was so, against the probability that was said")
        )
    return parts


def _number(cell: str) -> str | float:
    """A cell of a CSV: fractions as numbers, which are shown with three digits."""
    return float(cell) if "." in cell and cell.replace(".", "").isdecimal() else cell
