"""The slide-report loss as a module: learnable temperature, case-aware positives, cohort negatives."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dre_fast.ops import contrast as ops
from dre_fast.reference import loss as reference
from dre_fast.reference.encode import l2_normalize

MAX_SCALE = 100.0  # the inverse temperature stays in [1, MAX_SCALE], as in CLIP
Cases = Tensor | Sequence[Hashable]


class _Clamp(torch.autograd.Function):
    """clamp(x, low, high) whose gradient at a bound is dropped only where it pushes outwards.

    A plain clamp has no gradient beyond the bound, so a parameter that once overshot would stay there for
    good.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.bounds
        outwards = ((x >= high) & (grad < 0)) | ((x <= low) & (grad > 0))
        return torch.where(outwards, 0.0, grad), None, None


class SlideReportLoss(nn.Module):
    """Contrastive loss between slide embeddings and frozen report embeddings.

    Slides of one case share its report: slide and report of one case are positives, never negatives, of each
    other. Embeddings are L2-normalised inside; everything runs in fp32 (float64 for float64 slides), also
    under autocast.

    Args:
        kind: ``"infonce"``, symmetric cross entropy to the uniform distribution over the positives, or
            ``"siglip"``, a sigmoid loss per pair with a learnable bias.
        negatives: ``"batch"``: the reports of the batch. ``"all"``: every report given to
            :meth:`set_reports`; its logits are streamed in tiles, so memory does not grow with the cohort.
            For infonce the direction slide -> report then runs over all reports and report -> slide over the
            batch's slides.
        temperature: start of the learnable temperature; default 0.07 (infonce) or 0.1 (siglip). Its inverse,
            the scale of the logits, is learnt as a logarithm and kept in [1, 100].
        bias: start of the learnable siglip bias.

    Shapes:
        ``forward(slide_emb, report_emb, case_ids)``: ``slide_emb`` [B, T] any float dtype; ``report_emb`` [B,
        T], row i the report of slide i, or, with ``negatives="all"``, None for the registered ones;
        ``case_ids`` int64 [B] or B strings or ints -> 0-d loss in fp32 (float64 for float64 slides).

    What to expect: a slide with p positives among the reports of the batch cannot go below log p. A batch of
    one case has no negatives: its infonce loss is log B when its slides agree, and the gradient only makes
    them agree. A batch of one slide gives zero.

    Raises:
        ValueError: unknown options; shapes that do not fit; NaN or Inf in an embedding (row and case named;
            not looked for under torch.compile); with ``negatives="all"`` no registered reports, or none for a
            case.

    Source: DRE-SLCL, arXiv 2511.05034 (slide-level contrast); CLIP, Radford et al. 2021; SigLIP, Zhai et al.
    2023.
    """

    def __init__(
        self,
        kind: str = "infonce",
        negatives: str = "batch",
        *,
        temperature: float | None = None,
        bias: float = -10.0,
    ) -> None:
        super().__init__()
        if kind not in ("infonce", "siglip"):
            raise ValueError(f"SlideReportLoss: kind must be 'infonce' or 'siglip', got {kind!r}")
        if negatives not in ("batch", "all"):
            raise ValueError(f"SlideReportLoss: negatives must be 'batch' or 'all', got {negatives!r}")
        if temperature is None:
            temperature = 0.07 if kind == "infonce" else 0.1
        if not 1 / MAX_SCALE <= temperature <= 1:
            raise ValueError(f"SlideReportLoss: temperature must be in [0.01, 1], got {temperature}")
        self.kind, self.negatives = kind, negatives
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.register_parameter("bias", nn.Parameter(torch.tensor(float(bias))) if kind == "siglip" else None)
        # frozen and given anew for each run: they are moved with the module but not saved with it
        self.register_buffer("reports", None, persistent=False)
        self.register_buffer("report_cases", None, persistent=False)
        self.bias: Tensor | None
        self.reports: Tensor | None
        self.report_cases: Tensor | None
        self._numbers: dict[Hashable, int] | None = None

    @property
    def scale(self) -> Tensor:
        """Inverse temperature, 0-d, in [1, 100]."""
        return _Clamp.apply(self.log_scale, 0.0, math.log(MAX_SCALE)).exp()  # type: ignore[no-any-return]

    @property
    def temperature(self) -> Tensor:
        """Temperature, 0-d, in [0.01, 1]; without gradient."""
        return 1 / self.scale.detach()

    @torch.no_grad()
    def set_reports(self, reports: Tensor, case_ids: Cases) -> None:
        """Register the cohort's reports for ``negatives="all"``. They are not part of ``state_dict``.

        Args:
            reports: [M, T] embeddings, any float dtype; L2-normalised here. A case may have several.
            case_ids: int64 [M], or M strings or ints; ``forward`` is then given cases of the same sort.

        Raises:
            ValueError: shapes that do not fit, no reports, or NaN or Inf in one.
        """
        if reports.dim() != 2 or not len(reports) or not reports.is_floating_point():
            raise ValueError(
                f"set_reports: reports must be floating point [M, T] with M >= 1, "
                f"got {reports.dtype} {tuple(reports.shape)}"
            )
        if len(case_ids) != len(reports):
            raise ValueError(f"set_reports: {len(reports)} reports, but {len(case_ids)} case ids")
        _check_finite("set_reports: report", reports, case_ids)
        device = self.log_scale.device
        if isinstance(case_ids, Tensor):
            self._numbers = None
            cases = _case_tensor(case_ids, len(reports))
        else:
            self._numbers = {case: i for i, case in enumerate(dict.fromkeys(case_ids))}
            cases = torch.tensor([self._numbers[case] for case in case_ids])
        self.reports = l2_normalize(reports.detach().to(device))
        self.report_cases = cases.to(device)

    def forward(self, slide_emb: Tensor, report_emb: Tensor | None, case_ids: Cases) -> Tensor:
        """slide_emb, report_emb [B, T] and B case ids -> loss, 0-d. Shapes and errors: the class."""
        if self.negatives == "batch":
            if report_emb is None:
                raise ValueError("SlideReportLoss: negatives='batch' needs report_emb [B, T]")
            return self.among(slide_emb, report_emb, case_ids)
        reports, report_cases = self.reports, self.report_cases
        if reports is None or report_cases is None:
            raise ValueError("SlideReportLoss: negatives='all' needs set_reports(reports, case_ids) first")
        if reports.shape[1] != slide_emb.shape[-1]:
            raise ValueError(
                f"SlideReportLoss: slide_emb has T={slide_emb.shape[-1]}, "
                f"the registered reports T={reports.shape[1]}"
            )
        _check_pair(slide_emb, report_emb, case_ids)
        cases = self._registered_cases(case_ids).to(slide_emb.device)
        with torch.autocast(slide_emb.device.type, enabled=False):
            slides = l2_normalize(slide_emb)
            scale = self.scale.to(slides.dtype)
            if self.bias is not None:
                _check_registered(torch.isin(cases, report_cases), case_ids)
                bias = self.bias.to(slides.dtype)
                return ops.siglip_rows(slides, reports, cases, report_cases, scale, bias).mean()
            to_reports, positives = ops.info_nce_rows(slides, reports, cases, report_cases, scale)
            _check_registered(positives, case_ids)
            own = (
                self._own_reports(cases, positives, case_ids)
                if report_emb is None
                else l2_normalize(report_emb)
            )
            logits = scale * own.to(slides.dtype) @ slides.T
            to_slides = reference.cross_entropy_rows(logits, reference.same_case(cases, cases))
        return (to_reports.mean() + to_slides.mean()) / 2

    def among(self, slide_emb: Tensor, report_emb: Tensor, case_ids: Cases) -> Tensor:
        """The loss of these pairs with one another as negatives, whatever ``negatives`` says: for validation.

        Shapes and errors as ``forward``.
        """
        _check_pair(slide_emb, report_emb, case_ids)
        if isinstance(case_ids, Tensor):
            cases = _case_tensor(case_ids, len(slide_emb))
        else:
            numbers = {case: i for i, case in enumerate(dict.fromkeys(case_ids))}
            cases = torch.tensor([numbers[case] for case in case_ids])
        cases = cases.to(slide_emb.device)
        slides = l2_normalize(slide_emb)
        reports = l2_normalize(report_emb).to(slides.dtype)
        scale = self.scale.to(slides.dtype)
        if self.bias is not None:
            return reference.siglip(slides, reports, cases, cases, scale, self.bias.to(slides.dtype))
        return reference.info_nce(slides, reports, cases, scale)

    def _registered_cases(self, case_ids: Cases) -> Tensor:
        """Case numbers int64 [B] as :meth:`set_reports` numbered them."""
        if isinstance(case_ids, Tensor):
            if self._numbers is not None:
                raise ValueError(
                    "SlideReportLoss: set_reports was given a list of cases; pass a list here as well"
                )
            return case_ids.long()
        if self._numbers is None:
            raise ValueError(
                "SlideReportLoss: set_reports was given cases as a tensor; pass a tensor here as well"
            )
        unknown = [case for case in case_ids if case not in self._numbers]
        if unknown:
            raise ValueError(f"SlideReportLoss: no report is registered for case {unknown[0]!r}")
        return torch.tensor([self._numbers[case] for case in case_ids])

    def _own_reports(self, cases: Tensor, positives: Tensor, case_ids: Cases) -> Tensor:
        """The one registered report of each slide's case, [B, T]."""
        assert self.reports is not None
        assert self.report_cases is not None
        if not torch.compiler.is_compiling() and (positives > 1).any():
            row = int((positives > 1).nonzero()[0, 0])
            raise ValueError(
                f"SlideReportLoss: case {_name(case_ids, row)!r} has {int(positives[row])} "
                "registered reports; pass report_emb to say which one belongs to the slide"
            )
        ascending, order = self.report_cases.sort(stable=True)
        return self.reports[order[torch.searchsorted(ascending, cases)]]

    def extra_repr(self) -> str:
        registered = 0 if self.reports is None else len(self.reports)
        return f"kind={self.kind!r}, negatives={self.negatives!r}, registered reports={registered}"


def _name(case_ids: Cases, row: int) -> Any:
    return int(case_ids[row]) if isinstance(case_ids, Tensor) else case_ids[row]


def _case_tensor(case_ids: Tensor, rows: int) -> Tensor:
    if case_ids.dim() != 1 or case_ids.is_floating_point() or len(case_ids) != rows:
        raise ValueError(
            f"SlideReportLoss: case_ids must be integers [{rows}], "
            f"got {case_ids.dtype} {tuple(case_ids.shape)}"
        )
    return case_ids.long()


def _check_finite(what: str, embeddings: Tensor, case_ids: Cases) -> None:
    if not torch.compiler.is_compiling() and not torch.isfinite(embeddings).all():
        row = int((~torch.isfinite(embeddings).all(dim=1)).nonzero()[0, 0])
        raise ValueError(f"{what} {row} (case {_name(case_ids, row)!r}) holds NaN or Inf")


def _check_pair(slide_emb: Tensor, report_emb: Tensor | None, case_ids: Cases) -> None:
    if slide_emb.dim() != 2 or not slide_emb.shape[0] or not slide_emb.is_floating_point():
        raise ValueError(
            f"SlideReportLoss: slide_emb must be floating point [B, T] with B >= 1, "
            f"got {slide_emb.dtype} {tuple(slide_emb.shape)}"
        )
    if len(case_ids) != len(slide_emb):
        raise ValueError(f"SlideReportLoss: {len(slide_emb)} slides, but {len(case_ids)} case ids")
    if isinstance(case_ids, Tensor):
        _case_tensor(case_ids, len(slide_emb))
    _check_finite("SlideReportLoss: slide embedding", slide_emb, case_ids)
    if report_emb is not None:
        if report_emb.shape != slide_emb.shape:
            raise ValueError(
                f"SlideReportLoss: slide_emb is {tuple(slide_emb.shape)}, "
                f"report_emb {tuple(report_emb.shape)}"
            )
        _check_finite("SlideReportLoss: report embedding", report_emb, case_ids)


def _check_registered(positives: Tensor, case_ids: Cases) -> None:
    if not torch.compiler.is_compiling() and (positives == 0).any():
        row = int((positives == 0).nonzero()[0, 0])
        raise ValueError(
            f"SlideReportLoss: no report is registered for case {_name(case_ids, row)!r} (row {row})"
        )
