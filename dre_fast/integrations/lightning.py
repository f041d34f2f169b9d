"""ResidualMIL as a LightningModule on ragged batches of bags. Importing this module imports lightning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dre_fast.eval.metrics import auc
from dre_fast.integrations.build import need_host
from dre_fast.nn.residual_mil import ResidualMIL

_lightning: Any = need_host("lightning", "lightning")


class Bags(NamedTuple):
    """A ragged batch of B bags.

    Attributes:
        x: features [N, D] of all bags, one after the other.
        cu_seqlens: int64 [B+1], offsets of the bags in x.
        target: int64 [B], -1 = not labelled; of a binary task with one logit fp32 [B], NaN = not labelled.
    """

    x: Tensor
    cu_seqlens: Tensor
    target: Tensor


def collate_bags(items: Sequence[tuple[Tensor, Any]]) -> Bags:
    """For a DataLoader whose dataset gives (bag [n, D], label): any n, also 0.

    Raises:
        ValueError: a bag that is not [n, D], or of another D than the first; says which of the batch.
    """
    bags = [bag for bag, _ in items]
    for number, bag in enumerate(bags):
        if bag.ndim != 2 or bag.shape[1] != bags[0].shape[-1]:
            raise ValueError(
                f"bag {number} of the batch is {list(bag.shape)}, and bags must be [n, {bags[0].shape[-1]}]"
            )
    lengths = torch.tensor([0, *(len(bag) for bag in bags)])
    return Bags(torch.cat(bags), lengths.cumsum(0), torch.as_tensor([label for _, label in items]))


class ResidualMILModule(_lightning.LightningModule):  # type: ignore[misc]
    """Trains a :class:`~dre_fast.ResidualMIL` in Lightning: ``Trainer().fit(ResidualMILModule(model), loader)``.

    Logs ``train_loss``, ``val_loss`` and, where it is defined, ``val_auc`` (several classes: the mean of one against the
    rest), of the bags of all processes together. Fit the codebook before: ``model.fit_codebook(bags)``.

    Args:
        model: the model. None: a new one of ``options``, as ``load_from_checkpoint`` makes it.
        options: of a new model; see :attr:`dre_fast.ResidualMIL.options`.
        lr, weight_decay: of AdamW; vectors and scalars do not decay.

    Shapes:
        Batches are :class:`Bags`, of :func:`collate_bags`; ``forward`` takes bags as the model does.

    Raises:
        ValueError: neither a model nor options.
        RuntimeError: at the start of a fit, where the codebook is not fitted.
    """

    def __init__(
        self,
        model: ResidualMIL | None = None,
        *,
        options: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        if model is None:
            if options is None:
                raise ValueError("ResidualMILModule: give a model, or the options of a new one")
            model = ResidualMIL(**options)
        self.model, self.lr, self.weight_decay = model, lr, weight_decay
        self.save_hyperparameters({"options": model.options, "lr": lr, "weight_decay": weight_decay})
        self._judged: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits [B, C] of bags in any layout of the model."""
        return self.model(x, cu_seqlens, mask)  # type: ignore[no-any-return]

    def on_fit_start(self) -> None:
        if not self.model.fitted and not self.model.encoding.learnable:
            raise RuntimeError(
                "ResidualMILModule: the codebook is not fitted; call model.fit_codebook(bags) with the training bags "
                "before Trainer.fit"
            )

    def training_step(self, batch: Bags, _: int) -> Tensor:
        loss = self._loss(self(batch.x, batch.cu_seqlens), batch.target)
        self.log("train_loss", loss, batch_size=len(batch.target), prog_bar=True)
        return loss

    def validation_step(self, batch: Bags, _: int) -> None:
        logits = self(batch.x, batch.cu_seqlens)
        self._judged.append((logits.float().cpu(), batch.target.cpu()))

    def on_validation_epoch_end(self) -> None:
        judged, self._judged = self._judged, []
        several = self.trainer.world_size > 1
        if several:
            # not each process its own score: where one has no bag of a class, there is none to take the mean of
            everywhere: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(everywhere, judged)
            judged = [pair for own in everywhere for pair in own]
        logits, target = (torch.cat(parts) for parts in zip(*judged))
        self.log("val_loss", self._loss(logits, target), prog_bar=True, sync_dist=several)
        score = auc("binary" if self.model.classes == 1 else "multiclass", logits, target)
        if score is not None:
            self.log("val_auc", score, prog_bar=True, sync_dist=several)

    def predict_step(self, batch: Bags, _: int) -> Tensor:
        return self(batch.x, batch.cu_seqlens)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean over the labelled bags; 0 without any."""
        if self.model.classes == 1:
            there = ~torch.isnan(target.float())
            if not there.any():
                return logits.sum() * 0.0
            return nn.functional.binary_cross_entropy_with_logits(
                logits[there, 0].float(), target[there].float()
            )
        if not (target >= 0).any():
            return logits.sum() * 0.0
        return nn.functional.cross_entropy(logits.float(), target.long(), ignore_index=-1)
