"""Bank write: one call of the compiled op against the strongest chain of torch calls that does the same.

Both leave the same bank behind (checked here before anything is timed). The chain is what one would write by hand:
normalize, quantise, index_select of the old rows, matmul + argmin, index_add_ of the differences in int64,
index_copy_. It is given what the op does not ask for: no duplicates, no skipped entries, every row written before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dre_fast.ops import native
from dre_fast.reference.quantize import has_scale, padded_dim

SCALE = float(1 << 24)  # of the fixed-point sums


@dataclass(frozen=True)
class BankShape:
    """``rows`` entries a call, spread over ``slides`` slides of ``tiles`` tiles."""

    rows: int
    dim: int
    codewords: int
    slides: int
    tiles: int
    id: str


BANK_SHAPES = (
    BankShape(2048, 384, 64, 32, 1000, "P6-2048x384"),  # one step: 32 slides, 64 live tiles each
    BankShape(64, 384, 64, 1, 1000, "64x384"),  # one slide
    BankShape(2048, 1024, 64, 32, 500, "2048x1024"),
)
DTYPES = (torch.int8, torch.bfloat16, torch.float32)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
Bank = dict[str, Tensor]


def make_bank(shape: BankShape, dtype: torch.dtype, device: str) -> tuple[Bank, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    total = shape.slides * shape.tiles
    codebook = torch.randn(shape.codewords, shape.dim, generator=generator)
    bank = {
        "payload": torch.zeros(total, padded_dim(shape.dim, dtype), dtype=dtype),
        "scale": torch.zeros(total if has_scale(dtype) else 0),
        "code": torch.full((total,), -1, dtype=torch.int16),
        "age": torch.full((total,), -1, dtype=torch.int32),
        "drift": torch.zeros(total),
        "sums": torch.zeros(shape.slides, shape.codewords, shape.dim, dtype=torch.int64),
        "counts": torch.zeros(shape.slides, shape.codewords, dtype=torch.int64),
        "codebook": codebook / codebook.norm(dim=1, keepdim=True),
        "start": torch.arange(shape.slides) * shape.tiles,
    }
    per_slide = shape.rows // shape.slides
    batch = [
        torch.arange(shape.slides).repeat_interleave(per_slide),
        torch.cat(
            [torch.randperm(shape.tiles, generator=generator)[:per_slide] for _ in range(shape.slides)]
        ),
        torch.randn(shape.rows, shape.dim, generator=generator),
    ]
    return {name: t.to(device) for name, t in bank.items()}, [t.to(device) for t in batch]


def torch_chain(bank: Bank, slide: Tensor, tile: Tensor, x: Tensor, step: int) -> None:
    k, d = bank["codebook"].shape
    row = bank["start"][slide] + tile
    f = torch.nn.functional.normalize(x, dim=1)
    dtype = bank["payload"].dtype
    old = bank["payload"].index_select(0, row)[:, :d].float()
    if has_scale(dtype):
        scale = f.abs().amax(1, keepdim=True).div_(127)
        q = (f / scale).round_()
        z = q * scale
        old.mul_(bank["scale"].index_select(0, row)[:, None])
        bank["scale"].index_copy_(0, row, scale.squeeze(1))
    else:
        q = f.to(dtype)
        z = q.float()
    score = torch.addmm(bank["codebook"].square().sum(1).div_(2), z, bank["codebook"].T, alpha=-1)
    code = score.argmin(1)
    drift = 1 - torch.nn.functional.cosine_similarity(old, z, dim=1)
    sums, counts = bank["sums"].view(-1, d), bank["counts"].view(-1)
    before = slide * k + bank["code"].index_select(0, row)
    after = slide * k + code
    ones = torch.ones_like(row)
    sums.index_add_(0, before, old.mul_(SCALE).round_().to(torch.int64), alpha=-1)
    sums.index_add_(0, after, z.mul_(SCALE).round_().to(torch.int64))
    counts.index_add_(0, before, ones, alpha=-1)
    counts.index_add_(0, after, ones)
    bank["payload"][:, :d].index_copy_(0, row, q.to(dtype))
    bank["code"].index_copy_(0, row, code.to(torch.int16))
    bank["age"].index_fill_(0, row, step)
    bank["drift"].index_copy_(0, row, drift)


def native_write(bank: Bank, slide: Tensor, tile: Tensor, x: Tensor, step: int) -> None:
    torch.ops.dre_fast_native.bank_write.default(*bank.values(), slide, tile, x, step)


@pytest.mark.parametrize("implementation", [native_write, torch_chain], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", BANK_SHAPES, ids=lambda s: s.id)
@pytest.mark.parametrize("device", DEVICES)
def test_bank_write(
    benchmark, device: str, shape: BankShape, dtype: torch.dtype, implementation: Callable[..., None]
) -> None:
    part = "cuda" if device == "cuda" else "ops"
    if native.why_not(part):
        pytest.skip(f"needs the compiled bank write: {native.why_not(part)}")
    bank, batch = make_bank(shape, dtype, device)
    native_write(bank, *batch, 0)  # every row of the batch is written before: the case of a running training
    other = {name: t.clone() for name, t in bank.items()}
    moved = [*batch[:2], batch[2] + 0.3 * torch.randn_like(batch[2])]
    native_write(bank, *moved, 1)
    torch_chain(other, *moved, 1)
    assert torch.equal(bank["age"], other["age"])
    assert (bank["code"] != other["code"]).float().mean() < 1e-3
    # the chain normalises in fp32, so stored values differ by one rounding here and there: 1e-3 of a row's sum
    assert (bank["sums"] - other["sums"]).abs().max() < 2e-2 * SCALE

    batches = itertools.cycle([batch, moved])
    steps = itertools.count(2)

    def one_write() -> None:
        implementation(bank, *next(batches), next(steps))
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"bank write {shape.id} {dtype} {device}"
    benchmark.extra_info.update(
        implementation=implementation.__name__,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        cpu_level=native.cpu_level(),
    )
    benchmark.pedantic(one_write, rounds=30, warmup_rounds=3)
