"""Survival losses of the slide heads: Cox's partial likelihood and hazards in discrete time, censoring included.

A sample is a time and whether the event happened then (1), or it was last seen then without it (0, censored). A higher
risk score means an earlier event.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cox_loss(risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Negative log partial likelihood of Cox's proportional hazards, divided by the number of events.

    With D_t the samples whose event is at t, d_t of them, and R_t those whose time is >= t, it is

        1/E sum_t [ sum_{l=0}^{d_t-1} log(sum_{R_t} exp(r) - l/d_t sum_{D_t} exp(r)) - sum_{D_t} r ]

    which is the partial likelihood of Cox (1972) where every event has a time of its own, and the approximation of
    Efron (JASA 1977) for tied ones. Only the samples given are compared with one another. It takes memory for
    (distinct event times) x B numbers, and is the same in every run.

    Args:
        risk: log hazard ratios [B], any float dtype, computed in fp32 (float64 for float64).
        time: [B], >= 0. event: [B], bool or 1/0.

    Returns:
        0-d, fp32 or float64; zero, with a graph, when no sample has an event.

    Raises:
        ValueError: shapes that differ.
    """
    _check(risk, time, event, dims=1)
    risk = _wide(risk)
    risk = risk - risk.detach().sum() / max(len(risk), 1)  # the loss is the same, its rounding error smaller
    event = event.bool()
    moments = time[event].unique()[:, None]  # [U, 1]
    dies = event & (time == moments)  # D_t, [U, B]
    log_dying = risk.masked_fill(~dies, -torch.inf).logsumexp(1, keepdim=True)
    log_at_risk = risk.masked_fill(time < moments, -torch.inf).logsumexp(1, keepdim=True)
    deaths = dies.sum(1, keepdim=True)
    l = torch.arange(int(deaths.max()) if len(deaths) else 0, device=risk.device)
    beyond = l >= deaths  # [U, most deaths of a time]
    part = (l.to(risk.dtype) / deaths).masked_fill(beyond, 0.0)
    terms = log_at_risk + torch.log1p(-part * torch.exp(log_dying - log_at_risk))
    return (terms.masked_fill(beyond, 0.0).sum() - risk[event].sum()) / deaths.sum().clamp(min=1)


def hazard_edges(times: Tensor, events: Tensor, bins: int) -> list[float]:
    """The bins - 1 inner edges at quantiles of the uncensored times, so that each bin holds as many events.

    Args:
        times: [S], NaN = missing. events: [S], 1/0, of the training set.
        bins: number of intervals, the first from 0 and the last without end.

    Returns:
        Ascending edges; interval k is [edge_{k-1}, edge_k).

    Raises:
        ValueError: ``bins`` < 2, or too few distinct event times for an event in each.
    """
    if bins < 2:
        raise ValueError(f"hazard_edges: needs at least 2 bins, got {bins}")
    uncensored = times[(events == 1) & ~torch.isnan(times)].double()
    where = torch.arange(1, bins, dtype=torch.float64, device=times.device) / bins
    edges = uncensored.quantile(where) if len(uncensored) else where
    held = torch.bucketize(uncensored, edges, right=True).bincount(minlength=bins)
    if (held == 0).any():
        raise ValueError(
            f"{len(uncensored.unique())} distinct event times are too few for {bins} bins of about as many events "
            "each; ask for fewer bins"
        )
    return edges.tolist()  # type: ignore[no-any-return]


def hazard_loss(logits: Tensor, time: Tensor, event: Tensor, edges: Sequence[float]) -> Tensor:
    """Mean negative log likelihood of a discrete-time model, one hazard an interval.

    h_k = sigmoid(logit_k) is the probability of the event in interval k of those who reach it. A sample whose event is
    in interval k contributes log h_k + sum_{j<k} log(1 - h_j) (Gensheimer & Narasimhan, PeerJ 2019); one
    censored there sum_{j<=k} log(1 - h_j), that is, it counts as having outlived the interval, as in Zadeh & Schmid
    (TPAMI 2020, the uncensored and censored terms weighted alike) and the pathology models that follow them.
    (Gensheimer and Narasimhan count it only when it was seen past the middle of the interval.)

    Args:
        logits: [B, bins], any float dtype, computed in fp32 (float64 for float64).
        time: [B], >= 0. event: [B], bool or 1/0.
        edges: bins - 1 ascending edges, see :func:`hazard_edges`.

    Returns:
        0-d, fp32 or float64; zero, with a graph, for B = 0.

    Raises:
        ValueError: shapes that differ, or edges that are not one fewer than the logits of a sample.
    """
    _check(logits, time, event, dims=2)
    if len(edges) + 1 != logits.shape[1]:
        raise ValueError(
            f"hazard_loss: {logits.shape[1]} logits a sample need as many bins, got edges {edges}"
        )
    logits = _wide(logits)
    bounds = torch.tensor(list(edges), dtype=torch.float64, device=time.device)
    own = torch.bucketize(time.double(), bounds, right=True)[:, None]
    interval = torch.arange(logits.shape[1], device=logits.device)
    happened = ((interval == own) & event.bool()[:, None]).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, happened, reduction="none")
    return losses.masked_fill(interval > own, 0.0).sum() / max(len(logits), 1)


def survival_probabilities(logits: Tensor) -> Tensor:
    """S_k = prod_{j<=k} (1 - h_j), the probability of outliving interval k: [B, bins] from logits [B, bins]."""
    return F.logsigmoid(-_wide(logits)).cumsum(1).exp()


def risk_score(method: str, logits: Tensor) -> Tensor:
    """What a survival head says of the order of events, [B]: a higher score, an earlier event.

    Args:
        method: ``"cox"``: the logit of [B, 1] itself. ``"hazard"``: minus the sum over the intervals of the probability
            of outliving each, from [B, bins] (Zadeh & Schmid 2020).
    """
    return _wide(logits)[:, 0] if method == "cox" else -survival_probabilities(logits).sum(1)


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _check(scores: Tensor, time: Tensor, event: Tensor, dims: int) -> None:
    if scores.dim() != dims or time.shape != scores.shape[:1] or event.shape != scores.shape[:1]:
        raise ValueError(
            f"survival loss: expected scores with {dims} dimension(s) and as many times and events, got "
            f"{tuple(scores.shape)}, {tuple(time.shape)} and {tuple(event.shape)}"
        )
