"""``dre-fast train``: train a slide model end to end."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a slide model end to end, or resume a run",
        description="Train DRE-SLCL on a tiled cohort. Settings come from defaults, then --config, then overrides.",
        epilog=(
            "example:\n"
            "  dre-fast train --out runs/a data.cohort=cohort.csv data.tiles=tiles data.reports=reports.safetensors \\\n"
            "      'loss.tasks=[{name: subtype}, {name: genes, kind: multilabel, columns: [EGFR, TP53]}]'\n"
            "  dre-fast train --out runs/a --resume          # after a kill or a crash; the config is the run's own\n"
            "All settings with their defaults: dre-fast train --print-config"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, values in YAML")
    parser.add_argument("--out", help="folder of the run")
    parser.add_argument("--config", help="YAML file of settings")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --out (config from the run)"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved settings as YAML and stop"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dre_fast.train.config import ConfigError, load_config

    source = args.config
    if args.resume and args.out and source is None:
        if (Path(args.out) / "config.yaml").exists():
            source = Path(args.out) / "config.yaml"
        elif not args.overrides:
            raise ConfigError(f"--resume: {args.out} holds no run (config.yaml)")
    config = load_config(source, args.overrides)
    if args.print_config:
        import dataclasses

        import yaml

        yaml.safe_dump(dataclasses.asdict(config), sys.stdout, sort_keys=False)
        return 0
    if not args.out:
        raise ConfigError("--out is not set: the folder of the run")
    from dre_fast.train.loop import Trainer

    trainer = Trainer(config, args.out, resume=args.resume)
    try:
        trainer.fit()
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: dre-fast train --out {args.out} --resume", file=sys.stderr)
        return 130
    trainer.group.close()
    if not trainer.group.first:
        return 0
    if trainer.best is not None:
        print(f"best epoch {trainer.best_epoch + 1} of {config.optim.epochs}, val_score {trainer.best:.4f}")
    print(f"model {trainer.out / 'best.safetensors'}\nmetrics {trainer.out / 'metrics.jsonl'}")
    return 0
