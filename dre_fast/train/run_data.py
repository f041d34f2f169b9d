"""What a run learns from: the slides of its splits, their tasks and reports, and this process's share of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dre_fast.data.bag_cohort import refuse_shared_report
from dre_fast.data.cohort import Cohort, SlideRecord, Task
from dre_fast.train.build import Reports, SlideSet, load_reports, slide_set
from dre_fast.train.checks import check_labels, data_fingerprint, split_records
from dre_fast.train.config import Config
from dre_fast.train.distributed import Group
from dre_fast.train.samplers import steps_per_epoch
from dre_fast.train.shards import deal_slides, shards_of
from dre_fast.train.supervision import fit_survival


class RunData:
    """The data of a run.

    Attributes:
        train, val: all slides of the splits, ``val`` None without one.
        tasks: resolved on the cohort, intervals of time on its training slides.
        reports: embeddings, or None without a contrastive loss.
        fingerprint: hashes of all of it.
        numbers: int64 [S], the training slides this process holds, ascending; ``own`` are these alone.
        shards: shard -> its slides among ``own``, int64.
        per_shard: slides of each shard in a batch.
        steps: of an epoch.

    Raises:
        ValueError: bad cohort, tiles or reports (named); one report text under two cases in different splits; no
            report for any training case; fewer tiles than codewords; shards that the processes cannot share out.
    """

    def __init__(self, config: Config, group: Group) -> None:
        data, loss = config.data, config.loss
        cohort = Cohort.read(data.cohort, missing_values=data.missing_values)
        train, val = split_records(cohort, data)
        if data.train_split is not None:
            refuse_shared_report(cohort, "split")
        self.tasks = [
            cohort.resolve(
                Task(task.name, task.kind, tuple(task.classes), tuple(task.columns), task.method, task.bins)
            )
            for task in loss.tasks
        ]
        self.reports: Reports | None = load_reports(data.reports) if loss.contrastive else None

        def open_split(records: Sequence[SlideRecord], name: str) -> SlideSet:
            return slide_set(
                cohort,
                records,
                data.tiles,
                self.tasks,
                self.reports,
                backend=data.backend,
                mpp=data.mpp,
                max_open=data.max_open,
                cache=Path(data.cache) / f"{name}.h5" if data.cache else None,
                skip_untiled=data.skip_untiled,
            )

        # the first process decodes the tiles for a cache, the others find them there
        self.train = group.first_then_others(lambda: open_split(train, "train"))
        self.val = group.first_then_others(lambda: open_split(val, "val")) if val else None
        if self.reports is not None and not (self.train.report_rows >= 0).any():
            raise ValueError(f"{data.reports}: holds a report for none of the training cases")
        check_labels(self.tasks, self.train, self.val)
        self.tasks = fit_survival(self.tasks, self.train.targets)
        if config.model.codewords > sum(self.train.tiles):
            raise ValueError(
                f"model.codewords={config.model.codewords}, but the training slides have only "
                f"{sum(self.train.tiles)} tiles; ask for fewer codewords"
            )
        self.fingerprint = data_fingerprint(self.train, self.val, self.reports)
        self._deal(config, group)

    def _deal(self, config: Config, group: Group) -> None:
        count = config.run.shards or 1
        mine = shards_of(group.rank, group.world, count)
        dealt = deal_slides(self.train.tiles, count, config.run.seed)
        self.per_shard = config.optim.batch_size // count
        self.steps = steps_per_epoch([len(slides) for slides in dealt], self.per_shard)
        self.numbers = torch.cat([dealt[shard] for shard in mine]).sort().values
        self.shards: dict[int, Tensor] = {
            shard: torch.searchsorted(self.numbers, dealt[shard]) for shard in mine
        }
        self.own = self.train if group.world == 1 else self.train.share(self.numbers)
