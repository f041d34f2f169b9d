"""The study on synthetic slides: what the bank, the live tiles and the ways to keep rows fresh are worth.

    python -m benchmarks.study.ablation --out benchmarks/results/cpu-2-cores/ablation

Frozen encoder, live tiles only, sampled and full memory and the exact gradient, with 4, 16 and 64 live tiles, and with
16 the policies against staleness; 3 seeds, each with a cohort, reports and a label-free warm encoder of its own. Judged
once, on slides that no run trained on. A study goes on where it stopped. Writes runs.jsonl, table.md and figure.png.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.study.runs import Run, last, mean_and_range, study
from dre_fast.eval.figures import new_figure, save_figure, tidy

TILE, MPP, SIZE = 64, 1.0, (1152, 896)
SLIDES = {"train": 96, "val": 2, "test": 160}
EPOCHS, WARM_UP_STEPS = 40, 50
LIVE = (4, 16, 64)
TASKS = ("subtype", "tumour")
POLICIES: dict[str, dict[str, Any]] = {
    "16 rows renewed a step": {"memory.refresh": 16},
    "64 rows renewed a step": {"memory.refresh": 64},
    "moving average writes": {"memory.writer_decay": 0.99},
    "codebook fitted once": {"memory.refit_every": 0},
    "no drift guard": {"memory.drift_limit": 0},
    "gradient times n/m": {"memory.grad_scale": "unbiased"},
}


def base(data: Path) -> dict[str, Any]:
    """The config that all runs share."""
    return {
        "data": {
            "cohort": str(data / "cohort" / "cohort.csv"),
            "tiles": str(data / "tiles"),
            "reports": str(data / "reports.safetensors"),
            "cache": str(data / "cache"),
            "backend": "openslide",
            "stain": 0.25,
            "val_split": "test",
        },
        "model": {
            "encoder": "conv-tiny",
            "encoder_args": {"dim": 32, "width": 16},
            "encoder_weights": str(data / "encoder.safetensors"),
            "codewords": 8,
            "width": 64,
            "depth": 1,
            "dropout": 0.1,
        },
        "memory": {"live": 16, "retrieved": 64, "kmeans_iterations": 5},
        "loss": {"contrastive_weight": 0.5, "tasks": [{"name": name} for name in TASKS]},
        "optim": {
            "epochs": EPOCHS,
            "batch_size": 8,
            "lr": 2e-3,
            "encoder_lr_scale": 0.05,
            "head_warmup_epochs": 3,
            "weight_decay": 0.05,
        },
        "run": {
            "tensorboard": False,
            "pictures": False,
            "checkpoint_every": 10**6,
            "validate_every": EPOCHS,
            "probe_every": 30,
            "threads": 1,
        },
    }


def runs(seed: int) -> list[Run]:
    """The runs of a seed."""
    found = [Run("frozen", seed, {"optim.freeze_encoder": True, "run.probe_every": 0})]
    for live in LIVE:
        for mode in ("none", "sampled", "full"):
            found.append(Run(f"{mode}, m={live}", seed, {"memory.mode": mode, "memory.live": live}))
    found += [Run(name, seed, settings) for name, settings in POLICIES.items()]
    found.append(Run("exact", seed, {"memory.mode": "exact", "run.probe_every": 0}))
    return found


def prepare(folder: Path, seed: int) -> Path:
    """Slides, tiles, reports and the encoder that all runs of a seed start from."""
    import torch

    from dre_fast.cli import main
    from dre_fast.data.cohort import Cohort
    from dre_fast.data.synthetic import make_cohort
    from dre_fast.nn.tile_encoders import build_tile_encoder
    from dre_fast.train.build import slide_set
    from dre_fast.train.pretrain import pretrain_encoder, save_encoder

    data = folder / f"data-{seed}"
    if (data / "encoder.safetensors").exists():
        return data
    cohort = make_cohort(data / "cohort", **SLIDES, seed=seed, size=SIZE, stain_variation=2.0)
    for command in (
        ["tile", str(cohort), "--out", str(data / "tiles"), "--tile-size", str(TILE), "--mpp-out", str(MPP)],
        ["embed-reports", str(cohort), "--out", str(data / "reports.safetensors")],
    ):
        if main(command):
            raise RuntimeError(f"dre-fast {command[0]} failed")
    (data / "cache").mkdir()
    train = Cohort.read(cohort).subset("train")
    slides = slide_set(train, train.records, data / "tiles", cache=data / "cache" / "train.h5")
    torch.manual_seed(seed)
    encoder = build_tile_encoder("conv-tiny", dim=32, width=16)
    pretrain_encoder(encoder, slides.reader, steps=WARM_UP_STEPS, seed=seed)
    save_encoder(encoder, data / "encoder.safetensors")
    return data


def fidelity(outcome: dict[str, Any], key: str) -> float | None:
    """Mean cosine with the exact one over the second half of a run."""
    found = [row[key] for row in outcome["log"] if row["kind"] == "fidelity" and row[key] is not None]
    half = found[len(found) // 2 :]
    return sum(half) / len(half) if half else None


def table(outcomes: list[dict[str, Any]]) -> str:
    """Markdown: AUCs over the seeds, fidelity, cost."""
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for outcome in outcomes:
        by_name[outcome["name"]].append(outcome)
    lines = [
        "| run | subtype AUC, mean (range) | tumour AUC, mean (range) | embedding cos | gradient cos | s/run "
        "| peak MB | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in [run.name for run in runs(0)]:
        group = by_name[name]
        if not group:
            continue
        cosines = []
        for key in ("embedding", "gradient"):
            values = [value for value in (fidelity(o, key) for o in group) if value is not None]
            cosines.append(f"{sum(values) / len(values):.2f}" if values else "-")
        aucs = [mean_and_range(last(o, f"val_auc_{task}") for o in group) for task in TASKS]
        seconds = sum(o["step_seconds"] for o in group) / len(group)
        peaks = [o["peak_mb"] for o in group if o["peak_mb"] is not None]
        peak = f"{max(peaks):.0f}" if peaks else "-"
        lines.append(
            f"| {name} | {aucs[0]} | {aucs[1]} | {cosines[0]} | {cosines[1]} | {seconds:.0f} | {peak} | {len(group)} |"
        )
    return "\n".join(lines) + "\n"


def draw(outcomes: list[dict[str, Any]], path: Path) -> None:
    """AUC over live tiles, one panel a task; a dot a seed."""
    figure = new_figure(9, 4)
    for column, task in enumerate(TASKS):
        axes = figure.add_subplot(1, 2, column + 1)
        for mode, colour in (("none", "#7f7f7f"), ("sampled", "#ff7f0e"), ("full", "#1f77b4")):
            points = [
                (live, last(o, f"val_auc_{task}"))
                for live in LIVE
                for o in outcomes
                if o["name"] == f"{mode}, m={live}"
            ]
            if not points:
                continue
            axes.scatter(*zip(*points), s=12, color=colour, alpha=0.6)
            there = sorted({live for live, _ in points})
            means = [
                sum(a for m, a in points if m == live) / sum(m == live for m, _ in points) for live in there
            ]
            axes.plot(there, means, color=colour, label=mode)
        for name, style in (("frozen", "--"), ("exact", ":")):
            aucs = [last(o, f"val_auc_{task}") for o in outcomes if o["name"] == name]
            if aucs:
                axes.axhline(sum(aucs) / len(aucs), color="0.4", linestyle=style, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(LIVE, [str(live) for live in LIVE])
        axes.set_xlabel("live tiles a slide")
        axes.set_ylabel("test AUC")
        axes.set_title(task)
        tidy(axes)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=6, fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    raise SystemExit(study(__doc__ or "", runs, prepare, base, table, draw))
