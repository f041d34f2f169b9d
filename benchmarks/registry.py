"""The shapes every benchmark and size test uses, by id. Floors and ratios of a figure refer to these.

P1, P2: hard encode forward. P3: encode from the bank. P4: soft encode, forward and backward. P10: the CPU paths.
all-*: the loss against all reports, forward and backward.
Bytes are the least a pass must move: each row read once, codes (int64), V and counts written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True)
class Encode:
    """N rows of D features in ``bags`` bags against K codewords.

    ragged: bags of different sizes, the largest about eight times the smallest; else of equal ones.
    """

    id: str
    rows: int
    dim: int
    codewords: int
    bags: int
    dtype: torch.dtype
    ragged: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        bags = f"{self.bags} {'ragged ' if self.ragged else ''}bag{'s' if self.bags > 1 else ''}"
        return f"N={self.rows:,} D={self.dim} K={self.codewords}, {bags}, {kind}"

    @property
    def item(self) -> int:
        """Bytes of one feature."""
        return torch.empty(0, dtype=self.dtype).element_size()

    @property
    def input_bytes(self) -> int:
        """Bytes of rows, codebook (fp32) and offsets."""
        return self.rows * self.dim * self.item + self.codewords * self.dim * 4 + (self.bags + 1) * 8

    @property
    def output_bytes(self) -> int:
        """Bytes of V (fp32), counts and codes (int64)."""
        return self.rows * 8 + self.bags * self.codewords * (self.dim * 4 + 8)

    @property
    def bytes(self) -> int:
        """Bytes a hard encode forward must move."""
        return self.rows * self.dim * self.item + self.output_bytes

    @property
    def flops(self) -> int:
        """Assign and aggregate as matrix products, 2 N D K each."""
        return 4 * self.rows * self.dim * self.codewords

    @property
    def soft_bytes(self) -> int:
        """Bytes soft forward and backward must move: rows read twice, their gradient written, V, dV and mass."""
        return 3 * self.rows * self.dim * self.item + self.bags * self.codewords * (self.dim * 8 + 8)

    @property
    def soft_flops(self) -> int:
        """Forward 4 N D K, backward 10 N D K with the assignment formed again."""
        return 14 * self.rows * self.dim * self.codewords

    @property
    def residual_bytes(self) -> int:
        """Bytes of the fp32 N x K x D residuals that dre_fast never forms and some of its peers do."""
        return self.rows * self.codewords * self.dim * 4


@dataclass(frozen=True)
class Retrieval:
    """``bags`` slides of ``tiles`` tiles in an int8 bank: m live rows and r retrieved ones of each are encoded."""

    id: str
    bags: int
    tiles: int
    live: int
    retrieved: int
    dim: int
    codewords: int

    def __str__(self) -> str:
        rows = f"n_s={self.tiles:,} m={self.live} r={self.retrieved:,}"
        return f"B={self.bags} {rows} D={self.dim} K={self.codewords}, int8"

    @property
    def bytes(self) -> int:
        """Bytes the retrieved rows move: int8 row, scale, code, and V once."""
        return self.bags * self.retrieved * (self.dim + 4 + 2) + self.bags * self.codewords * (
            self.dim * 4 + 8
        )


@dataclass(frozen=True)
class Contrast:
    """B slides against M reports of T numbers each, slides in fp32."""

    id: str
    slides: int
    reports: int
    dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"B={self.slides} M={self.reports:,} T={self.dim}, {kind} reports"

    @property
    def bytes(self) -> int:
        """Bytes forward and backward must move: reports and their cases twice."""
        return 2 * self.reports * (self.dim * torch.empty(0, dtype=self.dtype).element_size() + 8)

    @property
    def flops(self) -> int:
        """Forward 2 B M T, backward 4 B M T with the logits formed again."""
        return 6 * self.slides * self.reports * self.dim

    @property
    def logits_bytes(self) -> int:
        """Bytes of the fp32 B x M logits that dre_fast never forms and its peers do."""
        return self.slides * self.reports * 4


GPU_ENCODE = (
    Encode("P1", 1_000_000, 384, 64, 1, torch.bfloat16),
    Encode("P1-ragged", 1_000_000, 384, 64, 64, torch.bfloat16, ragged=True),
    Encode("P1-fp32", 1_000_000, 384, 64, 1, torch.float32),
    Encode("P2", 400_000, 1024, 64, 1, torch.bfloat16),
)
GPU_SOFT = (Encode("P4", 131_072, 384, 64, 32, torch.bfloat16),)
GPU_RETRIEVAL = (Retrieval("P3", 32, 8_192, 64, 4_096, 384, 64),)
CPU_ENCODE = (
    Encode("P10-384", 200_000, 384, 64, 1, torch.float32),
    Encode("P10-1024", 60_000, 1024, 64, 1, torch.float32),
    Encode("P10-384-bf16", 200_000, 384, 64, 1, torch.bfloat16),
    Encode("P10-ragged", 100_000, 384, 64, 64, torch.float32, ragged=True),
    Encode("P10-K16", 100_000, 384, 16, 1, torch.float32),
    Encode("P10-K256", 50_000, 384, 256, 1, torch.float32),
    Encode("P10-2k", 2_000, 384, 64, 1, torch.float32),
)
CPU_SOFT = (
    Encode("P4-cpu", 16_384, 384, 64, 8, torch.float32),
    Encode("P4-cpu-1k", 1_024, 384, 64, 2, torch.float32),
    Encode("P4-cpu-D1024", 8_192, 1024, 64, 4, torch.float32),
    Encode("P4-cpu-bf16", 16_384, 384, 64, 8, torch.bfloat16),
)
CPU_RETRIEVAL = (Retrieval("P3-cpu", 32, 8_192, 64, 4_096, 384, 64),)
GPU_CONTRAST = (
    Contrast("all-32", 32, 100_000, 768, torch.float32),
    Contrast("all-32-bf16", 32, 100_000, 768, torch.bfloat16),
    Contrast("all-512-bf16", 512, 200_000, 768, torch.bfloat16),
)
CPU_CONTRAST = (Contrast("all-cpu", 32, 20_000, 512, torch.float32),)
# The same road at sizes that take a moment, for `benchmarks/gpu.sh --dry-run` and for tests of the scripts.
SMALL_ENCODE = (
    Encode("P1-small", 2_000, 64, 16, 1, torch.bfloat16),
    Encode("P2-small", 1_000, 96, 16, 3, torch.bfloat16),
)
SMALL_SOFT = (Encode("P4-small", 512, 32, 8, 4, torch.float32),)
SMALL_CONTRAST = (Contrast("all-small", 4, 300, 32, torch.float32),)
SMALL_RETRIEVAL = (Retrieval("P3-small", 2, 40, 4, 8, 16, 4),)

# Row counts every kernel is tested at: none, one, less and more than a tile, one short of a tile multiple, 2^16 + 1.
ROW_COUNTS = (0, 1, 63, 1000, 1023)
SLOW_ROW_COUNTS = (65_537,)


def make(
    shape: Encode, device: str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [N, D] around random unit codewords, codebook fp32 [K, D], cu_seqlens int64 [B + 1]."""
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
    return rows, codebook, torch.tensor(offsets(shape), device=device)


def offsets(shape: Encode) -> list[int]:
    """Row offsets of the bags; those of a ragged shape follow one another without order."""
    sizes = [1 + 7 * (5 * bag % shape.bags) / shape.bags if shape.ragged else 1 for bag in range(shape.bags)]
    return [int(shape.rows * part / sum(sizes)) for part in accumulate(sizes, initial=0)]
