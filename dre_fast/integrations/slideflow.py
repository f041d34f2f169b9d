"""ResidualMIL as a MIL model of slideflow, which only :func:`register` imports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dre_fast.integrations.build import CodebookFile, build_model, need_host
from dre_fast.nn.residual_mil import ResidualMIL


class ResidualSlideflow(nn.Module):
    """Built and called as slideflow's MIL models: padded bags with their lengths.

    Attention becomes contributions to the largest logit (:meth:`~dre_fast.ResidualMIL.contributions`): signed, 0 in the
    padding.

    Args:
        n_feats: D of the features. n_out: C.
        codebook: file of :func:`~dre_fast.integrations.build.save_codebook`. model: an existing model.
        options: of a new :class:`~dre_fast.ResidualMIL`: codewords, assignment, width, head, dropout, ...
    """

    use_lens = True  # slideflow then passes the lengths of the bags

    def __init__(
        self,
        n_feats: int,
        n_out: int,
        *,
        codebook: CodebookFile | None = None,
        model: ResidualMIL | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.mil = build_model(n_feats, n_out, model, codebook, **options)

    def forward(self, bags: Tensor, lens: Tensor, *, return_attention: bool = False) -> Any:
        """Bags [B, N, D] with lengths int [B] -> logits [B, C], and with ``return_attention`` [B, N, 1]."""
        logits = self.mil(bags, mask=_valid(bags, lens))
        return (logits, self.calculate_attention(bags, lens)) if return_attention else logits

    def calculate_attention(self, bags: Tensor, lens: Tensor, *, apply_softmax: bool | None = None) -> Tensor:
        """Contributions fp32 [B, N, 1]; with ``apply_softmax`` their softmax over the tiles of a bag."""
        valid = _valid(bags, lens)
        scores = self.mil.contributions(bags, mask=valid)
        if apply_softmax:
            weights = scores.masked_fill(~valid, -torch.inf).softmax(1)
            scores = weights.masked_fill(~valid, 0.0)  # also where a bag is empty, whose softmax is NaN
        return scores[..., None]

    def relocate(self) -> None:
        """To the accelerator, where there is one."""
        self.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def register(name: str = "residual_mil", **options: Any) -> None:
    """Make ``sf.mil.mil_config("residual_mil", ...)`` build :class:`ResidualSlideflow`.

    Args:
        name: what slideflow is to call it.
        options: what the model is built with beside the sizes, which are all that slideflow passes: codebook,
            codewords, width, ... Register it the same way before loading a trained one.

    Raises:
        ModuleNotFoundError: slideflow does not import.
    """

    class Registered(ResidualSlideflow):
        def __init__(self, n_feats: int, n_out: int, **more: Any) -> None:
            super().__init__(n_feats, n_out, **{**options, **more})

    Registered.__name__ = Registered.__qualname__ = ResidualSlideflow.__name__  # the name in slideflow's logs

    def residual_mil() -> type[ResidualSlideflow]:
        return Registered

    need_host("slideflow.mil", "slideflow").register_model(name)(residual_mil)


def _valid(bags: Tensor, lens: Tensor) -> Tensor:
    return torch.arange(bags.shape[1], device=bags.device) < lens.to(bags.device)[:, None]
