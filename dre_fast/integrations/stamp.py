"""ResidualMIL as a tile-level model of STAMP, which is not imported."""

from __future__ import annotations

from torch import Tensor, nn

from dre_fast.integrations.build import CodebookFile, build_model
from dre_fast.nn.residual_mil import ResidualMIL


class ResidualSTAMP(nn.Module):
    """Called and answering as STAMP's models; masks are True where padded.

    STAMP fills bags up with zeros and by default passes no mask. Without one, tiles whose features are all zero count
    as padding.

    Args:
        dim_input: D of the features. dim_output: C.
        codewords, assignment, width, head, depth, dropout: of a new :class:`~dre_fast.ResidualMIL`.
        codebook: file of :func:`~dre_fast.integrations.build.save_codebook`. model: an existing model.
    """

    def __init__(
        self,
        dim_input: int,
        dim_output: int,
        codewords: int = 16,
        assignment: str = "hard",
        width: int = 256,
        head: str = "transformer",
        depth: int = 2,
        dropout: float = 0.0,
        codebook: CodebookFile | None = None,
        model: ResidualMIL | None = None,
    ) -> None:
        super().__init__()
        self.mil = build_model(
            dim_input,
            dim_output,
            model,
            codebook,
            codewords=codewords,
            assignment=assignment,
            width=width,
            head=head,
            depth=depth,
            dropout=dropout,
        )

    def forward(self, bags: Tensor, *, coords: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Bags [B, N, D] -> logits [B, C].

        Args:
            coords: [B, N, 2]; positions do not enter the encoding.
            mask: [B, N], True or nonzero = padded.
        """
        return self.mil(bags, mask=_valid(bags, mask))  # type: ignore[no-any-return]

    def contributions(self, bags: Tensor, target: int | None = None, mask: Tensor | None = None) -> Tensor:
        """:meth:`dre_fast.ResidualMIL.contributions` [B, N] with STAMP's mask."""
        return self.mil.contributions(bags, target, mask=_valid(bags, mask))


def _valid(bags: Tensor, padded: Tensor | None) -> Tensor:
    return (bags != 0).any(-1) if padded is None else ~padded.bool()
