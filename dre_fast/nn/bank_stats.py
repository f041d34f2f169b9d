"""How fresh a memory bank is: ages and drift, overall and per slide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

QUANTILES = {"q50": 0.5, "q90": 0.9, "q99": 0.99, "max": 1.0}
BINS = 32


@dataclass(frozen=True)
class Freshness:
    """Measured on the bank's device, not waited for; :meth:`read` brings it to the host.

    Counts and sums of a slide, int64 [S]: rows, written, refreshed (written after ``fill_step``), sum and maximum of
    ages. Histograms int64 [S, 32] of the ages of written rows and the drift of refreshed ones, and their edges
    fp32 [33]. Drift quantiles fp32 [4, S] and [4] overall (the lower of two neighbours), and its mean.
    """

    step: int
    rows: Tensor
    written: Tensor
    refreshed: Tensor
    age_sum: Tensor
    age_max: Tensor
    age_edges: Tensor
    age_histogram: Tensor
    drift_edges: Tensor
    drift_histogram: Tensor
    slide_drift: Tensor
    drift: Tensor
    drift_mean: Tensor

    def read(self) -> dict[str, Any]:
        """What :meth:`dre_fast.MemoryBank.statistics` describes; waits for the device."""
        host = {name: v.cpu() for name, v in vars(self).items() if isinstance(v, Tensor)}
        rows, written, refreshed = host["rows"], host["written"], host["refreshed"]
        total, done, fresh = int(rows.sum()), int(written.sum()), int(refreshed.sum())
        n = rows.double()  # 0 / 0 is NaN: a slide that was removed
        return {
            "step": self.step,
            "rows": total,
            "written": done,
            "never_written": 1 - done / total if total else 0.0,
            "never_refreshed": 1 - fresh / total if total else 0.0,
            "age_mean": int(host["age_sum"].sum()) / done if done else None,
            "age_max": int(host["age_max"].max()) if done else None,
            "drift_mean": float(host["drift_mean"]) if fresh else None,
            "drift": {name: float(q) if fresh else None for name, q in zip(QUANTILES, host["drift"])},
            "age_histogram": {"edges": host["age_edges"], "rows": host["age_histogram"].sum(0)},
            "drift_histogram": {"edges": host["drift_edges"], "rows": host["drift_histogram"].sum(0)},
            "per_slide": {
                "rows": rows,
                "never_written": (1 - written / n).float(),
                "never_refreshed": (1 - refreshed / n).float(),
                "age_mean": (host["age_sum"] / written.double()).float(),
                "age_max": host["age_max"],
                "drift": dict(zip(QUANTILES, host["slide_drift"])),
                "age_histogram": host["age_histogram"],
                "drift_histogram": host["drift_histogram"],
            },
        }


def measure(
    age: Tensor, drift: Tensor, start: Tensor, length: Tensor, step: int, fill_step: int = 0
) -> Freshness:
    """Age and drift of the rows of a bank, without waiting for its device: no shape here depends on the data.

    Args:
        age: int32 [R]; drift: fp32 [R]; start, length: int64 [S]: the bank's tables.
        step, fill_step: see :meth:`dre_fast.MemoryBank.statistics`.
    """
    s, device = length.shape[0], age.device
    slide, inside = _slides(start, length, age.shape[0])
    written, refreshed = inside & (age >= 0), inside & (age > fill_step)

    def per_slide(values: Tensor, of: Tensor) -> Tensor:
        """Integers, so that the order of addition does not show."""
        return values.new_zeros(s + 1).index_add_(0, torch.where(of, slide, s), values)[:s]

    def histogram(values: Tensor, of: Tensor, edges: Tensor) -> Tensor:
        bin_ = (torch.bucketize(values, edges, right=True) - 1).clamp(0, BINS - 1)
        cell = torch.where(of, slide, s) * BINS + bin_
        counts = torch.zeros((s + 1) * BINS, dtype=torch.int64, device=device)
        return counts.index_add_(0, cell, torch.ones_like(cell)).view(s + 1, BINS)[:s]

    ages = (step - age.to(torch.int64)).clamp(min=0)
    ones = torch.ones_like(ages)
    oldest = torch.full((s + 1,), -1, dtype=torch.int64, device=device)
    oldest.scatter_reduce_(0, torch.where(written, slide, s), ages, "amax")
    age_edges = torch.linspace(0, max(step, 1), BINS + 1, device=device)
    drift_edges = torch.logspace(-8, 0.30103, BINS + 1, device=device)

    # rows in order of (slide, drift), those that count first: any quantile of any slide is then one look-up
    n_fresh = per_slide(ones, refreshed)
    moved, order = torch.where(refreshed, drift, torch.inf).sort(stable=True)
    grouped = moved[torch.where(refreshed, slide, s)[order].sort(stable=True).indices]
    first, all_fresh = n_fresh.cumsum(0) - n_fresh, n_fresh.sum()[None]
    quantiles = QUANTILES.values()
    return Freshness(
        step=step,
        rows=length.clone(),  # a slide may be removed before this is read
        written=per_slide(ones, written),
        refreshed=n_fresh,
        age_sum=per_slide(ages, written),
        age_max=oldest[:s],
        age_edges=age_edges,
        age_histogram=histogram(ages.float(), written, age_edges),
        drift_edges=drift_edges,
        drift_histogram=histogram(drift, refreshed, drift_edges),
        slide_drift=torch.stack([_at(grouped, first, n_fresh, q) for q in quantiles]),
        drift=torch.cat([_at(moved, torch.zeros_like(all_fresh), all_fresh, q) for q in quantiles]),
        drift_mean=torch.where(refreshed, drift.double(), 0.0).sum() / all_fresh[0],
    )


def _slides(start: Tensor, length: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The slide of each row, int64 [rows], and whether it has one, bool [rows]: there are gaps."""
    row = torch.arange(rows, device=start.device)
    if start.shape[0] == 0:
        return torch.zeros_like(row), torch.zeros_like(row, dtype=torch.bool)
    first, order = torch.where(length > 0, start, rows).sort()  # removed slides last
    at = torch.searchsorted(first, row, right=True) - 1
    slide = order[at.clamp(min=0)]
    return slide, (at >= 0) & (row - start[slide] < length[slide])


def _at(ordered: Tensor, first: Tensor, count: Tensor, q: float) -> Tensor:
    """Quantile q (the lower of two neighbours) of the ascending groups ordered[first : first + count]; NaN of none."""
    if ordered.shape[0] == 0:
        return torch.full(first.shape, torch.nan, device=first.device)
    index = first + ((count - 1).clamp(min=0).double() * q).floor().long()
    return torch.where(count > 0, ordered[index.clamp(max=ordered.shape[0] - 1)], torch.nan)
