"""DRE-SLCL: tile encoder, memory bank, residual encoding, slide encoder and heads in one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from dre_fast.nn.aggregators import RowAggregator
from dre_fast.nn.bank import MemoryBank
from dre_fast.nn.encoding import residual_encode
from dre_fast.nn.slide_encoder import SlideEncoder
from dre_fast.ops.normalize import normalize_residuals
from dre_fast.reference.encode import l2_normalize, normalization_steps


@dataclass
class SlideOutput:
    """What a batch of B slides becomes.

    ``embedding`` [B, width]; ``report`` [B, T], the projection into the report space (not normalised), or None
    without one; ``logits`` task name -> [B, C]: these in fp32, or in autocast's dtype under autocast. ``residuals`` V
    fp32 [B, K, D], un-normalised; ``live`` fp32 [B, m, D], the L2-normalised features of the live tiles (with
    gradient), None at inference. ``residuals`` is None where another aggregator than residuals to the bank's codebook
    reads the rows.
    """

    embedding: Tensor
    report: Tensor | None
    logits: dict[str, Tensor]
    residuals: Tensor | None
    live: Tensor | None = None


class DRESLCL(nn.Module):
    """The whole slide model of DRE-SLCL (arXiv 2511.05034): ``forward`` trains it, ``encode_bags`` applies it.

    Args:
        tile_encoder: any module [*, 3, H, W] -> [*, D].
        bank: the :class:`~dre_fast.MemoryBank` of the training slides, with its codebook; a bank of no slides is
            enough for inference.
        slide_encoder: :class:`~dre_fast.SlideEncoder` for the same K and D, or a
            :class:`~dre_fast.nn.aggregators.RowAggregator` for the same D, which is given the live rows and those of
            the bank instead of residuals.
        tasks: supervised heads, task name -> number of logits. May be empty.
        memory: ``"full"`` (every written row of the slide, through its running sums; an aggregator of rows reads them
            all, at a cost that grows with the slide), an int r (r rows retrieved from the bank, the paper's mode) or
            ``"none"`` (live tiles only).
        grad_scale: factor on the gradient of the live features: ``"none"`` = 1, ``"unbiased"`` = rows that the slide's
            summary is of, n_s or with r retrieved ones min(n_s, m + r), over the m slots in use; or a float. Over the
            visits of a slide the mean is then the gradient through all its rows, whose features are those of now.
        normalize: normalisations of V in the order intra, power, l2.

    Raises:
        ValueError: the parts disagree on D or K, or ``memory``, ``grad_scale`` or ``normalize`` is not one of the
            above.
    """

    def __init__(
        self,
        tile_encoder: nn.Module,
        bank: MemoryBank,
        slide_encoder: SlideEncoder | RowAggregator,
        *,
        tasks: Mapping[str, int] | None = None,
        memory: str | int = "full",
        grad_scale: str | float = "none",
        normalize: str | Sequence[str] = ("intra", "l2"),
    ) -> None:
        super().__init__()
        if bank.dim != slide_encoder.dim:
            raise ValueError(f"DRESLCL: bank has D={bank.dim}, slide encoder D={slide_encoder.dim}")
        words = bank.codebook.shape[0]
        if isinstance(slide_encoder, SlideEncoder) and words and words != slide_encoder.codewords:
            raise ValueError(f"DRESLCL: bank has K={words}, slide encoder K={slide_encoder.codewords}")
        rows = isinstance(memory, int) and not isinstance(memory, bool) and memory >= 0
        if memory not in ("full", "none") and not rows:
            raise ValueError(f"DRESLCL: memory must be 'full', 'none' or an int r >= 0, got {memory!r}")
        if grad_scale not in ("none", "unbiased") and not isinstance(grad_scale, (int, float)):
            raise ValueError(
                f"DRESLCL: grad_scale must be 'none', 'unbiased' or a number, got {grad_scale!r}"
            )
        self.tile_encoder = tile_encoder
        self.bank = bank
        self.slide_encoder = slide_encoder
        self.heads = nn.ModuleDict(
            {name: nn.Linear(slide_encoder.width, n) for name, n in (tasks or {}).items()}
        )
        self.memory = memory
        self.grad_scale = grad_scale
        self.normalize = normalization_steps(normalize)

    @property
    def codebook(self) -> Tensor:
        """Codebook C [K, D], fp32."""
        return self.bank.codebook

    def encode_tiles(self, images: Tensor, encoder: nn.Module | None = None) -> Tensor:
        """Images [R, 3, H, W] (uint8, or float in [0, 1]) -> L2-normalised fp32 features [R, D].

        Args:
            encoder: another tile encoder than the model's, such as a moving average of it.

        Raises:
            ValueError: the tile encoder does not return [R, D].
        """
        features = (self.tile_encoder if encoder is None else encoder)(images)
        if features.shape != (images.shape[0], self.bank.dim):
            raise ValueError(
                f"DRESLCL: the tile encoder returned {tuple(features.shape)} for {images.shape[0]} tiles; "
                f"expected {(images.shape[0], self.bank.dim)}"
            )
        return l2_normalize(features.float())

    def forward(
        self, images: Tensor, slides: Tensor, tiles: Tensor, *, visit: Tensor | int = 0, seed: int = 0
    ) -> SlideOutput:
        """One training forward: the live tiles with gradient, the other rows of each slide from the bank.

        Args:
            images: live tiles [B, m, 3, H, W], uint8 or float in [0, 1].
            slides: int64 [B], slide ids in the bank.
            tiles: int64 [B, m], tile ids of the live tiles; -1 marks an unused slot (slide smaller than m).
            visit: visit number of the slides, int or int64 [B]; with ``seed`` it fixes the rows retrieved when
                ``memory`` is an int, so that they never overlap the live ones. Unused otherwise.
            seed: seed of the sampling permutation.

        Returns:
            :class:`SlideOutput` of the B slides, with ``live`` [B, m, D].

        Raises:
            ValueError: the tile encoder's output has another shape, or as :meth:`MemoryBank.encode` does.
        """
        b = tiles.shape[0]
        live = rearrange(
            self.encode_tiles(rearrange(images, "b m ... -> (b m) ...")), "(b m) d -> b m d", b=b
        )
        scaled = self._scale_gradient(live, slides, tiles)
        if isinstance(self.slide_encoder, RowAggregator):
            out = self.represent_rows(*self._with_bank(scaled, slides, tiles, visit, seed))
        else:
            residuals = self.bank.encode(slides, tiles, scaled, memory=self.memory, cycle=visit, seed=seed)
            assert isinstance(residuals, Tensor)  # not the pair that return_counts gives
            out = self.represent(residuals)
        out.live = live
        return out

    def _with_bank(
        self, live: Tensor, slides: Tensor, tiles: Tensor, visit: Tensor | int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """The live rows and those of the bank, in the order of their tiles: rows [B, N, D] and which are valid."""
        bank, ids = self.bank, tiles
        rows = live
        if self.memory != "none":
            if isinstance(self.memory, int):
                others = bank.retrieved(slides, tiles, self.memory, visit, seed)
            else:
                others = bank.others(slides, tiles)
            b, r = others.shape
            stored = bank.read(slides.repeat_interleave(r), others.reshape(-1)).view(b, r, -1)
            ids, rows = torch.cat([tiles, others], 1), torch.cat([live, stored.to(live)], 1)
        order = torch.where(ids >= 0, ids, torch.iinfo(ids.dtype).max).sort(dim=1, stable=True).indices
        return rows.gather(1, order[..., None].expand_as(rows)), ids.gather(1, order) >= 0

    def _scale_gradient(self, live: Tensor, slides: Tensor, tiles: Tensor) -> Tensor:
        if self.grad_scale == "none":
            return live
        if self.grad_scale == "unbiased":
            # what reads V or the rows is blind to how many there are, so n_s/m would be too much for a part of them
            used = (tiles >= 0).sum(1)
            rows = self.bank.length[slides]
            if self.memory != "full":
                rows = torch.minimum(rows, used + (self.memory if isinstance(self.memory, int) else 0))
            factor = (rows / used.clamp(min=1)).to(live.dtype)[:, None, None]
        else:
            factor = torch.tensor(float(self.grad_scale), dtype=live.dtype, device=live.device)
        return (
            live.detach() + (live - live.detach()) * factor
        )  # the value stays exact, the gradient is scaled

    def no_slides(self) -> SlideOutput:
        """The output of no slides, B = 0; without gradient."""
        weight = next(self.slide_encoder.parameters())
        report_dim = self.slide_encoder.report_dim
        return SlideOutput(
            weight.new_zeros(0, self.slide_encoder.width),
            weight.new_zeros(0, report_dim) if report_dim else None,
            {name: weight.new_zeros(0, int(head.out_features)) for name, head in self.heads.items()},  # type: ignore[arg-type]
            None,
        )

    def represent(self, residuals: Tensor) -> SlideOutput:
        """Un-normalised residuals V [B, K, D] -> :class:`SlideOutput`, with ``live`` None.

        Raises:
            ValueError: V is not [B, K, D] of the slide encoder.
        """
        return self._output(self.slide_encoder(normalize_residuals(residuals, self.normalize)), residuals)

    def represent_rows(self, rows: Tensor, mask: Tensor) -> SlideOutput:
        """Rows [B, N, D] and mask bool [B, N], True = valid -> :class:`SlideOutput`, with an aggregator of rows.

        Raises:
            ValueError: shapes that do not fit it.
        """
        return self._output(self.slide_encoder(rows, mask), None)

    def _output(self, embedding: Tensor, residuals: Tensor | None) -> SlideOutput:
        report = self.slide_encoder.project(embedding) if self.slide_encoder.report_dim else None
        logits = {name: head(embedding) for name, head in self.heads.items()}
        return SlideOutput(embedding, report, logits, residuals)

    def encode_bags(self, features: Tensor, cu_seqlens: Tensor | None = None) -> SlideOutput:
        """Inference on all rows of each slide; the bank is not used, only its codebook.

        Args:
            features: [N, D] rows of B ragged bags (L2-normalised here), e.g. ``encode_tiles`` of every tile.
            cu_seqlens: int32 or int64 [B+1] row offsets; ``None`` means one bag.

        Returns:
            :class:`SlideOutput` of the B slides, with ``live`` None.

        Raises:
            ValueError: as :func:`dre_fast.residual_encode` does: wrong shapes or offsets, no codebook (an aggregator
                of rows needs none), NaN or Inf in a row (bag and row named).
        """
        rows = l2_normalize(features.float())
        if isinstance(self.slide_encoder, RowAggregator):
            together, mask = padded(rows, cu_seqlens)
            bad = ~torch.isfinite(together).all(2)
            if bad.any():
                bag, row = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"encode_bags: row {row} of bag {bag} holds NaN or Inf ({int(bad.sum())} such rows in all)"
                )
            return self.represent_rows(together, mask)
        return self.represent(residual_encode(rows, self.codebook, cu_seqlens=cu_seqlens))


def padded(rows: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ragged rows [N, D] of B bags -> rows [B, n, D], padded with zeros, and mask bool [B, n], True = valid.

    Args:
        cu_seqlens: int32 or int64 [B+1] row offsets; None means one bag.

    Raises:
        ValueError: rows that are not [N, D], or offsets that do not ascend from 0 to N.
    """
    if rows.ndim != 2:
        raise ValueError(f"rows must be [N, D], got {list(rows.shape)}")
    if cu_seqlens is None:
        return rows[None], torch.ones(1, len(rows), dtype=torch.bool, device=rows.device)
    offsets = cu_seqlens.tolist()
    if cu_seqlens.ndim != 1 or offsets[:1] != [0] or offsets[-1] != len(rows) or offsets != sorted(offsets):
        shown = ", ".join(map(str, offsets[:8])) + (", ..." if len(offsets) > 8 else "")
        raise ValueError(f"cu_seqlens must ascend from 0 to the number of rows, {len(rows)}; got [{shown}]")
    bags = rows.split([end - start for start, end in pairwise(offsets)])
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(rows.device)
    together = nn.utils.rnn.pad_sequence(list(bags), batch_first=True)
    return together, torch.arange(together.shape[1], device=rows.device) < lengths[:, None]
