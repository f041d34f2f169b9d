"""From the rows of a slide to its embedding, other than by residuals to a fixed codebook: for side-by-side comparison.

Every aggregator reads rows [B, N, D] of slides padded to one length and gives embeddings of the same width, behind which
stand the same heads and the same projection into the report space, so that runs differ in the aggregation alone.

| name | what it is |
|---|---|
| mean, max | a linear layer and ReLU, then the mean or maximum over the rows |
| abmil | gated attention (Ilse et al. 2018) |
| abmilx | multi-head local attention, refined by a global correlation between tiles (after ABMILX, Tang et al. 2025) |
| transmil | class token, two transformer layers, convolutional positions between (after TransMIL, Shao et al. 2021) |
| soft | residual encoding with learnable codewords and soft assignment (Deep-TEN), then the slide encoder |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dre_fast.codebook import row_chunks
from dre_fast.nn.encoding import ResidualEncoding
from dre_fast.nn.slide_encoder import SlideEncoder
from dre_fast.reference.encode import squared_distances


class RowAggregator(nn.Module):
    """Base: checks rows, and projects embeddings into the report space.

    Args:
        dim: D of the rows.
        width: of the embedding.
        report_dim: T, dimension of the report embeddings; None leaves the projection out.

    Shapes:
        ``forward(rows, mask)``: rows fp32 [B, N, D], mask bool [B, N], True = valid -> [B, width]. A masked row has no
        influence and no gradient, whatever finite values it holds; a slide without valid rows has a finite embedding.

    Raises:
        ValueError: sizes below 1, or rows and mask of other shapes.
    """

    def __init__(self, dim: int, width: int, report_dim: int | None) -> None:
        super().__init__()
        if min(dim, width) < 1 or (report_dim is not None and report_dim < 1):
            raise ValueError(
                f"{type(self).__name__}: sizes must be at least 1, got {dim}, {width}, {report_dim}"
            )
        self.dim, self.width, self.report_dim = dim, width, report_dim
        self.projection = nn.Linear(width, report_dim) if report_dim else None

    def embed(self, rows: Tensor, mask: Tensor) -> Tensor:
        """Rows, masked ones zero, [B, N, D] and mask [B, N] -> [B, width]."""
        raise NotImplementedError

    def forward(self, rows: Tensor, mask: Tensor) -> Tensor:
        """Slide embeddings [B, width]. Shapes and errors: the class."""
        if rows.ndim != 3 or rows.shape[2] != self.dim or mask.shape != rows.shape[:2]:
            raise ValueError(
                f"{type(self).__name__}: rows must be [B, N, {self.dim}] and mask [B, N], "
                f"got {list(rows.shape)} and {list(mask.shape)}"
            )
        return self.embed(rows.masked_fill(~mask[..., None], 0.0), mask)

    def project(self, embedding: Tensor) -> Tensor:
        """Slide embedding [B, width] -> report space [B, T], not normalised.

        Raises:
            ValueError: built without ``report_dim``.
        """
        if self.projection is None:
            raise ValueError(f"{type(self).__name__}: built without report_dim")
        return self.projection(embedding)  # type: ignore[no-any-return]

    def measure(self, bank: Any) -> Any:
        """What :meth:`start_from` needs of the rows of a :class:`~dre_fast.MemoryBank`. Nothing, by default."""

    def start_from(self, codebook: Tensor, measured: Sequence[Any]) -> None:
        """Before training: take over what banks tell. Nothing, by default.

        Args:
            codebook: fp32 [K, D], that of the banks.
            measured: what :meth:`measure` found, one of each bank: those of several processes, in the same order.
        """


class _Pool(RowAggregator):
    def __init__(self, dim: int, width: int, report_dim: int | None = None, **_: Any) -> None:
        super().__init__(dim, width, report_dim)
        self.tokens = nn.Sequential(nn.Linear(dim, width), nn.ReLU())


class MeanPool(_Pool):
    """h = mean_i relu(W x_i + b)."""

    def embed(self, rows: Tensor, mask: Tensor) -> Tensor:
        tokens = self.tokens(rows) * mask[..., None]
        return tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)  # type: ignore[no-any-return]


class MaxPool(_Pool):
    """h = max_i relu(W x_i + b), zero without rows."""

    def embed(self, rows: Tensor, mask: Tensor) -> Tensor:
        # relu is never negative, so zeros in place of masked rows change nothing
        return (
            (self.tokens(rows) * mask[..., None]).amax(1)
            if rows.shape[1]
            else rows.new_zeros(len(rows), self.width)
        )


class GatedAttention(_Pool):
    """h = sum_i a_i t_i, a = softmax_i(w . (tanh(V t_i) * sigmoid(U t_i))) with t_i = relu(W x_i + b).

    Source: Ilse et al. 2018, Attention-based deep multiple instance learning, eq. 9.
    """

    def __init__(self, dim: int, width: int, report_dim: int | None = None, **_: Any) -> None:
        super().__init__(dim, width, report_dim)
        hidden = max(width // 2, 1)
        self.tanh = nn.Sequential(nn.Linear(width, hidden), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(width, hidden), nn.Sigmoid())
        self.score = nn.Linear(hidden, 1)

    def embed(self, rows: Tensor, mask: Tensor) -> Tensor:
        tokens = self.tokens(rows)
        weight = _masked_softmax(self.score(self.tanh(tokens) * self.gate(tokens))[..., 0], mask)
        return (weight[..., None] * tokens).sum(1)  # type: ignore[no-any-return]


class CorrelatedAttention(_Pool):
    """Multi-head attention pooling whose scores are refined by the correlation of all tiles with all.

    Per head, with t_i = relu(W x_i + b) cut into heads: scores s_i = w . tanh(V t_i); refined s' = s + U s with
    U = softmax(Q K^T / sqrt(d)) over the tiles; h = sum_i softmax_i(s') t_i, heads joined. Compute grows with N^2, memory
    with N where ``scaled_dot_product_attention`` has a fused form.

    Source: after the description of ABMILX (Tang et al. 2025): multi-head local attention, attention refined globally.
    """

    def __init__(
        self, dim: int, width: int, report_dim: int | None = None, *, heads: int = 4, **_: Any
    ) -> None:
        super().__init__(dim, width, report_dim)
        if width % heads:
            raise ValueError(f"CorrelatedAttention: width {width} must be a multiple of heads {heads}")
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.local = nn.Linear(width // heads, width // heads)
        self.score = nn.Linear(width // heads, 1)

    def embed(self, rows: Tensor, mask: Tensor) -> Tensor:
        tokens = self.tokens(rows)
        heads, query, key = (
            rearrange(x, "b n (h d) -> b h n d", h=self.heads)
            for x in (tokens, self.query(tokens), self.key(tokens))
        )
        score = self.score(torch.tanh(self.local(heads)))
        # as wide as queries and keys: fused attention takes no values of width one
        values = F.pad(score, (0, heads.shape[-1] - 1))
        seen = _never_empty(mask)[:, None, None, :]
        refined = score + F.scaled_dot_product_attention(query, key, values, attn_mask=seen)[..., :1]
        weight = _masked_softmax(refined[..., 0], mask[:, None])
        return rearrange((weight[..., None] * heads).sum(2), "b h d -> b (h d)")


class TransMIL(RowAggregator):
    """A class token, a transformer layer, positions by convolution over a square of tokens, another layer.

    The rows of a slide, in the order given, fill the smallest square that holds them; its empty places repeat the first
    rows. Depthwise convolutions of 7, 5 and 3 over the square are added to the tokens. Attention is exact
    (``scaled_dot_product_attention``) where TransMIL approximates it by Nystrom's method; memory grows with N as long as
    that has a fused form, which it has not on a CPU with dropout. Slides are gone through one by
    one, so that padding does not move a tile.

    Source: after Shao et al. 2021, TransMIL (class token, squaring, pyramid position encoding).
    """

    def __init__(
        self,
        dim: int,
        width: int,
        report_dim: int | None = None,
        *,
        heads: int = 4,
        dropout: float = 0.0,
        **_: Any,
    ) -> None:
        super().__init__(dim, width, report_dim)
        if width % heads:
            raise ValueError(f"TransMIL: width {width} must be a multiple of heads {heads}")
        self.tokens = nn.Sequential(nn.Linear(dim, width), nn.ReLU())
        self.cls = nn.Parameter(torch.randn(width) * 0.02)
        self.before, self.after = (
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.positions = nn.ModuleList(
            [nn.Conv2d(width, width, size, padding=size // 2, groups=width) for size in (7, 5, 3)]
        )
        self.norm = nn.LayerNorm(width)

    def embed(self, rows: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([self._one(own[valid]) for own, valid in zip(rows, mask)])

    def _one(self, rows: Tensor) -> Tensor:
        tokens, cls = self.tokens(rows), self.cls[None]
        n = len(tokens)
        if not n:
            return self.norm(self.after(self.before(cls[None])))[0, 0]  # type: ignore[no-any-return]
        side = math.ceil(math.sqrt(n))
        repeated = tokens[torch.arange(side * side, device=tokens.device) % n]
        seen = self.before(torch.cat([cls, repeated])[None])[0]
        square = rearrange(seen[1:], "(y x) w -> 1 w y x", y=side)
        placed = square + sum(conv(square) for conv in self.positions)
        again = torch.cat([seen[:1], rearrange(placed, "1 w y x -> (y x) w")])
        return self.norm(self.after(again[None]))[0, 0]  # type: ignore[no-any-return]


class SoftResiduals(RowAggregator):
    """Residuals to learnable codewords under soft assignment, read by the slide encoder.

    V_k = sum_i a_ik (x_i - c_k), a_ik = softmax_k(-s_k ||x_i - c_k||^2); codewords c and scales s are learnt. They start
    from k-means on the bank, with scales that make the nearest codeword 100 times as likely as the second on average.

    Source: Deep-TEN, Zhang et al. 2017; DRE-SLCL, arXiv 2511.05034 (slide encoder).
    """

    def __init__(
        self,
        dim: int,
        width: int,
        report_dim: int | None = None,
        *,
        codewords: int,
        normalize: str | Sequence[str] = ("intra", "l2"),
        **options: Any,
    ) -> None:
        super().__init__(dim, width, report_dim)
        self.encoding = ResidualEncoding(dim, codewords, "soft", normalize, learnable=True)
        # pulled towards zero, codewords would leave the features they stand for
        self.encoding.codebook.no_decay = True  # type: ignore[attr-defined]
        self.residuals = SlideEncoder(dim, codewords, width=width, **options)

    def embed(self, rows: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            V = self.encoding(rows.float(), mask=mask)
        return self.residuals(V)  # type: ignore[no-any-return]

    @torch.no_grad()
    def measure(self, bank: Any) -> tuple[float, int]:
        """Sum over the bank's rows of d2^2 - d1^2, d1 and d2 the distances to the nearest codewords; number of rows."""
        codebook, gaps, rows = bank.codebook, 0.0, 0
        if len(codebook) < 2:
            return gaps, rows
        middle = codebook.mean(dim=0)  # far from the origin the distances lose digits
        for chunk in row_chunks(bank):
            nearest = (
                squared_distances(chunk - middle, codebook - middle).topk(2, dim=1, largest=False).values
            )
            gaps += float((nearest[:, 1] - nearest[:, 0]).double().sum())
            rows += len(chunk)
        return gaps, rows

    @torch.no_grad()
    def start_from(self, codebook: Tensor, measured: Sequence[tuple[float, int]]) -> None:
        """Codewords as given, all scales ln(100) / mean(d2^2 - d1^2) over the rows of all banks."""
        gaps, rows = (sum(part) for part in zip(*measured))
        self.encoding.codebook.copy_(codebook)
        assert self.encoding.log_scale is not None
        self.encoding.log_scale.fill_(math.log(math.log(100.0) * rows / gaps) if gaps > 0 else 0.0)


AGGREGATORS: dict[str, type[RowAggregator]] = {
    "mean": MeanPool,
    "max": MaxPool,
    "abmil": GatedAttention,
    "abmilx": CorrelatedAttention,
    "transmil": TransMIL,
    "soft": SoftResiduals,
}


def _never_empty(mask: Tensor) -> Tensor:
    """The mask, all True for slides without valid rows: a softmax over nothing is NaN."""
    return mask | ~mask.any(-1, keepdim=True)


def _masked_softmax(score: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where mask; zero elsewhere, and everywhere in a slide without rows."""
    weight = score.masked_fill(~_never_empty(mask), -torch.inf).softmax(-1)
    return weight * mask
