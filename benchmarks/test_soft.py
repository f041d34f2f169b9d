"""Soft encode, forward and backward, Deep-TEN and NetVLAD, against every other way to write it: P4.

    pytest --benchmark-only -k soft

A call is V and the gradients of rows, codebook and assignment for a given gradient of V. Each implementation is checked
against dre_fast, gradients included, before it is timed; peers that keep residuals run where those fit
(peers_soft.covers). conftest.py prints times, ratios and peak memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor

from benchmarks import peers, peers_soft
from benchmarks.memory import Job
from benchmarks.peers_soft import Assignment
from benchmarks.registry import CPU_SOFT, GPU_SOFT, Encode, make
from dre_fast.ops import encode

SHAPES = {shape.id: shape for shape in (*CPU_SOFT, *GPU_SOFT)}
NAMES = ("dre_fast", *peers_soft.SOFT_PEERS)
ASSIGNMENTS = ("Deep-TEN", "NetVLAD")
CASES = [
    pytest.param(shape, device, assignment, name, id=f"{shape.id}-{device}-{assignment}-{name}", marks=marks)
    for shapes, device, marks in ((CPU_SOFT, "cpu", ()), (GPU_SOFT, "cuda", pytest.mark.gpu))
    for shape in shapes
    for assignment in ASSIGNMENTS
    for name in NAMES
    if peers_soft.covers(name, assignment, shape.residual_bytes, device)
]


@dataclass(frozen=True)
class Inputs:
    """Rows, codebook and assignment as leaves, the bags, and the gradient of V."""

    x: Tensor
    codebook: Tensor
    by: Assignment
    cu_seqlens: Tensor
    grad: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x, self.codebook, *self.by.leaves)


@lru_cache(maxsize=1)
def inputs(shape: Encode, device: str, assignment: str) -> Inputs:
    """Rows around random codewords; a scale at which a row has a few likely codewords, or a NetVLAD layer likewise."""
    x, codebook, cu_seqlens = make(shape, device)
    generator = torch.Generator(device).manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    if assignment == "Deep-TEN":
        by = Assignment(scale=(5 + normal(shape.codewords).abs()).requires_grad_())
    else:
        weight = 10 * codebook + 0.1 * normal(*codebook.shape)
        by = Assignment(weight=weight.requires_grad_(), bias=normal(shape.codewords).requires_grad_())
    grad = normal(shape.bags, *codebook.shape)
    return Inputs(x.requires_grad_(), codebook.requires_grad_(), by, cu_seqlens, grad)


def step(given: Inputs, name: str) -> tuple[Tensor, ...]:
    """V and the gradients of all leaves."""
    if name == "dre_fast":
        by = given.by
        V = encode.soft_encode(given.x, given.codebook, given.cu_seqlens, by.scale, by.weight, by.bias)[0]
    else:
        V = peers_soft.SOFT_PEERS[name](given.x, given.codebook, given.grad.shape[0], given.by)
    return (V.detach(), *torch.autograd.grad(V, given.leaves, given.grad))


@lru_cache(maxsize=1)
def expected(shape: Encode, device: str, assignment: str) -> tuple[Tensor, ...]:
    """V and gradients of dre_fast."""
    return step(inputs(shape, device, assignment), "dre_fast")


def job(shape_id: str, assignment: str, name: str) -> Job:
    """One CPU implementation at one shape, to watch its memory."""
    shape = SHAPES[shape_id]
    given = inputs(shape, "cpu", assignment)
    few = replace(shape, rows=8 * shape.bags)
    small = given if "compiled" in name else inputs.__wrapped__(few, "cpu", assignment)
    return Job(partial(step, given, name), partial(step, small, name))


@pytest.mark.parametrize(("shape", "device", "assignment", "name"), CASES)
def test_soft(benchmark, peak_memory, shape: Encode, device: str, assignment: str, name: str) -> None:
    if name == "gemm, compiled" and (reason := peers.why_no_compiler(device)):
        pytest.skip(reason)
    if (name, device, assignment, shape.dtype) == ("gemm, compiled", "cpu", "NetVLAD", torch.bfloat16):
        pytest.skip(
            "torch.compile (2.13) gives another gradient of the rows than the eager form: cosine 0.78"
        )
    given = inputs(shape, device, assignment)
    run = partial(step, given, name)
    results, right = run(), expected(shape, device, assignment)
    # bf16 logits move an assignment by percents: the results agree in direction, not in digits
    least = 0.99 if shape.dtype == torch.bfloat16 else 0.9999
    for got, wanted in zip(results, right, strict=True):
        cosine = torch.nn.functional.cosine_similarity(got.float().flatten(), wanted.float().flatten(), dim=0)
        assert cosine > least

    calls = 5 if device == "cuda" else 1

    def some_calls() -> None:
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()

    def sizes(tensors: tuple[Tensor, ...]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    benchmark.group = f"soft encode, forward and backward, {assignment} {shape.id} {device}: {shape}"
    benchmark.extra_info.update(
        implementation=name,
        ours=name == "dre_fast",
        backend=encode.backend("soft_encode_backward", device, shape.dtype),
        bytes=shape.soft_bytes,
        calls=calls,
        inputs=sizes((*given.leaves, given.grad)),
        outputs=sizes(right),
        peak=peak_memory(run, device, "benchmarks.test_soft:job", shape.id, assignment, name),
        difference=float((results[0] - right[0]).norm() / right[0].norm()),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
    )
    rounds = 10 if device == "cuda" else 3 if "broadcast" in name or "port" in name else 25
    benchmark.pedantic(some_calls, rounds=rounds)  # it ran above
