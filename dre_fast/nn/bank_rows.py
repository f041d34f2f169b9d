"""The row tables of a memory bank, as one argument."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ROW_TABLES = ("payload", "scale", "code", "age", "drift")


@dataclass(frozen=True)
class Rows:
    """The row tables an operation works on, and where each slide begins in them: ``start`` int64 [S]."""

    payload: Tensor
    scale: Tensor
    code: Tensor
    age: Tensor
    drift: Tensor
    start: Tensor
