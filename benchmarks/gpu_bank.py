"""The bank's part of benchmarks/gpu.sh: writing (P6), reading (P7), the whole-slide step (P5), capacity (P9), tiers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_sections import Row, collect, device_of, rates, time_ms


def bank(dry: bool, found: list[Row]) -> Iterator[Row]:
    """P6, P7, P5, P9, and rows in pinned host memory."""
    device = device_of(dry)
    return collect(
        [
            ("P6", partial(_write, dry, device)),
            ("P7", partial(_gather, dry, device, rates(found)[0])),
            ("P5", partial(_steps, dry, device)),
            ("P9", partial(_capacity, dry, device)),
            ("host tier", partial(_host_tier, dry, device)),
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

        captured = _captured(step, device)
        for how, call in (("", step), (", in a CUDA graph", captured)):
            rows.append(
                {
                    "id": "P5",
                    "what": f"memory='full' step, B={slides} m={m} n_s={tiles}{how}",
                    "implementation": "MemoryBank",
                    "ms": time_ms(call, device),
                }
            )
    for last, first in ((rows[-2], rows[0]), (rows[-1], rows[1])):
        last["note"] = f"largest / smallest slide: {last['ms'] / first['ms']:.3f}"
    return rows


def _captured(step: Callable[[], None], device: str) -> Callable[[], None]:
    """A step as one launch; on a CPU the step itself."""
    if device != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what the first calls set up must not be captured
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _capacity(dry: bool, device: str) -> list[Row]:
    """P9: the step of a bank of 200 million rows beside that of one of a million. Rows are noise, times are not."""
    from dre_fast import MemoryBank

    dim, words, m, r = (16, 4, 4, 16) if dry else (384, 64, 64, 4096)
    rows: list[Row] = []
    for slides, tiles in ((20, 50), (40, 50)) if dry else ((100, 10_000), (20_000, 10_000)):
        codebook = torch.nn.functional.normalize(torch.randn(words, dim), dim=1)
        made = MemoryBank([tiles] * slides, dim, codebook=codebook, dtype="int8", device=device)
        made.payload.random_(-127, 128)
        made.scale.fill_(1 / (127 * dim**0.5))
        made.code.random_(0, words)
        made.age.zero_()
        ids = torch.arange(0, slides, max(1, slides // 32), device=device)[:32]
        live = torch.nn.functional.normalize(torch.randn(len(ids), m, dim, device=device), dim=2)
        flat = ids.repeat_interleave(m)
        size = f"bank of {slides * tiles:,} rows ({made.nbytes / 1e9:.1f} GB)"
        for memory in ("full", r):

            def step(
                made: Any = made,
                ids: Tensor = ids,
                live: Tensor = live,
                memory: Any = memory,
                flat: Tensor = flat,
            ) -> None:
                chosen = made.sample(ids, m, 1, 0)
                made.encode(ids, chosen, live, memory=memory, cycle=1, seed=0)
                made.write(flat, chosen.reshape(-1), live.reshape(-1, dim), step=1)

            rows.append(
                {
                    "id": "P9",
                    "what": f"step, memory={memory}, B={len(ids)} m={m}, {size}",
                    "implementation": "MemoryBank",
                    "ms": time_ms(step, device),
                }
            )
        del made
    for large, small in ((rows[2], rows[0]), (rows[3], rows[1])):
        large["note"] = f"time over that of the small bank: {large['ms'] / small['ms']:.3f}"
    return rows


def _host_tier(dry: bool, device: str) -> list[Row]:
    """Rows retrieved from pinned host memory over the bus, beside the same from the device."""
    from dre_fast import MemoryBank

    slides, tiles, dim, words, m, r = (4, 50, 16, 4, 4, 16) if dry else (32, 20_000, 384, 64, 64, 4096)
    device_bank = filled(slides, tiles, dim, words, "int8", device)
    host_bank = MemoryBank([tiles] * slides, dim, dtype="int8", device=device, tier="host")
    host_bank.load_state_dict(device_bank.state_dict())
    ids = torch.arange(slides, device=device)
    live = torch.nn.functional.normalize(torch.randn(slides, m, dim, device=device), dim=2)
    rows: list[Row] = []
    for memory in ("full", r):
        times = {}
        for name, made in (("host", host_bank), ("device", device_bank)):
            chosen = made.sample(ids, m, 1, 0)

            def encode(made: Any = made, chosen: Tensor = chosen, memory: Any = memory) -> None:
                made.encode(ids, chosen, live, memory=memory, cycle=1, seed=0)

            times[name] = time_ms(encode, device)
        rows.append(
            {
                "id": "host tier",
                "what": f"encode, memory={memory}, B={slides} m={m}, rows in pinned host memory",
                "implementation": "MemoryBank, tier='host'",
                "ms": times["host"],
                "peers": {"tier='device'": times["device"]},
            }
        )
    return rows
