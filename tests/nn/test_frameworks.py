"""Residual encoding inside what trainers wrap around modules: DDP, activation checkpointing, autocast, compile."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dre_fast import ResidualEncoding, residual_encode

ASSIGNMENTS = ["hard", "soft", "netvlad"]


class Model(nn.Module):
    """A layer with gradient below the encoding and one above it, on ragged bags."""

    def __init__(self, assignment: str) -> None:
        super().__init__()
        self.encoder = nn.Linear(7, 5)
        self.encoding = ResidualEncoding(5, 4, assignment, learnable=True, normalize_rows=True)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.head(self.encoding(self.encoder(x), cu_seqlens=cu_seqlens).flatten(1))  # type: ignore[no-any-return]


def bags(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(30, 7, generator=generator), torch.tensor([0, 11, 11, 30])


def gradients(model: nn.Module, run: Callable[..., Tensor], x: Tensor, cu: Tensor) -> list[Tensor]:
    model.zero_grad()
    run(x, cu).float().square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_activation_checkpointing(assignment: str, reentrant: bool) -> None:
    model, (x, cu) = Model(assignment), bags()
    x = x.requires_grad_()  # the reentrant form needs an input with gradient

    def run(x: Tensor, cu: Tensor) -> Tensor:
        return checkpoint(model, x, cu, use_reentrant=reentrant)  # type: ignore[no-any-return]

    expected = gradients(model, model, x, cu)
    assert len(expected) >= 5
    for one, other in zip(gradients(model, run, x, cu), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_autocast_keeps_the_sums_in_fp32(assignment: str) -> None:
    model, (x, cu) = Model(assignment), bags()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.encoder(x)
        encoded = model.encoding(features, cu_seqlens=cu)
        loss = model.head(encoded.flatten(1)).float().square().sum()
    assert features.dtype == torch.bfloat16
    assert encoded.dtype == torch.float32
    torch.testing.assert_close(encoded, model.encoding(features.float(), cu_seqlens=cu))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_training_step_compiles_to_one_graph(assignment: str) -> None:
    torch._dynamo.reset()
    model, (x, cu) = Model(assignment), bags()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = gradients(model, model, x, cu)
    for one, other in zip(gradients(model, compiled, x, cu), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_torch_func_grad() -> None:
    x, codebook = torch.randn(9, 5), torch.randn(4, 5)
    for options in ({}, {"assignment": "soft", "scale": torch.ones(4)}):

        def energy(x: Tensor, o: dict[str, Any] = options) -> Tensor:
            return residual_encode(x, codebook, check=False, **o).square().sum()  # type: ignore[no-any-return]

        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(energy(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(energy)(x), expected)


def _one_process(rank: int, world: int, folder: str, assignment: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    model = nn.parallel.DistributedDataParallel(Model(assignment))
    found = gradients(model, model, *bags(rank))
    if rank == 0:
        torch.save(found, os.path.join(folder, "gradients.pt"))
    # gloo's threads must be gone, with all that holds the group, before the process may exit
    del model
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_ddp_averages_the_gradients_of_its_processes(assignment: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_process, (2, str(tmp_path), assignment), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    torch.manual_seed(0)
    model = Model(assignment)
    each = [gradients(model, model, *bags(rank)) for rank in range(2)]
    for one, first, second in zip(found, *each, strict=True):
        torch.testing.assert_close(one, (first + second) / 2)
