"""The drift guard: features must not move faster than the rows of the bank, and the codebook, are renewed.

A row of the bank is as old as its last visit, and an encoder that moves far in the meantime makes the bank a memory of
another encoder; a head and a codebook fitted to the former features are lost as well. The guard keeps some fixed tiles,
encodes them again every few steps as inference would (no augmentation, no dropout), and compares with the features
they had before. In units of the mean distance of a feature to its codeword, so that 1 says "as far as what is encoded",

    moved(a) = sqrt( mean_i |f_i(t) - f_i(t - a)|^2 / mean_i |f_i(t - a) - c_i(t - a)|^2 )     over an age of a steps

may be as large as ``limit * sqrt(a / cycle)``: ``limit`` over a whole refresh cycle, and over less what a random walk
of that reach would cover, so that neither a rush nor a steady march passes. A step counts as the square of the share of
its full rate that the schedule gives it, since that is how far a walk of such steps goes: features that settle with the
head's rate are what a schedule is for, and the guard must not make up for it. The largest ratio of the two over all ages
kept, the load, sets a factor on the encoder's rate: it falls when the load is above 1, and rises slowly to 1 when it is
below. A rush of the past keeps the load above 1 for a while, whatever the encoder does now: while the distance that is
too far grows at most half as fast as its limit the factor stays as it is.

Source: dre_fast's own.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

_KEPT = 64  # snapshots of the tiles' features in one cycle
_RISE, _FALL = 1.2, 0.5  # most that the factor changes at once
_START = 0.02  # first factor: nothing is known yet of how a step moves the features
_FLOOR = 1e-4
_EVERY_STEP = 20  # steps after the encoder begins to move in which it is looked at after each


@dataclass
class _Snapshot:
    """Features of a step, their mean squared distance to the codewords, and what the last look found of them."""

    step: int
    clock: float
    features: Tensor
    spread: float
    far: float = 0.0
    allowed: float = 0.0


class DriftGuard:
    """Watches features and gives the factor on the encoder's rate.

    Args:
        limit: most that features may move in a refresh cycle, in units of their mean distance to the codewords.
        every: steps between two looks.
        cycle: steps in which all rows, or the codebook, are renewed; may change from look to look.

    Attributes:
        factor: on the encoder's rate, in (0, 1].
        load: of the last look; above 1 the features moved too far.
    """

    def __init__(self, limit: float, every: int) -> None:
        self.limit, self.every = limit, every
        self.factor, self.load, self.moved = _START, 0.0, 0.0
        self.began = -1  # the step in which the encoder began to move
        self.clock = 0.0  # steps since then, each by the square of its share of the full rate
        self._kept: deque[_Snapshot] = deque()

    def due(self, step: int, share: float = 1.0) -> bool:
        """Whether the tiles are to be looked at after this step, in which the encoder moved.

        Args:
            share: of the encoder's full rate, as the schedule gave it to this step.
        """
        if self.began < 0:
            self.began = step
        self.clock += share**2
        return step - self.began < _EVERY_STEP or step % self.every == 0

    def look(self, step: int, features: Tensor, spread: float, cycle: float) -> dict[str, float]:
        """Take in the features of the tiles after a step.

        Args:
            step: counted from 0.
            features: fp32 [P, D], of the same tiles each time.
            spread: mean squared distance of these to their codewords.
            cycle: steps of a refresh cycle.

        Returns:
            For the log: ``moved`` over the longest age kept (a cycle, once one is over), ``age`` in steps, ``load``,
            ``factor``.
        """
        while len(self._kept) > 1 and step - self._kept[1].step >= cycle:
            self._kept.popleft()  # the first one left is the last that is a whole cycle old
        if self._kept and self._kept[-1].features.shape != features.shape:
            self._kept.clear()  # since the run was resumed, other slides can be read: these are not the same tiles
        self.load = self.moved = 0.0
        age, calm = 0, True
        for then in self._kept:
            far = float((features - then.features).square().sum(1).mean() / max(then.spread, 1e-12)) ** 0.5
            allowed = self.limit * min(1.0, max(self.clock - then.clock, 1e-12) / cycle) ** 0.5
            if far / allowed > self.load:
                self.load = far / allowed
                calm = then.far > 0 and far / then.far - 1 <= (allowed / then.allowed - 1) / 2
            then.far, then.allowed = far, allowed
            if not age:
                self.moved, age = far, step - then.step
        if self._kept and not (self.load > 1 and calm):
            change = min(_RISE, max(_FALL, 1 / max(self.load, 1e-12)))
            self.factor = min(1.0, max(_FLOOR, self.factor * change))
        if not self._kept or step - self._kept[-1].step >= cycle / _KEPT:
            self._kept.append(_Snapshot(step, self.clock, features.clone(), spread))
        return {"moved": self.moved, "age": age, "load": self.load, "factor": self.factor}

    def state_dict(self) -> dict[str, Any]:
        """All that it has seen; tensors and plain values."""
        return {
            "factor": self.factor,
            "began": self.began,
            "clock": self.clock,
            "kept": [asdict(then) for then in self._kept],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.factor, self.began, self.clock = state["factor"], state["began"], state["clock"]
        self._kept = deque(_Snapshot(**then) for then in state["kept"])
