"""The measurements of benchmarks/gpu.sh, one function a section; each yields rows for the report.

A row is a dict: id, what, implementation, ms, and where they apply bytes, flops, floor_ms, peers (ms by name), peak_mb
(beyond the inputs), memory (inputs and peak over inputs and outputs), peers_mb, note; or id and error where a measurement
failed, which stops no other. What is timed are the registered operations, as users get them. The same functions run with
``dry=True`` at small sizes on any machine; such times mean nothing.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers, peers_soft, retrieval, test_contrast, test_encode, test_soft
from benchmarks.memory import peak_on_gpu
from benchmarks.registry import (
    GPU_CONTRAST,
    GPU_ENCODE,
    GPU_RETRIEVAL,
    GPU_SOFT,
    SMALL_CONTRAST,
    SMALL_ENCODE,
    SMALL_RETRIEVAL,
    SMALL_SOFT,
    Contrast,
    Encode,
    Retrieval,
    make,
)
from dre_fast.ops import contrast as contrast_ops
from dre_fast.ops import encode as ops

Row = dict[str, Any]


def time_ms(run: Callable[[], object], device: str, rep: int = 100) -> float:
    """Median milliseconds of one call: by CUDA events with a cold L2 cache over ``rep`` ms, by the clock on a CPU."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=25, rep=rep, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def peak_mb(run: Callable[[], object], device: str) -> float | None:
    """Megabytes a call allocates beyond what was there; None on a CPU."""
    return peak_on_gpu(run) / 1e6 if device == "cuda" else None


def device_of(dry: bool) -> str:
    """The GPU, or in a dry run whatever is there. Raises RuntimeError for a real run without a GPU."""
    if torch.cuda.is_available():
        return "cuda"
    if not dry:
        raise RuntimeError("torch sees no CUDA device; `--dry-run` goes through the motions without one")
    return "cpu"


def collect(measurements: Iterable[tuple[str, Callable[[], list[Row]]]]) -> Iterator[Row]:
    """The rows of one measurement after the other; a failed one leaves a row with its error."""
    for name, measure in measurements:
        try:
            rows = measure()
        except Exception as problem:
            traceback.print_exc()
            rows = [{"id": name, "error": f"{type(problem).__name__}: {_first_line(problem)}"}]
        yield from rows
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0]


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


def rates(found: list[Row]) -> tuple[float, float]:
    """Bytes and FLOP per millisecond of the ceilings section."""
    by_id = {row["id"]: row for row in found}
    return by_id["copy"]["bytes"] / by_id["copy"]["ms"], by_id["gemm"]["flops"] / by_id["gemm"]["ms"]


def _compare(ways: Mapping[str, Callable[[], object]], device: str) -> Row:
    """Times and peaks of peers by name; one that runs out of memory or does not compile says so instead."""
    times: dict[str, float] = {}
    peaks: dict[str, float | None] = {}
    failed: list[str] = []
    for name, run in ways.items():
        try:
            times[name], peaks[name] = time_ms(run, device), peak_mb(run, device)
        except Exception as problem:
            traceback.print_exc()
            failed.append(f"{name} failed: {type(problem).__name__}")
        if device == "cuda":
            torch.cuda.empty_cache()
    return {"peers": times, "peers_mb": peaks, **({"note": "; ".join(failed)} if failed else {})}


# ---------------------------------------------------------------------------------------------- P1, P2


def encode(dry: bool, found: list[Row]) -> Iterator[Row]:
    """P1, P2 and neighbours: hard_encode against its peers."""
    return collect(
        (shape.id, partial(_encode, shape, dry, rates(found)[0]))
        for shape in (SMALL_ENCODE if dry else GPU_ENCODE)
    )


def _encode(shape: Encode, dry: bool, bandwidth: float) -> list[Row]:
    device = device_of(dry)
    made = make(shape, device)
    run = partial(test_encode.ours, *made)
    kinds = (
        ["gemm"] if dry else ["gemm", "gemm, compiled"]
    )  # every form of both: the best is seen in the report
    names = [name for kind in kinds for name in peers.candidates(kind, shape.bags, device)]
    names += [name for name in peers.OTHER_PEERS if peers.fits(name, shape.residual_bytes, device)]
    peak = peak_mb(run, device)
    passes = f" ({_passes(shape)} over the rows)" if device == "cuda" else ""
    return [
        {
            "id": shape.id,
            "what": f"hard encode, {shape}{passes}",
            "implementation": ops.backend("hard_encode", device, shape.dtype),
            "ms": time_ms(run, device, rep=250),
            "bytes": shape.bytes,
            "flops": shape.flops,
            "floor_ms": shape.bytes / bandwidth,
            "peak_mb": peak,
            "memory": _memory(peak, shape.input_bytes, shape.output_bytes),
            **_compare({name: partial(peers.resolve(name), *made) for name in names}, device),
        }
    ]


def _passes(shape: Encode) -> str:
    """How often the plan for this device asks for the rows."""
    from dre_fast.kernels import config

    arch = config.arch_of(torch.cuda.get_device_capability())
    passes = config.plan(arch, shape.dtype, shape.codewords, shape.dim, True).passes_over_rows
    return f"{passes} pass{'es' if passes > 1 else ''}"


def _memory(peak: float | None, inputs: int, outputs: int) -> float | None:
    return None if peak is None else (inputs + peak * 1e6) / (inputs + outputs)


# -------------------------------------------------------------------------------------------------- P4


def soft(dry: bool, found: list[Row]) -> Iterator[Row]:
    """P4: soft encode forward and backward, both assignments, against its peers."""
    return collect(
        (f"{shape.id} {assignment}", partial(_soft, shape, assignment, dry, found))
        for shape in (SMALL_SOFT if dry else GPU_SOFT)
        for assignment in test_soft.ASSIGNMENTS
    )


def _soft(shape: Encode, assignment: str, dry: bool, found: list[Row]) -> list[Row]:
    device = device_of(dry)
    bandwidth, compute = rates(found)
    given = test_soft.inputs(shape, device, assignment)
    run = partial(test_soft.step, given, "dre_fast")
    names = [
        name
        for name in peers_soft.SOFT_PEERS
        if peers_soft.covers(name, assignment, shape.residual_bytes, device)
        and not (dry and "compiled" in name)
    ]
    peak, right = peak_mb(run, device), run()
    sizes = [
        sum(t.numel() * t.element_size() for t in tensors) for tensors in ((*given.leaves, given.grad), right)
    ]
    return [
        {
            "id": shape.id,
            "what": f"soft encode forward + backward, {assignment}, {shape}",
            "implementation": ops.backend("soft_encode_backward", device, shape.dtype),
            "ms": time_ms(run, device, rep=250),
            "bytes": shape.soft_bytes,
            "flops": shape.soft_flops,
            "floor_ms": max(shape.soft_bytes / bandwidth, shape.soft_flops / compute),
            "peak_mb": peak,
            "memory": _memory(peak, sizes[0], sizes[1]),
            **_compare({name: partial(test_soft.step, given, name) for name in names}, device),
        },
        {
            "id": shape.id,
            "what": f"soft encode forward alone, {assignment}",
            "implementation": ops.backend("soft_encode", device, shape.dtype),
            "ms": time_ms(partial(_forward, given), device),
        },
    ]


@torch.no_grad()
def _forward(given: test_soft.Inputs) -> Tensor:
    by = given.by
    return ops.soft_encode(given.x, given.codebook, given.cu_seqlens, by.scale, by.weight, by.bias)[0]


# ----------------------------------------------------------------------------- loss against all reports


def contrast(dry: bool, found: list[Row]) -> Iterator[Row]:
    """The loss against all reports, forward and backward, against the whole matrix of logits."""
    return collect(
        (shape.id, partial(_contrast, shape, dry, found))
        for shape in (SMALL_CONTRAST if dry else GPU_CONTRAST)
    )


def _contrast(shape: Contrast, dry: bool, found: list[Row]) -> list[Row]:
    device = device_of(dry)
    bandwidth, compute = rates(found)
    given = test_contrast.inputs(shape, device)
    ours, *others = test_contrast.ways(shape, device)
    run = partial(test_contrast.step, given, ours)
    names = [name for name in others if not (dry and "compiled" in name)]
    return [
        {
            "id": shape.id,
            "what": f"loss against all reports, forward + backward, {shape}",
            "implementation": contrast_ops.backend("info_nce_rows", device),
            "ms": time_ms(run, device),
            "bytes": shape.bytes,
            "flops": shape.flops,
            "floor_ms": max(shape.bytes / bandwidth, shape.flops / compute),
            "peak_mb": peak_mb(run, device),
            **_compare({name: partial(test_contrast.step, given, name) for name in names}, device),
        },
        {
            "id": shape.id,
            "what": "loss against all reports, forward alone",
            "implementation": contrast_ops.backend("info_nce_rows", device),
            "ms": time_ms(partial(_loss, given), device),
        },
    ]


@torch.no_grad()
def _loss(given: test_contrast.Inputs) -> Tensor:
    return test_contrast.ours(given)


# -------------------------------------------------------------------------------------------------- P3


def retrieve(dry: bool, found: list[Row]) -> Iterator[Row]:
    """P3: encode from the int8 bank by (seed, slide), against chains that gather first."""
    for shape in SMALL_RETRIEVAL if dry else GPU_RETRIEVAL:
        given = retrieval.fill(shape, device_of(dry))
        bandwidth = rates(found)[0]
        for what in retrieval.TABLES:
            yield from collect(
                [(f"{shape.id} {what}", partial(_retrieve, given, shape, what, dry, bandwidth))]
            )
        yield from collect([(f"{shape.id} op alone", partial(_op_alone, given, shape, dry, bandwidth))])


def _retrieve(given: retrieval.Stored, shape: Retrieval, what: str, dry: bool, bandwidth: float) -> list[Row]:
    device, ways = device_of(dry), retrieval.TABLES[what]
    ours = [name for name, (_, forms) in ways.items() if not forms]
    chains = {
        f"{name}: {form}": retrieval.bound(what, name, form, given)
        for name, (_, forms) in ways.items()
        for form in forms
        if "blocks" not in form
    }
    against = _compare(chains, device)
    rows = []
    for name in ours:
        run = retrieval.bound(what, name, "", given)
        rows.append(
            {
                "id": shape.id,
                "what": f"{what}, {shape}",
                "implementation": name,
                "ms": time_ms(run, device, rep=250),
                "bytes": shape.bytes,
                "floor_ms": shape.bytes / bandwidth,
                "peak_mb": peak_mb(run, device),
                **against,
            }
        )
    return rows


def _op_alone(given: retrieval.Stored, shape: Retrieval, dry: bool, bandwidth: float) -> list[Row]:
    """hard_encode on given row numbers, and permutation with hard_encode as one CUDA graph: no launches between."""
    device = device_of(dry)
    common = {"id": shape.id, "bytes": shape.bytes, "floor_ms": shape.bytes / bandwidth}
    run = partial(retrieval.op, given, rows=given.rows)
    rows = [
        {
            **common,
            "what": "retrieved rows, row numbers given",
            "implementation": "op, stored codes",
            "ms": time_ms(run, device, rep=250),
        }
    ]
    if device == "cuda":
        graph = captured(partial(retrieval.op, given))
        rows.append(
            {
                **common,
                "what": "retrieved rows, as a CUDA graph",
                "implementation": "op, stored codes",
                "ms": time_ms(graph.replay, device, rep=250),
            }
        )
    return rows


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call, which is made once before so that nothing compiles in the capture."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


# ------------------------------------------------------------------------------------------------- P12


def codebook(dry: bool) -> Iterator[Row]:
    """P12: one k-means pass over 1 M rows, from the difference of two numbers of iterations, against one hard_encode."""
    return collect(
        (f"P12 {dtype}", partial(_codebook, dtype, dry)) for dtype in (torch.float32, torch.bfloat16)
    )


def _codebook(dtype: torch.dtype, dry: bool) -> list[Row]:
    from dre_fast import fit_codebook

    device = device_of(dry)
    count, dim, words = (20_000, 64, 8) if dry else (1_000_000, 384, 64)
    shape = Encode("P12", count, dim, words, 1, dtype)
    x, start, bounds = make(shape, device)
    start = start + 0.1 * torch.randn_like(start)  # from the very centres of the rows it would stop at once

    def seconds(iterations: int) -> float:
        _synchronize(device)
        begun = time.perf_counter()
        fit_codebook(x, words, iterations=iterations, warm_start=start, tolerance=0.0)
        _synchronize(device)
        return time.perf_counter() - begun

    seconds(1)
    few = min(seconds(1) for _ in range(3))
    many = min(seconds(9) for _ in range(3))
    return [
        {
            "id": "P12",
            "what": f"k-means, one Lloyd pass of {str(dtype).removeprefix('torch.')} rows, {shape}",
            "implementation": "fit_codebook",
            "ms": (many - few) / 8 * 1e3,
            "bytes": shape.bytes,
            "flops": shape.flops,
            "peers": {"one hard_encode": time_ms(lambda: test_encode.ours(x, start, bounds), device)},
        }
    ]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
