"""Slides that could not be read in an epoch: said, counted, and too many of them end the run."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from dre_fast.train.batches import Batch
from dre_fast.train.config import DataConfig
from dre_fast.train.distributed import Group


class Failures:
    """What a run with ``data.on_error=skip`` left out.

    Args:
        data: ``on_error``, ``max_failing``.
        group: the processes of the run.
    """

    def __init__(self, data: DataConfig, group: Group) -> None:
        self.data, self.group = data, group
        self._epoch: list[str] = []

    def note(self, batch: Batch) -> None:
        """Count the slides that were left out of a batch, with a warning for each."""
        for error in batch.failed:
            warnings.warn(f"left out of this step: {error}", stacklevel=2)
            self._epoch.append(str(error))

    def of_epoch(self, visits: int) -> dict[str, Any]:
        """At the end of an epoch of so many visits: ``skipped_slides`` for the log; {} unless slides may be skipped.

        Raises:
            OSError: more of them failed than ``data.max_failing``; names one.
        """
        if self.data.on_error == "stop":
            return {}
        errors = [error for part in self.group.everyones(self._epoch) for error in part]
        self._epoch = []
        if len(errors) > self.data.max_failing * visits:
            raise OSError(
                f"{len(errors)} of {visits} slides could not be read in this epoch, more than data.max_failing="
                f"{self.data.max_failing:g} of them; the last checkpoint is intact. The first: {errors[0]}"
            )
        if errors and self.group.first:
            print(
                f"{len(errors)} of {visits} slides left out: {'; '.join(dict.fromkeys(errors))}",
                file=sys.stderr,
            )
        return {"skipped_slides": len(errors)}

    def state_dict(self) -> list[str]:
        """The errors of the epoch so far in this process."""
        return self._epoch

    def load_state_dict(self, state: list[str]) -> None:
        """Take over what :meth:`state_dict` gave in all processes; the first one counts it."""
        self._epoch = list(state) if self.group.first else []
