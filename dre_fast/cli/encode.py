"""``dre-fast encode``: slide embeddings of any cohort with a trained model."""

from __future__ import annotations

import argparse

from dre_fast.cli.common import add_model_and_slides, counted, open_model_and_slides


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "encode",
        help="slide embeddings and predictions of a cohort, to safetensors or h5",
        description="Encode every tile of every slide with a trained model; write slide embeddings, projections into "
        "the report space and task logits.",
        epilog="example: dre-fast encode runs/a --cohort new.csv --tiles tiles --out new.safetensors",
    )
    add_model_and_slides(parser)
    parser.add_argument("--out", required=True, help="output file, .safetensors or .h5")
    parser.add_argument("--split", help="only the slides of this split")
    parser.add_argument("--amp", choices=("none", "bf16", "fp16"), default="none", help="autocast dtype")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import contextlib

    import torch

    from dre_fast.data.cohort import Cohort
    from dre_fast.train.checks import pick_device
    from dre_fast.train.inference import encode_slides

    device = pick_device(args.device)
    cohort = Cohort.read(args.cohort).subset(args.split)
    loaded, slides = open_model_and_slides(args, cohort)

    def autocast() -> contextlib.AbstractContextManager:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
        return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()

    encoded = encode_slides(loaded.model, slides, loaded.tasks, chunk=args.chunk, autocast=autocast)
    encoded.save(args.out)
    print(f"{counted(len(slides), 'slide')}, {counted(sum(slides.tiles), 'tile')} -> {args.out}")
    return 0
