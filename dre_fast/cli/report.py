"""``dre-fast report``: a page about one run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dre_fast.cli.common import check_magnifications, positive

if TYPE_CHECKING:
    from dre_fast.data.cohort import Cohort, Task

_MOST = 4  # slides shown, unless they are named


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "report",
        help="a page about one run: data, settings, curves, scores, cost, slides",
        description="Write one HTML file about a run, which opens from disk and holds all it shows: counts of the data, "
        "settings that differ from the defaults, curves, staleness and fidelity of the memory bank, the drift guard, "
        "validation scores and cost. A run writes it itself at its end, without scores on unseen slides and without "
        "slides.",
        epilog="example: dre-fast report runs/a --scores results --cohort cohort.csv --tiles tiles --slides S1 S2",
    )
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    parser.add_argument("--out", help="file to write (default: report.html in the run folder)")
    parser.add_argument(
        "--scores", metavar="FOLDER", help="what `dre-fast evaluate --out` wrote, to be shown, too"
    )
    parser.add_argument(
        "--cohort",
        help="cohort CSV: show codewords and contributions on slides of it (with --slides: the run's own)",
    )
    parser.add_argument(
        "--tiles",
        action="append",
        help="folder of the cohort's tiles; repeat it for a model of several magnifications (default: the run's own)",
    )
    parser.add_argument(
        "--slides",
        nargs="+",
        metavar="ID",
        help=f"slides to show (default with --cohort: up to {_MOST} of the test or validation split, of other labels)",
    )
    parser.add_argument("--task", help="task of the contribution maps (default: the model's first)")
    parser.add_argument(
        "--backend", default="auto", help="slide reader: auto, openslide, cucim, images, array"
    )
    parser.add_argument("--mpp", type=float, help="um/px of slides that do not say")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--chunk", type=positive, default=256, help="tiles encoded at once")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import tempfile

    from dre_fast.eval.run_report import write_report

    with tempfile.TemporaryDirectory() as scratch:
        slides = _slides(args, Path(scratch)) if args.cohort or args.slides else ()
        print(write_report(args.run_folder, args.out, scores=args.scores, slides=slides))
    return 0


def _slides(args: argparse.Namespace, folder: Path) -> list:
    """Maps of the slides and the sheets of the codewords in them, as figures."""
    from dre_fast.data.cohort import Cohort
    from dre_fast.eval.report import Figure
    from dre_fast.progress import progress
    from dre_fast.train.build import slide_set
    from dre_fast.train.checks import pick_device
    from dre_fast.train.explain import draw_slide, pick_task
    from dre_fast.train.inference import encode_tiles_of, load_run
    from dre_fast.train.top_tiles import write_sheets

    loaded = load_run(args.run_folder, pick_device(args.device))
    tiles = args.tiles or loaded.config.data.tile_folders
    check_magnifications(tiles, loaded.config)
    cohort = Cohort.read(args.cohort or loaded.config.data.cohort)
    task = pick_task(loaded, args.task) if loaded.tasks or args.task else None
    names = args.slides or some_slides(cohort, task)
    records = cohort.select(names).records
    slides = slide_set(cohort, records, tiles, backend=args.backend, mpp=args.mpp or loaded.config.data.mpp)
    loaded.check_tiles(slides)
    figures, features = [], []
    for i in progress(range(len(slides)), "report", unit="slide"):
        name = records[i].slide_id
        features.append(encode_tiles_of(loaded.model, slides.reader, i, args.chunk))
        for file in draw_slide(loaded, slides, i, folder, task=args.task, features=features[i]):
            if file.stem.endswith("_codewords"):
                caption = f"{name}: each tile in the colour of its codeword"
            else:
                caption = f"{name}: what each tile adds to the logit, to first order; red speaks for, blue against it"
            figures.append(Figure(_smaller(file), caption))
    of = "the slide" if len(names) == 1 else f"these {len(names)} slides"
    files = write_sheets(loaded, slides, folder, per_slide=-(-8 // len(names)), features=features)
    figures += [
        Figure(
            _smaller(file), f"The tiles of {of} nearest to each codeword, and its share of all their tiles"
        )
        for file in files
        if file.suffix == ".png"
    ]
    return figures


def _smaller(picture: Path) -> Path:
    """The picture as JPEG: tissue as PNG makes pages too large to mail."""
    from dre_fast.data.optional import need

    with need("PIL.Image", "wsi").open(picture) as image:
        image.convert("RGB").save(picture.with_suffix(".jpg"), quality=88)
    return picture.with_suffix(".jpg")


def some_slides(cohort: Cohort, task: Task | None) -> Sequence[str]:
    """Up to four slides of the test split (else validation, else any), of different labels of a task with classes."""
    split = next((name for name in ("test", "val") if cohort.splits.get(name)), None)
    records = cohort.subset(split).records
    column = task.columns[0] if task is not None and task.kind != "survival" else None
    by_label: dict[str | None, list[str]] = {}
    for record in records:
        by_label.setdefault(record.labels.get(column) if column else None, []).append(record.slide_id)
    lone = len(by_label) > 1
    labels = [names for label, names in by_label.items() if label is not None or not lone]
    chosen = [names[i] for i in range(_MOST) for names in labels if i < len(names)][:_MOST]
    return sorted(chosen, key=[record.slide_id for record in records].index)
