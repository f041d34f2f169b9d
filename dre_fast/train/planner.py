"""The plan of an epoch: its slides in order, and the live tiles of each from its permutations and its guide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dre_fast.data.multiscale import scales_of
from dre_fast.nn.model import DRESLCL, SlideOutput
from dre_fast.reference.sampling import hashed_uniform
from dre_fast.train.config import Config, MemoryConfig
from dre_fast.train.guided import Guide, LossGuide, ReportGuide
from dre_fast.train.objective import Objective
from dre_fast.train.run_data import RunData
from dre_fast.train.samplers import EpochPlan, draw, guided_slots, next_tiles, packed, scale_slots, visits


class Planner:
    """Makes the plan of each epoch of a process.

    The live tiles of a slide are shared out to its scales. At each of them a part may be drawn by the guide, from the
    tiles that follow the others in the permutation; the others are the next of that permutation. Without a guide, and
    for slides that it does not know, a plan is a function of seed and epoch; with one it also depends on model and bank
    as they are when it is made, at the start of an epoch.

    Args:
        memory: ``live``, ``scale_shares``, ``guided``, ``candidates``, ``guide_temperature``.
        sizes: int64 [S, C], tiles of the process's slides at each scale.
        numbers: int64 [S], numbers of these slides in the whole cohort.
        shards: shard -> its slides, int64.
        per_shard, steps: see :func:`dre_fast.train.samplers.visits`.
        seed: of the run.
        guide: needed for ``guided`` > 0.

    Raises:
        ValueError: ``guided`` > 0 without a guide.
    """

    def __init__(
        self,
        memory: MemoryConfig,
        sizes: Tensor,
        numbers: Tensor,
        shards: Mapping[int, Tensor],
        *,
        per_shard: int,
        steps: int,
        seed: int,
        guide: Guide | None = None,
    ) -> None:
        if memory.guided and guide is None:
            raise ValueError("Planner: memory.guided > 0 needs a guide")
        self.memory, self.sizes, self.numbers, self.seed = memory, sizes, numbers, seed
        self.shards, self.per_shard, self.steps = shards, per_shard, steps
        self.guide = guide if memory.guided else None
        self._starts = sizes.cumsum(1) - sizes
        self._slots = scale_slots(sizes, memory.live, memory.scale_shares)
        self._plan: EpochPlan | None = None
        self._epoch = -1
        self._kept: Tensor | None = None  # tiles of a plan taken over from a checkpoint, by slide

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch: that of a checkpoint within it, or a new one."""
        slides, sizes = visits(
            self.shards, per_shard=self.per_shard, steps=self.steps, seed=self.seed, epoch=epoch
        )
        plan = EpochPlan(slides, slides.new_full((len(slides), self.memory.live), -1), sizes)
        if epoch == self._epoch and self._kept is not None:
            plan.tiles = self._kept[slides]
        elif self.guide is None:
            plan.tiles = self._live_tiles(slides, epoch)
        else:
            together = max(1, self.guide.at_once // max(sizes, default=1))
            for step in range(0, len(sizes), together):
                there, coming = (slides[plan.steps(step, step + n * together)] for n in (1, 2))
                self.guide.expect(coming)
                plan.tiles[plan.steps(step, step + together)] = self._live_tiles(there, epoch)
        self._plan, self._epoch, self._kept = plan, epoch, None
        return plan

    def tiles_of(self, slide: int) -> Tensor:
        """Live tiles of a slide in the last plan made, int64 [m]."""
        assert self._plan is not None
        return self._plan.tiles[self._plan.slides == slide][0]

    def state_dict(self) -> dict[str, Any] | None:
        """Of the last plan made, when it cannot be made again: epoch, numbers int64 [S] of the slides, tiles [S, m]."""
        if self.guide is None or self._plan is None:
            return None
        return {
            "epoch": self._epoch,
            "slides": self.numbers[self._plan.slides],
            "tiles": self._plan.tiles,
        }

    def load_state_dict(self, states: Sequence[dict[str, Any] | None]) -> None:
        """Take over the plan that several processes had, by what :meth:`state_dict` gave on each."""
        parts = [state for state in states if state is not None]
        if not parts:
            return
        slides, tiles = (torch.cat([part[name] for part in parts]) for name in ("slides", "tiles"))
        order = slides.argsort()
        self._epoch = parts[0]["epoch"]
        self._kept = tiles[order[torch.searchsorted(slides[order], self.numbers)]]

    def _live_tiles(self, slides: Tensor, epoch: int) -> Tensor:
        """int64 [B, m]."""
        slots, drawn = self._slots[slides], torch.zeros_like(self._slots[slides])
        if self.guide is not None:
            share = guided_slots(slots, self.memory.guided)
            drawn = torch.where(self.guide.knows(slides)[:, None], share, drawn)
        most = int(self.sizes.max()) if self.sizes.numel() else 0
        beyond = min(self.memory.candidates, most) if self.guide is not None else 0
        live, candidates = [], []
        for scale, taken in enumerate((slots - drawn).T):
            # each scale has a permutation of its own; that of the first is the bank's
            keys = self.numbers[slides] + (scale << 32)
            found = next_tiles(self.sizes[slides, scale], keys, taken, beyond, visit=epoch, seed=self.seed)
            found = torch.where(found >= 0, found + self._starts[slides, scale][:, None], -1)
            column = torch.arange(found.shape[1])
            live.append(torch.where(column < taken[:, None], found, -1))
            candidates.append(packed(torch.where(column >= taken[:, None], found, -1), beyond))
        if self.guide is not None and bool(drawn.any()):
            live += self._drawn(slides, drawn, candidates, epoch)
        return packed(torch.cat(live, 1), self.memory.live)

    def _drawn(self, slides: Tensor, drawn: Tensor, candidates: list[Tensor], epoch: int) -> list[Tensor]:
        """Tiles that the guide draws at each scale: int64 [B, any], -1 for unused slots."""
        assert self.guide is not None
        there = (drawn > 0).any(1)
        scores = torch.full((len(slides), sum(own.shape[1] for own in candidates)), torch.nan)
        scores[there] = self.guide.scores(slides[there], torch.cat(candidates, 1)[there])
        streams = (epoch << 32) + self.numbers[slides]
        found, first = [], 0
        for scale, own in enumerate(candidates):
            columns = slice(first, first + own.shape[1])
            first = columns.stop
            # by scale and place, not by column: how many columns a scale has is up to the process's largest slide
            uniform = hashed_uniform(scale << 32, own.shape[1], self.seed, streams)
            chosen = draw(scores[:, columns], drawn[:, scale], self.memory.guide_temperature, uniform)
            found.append(torch.where(chosen >= 0, own.gather(1, chosen.clamp(min=0)), -1))
        return found


def planner_of(config: Config, data: RunData, model: DRESLCL, objective: Objective) -> Planner:
    """The planner of a run, for the slides that this process holds."""
    guide: Guide | None = None
    if config.memory.guided and config.memory.guide == "report":
        assert data.reports is not None  # Config.validate has seen to it
        guide = ReportGuide(model, data.reports.matrix, data.own.report_rows)
    elif config.memory.guided:

        def loss(out: SlideOutput, slides: Tensor) -> Tensor:
            return objective.of_each(out, data.numbers[slides])

        guide = LossGuide(model, loss, objective.labelled[data.numbers])
    return Planner(
        # slots that no slide can fill would be read, and take memory, as if they were tiles
        replace(config.memory, live=min(config.memory.live, max(data.train.tiles))),
        torch.tensor([[len(t) for t in scales_of(joined)] for joined in data.own.reader.tilings]),
        data.numbers,
        data.shards,
        per_shard=data.per_shard,
        steps=data.steps,
        seed=config.run.seed,
        guide=guide,
    )
