"""The shapes every benchmark and size test uses, by id. Floors and ratios of a figure refer to these.

P1, P2: hard encode forward. P4: soft encode. P10: the CPU paths. Bytes are the least a row pass must move: each row
read once, codes (int64), V and counts written once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Encode:
    """N rows of D features in ``bags`` equal bags against K codewords."""

    id: str
    rows: int
    dim: int
    codewords: int
    bags: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes a hard encode forward must move."""
        item = torch.empty(0, dtype=self.dtype).element_size()
        return self.rows * (self.dim * item + 8) + self.bags * self.codewords * (self.dim * 4 + 8)

    @property
    def flops(self) -> int:
        """Assign and aggregate as matrix products, 2 N D K each."""
        return 4 * self.rows * self.dim * self.codewords


GPU_ENCODE = (
    Encode("P1", 1_000_000, 384, 64, 1, torch.bfloat16),
    Encode("P1-ragged", 1_000_000, 384, 64, 64, torch.bfloat16),
    Encode("P1-fp32", 1_000_000, 384, 64, 1, torch.float32),
    Encode("P2", 400_000, 1024, 64, 1, torch.bfloat16),
)
GPU_SOFT = (Encode("P4", 131_072, 384, 64, 32, torch.bfloat16),)
CPU_ENCODE = (
    Encode("P10-384", 200_000, 384, 64, 1, torch.float32),
    Encode("P10-1024", 60_000, 1024, 64, 1, torch.float32),
    Encode("P10-384-bf16", 200_000, 384, 64, 1, torch.bfloat16),
)
# The same road at sizes that take a moment, for `benchmarks/gpu.sh --dry-run` and for tests of the scripts.
SMALL_ENCODE = (
    Encode("P1-small", 2_000, 64, 16, 1, torch.bfloat16),
    Encode("P2-small", 1_000, 96, 16, 3, torch.bfloat16),
)

# Row counts every kernel is tested at: none, one, less and more than a tile, one short of a tile multiple, 2^16 + 1.
ROW_COUNTS = (0, 1, 63, 1000, 1023)
SLOW_ROW_COUNTS = (65_537,)


def make(
    shape: Encode, device: str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [N, D] around random unit codewords, codebook fp32 [K, D], cu_seqlens int64 [B + 1] of equal bags."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, generator=generator)

    codebook = torch.nn.functional.normalize(normal(shape.codewords, shape.dim), dim=1)
    rows = torch.empty(shape.rows, shape.dim, device=device, dtype=shape.dtype)
    step = 1 << 17
    for start in range(0, shape.rows, step):  # in blocks: the fp32 rows of P1 are twice its working set
        size = min(step, shape.rows - start)
        nearest = torch.randint(shape.codewords, (size,), device=device, generator=generator)
        block = codebook[nearest] + normal(size, shape.dim) / shape.dim**0.5
        rows[start : start + size] = torch.nn.functional.normalize(block, dim=1).to(shape.dtype)
    bounds = [shape.rows * i // shape.bags for i in range(shape.bags + 1)]
    return rows, codebook, torch.tensor(bounds, device=device)
