"""The fidelity probe: how near a memory mode comes to the exact whole-slide gradient, measured on one slide."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dre_fast.data.slides import SlideError
from dre_fast.nn.loss import SlideReportLoss
from dre_fast.nn.model import DRESLCL, SlideOutput
from dre_fast.train.build import Reports, SlideSet
from dre_fast.train.exact import Autocast, ExactBatch


def measure_fidelity(
    model: DRESLCL,
    exact: ExactBatch,
    step: Callable[[], SlideOutput],
    objective: Callable[[SlideOutput], Tensor],
) -> dict[str, float | None]:
    """Compare a step in the model's memory mode with the oracle on the same slides.

    Nothing is changed: not the bank, no weight, no gradient, no random number. Both run in eval mode.

    Args:
        exact: all tiles of the slides.
        step: the forward of the memory mode, live tiles and bank.
        objective: the loss of an output, without randomness.

    Returns:
        ``embedding`` and ``gradient``: cosine of the slide embeddings (mean over the slides) and of the gradients of
        all parameters of the tile encoder; ``gradient_norm``: length of the mode's gradient over the exact one's. The
        latter two are None when the encoder has no gradient.
    """
    with _untouched(model):
        out = exact.forward()
        objective(out).backward()
        exact.backward()
        expected, embedding = _gradient(model), out.embedding.detach().float()
        out = step()
        objective(out).backward()
        got = _gradient(model)
        near = cosine_similarity(out.embedding.detach().float(), embedding, dim=1).mean()
    if expected is None or got is None or not float(expected.norm()):
        return {"embedding": float(near), "gradient": None, "gradient_norm": None}
    return {
        "embedding": float(near),
        "gradient": float(cosine_similarity(got, expected, dim=0)),
        "gradient_norm": float(got.norm() / expected.norm()),
    }


class FidelityProbe:
    """The comparison on one training slide of a run.

    Args:
        losses: (output, number int64 [1]) -> the run's loss of that slide alone, but for the contrast; like ``contrast``
            it is given the slide's number among all training slides.
        contrast: see :func:`contrast_with_all`; added to it.
        chunk: tiles the oracle encodes at once.
        seed: of the run.
        skip: a slide that cannot be read is left out, with a warning.
        autocast: a context for the model.
    """

    def __init__(
        self,
        model: DRESLCL,
        slides: SlideSet,
        losses: Callable[[SlideOutput, Tensor], Tensor],
        contrast: Callable[[SlideOutput, Tensor], Tensor] | None,
        *,
        chunk: int,
        seed: int,
        skip: bool,
        autocast: Autocast,
    ) -> None:
        self.skip = skip
        self.model, self.slides, self.losses, self.contrast = model, slides, losses, contrast
        self.chunk, self.seed, self.autocast = chunk, seed, autocast

    def measure(self, index: int, epoch: int, tiles: Tensor) -> dict[str, float | str | None]:
        """``slide``, its name, and what :func:`measure_fidelity` gives; None for all of it when the slide is left out.

        Args:
            index: id of the slide in the bank.
            tiles: int64 [m], its live tiles in this epoch; -1 = unused slot.

        Raises:
            SlideError: it cannot be read (named), unless such slides are left out.
        """
        reader = self.slides.reader
        there = torch.tensor([index], device=self.model.codebook.device)
        number = self.model.bank.number[there].cpu()
        exact = ExactBatch(
            self.model,
            [index],
            reader.read,
            [self.slides.tiles[index]],
            chunk=self.chunk,
            autocast=self.autocast,
        )

        def step() -> SlideOutput:
            images = reader.read(index, tiles)[None].to(there.device)
            with self.autocast():
                out: SlideOutput = self.model(
                    images, there, tiles[None].to(there.device), visit=epoch, seed=self.seed
                )
            return out

        def objective(out: SlideOutput) -> Tensor:
            total = self.losses(out, number)
            return total if self.contrast is None else total + self.contrast(out, number)

        found: dict[str, float | None] = {"embedding": None, "gradient": None, "gradient_norm": None}
        try:
            found = measure_fidelity(self.model, exact, step, objective)
        except SlideError as error:
            if not self.skip:
                raise
            warnings.warn(f"fidelity not measured: {error}", stacklevel=2)
        return {"slide": self.slides.records[index].slide_id, **found}


def contrast_with_all(
    loss: SlideReportLoss, reports: Reports | None, slides: SlideSet, weight: float
) -> Callable[[SlideOutput, Tensor], Tensor] | None:
    """The contrastive loss of one slide, which has no negatives of its own: all training reports are.

    Returns:
        (output, slide int64 [1]) -> loss, zero for a slide without report; None without reports.
    """
    rows = slides.report_rows.unique()
    rows = rows[rows >= 0]
    if reports is None or not len(rows):
        return None
    whole = SlideReportLoss(loss.kind, "all").to(loss.log_scale.device)
    whole.load_state_dict(loss.state_dict())  # its temperature, which may lie beyond the bounds, and bias
    whole.set_reports(reports.matrix[rows], rows)

    def contrast(out: SlideOutput, slide: Tensor) -> Tensor:
        row = slides.report_rows[slide]
        if out.report is None or int(row) < 0:
            return out.embedding.new_zeros(())
        return weight * whole(out.report.float(), None, row.to(out.report.device))

    return contrast


def _gradient(model: DRESLCL) -> Tensor | None:
    """The tile encoder's gradient in one vector, float64; taken out of the parameters."""
    parameters = [p for p in model.tile_encoder.parameters() if p.requires_grad]
    found = [
        p.grad.double().flatten() if p.grad is not None else p.new_zeros(p.numel()).double()
        for p in parameters
    ]
    model.zero_grad(set_to_none=True)
    return torch.cat(found) if found else None


@contextmanager
def _untouched(model: DRESLCL) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    kept = [(p, p.grad) for p in model.parameters()]
    devices = [model.codebook.device] if model.codebook.is_cuda else []
    model.zero_grad(set_to_none=True)
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in training:
            module.training = mode
        for p, grad in kept:
            p.grad = grad
