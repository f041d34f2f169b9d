"""From a folder of slides to scores and heatmaps, end to end: the commands of dre-fast, one after the other.

    python examples/end_to_end_folder.py [--out FOLDER] [--cohort TABLE.csv] [--small]

Without a table of your own (columns slide_id, case_id, path, report, subtype, split) it paints small synthetic slides of
two subtypes with one. Prints every command before it runs it, so the output is what you would type for your own slides;
those are larger: leave out --tile-size and --mpp-out there, take another encoder, and more epochs.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from pathlib import Path

from dre_fast.cli import main as dre_fast
from dre_fast.data.synthetic import make_cohort

SETTINGS = """
model.encoder=conv-tiny 'model.encoder_args={dim: 32, width: 16}' model.codewords=8 model.width=64 model.depth=1
memory.live=16 memory.refit_every=1 'loss.tasks=[{name: subtype}]' optim.batch_size=8 optim.lr=2e-3
optim.encoder_lr_scale=0.1 optim.head_warmup_epochs=2
"""


def run(line: str) -> None:
    """One command, as it would be typed."""
    print(f"\n$ dre-fast {' '.join(line.split())}", flush=True)
    if dre_fast(shlex.split(line)):
        raise SystemExit(f"dre-fast {line.split()[0]} failed; its message is above")


def main() -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write to (default: one in the system's temporary folder)"
    )
    parser.add_argument("--cohort", type=Path, help="a table of slides of your own")
    parser.add_argument("--small", action="store_true", help="fewer and smaller slides, one epoch")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="end_to_end_"))
    cohort = args.cohort
    if cohort is None:
        slides = {"train": 8, "val": 4, "test": 6} if args.small else {"train": 32, "val": 8, "test": 24}
        size = (512, 384) if args.small else (832, 640)
        cohort = make_cohort(out / "cohort", **slides, size=size, normal_fraction=0.0, seed=0)
        print(f"{sum(slides.values())} slides painted into {cohort.parent / 'slides'}, described by {cohort}")
    epochs = 1 if args.small else 12

    run(f"tile {cohort} --out {out}/tiles --tile-size 64 --mpp-out 1.0")
    run(f"embed-reports {cohort} --out {out}/reports.safetensors")
    run(
        f"train --out {out}/run data.cohort={cohort} data.tiles={out}/tiles data.reports={out}/reports.safetensors "
        f"{SETTINGS} optim.epochs={epochs}"
    )
    run(f"encode {out}/run --cohort {cohort} --tiles {out}/tiles --split test --out {out}/test.safetensors")
    run(f"evaluate {out}/test.safetensors --cohort {cohort} --split test --out {out}/results")
    first = next(line for line in cohort.read_text().splitlines()[1:] if line.endswith(",test")).split(",")[0]
    run(f"heatmap {out}/run --cohort {cohort} --tiles {out}/tiles --slide {first} --out {out}/maps")
    print(
        f"\nscores are in {out}/results, the heatmap of slide {first} is in {out}/maps, the run in {out}/run"
    )
    return out


if __name__ == "__main__":
    main()
