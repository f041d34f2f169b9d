"""ResidualMIL as a model of MIL_BASELINE, which is not imported."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dre_fast.integrations.build import CodebookFile, build_model
from dre_fast.nn.residual_mil import ResidualMIL


class ResidualBaseline(nn.Module):
    """Called and answering as MIL_BASELINE's models, one bag at a time.

    WSI_attn holds contributions to the largest logit (:meth:`~dre_fast.ResidualMIL.contributions`): signed.

    Args:
        num_classes: C. in_dim: D of the features. dropout: in the head.
        codebook: file of :func:`~dre_fast.integrations.build.save_codebook`. model: an existing model.
        options: of a new :class:`~dre_fast.ResidualMIL`: codewords, assignment, width, head, ...
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_dim: int = 512,
        dropout: float = 0.0,
        *,
        codebook: CodebookFile | None = None,
        model: ResidualMIL | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.mil = build_model(in_dim, num_classes, model, codebook, dropout=dropout, **options)

    def forward(
        self, x: Tensor, return_WSI_attn: bool = False, return_WSI_feature: bool = False
    ) -> dict[str, Tensor]:
        """A bag x [1, N, D] or [N, D] -> logits [1, C], and on request WSI_attn [N, 1], WSI_feature [1, width].

        Raises:
            ValueError: several bags, or another shape.
        """
        bag = x[0] if x.dim() == 3 and len(x) == 1 else x
        if bag.dim() != 2:
            raise ValueError(f"ResidualBaseline: x must be one bag [1, N, D] or [N, D], got {tuple(x.shape)}")
        feature = self.mil.embed(bag)
        found = {"logits": self.mil.classifier(feature)}
        if return_WSI_feature:
            found["WSI_feature"] = feature
        if return_WSI_attn:
            found["WSI_attn"] = self.mil.contributions(bag)[:, None]
        return found
