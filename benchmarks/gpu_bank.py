"""The bank's part of benchmarks/gpu.sh: writing (P6), reading (P7) and the whole-slide step (P5)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_sections import Row, collect, device_of, rates, time_ms


def bank(dry: bool, found: list[Row]) -> Iterator[Row]:
    """P6, P7 and P5."""
    device = device_of(dry)
    return collect(
        [
            ("P6", partial(_write, dry, device)),
            ("P7", partial(_gather, dry, device, rates(found)[0])),
            ("P5", partial(_steps, dry, device)),
        ]
    )


def _write(dry: bool, device: str) -> list[Row]:
    from benchmarks.test_bank_write import BankShape, make_bank, torch_chain
    from dre_fast.ops import bank as ops

    shape = BankShape(64, 32, 8, 4, 50, "small") if dry else BankShape(2048, 384, 64, 32, 1000, "P6")
    tables, batch = make_bank(shape, torch.int8, device)

    def ours() -> None:
        ops.write(*tables.values(), *batch, 1)

    ours()  # every row is written before, as the chain supposes
    chain = time_ms(lambda: torch_chain(tables, *batch, 1), device)
    return [
        {
            "id": "P6",
            "what": f"bank write of {shape.rows} rows x {shape.dim}, int8",
            "implementation": ops.backend("bank_write", device),
            "ms": time_ms(ours, device),
            "peers": {"torch chain": chain},
        }
    ]


def filled(slides: int, tiles: int, dim: int, words: int, dtype: str, device: str) -> Any:
    from dre_fast import MemoryBank

    codebook = torch.nn.functional.normalize(torch.randn(words, dim), dim=1)
    made = MemoryBank([tiles] * slides, dim, codebook=codebook, dtype=dtype, device=device)
    for slide in range(slides):
        for start in range(0, tiles, 65536):
            ids = torch.arange(start, min(start + 65536, tiles), device=device)
            made.write(torch.full_like(ids, slide), ids, torch.randn(len(ids), dim, device=device), step=0)
    return made


def _gather(dry: bool, device: str, bandwidth: float) -> list[Row]:
    from dre_fast.ops import bank as ops

    rows, dim, total = (256, 32, 1000) if dry else (131_072, 384, 1_000_000)
    made = filled(4, total // 4, dim, 8, "bfloat16", device)
    ids = torch.randint(total, (rows,), device=device)
    moved = rows * dim * 2 + rows * dim * 4 + rows * 8  # bf16 in, fp32 out, ids
    return [
        {
            "id": "P7",
            "what": f"bank gather of {rows} rows x {dim} bf16, as fp32",
            "implementation": ops.backend("bank_read", device),
            "ms": time_ms(lambda: ops.read(made.payload, made.scale, ids, dim), device),
            "bytes": moved,
            "floor_ms": moved / bandwidth,
            "peers": {
                "index_select + float": time_ms(lambda: made.payload.index_select(0, ids).float(), device)
            },
        }
    ]


def _steps(dry: bool, device: str) -> list[Row]:
    """P5: sample + encode with every stored row + write, at growing slide sizes; flat is right."""
    slides, m, dim, words = (2, 4, 16, 4) if dry else (32, 64, 384, 64)
    rows: list[Row] = []
    for tiles in (16, 64) if dry else (1_000, 8_000, 64_000):
        made = filled(slides, tiles, dim, words, "int8", device)
        ids = torch.arange(slides, device=device)
        live = torch.nn.functional.normalize(torch.randn(slides, m, dim, device=device), dim=2)
        flat = ids[:, None].expand(slides, m).reshape(-1)

        def step(made: Any = made, ids: Tensor = ids, live: Tensor = live, flat: Tensor = flat) -> None:
            chosen = made.sample(ids, m, 1, 0)
            made.encode(ids, chosen, live, memory="full")
            made.write(flat, chosen.reshape(-1), live.reshape(-1, dim), step=1)

        rows.append(
            {
                "id": "P5",
                "what": f"memory='full' step, B={slides} m={m} n_s={tiles}",
                "implementation": "MemoryBank",
                "ms": time_ms(step, device),
            }
        )
    rows[-1]["note"] = f"largest / smallest slide: {rows[-1]['ms'] / rows[0]['ms']:.3f}"
    return rows
