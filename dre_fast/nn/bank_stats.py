"""How fresh a memory bank is: ages and drift, overall and per slide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def freshness(
    age: Tensor,
    drift: Tensor,
    start: Tensor,
    length: Tensor,
    step: int,
    *,
    fill_step: int = 0,
    quantiles: Sequence[float] = (0.5, 0.9, 0.99),
    bins: int = 32,
) -> dict[str, Any]:
    """Age and drift of the rows of a bank; see :meth:`dre_fast.MemoryBank.statistics` for what comes back."""
    s, device = length.shape[0], age.device
    slide = torch.repeat_interleave(torch.arange(s, device=device), length)
    tile = torch.arange(slide.shape[0], device=device) - (length.cumsum(0) - length)[slide]
    row = start[slide] + tile
    stamp = age[row]
    written, refreshed = stamp >= 0, stamp > fill_step

    def per_slide(values: Tensor, of: Tensor) -> Tensor:
        return torch.zeros(s, dtype=torch.float64, device=device).index_add_(
            0, slide[of], values[of].double()
        )

    ages = (step - stamp.to(torch.int64)).clamp(min=0)
    ones = torch.ones_like(ages)
    n_rows, n_written, n_fresh = length.double(), per_slide(ones, written), per_slide(ones, refreshed)
    oldest = torch.full((s,), -1, dtype=torch.int64, device=device)
    oldest.scatter_reduce_(0, slide[written], ages[written], "amax")

    # rows in order of (slide, drift): any quantile of any slide is then one look-up
    moved, bag = drift[row][refreshed], slide[refreshed]
    moved, order = moved.sort(stable=True)
    grouped = moved[bag[order].sort(stable=True).indices]
    first = n_fresh.cumsum(0).long() - n_fresh.long()
    slide_drift = {
        _name(q): _at(grouped, first, n_fresh.long(), q, float("nan")).float().cpu()
        for q in (*quantiles, 1.0)
    }
    fresh = torch.tensor([moved.shape[0]], device=device)
    zero = torch.zeros_like(fresh)
    total, done = int(row.shape[0]), int(written.sum())

    def mean(values: Tensor) -> float | None:
        return float(values.double().mean()) if values.numel() else None

    age_edges = torch.linspace(0, max(step, 1), bins + 1)
    drift_edges = torch.logspace(-8, 0.30103, bins + 1)
    return {
        "step": step,
        "rows": total,
        "written": done,
        "never_written": 1 - done / total if total else 0.0,
        "never_refreshed": 1 - int(refreshed.sum()) / total if total else 0.0,
        "age_mean": mean(ages[written]),
        "age_max": int(oldest.max()) if done else None,
        "drift_mean": mean(moved),
        "drift": {
            _name(q): float(_at(moved, zero, fresh, q, float("nan"))) if moved.numel() else None
            for q in (*quantiles, 1.0)
        },
        "age_histogram": {"edges": age_edges, "rows": _histogram(ages[written], age_edges)},
        "drift_histogram": {"edges": drift_edges, "rows": _histogram(moved, drift_edges)},
        "per_slide": {
            "rows": length.cpu(),
            "never_written": (1 - n_written / n_rows).float().cpu(),
            "never_refreshed": (1 - n_fresh / n_rows).float().cpu(),
            "age_mean": (per_slide(ages, written) / n_written).float().cpu(),
            "age_max": oldest.cpu(),
            "drift": slide_drift,
        },
    }


def _name(q: float) -> str:
    return "max" if q == 1.0 else f"q{q * 100:g}"


def _at(ordered: Tensor, first: Tensor, count: Tensor, q: float, empty: float) -> Tensor:
    """Quantile q (the lower of two neighbours) of the ascending groups ordered[first : first + count]."""
    if ordered.numel() == 0:
        return torch.full(first.shape, empty, device=first.device)
    index = first + ((count - 1).clamp(min=0).double() * q).floor().long()
    return torch.where(count > 0, ordered[index.clamp(max=ordered.shape[0] - 1)], empty)


def _histogram(values: Tensor, edges: Tensor) -> Tensor:
    """Counts int64 [bins]; what lies beyond an end counts to the end bin."""
    bins = edges.shape[0] - 1
    index = torch.bucketize(values.float(), edges.to(values.device), right=True) - 1
    return torch.bincount(index.clamp(0, bins - 1), minlength=bins).cpu()
