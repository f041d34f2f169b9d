"""What the log says of a bank's age and drift, over all processes."""

from __future__ import annotations

from typing import Any

from dre_fast.train.distributed import Group

Scalars = dict[str, float | int | str | None]


def freshness(statistics: dict[str, Any], group: Group) -> Scalars:
    """The scalars of :meth:`dre_fast.MemoryBank.statistics`, over the banks of all processes.

    Shares and means are those of all rows and ``age_max`` is the largest. Quantiles of drift are the means of each
    bank's, weighted by its rows: slides are dealt at random, so the banks are alike.
    """
    scalars: Scalars = {
        f"bank_{k}": v for k, v in statistics.items() if v is None or isinstance(v, (int, float))
    }
    scalars |= {f"bank_drift_{k}": v for k, v in statistics["drift"].items()}
    banks = group.everyones(scalars)
    return {name: _joined(name, banks) for name in scalars}


def _joined(name: str, banks: list[Scalars]) -> float | int | None:
    there: list[tuple[Any, Any]] = [(b[name], _weight(name, b)) for b in banks if b[name] is not None]
    values = [value for value, _ in there]
    if len(values) < 2:
        return values[0] if values else None
    if name in ("bank_rows", "bank_written"):
        return sum(values)
    if name in ("bank_age_max", "bank_drift_max", "bank_step"):
        return max(values)
    return sum(value * rows for value, rows in there) / max(sum(rows for _, rows in there), 1)


def _weight(name: str, bank: Any) -> float:
    """The rows of a bank that a value is a mean of."""
    if name.startswith("bank_drift"):
        return bank["bank_rows"] * (1 - bank["bank_never_refreshed"])  # type: ignore[no-any-return]
    return bank["bank_written" if name == "bank_age_mean" else "bank_rows"]  # type: ignore[no-any-return]
