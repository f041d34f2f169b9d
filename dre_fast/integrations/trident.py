"""ResidualMIL as a slide encoder of TRIDENT, which is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dre_fast.nn.residual_mil import ResidualMIL


class ResidualSlideEncoder(nn.Module):
    """Called as TRIDENT calls its slide encoders, with the attributes of its CustomSlideEncoder.

    TRIDENT passes ``(batch, device)``, while the forward of CustomSlideEncoder takes the batch alone; so this is a module
    of its own. Gives the embedding before the classifier; neither coordinates nor attributes enter it.

    Args:
        model: fitted, and trained or not: :class:`~dre_fast.ResidualMIL`.
        enc_name: TRIDENT's name for it; features go to ``slide_features_{enc_name}``.
        precision: float32, or the dtype TRIDENT's autocast is switched on for.
    """

    def __init__(
        self, model: ResidualMIL, enc_name: str = "residual_mil", precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.model, self.enc_name, self.precision = model, enc_name, precision
        self.embedding_dim = model.width

    def forward(self, batch: Mapping[str, Any], device: torch.device | str = "cuda") -> Tensor:
        """``batch["features"]`` [N, D] or [1, N, D] -> embedding [width].

        Raises:
            ValueError: features of several slides, or another shape.
        """
        features = batch["features"]
        if features.dim() == 3 and len(features) == 1:
            features = features[0]
        if features.dim() != 2:
            raise ValueError(
                "ResidualSlideEncoder: features must be those of one slide, [N, D] or [1, N, D], "
                f"got {tuple(features.shape)}"
            )
        return self.model.embed(features.to(device))[0]
