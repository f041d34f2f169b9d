"""Hard encode forward against every other way to write it: P1, P2 (GPU) and P10 (CPU).

    pytest --benchmark-only -k encode

Each implementation of a shape is checked against dre_fast before it is timed. "gemm" is the quickest eager form of
A^T X - diag(sum A) C, picked for each shape here and named; "gemm by matmul" the quickest that forms A and
multiplies. Peers that form residuals are left out where that takes more than memory, or many seconds
(peers.fits). conftest.py prints times, ratios and peak memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch

from benchmarks import peers
from benchmarks.memory import Job
from benchmarks.registry import CPU_ENCODE, GPU_ENCODE, Encode, make
from dre_fast.ops import encode

SHAPES = {shape.id: shape for shape in (*CPU_ENCODE, *GPU_ENCODE)}
NAMES = ("dre_fast", *peers.KINDS, *peers.OTHER_PEERS)
CASES = [
    pytest.param(shape, device, name, id=f"{shape.id}-{device}-{name}", marks=marks)
    for shapes, device, marks in ((CPU_ENCODE, "cpu", ()), (GPU_ENCODE, "cuda", pytest.mark.gpu))
    for shape in shapes
    for name in NAMES
    if peers.fits(name, shape.residual_bytes, device)
    or (shape.id, name)
    == ("P10-384", "residual broadcast, chunked")  # seconds, but the headline is compared with all
]


def ours(x: torch.Tensor, codebook: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The registered operation; its counts and codes are formed too."""
    V: torch.Tensor = torch.ops.dre_fast.hard_encode.default(x, codebook, cu_seqlens)[0]
    return V


def implementation(name: str) -> peers.Encoder:
    """The function behind a name, "KIND: FORM" for the GEMM forms."""
    return ours if name == "dre_fast" else peers.resolve(name)


@lru_cache(maxsize=1)
def inputs(shape: Encode, device: str) -> tuple[torch.Tensor, ...]:
    """Rows, codebook, offsets."""
    return make(shape, device)


@lru_cache(maxsize=1)
def expected(shape: Encode, device: str) -> torch.Tensor:
    """V of dre_fast."""
    return ours(*inputs(shape, device))


@lru_cache
def quickest(kind: str, shape: Encode, device: str) -> str:
    """The full name of the quickest form of a kind on a shape."""
    runs: dict[str, Callable[[], object]] = {
        name: partial(peers.resolve(name), *inputs(shape, device))
        for name in peers.candidates(kind, shape.bags, device)
    }
    return next(iter(runs)) if len(runs) == 1 else peers.quickest(runs, device)[0]


def job(shape_id: str, name: str) -> Job:
    """One CPU implementation at one shape, to watch its memory."""
    shape, run = SHAPES[shape_id], implementation(name)
    made = inputs(shape, "cpu")
    few = made if "compiled" in name else make(replace(shape, rows=8 * shape.bags))
    return Job(partial(run, *made), partial(run, *few))


@pytest.mark.parametrize(("shape", "device", "name"), CASES)
def test_hard_encode(benchmark, peak_memory, shape: Encode, device: str, name: str) -> None:
    if name == "gemm, compiled" and (reason := peers.why_no_compiler(device)):
        pytest.skip(reason)
    full_name = quickest(name, shape, device) if name in peers.KINDS else name
    run = partial(implementation(full_name), *inputs(shape, device))
    V, right = run(), expected(shape, device)
    # bf16 scores elect another codeword for a row in a hundred: the sums agree in direction, not in digits
    cosine = torch.nn.functional.cosine_similarity(V.flatten(), right.flatten(), dim=0)
    assert cosine > (0.99 if shape.dtype == torch.bfloat16 else 0.9999)

    # On a GPU a round is many launches and one wait, so that no launch is timed alone.
    calls = 20 if device == "cuda" else 1

    def some_calls() -> None:
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"hard encode {shape.id} {device}: {shape}"
    benchmark.extra_info.update(
        implementation=name,
        ours=name == "dre_fast",
        variant=full_name.removeprefix(f"{name}: ") if name in peers.KINDS else "",
        backend=encode.backend("hard_encode", device, shape.dtype),
        bytes=shape.bytes,
        calls=calls,
        inputs=shape.input_bytes,
        outputs=shape.output_bytes,
        peak=peak_memory(run, device, "benchmarks.test_encode:job", shape.id, full_name),
        difference=float((V - right).norm() / right.norm()),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
    )
    rounds = 10 if device == "cuda" else 3 if name in peers.RESIDUAL_PEERS else 5
    benchmark.pedantic(some_calls, rounds=rounds)  # it ran above
