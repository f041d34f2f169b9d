"""ResidualMIL as a model of MIL-Lab, which is not imported."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dre_fast.integrations.build import CodebookFile, build_model
from dre_fast.nn.residual_mil import ResidualMIL


class ResidualMILLab(nn.Module):
    """Called and answering as MIL-Lab's models; masks are 1 where valid.

    Attention becomes contributions to the largest logit (:meth:`~dre_fast.ResidualMIL.contributions`): signed, 0 where
    masked, not made for a softmax.

    Args:
        in_dim: D of the features. embed_dim: width of the slide features. num_classes: C. dropout: in the head.
        codebook: file of :func:`~dre_fast.integrations.build.save_codebook`. model: an existing model.
        options: of a new :class:`~dre_fast.ResidualMIL`: codewords, assignment, head, ...
    """

    def __init__(
        self,
        in_dim: int = 1024,
        embed_dim: int = 256,
        num_classes: int = 2,
        dropout: float = 0.0,
        *,
        codebook: CodebookFile | None = None,
        model: ResidualMIL | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        options = {"width": embed_dim, "dropout": dropout, **options}
        self.mil = build_model(in_dim, num_classes, model, codebook, **options)
        self.in_dim, self.embed_dim, self.num_classes = in_dim, self.mil.width, num_classes

    def forward_attention(self, h: Tensor, attn_mask: Tensor | None = None, attn_only: bool = True) -> Any:
        """Tiles h [B, M, D] or [M, D] -> contributions [B, 1, M]; without ``attn_only`` the tiles [B, M, D] before it."""
        h, mask = _batched(h, attn_mask)
        scores = self.mil.contributions(h, mask=mask)[:, None]
        return scores if attn_only else (h, scores)

    def forward_features(
        self, h: Tensor, attn_mask: Tensor | None = None, return_attention: bool = False
    ) -> tuple[Tensor, dict[str, Any]]:
        """Slide features [B, embed_dim], and {"attention": [B, 1, M], or None}."""
        batch, mask = _batched(h, attn_mask)
        attention = self.forward_attention(h, attn_mask) if return_attention else None
        return self.mil.embed(batch, mask=mask), {"attention": attention}

    def forward_head(self, h: Tensor) -> Tensor:
        """Slide features [B, embed_dim] -> logits [B, C]."""
        return self.mil.classifier(h)  # type: ignore[no-any-return]

    def forward(
        self,
        h: Tensor,
        loss_fn: nn.Module | None = None,
        label: Tensor | None = None,
        attn_mask: Tensor | None = None,
        return_attention: bool = False,
        return_slide_feats: bool = False,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tiles h [B, M, D] -> ({"logits" [B, C], "loss" 0-d or None}, log_dict).

        Args:
            loss_fn: of logits and label. attn_mask: [B, M], nonzero = valid.
            return_attention, return_slide_feats: put "attention" [B, 1, M] and "slide_feats" [B, embed_dim] into
                log_dict, which also holds "loss" as a number, -1 without one.
        """
        features, log = self.forward_features(h, attn_mask, return_attention)
        logits = self.forward_head(features)
        loss = None if loss_fn is None else loss_fn(logits, label)
        log["loss"] = -1 if loss is None else loss.item()
        if return_slide_feats:
            log["slide_feats"] = features
        return {"logits": logits, "loss": loss}, log

    def initialize_classifier(self, num_classes: int | None = None) -> None:
        """A new last layer, for ``num_classes`` classes or as many as before."""
        self.num_classes = self.num_classes if num_classes is None else num_classes
        self.mil.reset_classifier(self.num_classes)


def _batched(h: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    h = h[None] if h.dim() == 2 else h
    return h, None if attn_mask is None else attn_mask.bool().reshape(h.shape[:2])
