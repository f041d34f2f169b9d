"""What a run minimises: the slide-report loss and the losses of its tasks, weighted and added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dre_fast.data.cohort import Task
from dre_fast.nn.loss import SlideReportLoss
from dre_fast.nn.model import SlideOutput
from dre_fast.nn.supervised import class_weights, compares_slides, supervised_loss
from dre_fast.train.build import Reports, SlideSet
from dre_fast.train.checks import labelled
from dre_fast.train.config import LossConfig


class Objective(nn.Module):
    """The loss of some training slides, whichever process encoded them.

    Args:
        config: kinds and weights.
        slides: all training slides: their targets, and which report each has.
        tasks: resolved tasks.
        reports: embeddings of the cohort's reports, or None for a run without.

    Attributes:
        class_weights: task -> :func:`~dre_fast.nn.supervised.class_weights`, or None for none.
        contrast: the slide-report loss, with its learnable temperature.
        reports: fp32 [M, T], or None.
    """

    def __init__(
        self, config: LossConfig, slides: SlideSet, tasks: Sequence[Task], reports: Reports | None
    ) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.targets: Mapping[str, Tensor] = slides.targets
        self.report_rows = slides.report_rows
        self.weights = {
            "contrastive": config.contrastive_weight,
            **{task.name: task.weight for task in config.tasks},
        }
        balance = {task.name: task.balance for task in config.tasks}
        self.class_weights = {
            task.name: class_weights(task.kind, self.targets[task.name], task.outputs, balance[task.name])
            for task in self.tasks
        }
        self.contrast = SlideReportLoss(kind=config.contrastive or "infonce", negatives=config.negatives)
        self.register_buffer("reports", None if reports is None else reports.matrix, persistent=False)
        self.reports: Tensor | None
        if reports is not None and config.negatives == "all":
            rows = self.report_rows.unique()
            rows = rows[rows >= 0]
            self.contrast.set_reports(reports.matrix[rows], rows)

    def forward(self, out: SlideOutput, slides: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The total and its parts, unweighted, by name.

        Args:
            out: of B slides.
            slides: int64 [B], their numbers among all training slides.
        """
        device = out.embedding.device
        parts: dict[str, Tensor] = {}
        if self.reports is not None and out.report is not None:
            rows = self.report_rows[slides]
            there = rows >= 0
            if there.any():
                cases = rows[there].to(device)
                parts["contrastive"] = self.contrast(
                    out.report.float()[there.to(device)], self.reports[cases], cases
                )
        parts |= self._of_tasks(out, slides)
        return self._total(out, parts), parts

    def without_contrast(self, out: SlideOutput, slides: Tensor) -> Tensor:
        """The weighted losses of the tasks alone; arguments as for the whole."""
        return self._total(out, self._of_tasks(out, slides))

    def of_each(self, out: SlideOutput, slides: Tensor) -> Tensor:
        """:meth:`without_contrast` of each slide by itself, added up: what is one slide's own depends on no other.

        A Cox loss, which compares slides, is zero then.
        """

        def own(i: int) -> Tensor:
            one = slice(i, i + 1)
            logits = {name: values[one] for name, values in out.logits.items()}
            return self.without_contrast(SlideOutput(out.embedding[one], None, logits, None), slides[one])

        return torch.stack([own(i) for i in range(len(slides))]).sum()

    def _of_tasks(self, out: SlideOutput, slides: Tensor) -> dict[str, Tensor]:
        return {
            task.name: self.supervised(
                task, out.logits[task.name], self.targets[task.name][slides].to(out.embedding.device)
            )
            for task in self.tasks
        }

    def _total(self, out: SlideOutput, parts: Mapping[str, Tensor]) -> Tensor:
        total = sum(
            (self.weights[name] * part for name, part in parts.items()), out.embedding.new_zeros(()).float()
        )
        # a batch in which no slide has a report or label still has a graph, and a zero gradient
        return total + 0.0 * out.embedding.float().sum()

    def supervised(self, task: Task, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of one task for some slides, of any split, with the class weights of the training slides."""
        return supervised_loss(
            task.kind,
            logits,
            target,
            weight=self.class_weights[task.name],
            method=task.method,
            edges=task.edges,
        )

    @property
    def labelled(self) -> Tensor:
        """Which training slides have a label that counts in :meth:`of_each`: bool [S]."""
        found = torch.zeros(len(self.report_rows), dtype=torch.bool)
        for task in self.tasks:
            if self.weights[task.name] and not compares_slides(task.kind, task.method):
                found |= labelled(self.targets[task.name]).view(len(found), -1).any(1)
        return found

    @property
    def temperature(self) -> float | None:
        """Of the contrast; None without reports."""
        return None if self.reports is None else float(self.contrast.temperature)
