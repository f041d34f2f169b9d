"""From the K residual tokens of a slide to its embedding (DRE-SLCL, arXiv 2511.05034)."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn


class SlideEncoder(nn.Module):
    """Residual tokens -> transformer -> slide embedding -> projection into the report space.

    The K normalised residuals ``V_k`` of a slide are tokens. Each is projected to ``width``, told which codeword it
    belongs to by a learned embedding, and read by a pre-norm transformer. The tokens are then narrowed to a quarter and
    joined in codeword order, and one linear layer makes the slide embedding h of them: what a residual means depends on
    its codeword, which a class token, that sees a mean of the tokens, has to learn first. A linear layer projects h to
    the dimension of the report embeddings.

    Args:
        dim: D, the feature dimension of the tile encoder.
        codewords: K, the number of codewords.
        width: width of the transformer and of the slide embedding; a multiple of 4 and of ``heads``.
        depth: transformer layers.
        heads: attention heads.
        report_dim: T, dimension of the report embeddings; ``None`` leaves the projection out.
        dropout: dropout inside the transformer and on the joined tokens, in [0, 1).

    Shapes:
        ``forward(residuals)``: ``residuals`` [B, K, D] (any float dtype) -> h [B, width], fp32 outside autocast.
        ``project(h)``: [B, width] -> [B, T].

    Raises:
        ValueError: a size is below 1, ``width`` is not a multiple of 4 and of ``heads``, the input is not [B, K, D],
            or ``project`` is called on an encoder built without ``report_dim``.

    Source: DRE-SLCL, arXiv 2511.05034 (a small transformer over the residual tokens, then a linear projection); the
    read-out in codeword order is dre_fast's own.
    """

    def __init__(
        self,
        dim: int,
        codewords: int,
        *,
        width: int = 256,
        depth: int = 2,
        heads: int = 4,
        report_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(dim, codewords, width, depth, heads) < 1:
            raise ValueError(
                "SlideEncoder: dim, codewords, width, depth and heads must be at least 1, "
                f"got {dim}, {codewords}, {width}, {depth} and {heads}"
            )
        if report_dim is not None and report_dim < 1:
            raise ValueError(f"SlideEncoder: report_dim must be at least 1, or None, got {report_dim}")
        if width % heads or width % 4:
            raise ValueError(f"SlideEncoder: width {width} must be a multiple of 4 and of heads {heads}")
        self.dim, self.codewords, self.width, self.report_dim = dim, codewords, width, report_dim
        self.tokens = nn.Linear(dim, width)
        self.codeword = nn.Parameter(torch.randn(codewords, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(
            layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.narrow = nn.Linear(width, width // 4)
        self.readout = nn.Sequential(nn.Dropout(dropout), nn.Linear(codewords * (width // 4), width))
        self.projection = nn.Linear(width, report_dim) if report_dim else None

    def forward(self, residuals: Tensor) -> Tensor:
        """Normalised residuals [B, K, D] -> slide embedding h [B, width]."""
        if residuals.dim() != 3 or residuals.shape[1:] != (self.codewords, self.dim):
            raise ValueError(
                f"SlideEncoder: residuals must be [B, {self.codewords}, {self.dim}], got {tuple(residuals.shape)}"
            )
        # After intra + global L2 a token has norm ~ K^-1/2; bring its entries to unit variance. Empty ones stay zero.
        scaled = residuals.to(self.tokens.weight.dtype) * math.sqrt(self.codewords * self.dim)
        tokens = self.transformer(self.tokens(scaled) + self.codeword)
        return self.readout(rearrange(self.narrow(tokens), "b k w -> b (k w)"))

    def project(self, embedding: Tensor) -> Tensor:
        """Slide embedding [B, width] -> report space [B, T], not normalised.

        Raises:
            ValueError: built without ``report_dim``.
        """
        if self.projection is None:
            raise ValueError(
                "SlideEncoder: built without report_dim, so there is no projection into a report space"
            )
        return self.projection(embedding)
