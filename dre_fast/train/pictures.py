"""Pictures in a run's folder, drawn while it trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dre_fast.train import state as on_disk

_PAUSE = 60.0  # seconds between two drawings


class Pictures:
    """Draws curves.png and staleness.png from a run's log, now and then, and writes its report at the end.

    Args:
        out: folder of the run.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._next = time.monotonic() + _PAUSE

    def draw(self, statistics: dict[str, Any], *, last: bool) -> None:
        """Draw, unless it was done within the last minute; ``last``: in any case.

        Args:
            statistics: of the bank.
        """
        if not last and time.monotonic() < self._next:
            return
        from dre_fast.eval.plots import draw_curves, draw_staleness

        log = on_disk.read_metrics(self.out / on_disk.METRICS)
        draw_curves(self.out / "curves.png", {self.out.name: log})
        draw_staleness(self.out / "staleness.png", log, statistics=statistics)
        self._next = time.monotonic() + _PAUSE

    def report(self) -> None:
        """Write report.html, the page of `dre-fast report` without slides."""
        from dre_fast.eval.run_report import write_report

        write_report(self.out)
