"""Supervised losses of the slide heads, with missing labels left out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def supervised_loss(kind: str, logits: Tensor, target: Tensor) -> Tensor:
    """Mean loss over the labels that are there; zero, with a graph, when the batch has none.

    Args:
        kind: ``"multiclass"``: cross-entropy, logits [B, C], target int64 [B] in 0 .. C-1, -1 = missing.
            ``"binary"`` | ``"multilabel"``: binary cross-entropy per column, logits [B, L], target float [B, L], or
            [B] where L = 1, in {0, 1}, NaN = missing.
        logits: any float dtype, computed in fp32 (float64 for float64).

    Returns:
        0-d, fp32 or float64: the mean over all labels that are there.

    Raises:
        ValueError: unknown ``kind``, or a target whose shape does not fit the logits.
    """
    if kind not in ("multiclass", "binary", "multilabel"):
        raise ValueError(f"supervised_loss: kind must be multiclass, binary or multilabel, got {kind!r}")
    fits = {logits.shape[:1]} if kind == "multiclass" else {logits.shape}
    if kind != "multiclass" and logits.dim() == 2 and logits.shape[1] == 1:
        fits.add(logits.shape[:1])
    if logits.dim() != 2 or target.shape not in fits:
        raise ValueError(
            f"supervised_loss: {kind} target {tuple(target.shape)} does not fit logits {tuple(logits.shape)}"
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if kind == "multiclass":
        labelled = target >= 0
        losses = F.cross_entropy(logits, target.clamp(min=0), reduction="none")
    else:
        target = target.reshape(logits.shape).to(logits.dtype)
        labelled = ~torch.isnan(target)
        losses = F.binary_cross_entropy_with_logits(logits, torch.nan_to_num(target), reduction="none")
    return (losses * labelled).sum() / labelled.sum().clamp(min=1)
