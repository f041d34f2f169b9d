"""Which tiles matter to a slide, from the rows of the bank alone: guides that draw live tiles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dre_fast.nn.contributions import contributions
from dre_fast.nn.model import DRESLCL, SlideOutput

_AT_ONCE = 64  # slides
_ROWS_AT_ONCE = 65_536  # of candidates: 1,024 of each slide


class Guide:
    """Scores tiles by their first-order effect on a number that the slides have; no tile is encoded.

    Args:
        model: with its bank and a residual slide encoder.
        known: bool [S], which slides of the bank have such a number.

    Attributes:
        at_once: slides that are best scored together: many, but of a bank in a file no more than those of a step, which
            its cache holds.
    """

    def __init__(self, model: DRESLCL, known: Tensor) -> None:
        self.model, self._known = model, known
        self.at_once = 1 if model.bank.tier == "file" else _AT_ONCE

    def number(self, out: SlideOutput, slides: Tensor) -> Tensor:
        """The sum (or mean) over slides, int64 [B], of what their tiles are to have an effect on; 0-d."""
        raise NotImplementedError

    def knows(self, slides: Tensor) -> Tensor:
        """Which slides, int64 [B], can be scored: bool [B]."""
        return self._known[slides]

    def expect(self, slides: Tensor) -> None:
        """Slides, int64 [n], that are scored next: their rows are read ahead where they lie in a file."""
        self.model.bank.prefetch(slides)

    def gradient(self, slides: Tensor) -> Tensor:
        """d number / dV of known slides, int64 [B] -> fp32 [B, K, D].

        V holds all rows that the bank has of a slide, whatever the memory mode; dropout is off.
        """
        model, bank = self.model, self.model.bank
        if model.training:
            model.eval()
        none = torch.empty(len(slides), 0, dtype=torch.int64)
        residuals = bank.encode(slides, none, torch.empty(len(slides), 0, bank.dim, device=bank.device))
        assert isinstance(residuals, Tensor)  # not the pair that return_counts gives
        residuals = residuals.detach().requires_grad_(True)
        with torch.enable_grad():
            total = self.number(model.represent(residuals), slides)
        return torch.autograd.grad(total, residuals)[0]

    @torch.no_grad()
    def scores(self, slides: Tensor, candidates: Tensor) -> Tensor:
        """First-order effect of each candidate, <d number / dV_k, f_i - c_k> with k its codeword.

        The formula of the heatmaps (:func:`dre_fast.nn.contributions.contributions`), with the number for the logit and
        stored rows for features.

        Args:
            slides: int64 [B], known slides.
            candidates: int64 [B, c], tiles; -1 = none.

        Returns:
            fp32 [B, c] on the CPU; NaN where there is no candidate, 0 for a row that was never written.
        """
        model, bank, (b, c) = self.model, self.model.bank, candidates.shape
        gradient = self.gradient(slides)
        own, tiles = slides[:, None].to(bank.device), candidates.to(bank.device)
        codes = bank.code[bank.start[own] + tiles.clamp(min=0)].to(torch.int64)
        found, together = [], max(1, _ROWS_AT_ONCE // max(c, 1))
        for first in range(0, b, together):
            part = slice(first, first + together)
            rows = bank.read(own[part].expand(-1, c).reshape(-1), tiles[part].reshape(-1))
            found += [
                contributions(g, of_slide, model.codebook, k)
                for g, of_slide, k in zip(gradient[part], rows.view(-1, c, bank.dim), codes[part])
            ]
        return torch.where(tiles >= 0, torch.stack(found), torch.nan).cpu()


class ReportGuide(Guide):
    """Draws tiles that speak for the slide's report: by their effect on the similarity of report and slide.

    Args:
        model: one whose slide encoder projects into the report space.
        reports: fp32 [M, T].
        report_rows: int64 [S], the report of each slide of the bank; -1 = none.
    """

    def __init__(self, model: DRESLCL, reports: Tensor, report_rows: Tensor) -> None:
        super().__init__(model, report_rows >= 0)
        self.reports, self.report_rows = reports, report_rows

    def number(self, out: SlideOutput, slides: Tensor) -> Tensor:
        """The cosines of slides' projections and reports, added up."""
        assert out.report is not None
        reports = self.reports[self.report_rows[slides]].to(out.report.device)
        return cosine_similarity(out.report.float(), reports, dim=1).sum()


class LossGuide(Guide):
    """Draws tiles that the slide's labels turn on, for or against: by the size of their effect on the loss of the tasks.

    Args:
        loss: (output, slides int64 [B] of the bank) -> 0-d; a sum of the slides' own losses, so that a score does not
            depend on what is scored with it.
        known: bool [S], slides with a label.
    """

    def __init__(self, model: DRESLCL, loss: Callable[[SlideOutput, Tensor], Tensor], known: Tensor) -> None:
        super().__init__(model, known)
        self.loss = loss

    def number(self, out: SlideOutput, slides: Tensor) -> Tensor:
        """The loss of the tasks."""
        return self.loss(out, slides)

    def scores(self, slides: Tensor, candidates: Tensor) -> Tensor:
        """The size of the effect: a tile that misleads matters as much as one that tells."""
        return super().scores(slides, candidates).abs()
