"""Encoding straight from the int8 bank by (seed, slide), against chains of torch calls that gather first: P3.

    pytest --benchmark-only -k retrieval

Once as MemoryBank.encode does it for a training step, live rows included, once the registered operations on the
retrieved rows alone. Every way is checked against dre_fast before it is timed. "torch chain" normalises the gathered rows
again, as P3 has it; "stored codes" is the leanest chain: no assignment, no second normalisation.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from benchmarks import retrieval
from benchmarks.memory import Job
from benchmarks.registry import CPU_RETRIEVAL, GPU_RETRIEVAL, Retrieval
from dre_fast.ops import encode

SHAPES = {shape.id: shape for shape in (*CPU_RETRIEVAL, *GPU_RETRIEVAL)}
CASES = [
    pytest.param(shape, device, what, name, id=f"{shape.id}-{device}-{what}-{number}", marks=marks)
    for shapes, device, marks in ((CPU_RETRIEVAL, "cpu", ()), (GPU_RETRIEVAL, "cuda", pytest.mark.gpu))
    for shape in shapes
    for what, ways in retrieval.TABLES.items()
    for number, name in enumerate(ways)  # by number: `-k encode` means test_encode.py
]


@lru_cache(maxsize=1)
def stored(shape: Retrieval, device: str) -> retrieval.Stored:
    """A filled bank and a step's slides."""
    return retrieval.fill(shape, device)


def job(shape_id: str, what: str, name: str, form: str) -> Job:
    """One way on a CPU, to watch its memory."""
    shape = SHAPES[shape_id]
    few = retrieval.fill(replace(shape, tiles=100, live=4, retrieved=16), "cpu")
    return Job(
        retrieval.bound(what, name, form, stored(shape, "cpu")), retrieval.bound(what, name, form, few)
    )


@pytest.mark.parametrize(("shape", "device", "what", "name"), CASES)
def test_retrieval(benchmark, peak_memory, shape: Retrieval, device: str, what: str, name: str) -> None:
    given = stored(shape, device)
    form = retrieval.quickest_form(what, name, given, device)
    run = retrieval.bound(what, name, form, given)
    first = next(iter(retrieval.TABLES[what]))
    V, right = run(), retrieval.bound(what, first, "", given)()
    # stored rows are unit vectors up to int8 rounding, which a second normalisation undoes
    assert torch.nn.functional.cosine_similarity(V.flatten(), right.flatten(), dim=0) > 0.9999

    calls = 20 if device == "cuda" else 1

    def some_calls() -> None:
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"encode from the bank, {what}, {shape.id} {device}: {shape}"
    benchmark.extra_info.update(
        implementation=name,
        ours=name == first,
        variant=form,
        backend=encode.backend("hard_encode", device, torch.int8),
        bytes=shape.bytes,
        calls=calls,
        peak=peak_memory(run, device, "benchmarks.test_retrieval:job", shape.id, what, name, form),
        difference=float((V - right).norm() / right.norm()),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
    )
    benchmark.pedantic(some_calls, rounds=5 if device == "cpu" else 10)  # it ran above
