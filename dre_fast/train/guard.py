"""The drift guard at work in a run: which tiles it looks at, and what its findings change."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dre_fast.data.multiscale import scales_of
from dre_fast.nn.model import DRESLCL
from dre_fast.ops.encode import nearest
from dre_fast.train.config import Config
from dre_fast.train.distributed import Group
from dre_fast.train.drift import DriftGuard
from dre_fast.train.read_ahead import read_or_error
from dre_fast.train.run_data import RunData
from dre_fast.train.samplers import epoch_order, guided_slots, scale_slots
from dre_fast.train.writer import Autocast

_LITTLE = 0.25  # a load below which a raised refresh budget may fall again


class EncoderGuard:
    """Keeps the encoder of a run from moving faster than rows and codebook are renewed.

    When the features move too fast, first more rows are renewed a step, up to ``memory.max_refresh``, which makes the
    refresh cycle shorter; what that does not cover lowers the encoder's rate. With ``memory.drift_limit=0`` it does
    nothing.

    Attributes:
        refresh: rows to renew in a step.
    """

    def __init__(
        self, config: Config, model: DRESLCL, data: RunData, group: Group, autocast: Autocast
    ) -> None:
        self.config, self.model, self.data, self.group, self.autocast = config, model, data, group, autocast
        memory = config.memory
        self.refresh = memory.refresh
        self._drift = DriftGuard(memory.drift_limit, memory.drift_every) if memory.drift_limit else None
        self._images: Tensor | None = None

    @property
    def factor(self) -> float:
        """On the encoder's rate, in (0, 1]."""
        return 1.0 if self._drift is None else self._drift.factor

    def before(self, step: int) -> None:
        """Before a step in which the encoder moves: what the features were before any did."""
        if self._drift is not None and self._drift.began < 0 and self.group.first:
            self._drift.look(step, *self._features(), self.cycle())

    def after(self, step: int, share: float) -> dict[str, float] | None:
        """After a step in which the encoder moved: what was found, for the log, when it was time to look.

        Args:
            share: of the encoder's full rate, as the schedule gave it to this step.
        """
        if self._drift is None or not self._drift.due(step, share):
            return None
        found = None
        if self.group.first:
            cycle = self.cycle()
            found = self._drift.look(step, *self._features(), cycle)
            self._adapt_refresh()
            found |= {"cycle": cycle, "refresh": self.refresh}
        self._drift.factor, self.refresh, found = self.group.from_first(
            (self._drift.factor, self.refresh, found)
        )
        return found

    def cycle(self) -> float:
        """Steps in which all rows are renewed; where no row is used, those between two fits of the codebook."""
        memory, tiles = self.config.memory, self.data.train.tiles
        if memory.mode in ("none", "exact"):
            return float(self.data.steps * (memory.refit_every or self.config.optim.epochs))
        return self.data.steps * max(1.0, sum(tiles) / (self._renewed + self.refresh * self.data.steps))

    @cached_property
    def _renewed(self) -> int:
        """Live tiles of an epoch that the permutations bring; those that a guide draws may be any and renew no cycle."""
        memory = self.config.memory
        sizes = [[len(tiling) for tiling in scales_of(joined)] for joined in self.data.train.reader.tilings]
        slots = scale_slots(torch.tensor(sizes), memory.live, memory.scale_shares)
        return int((slots - guided_slots(slots, memory.guided)).sum())

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; that of the first process counts."""
        return {
            "refresh": self.refresh,
            "drift": None if self._drift is None else self._drift.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.refresh = state["refresh"]
        if self._drift is not None:
            self._drift.load_state_dict(state["drift"])

    def _adapt_refresh(self) -> None:
        assert self._drift is not None
        least, most = self.config.memory.refresh, self.config.memory.max_refresh
        if self._drift.load > 1 and self.refresh < most:
            self.refresh = min(most, max(16, 2 * self.refresh))
        elif self._drift.load < _LITTLE and self.refresh > least and self._drift.factor == 1.0:
            self.refresh = max(least, self.refresh // 2)

    @torch.no_grad()
    def _features(self) -> tuple[Tensor, float]:
        """Features of the tiles looked at, on the CPU, and their mean squared distance to their codewords."""
        if self._images is None:
            self._images = self._read()
        encoder, parts = self.model.tile_encoder, []
        training = encoder.training
        encoder.eval()
        for images in self._images.split(self.config.run.encode_chunk):
            with self.autocast():
                parts.append(self.model.encode_tiles(images.to(self.model.codebook.device)))
        encoder.train(training)
        features = torch.cat(parts)
        distance = nearest(features, None, None, self.model.codebook)[1]
        return features.cpu(), float(distance.mean())

    def _read(self) -> Tensor:
        """The tiles: of as many slides as there are tiles wanted, one after the other, drawn by the run's seed."""
        seed, tiles = self.config.run.seed, self.data.train.tiles
        slides = epoch_order(len(tiles), seed, 0).tolist()
        generator = torch.Generator().manual_seed(seed)
        chosen: dict[int, set[int]] = {}
        for i in range(self.config.memory.drift_tiles):
            slide = slides[i % len(slides)]
            chosen.setdefault(slide, set()).add(int(torch.randint(tiles[slide], (1,), generator=generator)))
        read = [
            read_or_error(self.data.train.reader, slide, torch.tensor(sorted(ids)))
            for slide, ids in chosen.items()
        ]
        there = [images for images in read if isinstance(images, Tensor)]
        errors = [error for error in read if isinstance(error, ValueError)]
        if errors and (self.config.data.on_error == "stop" or not there):
            raise errors[0]
        return torch.cat(there)
