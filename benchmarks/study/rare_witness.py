"""The rare-witness yardstick: about one tile in a hundred decides, and the encoder comes from another task.

    python -m benchmarks.study.rare_witness --out benchmarks/results/cpu-2-cores/rare_witness

Frozen encoder, no memory, sampled and full memory, both also with half of fewer live tiles drawn by their effect on the
loss ("guided"), and the exact gradient, over encoder rates from 0.01 to 1 of the head's, with the drift guard and, full
memory at the default, without; 3 seeds. A study goes on where it stopped. Writes runs.jsonl (all logs but those of
single steps), table.md and figure.png.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.study import shapes
from benchmarks.study.runs import Run, last, mean_and_range, study
from dre_fast.eval.figures import new_figure, save_figure, tidy
from dre_fast.nn.tile_encoders import build_tile_encoder
from dre_fast.train.pretrain import save_encoder

SLIDES = {"train": 1280, "val": 2, "test": 400}
WITNESSES = 4  # of 484 tiles
EPOCHS = 16
ENCODER: dict[str, Any] = {"dim": 32, "width": 16}
GUIDED: dict[str, Any] = {"memory.guided": 0.5, "memory.guide": "loss", "memory.live": 32}


def base(data: Path) -> dict[str, Any]:
    """The config that all runs share; judged once, at the end, on the test slides."""
    return {
        "data": {
            "cohort": str(data / "cohort.csv"),
            "tiles": str(data / "tiles"),
            "cache": str(data / "cache"),
            "mpp": 1.0,
            "augment": False,
            "val_split": "test",
        },
        "model": {
            "encoder": "conv-tiny",
            "encoder_args": ENCODER,
            "encoder_weights": str(data / "encoder.safetensors"),
            "codewords": 16,
            "width": 16,  # wider heads learn the slides by heart
            "depth": 1,
            "dropout": 0.2,
        },
        "memory": {"live": 44, "retrieved": 384, "kmeans_iterations": 5},
        "loss": {"contrastive": None, "tasks": [{"name": "witness", "kind": "binary"}]},
        "optim": {
            "epochs": EPOCHS,
            "batch_size": 8,
            "lr": 2e-3,
            "head_warmup_epochs": 4,
            "weight_decay": 0.05,
        },
        "run": {
            "tensorboard": False,
            "pictures": False,
            "checkpoint_every": 10**6,
            "validate_every": EPOCHS,
            "threads": 1,
        },
    }


def runs(seed: int) -> list[Run]:
    """The runs of a seed, those that tell most first."""
    found = [
        Run("frozen", seed, {"optim.freeze_encoder": True}),
        *(Run(f"{mode} default", seed, {"memory.mode": mode}) for mode in ("full", "sampled", "none")),
    ]
    both = [(mode, guided) for guided in (True, False) for mode in ("full", "sampled")]
    for rate in (0.1, 1.0, 0.01, 0.3):  # 0.1 is the default
        for mode, guided in both:
            if rate != 0.1 or guided:
                name = f"{mode}{' guided' * guided} {'default' if rate == 0.1 else format(rate, 'g')}"
                settings = {"memory.mode": mode, "optim.encoder_lr_scale": rate, **(GUIDED if guided else {})}
                found.append(Run(name, seed, settings))
    unguarded = {"memory.mode": "full", "memory.drift_limit": 0}
    return [
        *found,
        Run("full default unguarded", seed, unguarded),
        Run("exact default", seed, {"memory.mode": "exact"}),
    ]


def prepare(folder: Path, seed: int, slides: Mapping[str, int] = SLIDES) -> Path:
    """The slides of a seed and the encoder that all its runs start from."""
    data = folder / f"data-{seed}"
    if not (data / "encoder.safetensors").exists():
        shapes.make_cohort(data, slides, WITNESSES, seed)
        torch.manual_seed(seed)
        encoder = build_tile_encoder("conv-tiny", **ENCODER)
        shapes.pretrain(encoder, 300, seed)
        save_encoder(encoder, data / "encoder.safetensors")
    return data


def table(outcomes: list[dict[str, Any]]) -> str:
    """Markdown: AUC over the seeds, and against the frozen encoder of the same seed."""
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for outcome in outcomes:
        by_name[outcome["name"]].append(outcome)
    frozen = {o["seed"]: last(o, "val_auc_witness") for o in by_name.get("frozen", [])}
    lines = [
        "| run | test AUC, mean (range) | above frozen, worst seed | seeds |",
        "|---|---|---|---|",
    ]
    for name, group in sorted(by_name.items(), key=lambda item: _order(item[0])):
        aucs = {o["seed"]: last(o, "val_auc_witness") for o in group}
        worst = min((auc - frozen[seed] for seed, auc in aucs.items() if seed in frozen), default=0.0)
        lines.append(f"| {name} | {mean_and_range(aucs.values())} | {worst:+.3f} | {len(group)} |")
    return "\n".join(lines) + "\n"


def rate_of(name: str) -> float:
    """The encoder's rate over the head's, of a run of this name."""
    return next((float(word) for word in name.split() if word[0].isdigit()), 0.1)


def _order(name: str) -> tuple[int, bool, float, str]:
    kind = ["frozen", "none", "sampled", "full", "exact"].index(name.split()[0])
    return kind, "guided" in name, rate_of(name), name


_LINES = (
    (" guided", "half drawn by loss", "#2ca02c"),
    ("", "in turn", "#1f77b4"),
    (" unguarded", "in turn, no drift guard", "#d62728"),
)


def draw(outcomes: list[dict[str, Any]], path: Path) -> None:
    """AUC over encoder rates; a dot a seed."""
    figure = new_figure(9, 4)
    lowest = min(last(outcome, "val_auc_witness") for outcome in outcomes)
    for column, mode in enumerate(("full", "sampled")):
        axes = figure.add_subplot(1, 2, column + 1)
        for mark, label, colour in _LINES:
            points = [
                (rate_of(outcome["name"]), last(outcome, "val_auc_witness"))
                for outcome in outcomes
                if outcome["name"].startswith(mode)
                and [m for m, *_ in _LINES if m and m in outcome["name"]] == [mark] * bool(mark)
            ]
            if not points:
                continue
            rates = sorted({rate for rate, _ in points})
            means = [
                sum(a for r, a in points if r == rate) / sum(r == rate for r, _ in points) for rate in rates
            ]
            axes.plot(rates, means, color=colour, label=label)
            axes.scatter(*zip(*points), s=12, color=colour, alpha=0.6)
        for name, style in (("frozen", "--"), ("exact default", ":"), ("none default", "-.")):
            aucs = [last(o, "val_auc_witness") for o in outcomes if o["name"] == name]
            if aucs:
                axes.axhline(sum(aucs) / len(aucs), color="0.4", linestyle=style, label=name.split()[0])
        axes.set_xscale("log")
        axes.set_xlabel("encoder rate / head rate")
        axes.set_ylabel("test AUC")
        axes.set_ylim(lowest - 0.02, 1.005)
        axes.set_title(f"memory: {mode}")
        tidy(axes)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    shown = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="lower center", ncols=6, fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    raise SystemExit(study(__doc__ or "", runs, prepare, base, table, draw))
