"""The codebook of a run: which rows of the banks it is fitted to."""

from __future__ import annotations

import torch

from dre_fast.nn.bank import MemoryBank
from dre_fast.train.codebook import _rows_of_all
from dre_fast.train.distributed import Group


def test_rows_that_were_never_written_are_not_sent() -> None:
    bank = MemoryBank([5, 3, 4], 8, dtype="float32")
    features = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    slides, tiles = torch.tensor([0, 0, 0, 0, 0, 2, 2]), torch.tensor([0, 1, 2, 3, 4, 1, 3])
    bank.write(slides, tiles, features, step=0)  # slide 1 and half of slide 2 could not be read
    sent = _rows_of_all(bank, Group(torch.device("cpu")), seed=0)
    assert sent.equal(torch.cat(list(bank.iter_rows())))
