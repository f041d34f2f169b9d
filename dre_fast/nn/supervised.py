"""Supervised losses of the slide heads, with missing labels left out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def supervised_loss(kind: str, logits: Tensor, target: Tensor) -> Tensor:
    """Mean loss over the labels that are there; zero, with a graph, when the batch has none.

    Args:
        kind: ``"multiclass"``: cross-entropy, logits [B, C], target int64 [B], -1 = missing.
            ``"binary"`` | ``"multilabel"``: binary cross-entropy per column, logits [B, L], target float [B, L] or
            [B] in {0, 1}, NaN = missing.

    Raises:
        ValueError: unknown ``kind``.
    """
    logits = logits.float()
    if kind == "multiclass":
        labelled = target >= 0
        losses = F.cross_entropy(logits, target.clamp(min=0), reduction="none")
    elif kind in ("binary", "multilabel"):
        target = target.reshape(logits.shape).to(logits.dtype)
        labelled = ~torch.isnan(target)
        losses = F.binary_cross_entropy_with_logits(logits, torch.nan_to_num(target), reduction="none")
    else:
        raise ValueError(f"supervised_loss: kind must be multiclass, binary or multilabel, got {kind!r}")
    return (losses * labelled).sum() / labelled.sum().clamp(min=1)
