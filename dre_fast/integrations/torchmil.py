"""ResidualMIL as a MILModel of torchmil. Importing this module imports torchmil."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dre_fast.integrations.build import CodebookFile, build_model, need_host
from dre_fast.nn.residual_mil import ResidualMIL

MILModel: Any = need_host("torchmil.models", "torchmil").MILModel


class ResidualTorchMIL(MILModel):
    """ResidualMIL for torchmil's Trainer: masks are 1 where valid, logits of a binary task are [B].

    Attention values and instance predictions are contributions to the largest logit
    (:meth:`~dre_fast.ResidualMIL.contributions`): signed, 0 where masked.

    Args:
        in_shape: (D,), as torchmil's models take it.
        n_classes: number of logits; 1 for a binary task.
        criterion: default: binary cross-entropy of one logit, cross-entropy of several.
        codebook: file of :func:`~dre_fast.integrations.build.save_codebook`. model: an existing model.
        options: of a new :class:`~dre_fast.ResidualMIL`: codewords, assignment, width, head, ...
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        n_classes: int = 1,
        criterion: nn.Module | None = None,
        *,
        codebook: CodebookFile | None = None,
        model: ResidualMIL | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        (dim,) = in_shape
        self.mil = build_model(dim, n_classes, model, codebook, **options)
        if criterion is None:
            criterion = nn.BCEWithLogitsLoss() if n_classes == 1 else nn.CrossEntropyLoss()
        self.criterion = criterion

    # torchmil passes of a batch what is named here, by names of positional arguments

    def forward(self, X: Tensor, mask: Tensor | None = None, return_att: bool = False) -> Any:
        """Bags X [B, N, D] and mask [B, N], nonzero = valid -> logits [B], or [B, C] of several classes.

        Args:
            return_att: also return the contributions fp32 [B, N].
        """
        mask = None if mask is None else mask.bool()
        logits = self.mil(X, mask=mask)
        logits = logits[:, 0] if self.mil.classes == 1 else logits
        return (logits, self.mil.contributions(X, mask=mask)) if return_att else logits

    def compute_loss(
        self, Y: Tensor, X: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Labels Y [B] or [B, 1], bags and mask -> logits and {name of the criterion: its value}."""
        logits = self.forward(X, mask)
        target = Y.reshape(len(logits))
        target = target.float() if self.mil.classes == 1 else target.long()
        return logits, {type(self.criterion).__name__: self.criterion(logits.float(), target)}

    def predict(self, X: Tensor, mask: Tensor | None = None, return_inst_pred: bool = True) -> Any:
        """Logits, and with ``return_inst_pred`` the contributions [B, N]."""
        return self.forward(X, mask, return_inst_pred)
