"""``dre-fast compare``: runs drawn against each other, and tables of what differs."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="curves, settings, scores and speed of runs against each other, as figures, tables and a page",
        description="Read the logs and configs of runs (or folders of cross-validations) and write figures, tables and "
        "index.html. With --cohort, runs that hold predictions.safetensors (of `dre-fast encode`), or the "
        "out_of_fold.safetensors of a cross-validation, are also judged in pairs: differences in AUC with bootstrap "
        "intervals by case.",
        epilog="example: dre-fast compare runs/full runs/sampled runs/none --cohort cohort.csv --split test --out seen",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or folder of a cross-validation")
    parser.add_argument("--out", required=True, help="folder for index.html, figures and tables")
    parser.add_argument("--cohort", help="cohort CSV with labels, for paired differences")
    parser.add_argument(
        "--split", choices=("train", "val", "test"), help="judge only these slides (default: every slide)"
    )
    parser.add_argument(
        "--predictions",
        nargs="+",
        metavar="FILE",
        help="one file of predictions a run, in their order, in place of those in their folders",
    )
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples by case (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: 0)")
    parser.add_argument(
        "--missing",
        nargs="+",
        default=(),
        metavar="VALUE",
        help="label cells that mean 'unknown', besides NA",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dre_fast.data.cohort import MISSING, Cohort
    from dre_fast.eval.compare import paired_grid, read_runs, result_grid, settings_grid
    from dre_fast.eval.compare_figures import draw_comparison
    from dre_fast.eval.report import Table, build_page

    if args.predictions and len(args.predictions) != len(args.runs):
        raise ValueError(f"--predictions: {len(args.predictions)} files for {len(args.runs)} runs; one a run")
    if args.predictions and not args.cohort:
        raise ValueError("--predictions are judged by labels: give --cohort")
    runs = read_runs(args.runs)
    out = Path(args.out)
    grids = {"results": result_grid(runs), "settings": settings_grid(runs)}
    titles = {"results": "Results", "settings": "Settings that differ", "paired": "Paired differences in AUC"}
    if args.cohort:
        own = [one.predictions for one in runs]
        files = [Path(file) for file in args.predictions] if args.predictions else own
        judged = [(one, file) for one, file in zip(runs, files) if file is not None]
        for one, file in zip(runs, files):
            if file is None:
                print(f"note: {one.folder} holds no predictions.safetensors; not judged", file=sys.stderr)
        cohort = Cohort.read(args.cohort, require_path=False, missing_values=[*MISSING, *args.missing])
        if args.split is None and cohort.splits.get("train"):
            print(
                "note: slides of the train split are judged, too; judge others with --split, unless they were "
                "predicted out of fold",
                file=sys.stderr,
            )
        if len(judged) > 1:
            grids["paired"] = paired_grid(
                [one for one, _ in judged],
                [file for _, file in judged],
                cohort.subset(args.split),
                bootstrap=args.bootstrap,
                seed=args.seed,
            )
        else:
            print("note: paired differences need two runs with predictions", file=sys.stderr)
    for name, grid in grids.items():
        print(f"{titles[name]}\n{grid.text() if grid.rows else 'none'}\n")
        grid.write(out / name)
    figures = draw_comparison(out, runs)
    page = build_page(
        out / "index.html",
        title=f"{len(runs)} runs compared" if len(runs) > 1 else f"Run {runs[0].name}",
        lead="Validation scores are those of the epoch whose model was kept; of a cross-validation, means over folds.",
        figures=figures,
        tables=[
            Table(titles[name], list(grid.header), grid.rows) for name, grid in grids.items() if grid.rows
        ],
    )
    print(page)
    return 0
