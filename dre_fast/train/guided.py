"""What each tile does for the similarity of its slide with the slide's report, from the rows of the bank alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dre_fast.nn.contributions import contributions
from dre_fast.nn.model import DRESLCL


class ReportGuide:
    """Scores tiles by their slides' reports; no tile is encoded.

    Args:
        model: with its bank and a slide encoder that projects into the report space.
        reports: fp32 [M, T].
        report_rows: int64 [S], the report of each slide of the bank; -1 = none.
    """

    def __init__(self, model: DRESLCL, reports: Tensor, report_rows: Tensor) -> None:
        self.model, self.reports, self.report_rows = model, reports, report_rows

    def knows(self, slides: Tensor) -> Tensor:
        """Which slides, int64 [B], have a report: bool [B]."""
        return self.report_rows[slides] >= 0

    def expect(self, slides: Tensor) -> None:
        """Slides, int64 [n], that are scored next: their rows are read ahead where they lie in a file."""
        self.model.bank.prefetch(slides)

    def gradient(self, slides: Tensor) -> Tensor:
        """d cos(report, projection(h)) / dV of slides with a report, int64 [B] -> fp32 [B, K, D].

        V holds all rows that the bank has of a slide, whatever the memory mode; dropout is off.
        """
        model, bank = self.model.eval(), self.model.bank
        none = torch.empty(len(slides), 0, dtype=torch.int64)
        residuals = bank.encode(slides, none, torch.empty(len(slides), 0, bank.dim, device=bank.device))
        assert isinstance(residuals, Tensor)  # not the pair that return_counts gives
        residuals = residuals.detach().requires_grad_(True)
        with torch.enable_grad():
            projected = model.represent(residuals).report
            assert projected is not None
            reports = self.reports[self.report_rows[slides]].to(projected.device)
            similarity = cosine_similarity(projected.float(), reports, dim=1).sum()
        return torch.autograd.grad(similarity, residuals)[0]

    @torch.no_grad()
    def scores(self, slides: Tensor, candidates: Tensor) -> Tensor:
        """First-order effect of each candidate on the similarity, <d cos / dV_k, f_i - c_k> with k its codeword.

        The formula of the heatmaps (:func:`dre_fast.nn.contributions.contributions`), with the similarity for the logit
        and stored rows for features.

        Args:
            slides: int64 [B], slides with a report.
            candidates: int64 [B, c], tiles; -1 = none.

        Returns:
            fp32 [B, c] on the CPU; NaN where there is no candidate, 0 for a row that was never written.
        """
        model, bank, (b, c) = self.model, self.model.bank, candidates.shape
        gradient = self.gradient(slides)
        own, tiles = slides[:, None].to(bank.device), candidates.to(bank.device)
        rows = bank.read(own.expand(b, c).reshape(-1), tiles.reshape(-1)).view(b, c, -1)
        codes = bank.code[bank.start[own] + tiles.clamp(min=0)].to(torch.int64)
        found = [contributions(gradient[i], rows[i], model.codebook, codes[i]) for i in range(b)]
        return torch.where(tiles >= 0, torch.stack(found), torch.nan).cpu()
