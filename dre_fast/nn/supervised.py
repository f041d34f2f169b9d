"""Supervised losses of the slide heads, with missing labels left out, and weights against class imbalance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dre_fast.nn.survival import cox_loss, hazard_loss

KINDS = ("multiclass", "binary", "multilabel", "survival")
BETA = 0.999  # of the effective number of samples


def supervised_loss(
    kind: str,
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    method: str = "cox",
    edges: Sequence[float] = (),
) -> Tensor:
    """Mean loss over the labels that are there; zero, with a graph, when the batch has none.

    Args:
        kind: ``"multiclass"``: cross-entropy, logits [B, C], target int64 [B] in 0 .. C-1, -1 = missing.
            ``"binary"`` | ``"multilabel"``: binary cross-entropy per column, logits [B, L], target float [B, L], or
            [B] where L = 1, in {0, 1}, NaN = missing. ``"survival"``: logits [B, 1] or [B, bins], target float [B, 2],
            time and event, both NaN = missing.
        logits: any float dtype, computed in fp32 (float64 for float64).
        weight: from :func:`class_weights`. Multiclass: [C], of each class; the mean is then that of torch's
            cross_entropy, over the weights of the labels. Binary and multilabel: [L], on the positive labels.
        method: survival: ``"cox"``, :func:`~dre_fast.nn.survival.cox_loss` among the slides given (a mean over events),
            or ``"hazard"``, :func:`~dre_fast.nn.survival.hazard_loss`.
        edges: of the hazards.

    Returns:
        0-d, fp32 or float64: the mean over all labels that are there.

    Raises:
        ValueError: unknown ``kind`` or ``method``, weights for a survival task, or a target or weights whose shape does
            not fit the logits.
    """
    if kind not in KINDS:
        raise ValueError(f"supervised_loss: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    _check_shapes(kind, logits, target, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weight = None if weight is None else weight.to(logits)
    if kind == "survival":
        return _survival_loss(logits, target, method, edges)
    if kind == "multiclass":
        labelled = (target >= 0).to(logits.dtype)
        known = target.clamp(min=0)
        losses = F.cross_entropy(logits, known, reduction="none")
        share = labelled if weight is None else labelled * weight[known]
    else:
        target = target.reshape(logits.shape).to(logits.dtype)
        share = (~torch.isnan(target)).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(
            logits, torch.nan_to_num(target), pos_weight=weight, reduction="none"
        )
    total = share.sum()
    return (losses * share).sum() / torch.where(total > 0, total, 1.0)


def compares_slides(kind: str, method: str) -> bool:
    """Whether the loss of a task is one of slides together, and none of a slide by itself: Cox's."""
    return kind == "survival" and method == "cox"


def class_weights(kind: str, target: Tensor, outputs: int, balance: str) -> Tensor | None:
    """Weights that make rare classes count as much as common ones, from the labels of the training slides.

    A class of n slides weighs 1/n (``"inverse"``) or (1 - beta)/(1 - beta^n) with beta = 0.999 (``"effective"``: the
    effective number of samples of Cui et al., CVPR 2019). A class that no slide has weighs 1, as the mean class.

    Args:
        kind: multiclass, binary or multilabel.
        target: as in :func:`supervised_loss`; missing labels do not count.
        outputs: number of logits.
        balance: none, inverse or effective.

    Returns:
        fp32. Multiclass: [C], on average 1 over the classes there are. Binary and multilabel: [L], the weight of the
        positive labels of a column over that of its negative ones; 1 where it has only one of them. None for
        ``"none"``.

    Raises:
        ValueError: unknown ``balance``, or one for a survival task, which has no classes.
    """
    if balance not in ("none", "inverse", "effective"):
        raise ValueError(f"class_weights: balance must be none, inverse or effective, got {balance!r}")
    if balance == "none":
        return None
    if kind not in ("multiclass", "binary", "multilabel"):
        raise ValueError(f"class_weights: a {kind} task has no classes to balance")
    if kind == "multiclass":
        counts = target[target >= 0].bincount(minlength=outputs)
        raw = _of_count(counts, balance)
        return torch.where(counts > 0, raw / raw[counts > 0].mean(), 1.0).float()
    columns = target.reshape(-1, outputs)
    positive, negative = (columns == 1).sum(0), (columns == 0).sum(0)
    ratio = _of_count(positive, balance) / _of_count(negative, balance)
    return torch.where((positive > 0) & (negative > 0), ratio, 1.0).float()


def _of_count(n: Tensor, balance: str) -> Tensor:
    """Unscaled float64 weight of classes of n labels; that of n = 0 is not used."""
    n = n.double().clamp(min=1)
    return 1 / n if balance == "inverse" else (1 - BETA) / (1 - BETA**n)


def _survival_loss(logits: Tensor, target: Tensor, method: str, edges: Sequence[float]) -> Tensor:
    there = ~torch.isnan(target).any(1)
    logits, (time, event) = logits[there], target[there].unbind(1)
    if method == "cox":
        if logits.shape[1] != 1:
            raise ValueError(f"supervised_loss: a Cox head has one logit, got {logits.shape[1]}")
        return cox_loss(logits[:, 0], time, event)
    if method == "hazard":
        return hazard_loss(logits, time, event, edges)
    raise ValueError(f"supervised_loss: method must be cox or hazard, got {method!r}")


def _check_shapes(kind: str, logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    shapes: list[tuple[int, ...]] = [tuple(logits.shape)]
    if kind == "multiclass":
        shapes = [tuple(logits.shape[:1])]
    elif kind == "survival":
        shapes = [(*logits.shape[:1], 2)]
    elif logits.shape[1:] == (1,):
        shapes.append(tuple(logits.shape[:1]))
    if logits.dim() != 2 or tuple(target.shape) not in shapes:
        raise ValueError(
            f"supervised_loss: {kind} target {tuple(target.shape)} does not fit logits {tuple(logits.shape)}"
        )
    if weight is not None and (kind == "survival" or weight.shape != logits.shape[1:]):
        raise ValueError(
            f"supervised_loss: weights {tuple(weight.shape)} do not fit a {kind} task with "
            f"{logits.shape[1]} logits"
        )
