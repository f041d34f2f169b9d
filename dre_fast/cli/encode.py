"""``dre-fast encode``: slide embeddings of any cohort with a trained model."""

from __future__ import annotations

import argparse

from dre_fast.cli.common import add_model_and_slides, check_magnifications


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
    from dre_fast.train.build import slide_set
    from dre_fast.train.checks import pick_device
    from dre_fast.train.inference import encode_slides, load_run

    device = pick_device(args.device)
    loaded = load_run(args.model, device)
    check_magnifications(args.tiles, loaded.config)
    cohort = Cohort.read(args.cohort).subset(args.split)
    slides = slide_set(
        cohort,
        cohort.records,
        args.tiles,
        backend=args.backend,
        mpp=args.mpp,
        skip_untiled=args.skip_untiled,
    )
    loaded.check_tiles(slides)

    def autocast() -> contextlib.AbstractContextManager:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
        return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()

    encoded = encode_slides(loaded.model, slides, loaded.tasks, chunk=args.chunk, autocast=autocast)
    encoded.save(args.out)
    print(f"{len(slides)} slides, {sum(slides.tiles)} tiles -> {args.out}")
    return 0
