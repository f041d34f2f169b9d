"""The training part of benchmarks/gpu.sh: what a whole step costs beside its tile encoder (P8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu_sections import Row, collect, device_of, time_ms


def training(dry: bool) -> Iterator[Row]:
    """P8: a step of DRE-SLCL with whole-slide memory, and its encoder alone on the same tiles."""
    shapes = (
        [(2, 2)] if dry else [(32, 64), (32, 16)]
    )  # slides, live tiles; the first fills most of the GPU's memory
    return collect((f"P8 m={live}", partial(_step, slides, live, dry)) for slides, live in shapes)


def _step(slides: int, live: int, dry: bool) -> list[Row]:
    from benchmarks.gpu_bank import filled
    from dre_fast import DRESLCL, SlideEncoder, SlideReportLoss
    from dre_fast.nn.tile_encoders import build_tile_encoder

    device = device_of(dry)
    encoder, side, tiles, words, text = (
        ("vit-tiny", 32, 40, 4, 16) if dry else ("vit-s16", 256, 10_000, 64, 4096)
    )
    built = build_tile_encoder(encoder)
    bank = filled(slides, tiles, built.dim, words, "int8", device)
    model = DRESLCL(built, bank, SlideEncoder(built.dim, words, report_dim=text)).to(device)
    loss = SlideReportLoss().to(device)
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=1e-6, fused=device == "cuda")
    encoder_optimizer = torch.optim.AdamW(built.parameters(), lr=1e-6, fused=device == "cuda")
    images = torch.randint(256, (slides, live, 3, side, side), dtype=torch.uint8, device=device)
    reports = torch.randn(slides, text, device=device)
    ids, cases = torch.arange(slides, device=device), torch.arange(slides, device=device)
    rows = ids.repeat_interleave(live)
    grad = torch.randn(slides * live, built.dim, device=device)

    def whole() -> None:
        chosen = bank.sample(ids, live, cycle=1, seed=0)
        with torch.autocast(device, torch.bfloat16):
            out = model(images, ids, chosen, visit=1)
        assert out.report is not None
        assert out.live is not None
        optimizer.zero_grad(set_to_none=True)
        loss(out.report.float(), reports, cases).backward()
        optimizer.step()
        bank.write(rows, chosen.reshape(-1), out.live.detach().flatten(0, 1), step=1)

    def encoder_alone() -> None:
        with torch.autocast(device, torch.bfloat16):
            features = model.encode_tiles(images.flatten(0, 1))
        encoder_optimizer.zero_grad(set_to_none=True)
        features.backward(grad)
        encoder_optimizer.step()

    ours, alone = _alternately(whole, encoder_alone, device)
    return [
        {
            "id": f"P8 m={live}",
            "what": f"training step, {encoder} {side} px bf16, {slides} slides of {tiles} tiles, {live} live",
            "implementation": "dre_fast",
            "ms": ours,
            "peers": {"its tile encoder alone": alone},
            "note": f"{1 - alone / ours:.1%} of the step is not the encoder",
        }
    ]


def _alternately(one: Callable[[], None], other: Callable[[], None], device: str) -> tuple[float, float]:
    """Milliseconds of two calls, the faster of two medians each, one after the other: the GPU's clock drifts."""
    times = [(time_ms(one, device, rep=1500), time_ms(other, device, rep=1500)) for _ in range(2)]
    return min(t[0] for t in times), min(t[1] for t in times)
