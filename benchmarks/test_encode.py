"""Hard encode forward against the GEMM form, torch.compile of it and a loop over codewords.

    pytest --benchmark-only -k encode

Every implementation of a shape is checked against the others before it is timed; conftest.py prints the ratios.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from benchmarks import peers
from benchmarks.registry import CPU_ENCODE, GPU_ENCODE, Encode, make
from dre_fast.ops import encode

CASES = [
    *(pytest.param(shape, "cpu", id=f"{shape.id}-cpu") for shape in CPU_ENCODE),
    *(pytest.param(shape, "cuda", id=f"{shape.id}-cuda", marks=pytest.mark.gpu) for shape in GPU_ENCODE),
]
IMPLEMENTATIONS = {
    "dre_fast": lambda x, codebook, bounds: torch.ops.dre_fast.hard_encode(x, codebook, bounds)[0],
    **peers.HARD_PEERS,
}


@lru_cache(maxsize=1)
def inputs(shape: Encode, device: str) -> tuple[torch.Tensor, ...]:
    """Rows, codebook, offsets, and V of dre_fast."""
    made = make(shape, device)
    return (*made, IMPLEMENTATIONS["dre_fast"](*made))


@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
@pytest.mark.parametrize(
    ("shape", "device"), CASES
)  # the outer loop, so that inputs() is computed once a shape
def test_hard_encode(benchmark, shape: Encode, device: str, implementation: str) -> None:
    if implementation == "gemm-compiled" and shape.bags > 1:
        pytest.skip("the compiled GEMM form covers one bag")
    x, codebook, bounds, expected = inputs(shape, device)
    run = IMPLEMENTATIONS[implementation]
    V = run(x, codebook, bounds)
    # bf16 scores elect another codeword for a row in a hundred: the sums agree in direction, not in digits
    cosine = torch.nn.functional.cosine_similarity(V.flatten(), expected.flatten(), dim=0)
    assert cosine > (0.99 if x.dtype == torch.bfloat16 else 0.9999)

    # On a GPU a round is many launches and one wait, so that no launch is timed alone.
    calls = 20 if device == "cuda" else 1

    def some_calls() -> None:
        for _ in range(calls):
            run(x, codebook, bounds)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"hard encode {shape.id} {device}"
    benchmark.extra_info.update(
        implementation=implementation,
        backend=encode.backend("hard_encode", device, x.dtype),
        bytes=shape.bytes,
        calls=calls,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    benchmark.pedantic(some_calls, rounds=3 if device == "cpu" else 10, warmup_rounds=1)
