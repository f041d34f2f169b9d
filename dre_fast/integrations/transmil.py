"""ResidualMIL as a model of TransMIL's codebase, which is not imported."""

from __future__ import annotations

from torch import Tensor, nn

from dre_fast.integrations.build import CodebookFile, build_model
from dre_fast.nn.residual_mil import ResidualMIL


class ResidualTransMIL(nn.Module):
    """Called and answering as TransMIL: ``model(data=, label=)`` -> logits, Y_prob, Y_hat.

    Args:
        n_classes: C. dim: D of the features.
        codewords, assignment, width, head, depth, dropout: of a new :class:`~dre_fast.ResidualMIL`.
        codebook: file of :func:`~dre_fast.integrations.build.save_codebook`. model: an existing model.
    """

    def __init__(
        self,
        n_classes: int,
        dim: int = 1024,
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
            dim,
            n_classes,
            model,
            codebook,
            codewords=codewords,
            assignment=assignment,
            width=width,
            head=head,
            depth=depth,
            dropout=dropout,
        )

    def forward(self, data: Tensor, label: Tensor | None = None) -> dict[str, Tensor]:
        """Bags ``data`` [B, N, D] (no padding) -> logits [B, C], Y_prob [B, C] and Y_hat int64 [B].

        Args:
            label: what the host passes to every model; the logits do not depend on it.
        """
        logits = self.mil(data)
        return {"logits": logits, "Y_prob": logits.softmax(1), "Y_hat": logits.argmax(1)}
