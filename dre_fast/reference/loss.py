"""The slide-report losses in plain torch: whole-matrix formulas, and streamed over a cohort.

Embeddings come L2-normalised, in one dtype (fp32 or float64). Cases are int64: a slide and a report of one
case are a positive pair, every other pair of slide and report is a negative one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from dre_fast.reference.encode import full_precision


def same_case(slide_cases: Tensor, report_cases: Tensor) -> Tensor:
    """bool [B, M]: slide i and report j belong to one case."""
    return slide_cases[:, None] == report_cases[None, :]


def cross_entropy_rows(logits: Tensor, positive: Tensor) -> Tensor:
    """Cross entropy of each row to the uniform distribution over its positives, [B].

    -1/|P_i| sum over j in P_i of log softmax_j(z_ij), as logsumexp_j z_ij - mean over P_i of z_ij.
    """
    share = positive.to(logits.dtype)  # a bool divided by an int would be fp32 whatever the logits are
    share = share / reduce(share, "b m -> b 1", "sum")
    return logits.logsumexp(dim=1) - reduce(share * logits, "b m -> b", "sum")


def info_nce(
    slides: Tensor,
    reports: Tensor,
    cases: Tensor,
    scale: Tensor,
    cohort: Tensor | None = None,
    cohort_cases: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE with case-aware positives.

    L = (mean_i H(slide i -> reports) + mean_j H(report j -> slides)) / 2, where H is the cross entropy to the
    uniform distribution over the positives. Slide -> report runs over the batch's reports or, with
    ``cohort``, over all of them; report -> slide always over the batch's slides.

    Args:
        slides: [B, T].
        reports: [B, T]; row i is the report of slide i (slides of one case repeat it).
        cases: int64 [B].
        scale: 0-d, the inverse temperature.
        cohort: [M, T] every report of the cohort, and ``cohort_cases`` int64 [M].

    Returns:
        0-d. With p_i positives H is at least log p_i, reached when their logits are equal and all others
        lower: so the loss of a batch of one case is log B at best, and its gradient only pulls the B slides
            together.

    Source: CLIP, Radford et al. 2021 (symmetric InfoNCE); DRE-SLCL, arXiv 2511.05034 (slide-level contrast).
    """
    with full_precision(slides):
        logits = scale * slides @ reports.T
        positive = same_case(cases, cases)
        to_slides = cross_entropy_rows(logits.T, positive).mean()
        if cohort is None or cohort_cases is None:
            to_reports = cross_entropy_rows(logits, positive).mean()
        else:
            whole = scale * slides @ cohort.T
            to_reports = cross_entropy_rows(whole, same_case(cases, cohort_cases)).mean()
    return (to_reports + to_slides) / 2


def siglip(
    slides: Tensor, reports: Tensor, cases: Tensor, report_cases: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """Sigmoid loss: L = -1/B sum_ij log sigmoid(y_ij (scale x_i.r_j + bias)), y = 1 for one case, else -1.

    Args:
        slides: [B, T]. reports: [M, T], of the batch or of the cohort.
        cases: int64 [B]. report_cases: int64 [M].
        scale, bias: 0-d.

    Source: SigLIP, Zhai et al. 2023, eq. 1.
    """
    with full_precision(slides):
        logits = scale * slides @ reports.T + bias
        sign = torch.where(same_case(cases, report_cases), 1.0, -1.0).to(logits.dtype)
        return -F.logsigmoid(sign * logits).sum() / len(slides)


# -------------------------------------------------------------------------------------- streamed over reports


def info_nce_rows(
    slides: Tensor, reports: Tensor, slide_cases: Tensor, report_cases: Tensor, scale: Tensor, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`cross_entropy_rows` of scale * slides @ reports^T, ``tile`` reports at a time.

    The log-sum-exp runs on: (m, l) -> (m', l exp(m - m') + sum exp(z - m')) with m' = max(m, max z). Nothing
    larger than B x tile is formed.

    Returns:
        loss [B] (NaN for a slide without a positive), logsumexp [B], and the number of positives [B] (int64).
    """
    highest = torch.full_like(slides[:, 0], -torch.inf)
    total = torch.zeros_like(highest)
    positive_sum = torch.zeros_like(highest)
    positives = torch.zeros_like(slide_cases)
    with full_precision(slides):
        for part, cases in zip(reports.split(tile), report_cases.split(tile)):
            logits = scale * (slides @ part.to(slides.dtype).T)
            positive = same_case(slide_cases, cases)
            positive_sum += torch.where(positive, logits, 0.0).sum(dim=1)
            positives += positive.sum(dim=1)
            higher = torch.maximum(highest, logits.amax(dim=1))
            total = total * (highest - higher).exp() + (logits - higher[:, None]).exp().sum(dim=1)
            highest = higher
    lse = highest + total.log()
    return lse - positive_sum / positives, lse, positives


def info_nce_rows_backward(
    grad: Tensor,
    slides: Tensor,
    reports: Tensor,
    slide_cases: Tensor,
    report_cases: Tensor,
    scale: Tensor,
    lse: Tensor,
    positives: Tensor,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows' loss to slides [B, T] and scale (0-d); the logits are formed again.

    dL_i/dz_ij = softmax_j(z_ij) - [j positive]/|P_i|. Reports are frozen and get none.
    """
    d_slides, d_scale = torch.zeros_like(slides), torch.zeros_like(scale)
    with full_precision(slides):
        for part, cases in zip(reports.split(tile), report_cases.split(tile)):
            part = part.to(slides.dtype)
            cosine = slides @ part.T
            share = same_case(slide_cases, cases).to(slides.dtype) / positives[:, None]
            d_logits = grad[:, None] * ((scale * cosine - lse[:, None]).exp() - share)
            d_slides += d_logits @ part
            d_scale += (d_logits * cosine).sum()
    return d_slides * scale, d_scale


def siglip_rows(
    slides: Tensor,
    reports: Tensor,
    slide_cases: Tensor,
    report_cases: Tensor,
    scale: Tensor,
    bias: Tensor,
    tile: int,
) -> Tensor:
    """Each slide's sum of -log sigmoid(y_ij (scale x_i.r_j + bias)) over the reports, [B], tile by tile."""
    loss = torch.zeros_like(slides[:, 0])
    with full_precision(slides):
        for part, cases in zip(reports.split(tile), report_cases.split(tile)):
            logits = scale * (slides @ part.to(slides.dtype).T) + bias
            loss += F.softplus(torch.where(same_case(slide_cases, cases), -logits, logits)).sum(dim=1)
    return loss


def siglip_rows_backward(
    grad: Tensor,
    slides: Tensor,
    reports: Tensor,
    slide_cases: Tensor,
    report_cases: Tensor,
    scale: Tensor,
    bias: Tensor,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`siglip_rows` to slides, scale and bias: dL_i/dz_ij = sigmoid(z_ij) - [one case]."""
    d_slides, d_scale, d_bias = torch.zeros_like(slides), torch.zeros_like(scale), torch.zeros_like(bias)
    with full_precision(slides):
        for part, cases in zip(reports.split(tile), report_cases.split(tile)):
            part = part.to(slides.dtype)
            cosine = slides @ part.T
            same = same_case(slide_cases, cases).to(slides.dtype)
            d_logits = grad[:, None] * ((scale * cosine + bias).sigmoid() - same)
            d_slides += d_logits @ part
            d_scale += (d_logits * cosine).sum()
            d_bias += d_logits.sum()
    return d_slides * scale, d_scale, d_bias
