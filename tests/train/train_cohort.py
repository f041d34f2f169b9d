"""A tiny cohort on disk: numpy slides, tile coordinates, reports; two classes that differ in texture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dre_fast.data.coords import write_coords
from dre_fast.data.slides import open_slide
from dre_fast.data.tiling import tile_slide
from dre_fast.train.config import Config, load_config

TILE = 32


def write_cohort(root: Path, *, slides: int = 10, side: int = 160, reports: bool = True) -> Path:
    """``root/cohort.csv`` with .npy slides, tiles in ``root/tiles`` and ``root/reports.safetensors``."""
    import torch

    from dre_fast.data.reports import ReportEmbeddings

    rng = np.random.default_rng(0)
    lines = ["slide_id,case_id,path,kind,EGFR,split"]
    for i in range(slides):
        kind = "stripes" if i % 2 else "dots"
        pixels = rng.integers(90, 150, (side, side, 3)).astype(np.uint8)
        if kind == "stripes":
            pixels[::4] = (200, 60, 160)
        else:
            pixels[::4, ::4] = (60, 30, 140)
        np.save(root / f"s{i}.npy", pixels)
        split = "val" if i >= slides - 4 else "train"
        lines.append(f"s{i},c{i},s{i}.npy,{kind},{['', '0', '1'][i % 3]},{split}")
        slide = open_slide(root / f"s{i}.npy", mpp=1.0)
        tiling = tile_slide(slide, tile_size=TILE, mpp=1.0, min_tissue=0.0)
        slide.close()
        write_coords(root / "tiles" / f"s{i}.h5", tiling)
    (root / "cohort.csv").write_text("\n".join(lines) + "\n")
    if reports:
        generator = torch.Generator().manual_seed(0)
        means = torch.randn(2, 8, generator=generator)
        matrix = torch.stack(
            [means[i % 2] + 0.1 * torch.randn(8, generator=generator) for i in range(slides)]
        )
        ReportEmbeddings([f"c{i}" for i in range(slides)], matrix, "test").save(root / "reports.safetensors")
    return root / "cohort.csv"


def tiny_config(root: Path, *overrides: str) -> Config:
    return load_config(
        None,
        [
            f"data.cohort={root / 'cohort.csv'}",
            f"data.tiles={root / 'tiles'}",
            f"data.reports={root / 'reports.safetensors'}",
            "data.mpp=1.0",
            "model.encoder=conv-tiny",
            "model.codewords=4",
            "model.width=16",
            "model.depth=1",
            "model.heads=2",
            "model.dropout=0.1",
            "memory.live=4",
            "memory.kmeans_iterations=3",
            "loss.tasks=[{name: kind}, {name: EGFR, kind: binary}]",
            "optim.epochs=3",
            "optim.batch_size=2",
            "optim.encoder_lr_scale=0.5",
            "optim.warmup_steps=2",
            "run.threads=1",
            "run.checkpoint_every=2",
            "run.tensorboard=false",
            "run.pictures=false",
            *overrides,
        ],
    )


def timeless(out: Path, *left_out: str) -> list[dict[str, Any]]:
    """A run's log without what clocks say, and without lines of some kinds."""
    from dre_fast.train.state import read_metrics

    rows = [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] not in left_out]
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]


def interrupt(config: Config, out: Path, step: int) -> None:
    """A run that Ctrl-C stops after a step."""
    import pytest

    from dre_fast.train.loop import Trainer

    trainer = Trainer(config, out)
    record = trainer._record

    def stop(kind: str, **fields: Any) -> None:
        record(kind, **fields)
        if kind == "step" and fields["step"] == step:
            raise KeyboardInterrupt

    trainer._record = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def assert_resumes(config: Config, folder: Path, step: int) -> None:
    """A run stopped after a step and resumed, ``folder/b``, has the log of one in a piece, ``folder/a``."""
    from dre_fast.train.loop import Trainer

    if not (folder / "a").exists():
        Trainer(config, folder / "a").fit()
    interrupt(config, folder / "b", step)
    Trainer(config, folder / "b", resume=True).fit()
    assert timeless(folder / "a") == timeless(folder / "b")
