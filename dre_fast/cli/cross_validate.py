"""``dre-fast cross-validate``: one run a fold, and the scores of every slide by a model that never saw its case."""

from __future__ import annotations

import argparse
import re
import sys

from dre_fast.cli.common import add_judging, validation


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "cross-validate",
        help="train one model a fold of cases and judge each on the fold it never saw",
        description="Cross-validation by case. The folds are those of the cohort's column `fold`, or are dealt so that "
        "labels are alike in all; --out/folds.csv keeps them. Each fold is a run in --out/fold-N; scores.csv and "
        "scores.md hold each fold, mean and sd over folds, and the out-of-fold predictions judged at once.",
        epilog=(
            "examples:\n"
            "  dre-fast cross-validate config.yaml --out cv optim.epochs=20\n"
            "  dre-fast cross-validate --out cv --resume        # after a kill; finished folds are not trained again\n"
            "  dre-fast cross-validate --out cv --resume --external other.csv --external-tiles other_tiles"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="CONFIG.yaml | section.key=value",
        help="a YAML file, and settings on top of it",
    )
    parser.add_argument("--out", required=True, help="folder of the cross-validation")
    parser.add_argument("--folds", type=int, help="how many (default: those of the column `fold`, else 5)")
    parser.add_argument(
        "--val",
        type=validation,
        metavar="fold|SHARE|none",
        help="validation slides: the next fold, a share of the other cases such as 0.2, or none (default: fold)",
    )
    parser.add_argument(
        "--external", metavar="COHORT.csv", help="judge every fold's model on this cohort as well"
    )
    parser.add_argument("--external-tiles", metavar="DIR", help="its folder of tiles")
    add_judging(parser)
    parser.add_argument("--resume", action="store_true", help="go on in --out (config from there)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dre_fast.train.config import ConfigError, load_config

    settings = [word for word in args.overrides if _is_setting(word)]
    files = [word for word in args.overrides if not _is_setting(word)]
    if len(files) > 1:
        raise ConfigError(f"one config file, or none; got {', '.join(files)}")
    if (args.external is None) != (args.external_tiles is None):
        raise ConfigError("--external and --external-tiles go together")
    source = files[0] if files else None
    if args.resume and source is None and (Path(args.out) / "config.yaml").exists():
        source = str(Path(args.out) / "config.yaml")
    config = load_config(source, settings)

    from dre_fast.eval.fold_scores import score_grid
    from dre_fast.eval.protocols import CrossValidation, Judging

    how = Judging(args.level, args.bootstrap)
    rounds = CrossValidation(config, args.out, folds=args.folds, validation=args.val, resume=args.resume)
    external = rounds.open_external(args.external, args.external_tiles) if args.external else None
    try:
        rounds.train()
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; go on with: dre-fast cross-validate --out {args.out} --resume", file=sys.stderr
        )
        return 130
    print(score_grid(rounds.judge(how), "pooled").text())
    print(rounds.out / "scores.csv", rounds.out / "scores.md", sep="\n")
    if external is not None:
        print(f"\n{args.external}:")
        print(score_grid(rounds.judge_external(external, how), "averaged").text())
        print(rounds.out / "external" / "scores.csv", rounds.out / "external" / "scores.md", sep="\n")
    return 0


def _is_setting(word: str) -> bool:
    """A path may hold '=', too; a setting begins with section.key."""
    return re.match(r"\w+\.\w+\s*=", word) is not None
