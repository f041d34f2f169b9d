"""``dre-fast embed-reports``: one vector per case from the reports of a cohort."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dre_fast.cli.common import counted

if TYPE_CHECKING:
    from dre_fast.data.cohort import Cohort

SHOWN = 20
EXAMPLES = """examples:
  dre-fast embed-reports cohort.csv --out reports.safetensors
      TF-IDF + SVD, fitted on the training cases; no download, no GPU. The fitted basis is kept in
      reports.tfidf.safetensors
  dre-fast embed-reports new.csv --out new.safetensors --model reports.tfidf.safetensors
      the same basis for another cohort
  dre-fast embed-reports cohort.csv --reports TCGA_Reports.csv --out llama.safetensors \\
      --model meta-llama/Llama-2-7b-hf --pooling mean --dtype bfloat16
      any Hugging Face text encoder, by name or local folder; run it again after an interruption and it
      goes on where it stopped
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "embed-reports",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="one vector per case from its report, to safetensors",
        description=(
            "Embed the reports of a cohort's cases, for training against them (data.reports of a run).\n"
            "Reports come from the table's 'report' column (text, or a .txt file), or from --reports.\n"
            "Cases without report are named and left out."
        ),
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "cohort",
        metavar="COHORT.csv",
        help="cohort table, or HistGen's annotation.json; slide files are not needed",
    )
    parser.add_argument("--out", required=True, help="output file, .safetensors")
    parser.add_argument(
        "--reports",
        help="reports kept apart from the table, used instead of its 'report' column: TCGA-Reports CSV "
        "(patient_filename,text), any CSV with an id and a text column, HistGen annotation.json, or a folder "
        "of ID.txt",
    )
    parser.add_argument(
        "--model",
        default="tfidf-svd",
        help="tfidf-svd (default), a .tfidf.safetensors file, a Hugging Face name or a local folder",
    )
    tfidf = parser.add_argument_group("tfidf-svd")
    tfidf.add_argument("--dim", type=int, default=256, help="length of the vectors (default 256)")
    tfidf.add_argument(
        "--fit-split",
        choices=("train", "all"),
        help="cases it is fitted on (default: train when the table has a split column, else all)",
    )
    tfidf.add_argument("--seed", type=int, default=0, help="of the SVD (default 0)")
    encoder = parser.add_argument_group("text encoders")
    encoder.add_argument(
        "--pooling",
        choices=("mean", "last", "cls"),
        default="mean",
        help="over the tokens: mean (default), last (decoder-only models), cls (BERT-like models)",
    )
    encoder.add_argument(
        "--max-length", type=int, help="tokens read at once; longer reports are cut into overlapping windows"
    )
    encoder.add_argument("--batch-size", type=int, default=8, help="windows encoded at once (default 8)")
    encoder.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights"
    )
    encoder.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N")
    encoder.add_argument("--revision", help="branch, tag or commit of a Hugging Face name")
    encoder.add_argument("--cache", help="folder of finished texts (default: OUT with .cache appended)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dre_fast.data.annotation import read_annotation
    from dre_fast.data.cohort import Cohort
    from dre_fast.data.reports import ReportError, embed_reports, match_reports, read_reports

    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise ReportError(f"--out {out}: the file must end in .safetensors")
    if args.cohort.lower().endswith(".json"):
        cohort = read_annotation(args.cohort)
    else:
        cohort = Cohort.read(args.cohort, require_path=False)
    if args.reports is None:
        reports = cohort.reports()
        if not reports:
            raise ReportError(f"{args.cohort}: no report in column 'report'; fill it, or give --reports FILE")
    else:
        reports = match_reports(read_reports(args.reports), cohort)
    without = [case for case in cohort.cases if case not in reports]
    fitting = args.model == "tfidf-svd"
    fit_on = _fit_cases(cohort, args.fit_split, reports) if fitting else None
    embedded = embed_reports(
        reports,
        args.model,
        args.pooling,
        fit_on=fit_on,
        dim=args.dim,
        seed=args.seed,
        cache_dir=args.cache or f"{out}.cache",
        batch_size=args.batch_size,
        max_length=args.max_length,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
    )
    embedded.save(out)
    print(
        f"{len(embedded)} of {counted(len(cohort.cases), 'case')} embedded, {embedded.dim} numbers each -> {out}"
    )
    if fitting and embedded.basis is not None:
        basis = out.with_suffix(".tfidf.safetensors")
        embedded.basis.save(basis)
        print(
            f"fitted on the reports of {counted(len(fit_on or reports), 'case')}; basis for later cohorts -> {basis}"
        )
    for note in embedded.details.get("notes", []):
        print(f"note: {note}", file=sys.stderr)
    if without:
        shown = ", ".join(without[:SHOWN])
        more = f" and {len(without) - SHOWN} more" if len(without) > SHOWN else ""
        print(f"note: no report for {len(without)} case(s): {shown}{more}", file=sys.stderr)
    return 0


def _fit_cases(cohort: Cohort, fit_split: str | None, reports: dict[str, str]) -> list[str] | None:
    """Cases that tfidf-svd is fitted on; ``None``: all."""
    if fit_split is None:
        fit_split = "train" if cohort.splits else "all"
    if fit_split == "all":
        return None
    return [case for case in cohort.subset("train").cases if case in reports]
