"""ResidualMIL as a network of eva's YAML configurations. eva itself is not imported."""

from __future__ import annotations

from torch import Tensor, nn

from dre_fast.integrations.build import CodebookFile, build_model
from dre_fast.nn.residual_mil import ResidualMIL


class ResidualEva(nn.Module):
    """Built and called as eva's networks for bags; rows of nothing but ``pad_value`` are padding.

    Args:
        input_size: D of the features. output_size: C; 1 for a binary task of one logit.
        codewords, assignment, width, head, depth, dropout: of a new :class:`~dre_fast.ResidualMIL`.
        pad_value: what eva fills bags up with; None: nothing is padding.
        codebook: file of :func:`~dre_fast.integrations.build.save_codebook`. model: an existing model.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        codewords: int = 16,
        assignment: str = "hard",
        width: int = 256,
        head: str = "transformer",
        depth: int = 2,
        dropout: float = 0.0,
        pad_value: float | None = float("-inf"),
        codebook: CodebookFile | None = None,
        model: ResidualMIL | None = None,
    ) -> None:
        super().__init__()
        self.pad_value = pad_value
        self.mil = build_model(
            input_size,
            output_size,
            model,
            codebook,
            codewords=codewords,
            assignment=assignment,
            width=width,
            head=head,
            depth=depth,
            dropout=dropout,
        )

    def forward(self, input_tensor: Tensor) -> Tensor:
        """Bags [B, N, D] -> logits [B, C]."""
        return self.mil(input_tensor, mask=self._valid(input_tensor))  # type: ignore[no-any-return]

    def contributions(self, input_tensor: Tensor, target: int | None = None) -> Tensor:
        """:meth:`dre_fast.ResidualMIL.contributions` [B, N], 0 in the padding."""
        return self.mil.contributions(input_tensor, target, mask=self._valid(input_tensor))

    def _valid(self, bags: Tensor) -> Tensor | None:
        return None if self.pad_value is None else (bags != self.pad_value).any(-1)
