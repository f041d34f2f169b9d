"""The measurements of benchmarks/gpu.sh, one function a section; each returns rows for the report.

A row is a dict: id, what, implementation, ms, and where they apply bytes, flops, floor_ms, peers (ms by name), peak_mb,
note. The same functions run with ``dry=True`` at small sizes on any machine: on a CPU the Triton kernel is interpreted,
and such rows are marked, because their times mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.registry import GPU_ENCODE, GPU_SOFT, SMALL_ENCODE, Encode, make

Row = dict[str, Any]


def time_ms(run: Callable[[], object], device: str) -> float:
    """Median milliseconds of one call: by CUDA events with a cold L2 cache, or by the clock on a CPU."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=50, rep=250, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def peak_mb(run: Callable[[], object], device: str) -> float | None:
    """Megabytes a call allocates beyond what was there."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def device_of(dry: bool) -> str:
    """The GPU, or in a dry run whatever is there. Raises RuntimeError for a real run without a GPU."""
    if torch.cuda.is_available():
        return "cuda"
    if not dry:
        raise RuntimeError("torch sees no CUDA device; `--dry-run` goes through the motions without one")
    return "cpu"


def ceilings(dry: bool) -> list[Row]:
    """What this device reaches: a copy (bytes read + written) and a square bf16 matrix product."""
    device = device_of(dry)
    count = 1 << 20 if dry else 1 << 32
    source = torch.empty(count, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = time_ms(lambda: target.copy_(source), device)
    side = 128 if dry else 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = time_ms(lambda: a @ b, device)
    return [
        {
            "id": "copy",
            "what": f"copy of {count} bytes",
            "implementation": "torch",
            "ms": copy,
            "bytes": 2 * count,
        },
        {
            "id": "gemm",
            "what": f"bf16 {side}^3 matrix product",
            "implementation": "torch",
            "ms": product,
            "flops": 2 * side**3,
        },
    ]


def _rates(found: list[Row]) -> tuple[float, float]:
    """Bytes and FLOP per millisecond of the ceilings section."""
    by_id = {row["id"]: row for row in found}
    return by_id["copy"]["bytes"] / by_id["copy"]["ms"], by_id["gemm"]["flops"] / by_id["gemm"]["ms"]


def encode(dry: bool, found: list[Row]) -> list[Row]:
    """P1, P2 and neighbours: the Triton hard encode against its peers."""
    from dre_fast.kernels import hard_encode

    device = device_of(dry)
    bandwidth, _ = _rates(found)
    rows = []
    for shape in SMALL_ENCODE if dry else GPU_ENCODE:
        x, codebook, bounds = make(shape, device)
        run = partial(hard_encode, x, codebook, bounds)
        timings: dict[str, float | None] = {}
        for name, peer in peers.HARD_PEERS.items():
            if name == "gemm-compiled" and (shape.bags > 1 or dry):
                continue
            timings[name] = time_ms(partial(peer, x, codebook, bounds), device)
        rows.append(
            {
                "id": shape.id,
                "what": describe(shape),
                "implementation": "triton" if device == "cuda" else "triton, interpreted",
                "ms": time_ms(run, device),
                "bytes": shape.bytes,
                "flops": shape.flops,
                "floor_ms": shape.bytes / bandwidth,
                "peers": timings,
                "peak_mb": peak_mb(run, device),
            }
        )
    return rows


def describe(shape: Encode) -> str:
    """Sizes of a shape in one phrase."""
    kind = str(shape.dtype).removeprefix("torch.")
    return f"N={shape.rows} D={shape.dim} K={shape.codewords} B={shape.bags} {kind}"


def soft(dry: bool) -> list[Row]:
    """P4: soft encode forward and backward against the GEMM form, eager and compiled."""
    from dre_fast import residual_encode

    device = device_of(dry)
    rows = []
    for shape in (Encode("P4-small", 512, 32, 8, 4, torch.float32),) if dry else GPU_SOFT:
        x, codebook, bounds = make(shape, device)
        leaf = x.clone().requires_grad_()
        words = codebook.clone().requires_grad_()
        scale = torch.full((shape.codewords,), 5.0, device=device, requires_grad=True)

        def both(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...] = (leaf, words, scale)) -> object:
            return torch.autograd.grad(forward().square().sum(), leaves)

        ours = partial(residual_encode, leaf, words, cu_seqlens=bounds, assignment="soft", scale=scale)
        eager = partial(peers.soft_gemm_form, leaf, words, scale, bounds)
        timings = {"gemm": time_ms(partial(both, eager), device)}
        if not dry:
            compiled = torch.compile(peers.soft_gemm_form, dynamic=False)
            timings["gemm-compiled"] = time_ms(
                partial(both, partial(compiled, leaf, words, scale, bounds)), device
            )
        rows.append(
            {
                "id": shape.id,
                "what": f"soft forward + backward, {describe(shape)}",
                "implementation": "reference",
                "ms": time_ms(partial(both, ours), device),
                "peers": timings,
                "peak_mb": peak_mb(partial(both, ours), device),
            }
        )
    return rows


def bank(dry: bool, found: list[Row]) -> list[Row]:
    """P6, P7, P5 and P3: writing, reading and encoding from the memory bank."""
    device = device_of(dry)
    return [
        _write(dry, device),
        _gather(dry, device, _rates(found)[0]),
        *_steps(dry, device),
        _retrieval(dry, device),
    ]


def _write(dry: bool, device: str) -> Row:
    from benchmarks.test_bank_write import BankShape, make_bank, torch_chain
    from dre_fast.ops import bank as ops

    shape = BankShape(64, 32, 8, 4, 50, "small") if dry else BankShape(2048, 384, 64, 32, 1000, "P6")
    tables, batch = make_bank(shape, torch.int8, device)

    def ours() -> None:
        ops.write(*tables.values(), *batch, 1)

    ours()  # every row is written before, as the chain supposes
    chain = time_ms(lambda: torch_chain(tables, *batch, 1), device)
    return {
        "id": "P6",
        "what": f"bank write of {shape.rows} rows x {shape.dim}, int8",
        "implementation": ops.backend("bank_write", device),
        "ms": time_ms(ours, device),
        "peers": {"torch chain": chain},
    }


def _filled(slides: int, tiles: int, dim: int, words: int, dtype: str, device: str) -> Any:
    from dre_fast import MemoryBank

    codebook = torch.nn.functional.normalize(torch.randn(words, dim), dim=1)
    made = MemoryBank([tiles] * slides, dim, codebook=codebook, dtype=dtype, device=device)
    for slide in range(slides):
        for start in range(0, tiles, 65536):
            ids = torch.arange(start, min(start + 65536, tiles), device=device)
            made.write(torch.full_like(ids, slide), ids, torch.randn(len(ids), dim, device=device), step=0)
    return made


def _gather(dry: bool, device: str, bandwidth: float) -> Row:
    from dre_fast.ops import bank as ops

    rows, dim, total = (256, 32, 1000) if dry else (131_072, 384, 1_000_000)
    made = _filled(4, total // 4, dim, 8, "bfloat16", device)
    ids = torch.randint(total, (rows,), device=device)
    moved = rows * dim * 2 + rows * dim * 4 + rows * 8  # bf16 in, fp32 out, ids
    return {
        "id": "P7",
        "what": f"bank gather of {rows} rows x {dim} bf16, as fp32",
        "implementation": ops.backend("bank_read", device),
        "ms": time_ms(lambda: ops.read(made.payload, made.scale, ids, dim), device),
        "bytes": moved,
        "floor_ms": moved / bandwidth,
        "peers": {"index_select + float": time_ms(lambda: made.payload.index_select(0, ids).float(), device)},
    }


def _steps(dry: bool, device: str) -> list[Row]:
    """P5: sample + encode with every stored row + write, at growing slide sizes; flat is right."""
    slides, m, dim, words = (2, 4, 16, 4) if dry else (32, 64, 384, 64)
    rows: list[Row] = []
    for tiles in (16, 64) if dry else (1_000, 8_000, 64_000):
        made = _filled(slides, tiles, dim, words, "int8", device)
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


def _retrieval(dry: bool, device: str) -> Row:
    """P3: encode B slides from the bank by (seed, slide), against the torch chain that gathers first."""
    slides, tiles, r, dim, words = (2, 40, 8, 16, 4) if dry else (32, 8_192, 4_096, 384, 64)
    made = _filled(slides, tiles, dim, words, "int8", device)
    ids = torch.arange(slides, device=device)
    chosen = made.sample(ids, 1, 0, 0)
    live = torch.nn.functional.normalize(torch.randn(slides, 1, dim, device=device), dim=2)
    random = (torch.rand(slides, r, device=device) * tiles).long() + ids[:, None] * tiles
    bounds = torch.arange(slides + 1, device=device) * (r + 1)

    def chain() -> None:
        flat = random.reshape(-1)
        rows = made.payload.index_select(0, flat)[:, :dim].float() * made.scale.index_select(0, flat)[:, None]
        rows = torch.nn.functional.normalize(rows, dim=1).view(slides, r, dim)
        peers.gemm_form(torch.cat([live, rows], 1).reshape(-1, dim), made.codebook, bounds)

    return {
        "id": "P3",
        "what": f"encode B={slides} slides, r={r} rows each from the int8 bank",
        "implementation": "MemoryBank",
        "ms": time_ms(lambda: made.encode(ids, chosen, live, memory=r, cycle=0, seed=0), device),
        "peers": {"torch chain": time_ms(chain, device)},
    }


def codebook(dry: bool) -> list[Row]:
    """P12: one k-means pass over 1 M rows, from the difference of two numbers of iterations."""
    from dre_fast import fit_codebook

    device = device_of(dry)
    count, dim, words = (2_000, 16, 4) if dry else (1_000_000, 384, 64)
    x = make(Encode("rows", count, dim, words, 1, torch.float32), device)[0]

    def seconds(iterations: int) -> float:
        start = time.perf_counter()
        fit_codebook(
            x, words, iterations=iterations, tolerance=-1.0
        )  # a negative tolerance never stops early
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(1)
    few, many = seconds(1), seconds(5)
    return [
        {
            "id": "P12",
            "what": f"k-means, one Lloyd pass, N={count} D={dim} K={words} fp32",
            "implementation": "fit_codebook",
            "ms": (many - few) / 4 * 1e3,
        }
    ]


def sanitize_case() -> None:
    """A small run of every compiled kernel, for compute-sanitizer to watch."""
    from dre_fast.kernels import hard_encode

    device = device_of(dry=True)
    for dtype in (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float16,):
        for dim, words in ((64, 16), (33, 7), (520, 9)):
            shape = Encode("case", 700, dim, words, 1, dtype)
            x, codewords, _ = make(shape, device)
            hard_encode(x, codewords, torch.tensor([0, 300, 300, 690], device=device))
    _filled(3, 100, 32, 8, "int8", device).rebuild()
    if device == "cuda":
        torch.cuda.synchronize()
