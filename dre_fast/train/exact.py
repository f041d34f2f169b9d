"""The oracle: the gradient through every tile of a slide, at the memory of one chunk of tiles.

V = sum over all tiles of (f - c) is a sum, so its gradient needs no tile beside another (dre_fast's own; streaming CNNs
pay for the same with special layers):

    pass 1   every tile is encoded without a graph, chunk by chunk, and V is summed up
    loss     of V, gives dL/dV
    pass 2   every chunk is encoded again, with a graph, and its share of V is back-propagated from dL/dV

The second pass sees the same random numbers as the first, so dropout is no obstacle. Batch normalisation is one: a
tile's feature then depends on the tiles beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dre_fast.nn.aggregators import RowAggregator
from dre_fast.nn.encoding import residual_encode
from dre_fast.nn.model import DRESLCL, SlideOutput, padded
from dre_fast.nn.tile_encoders import cross_sample_modules

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


def check_exact(encoder: nn.Module) -> None:
    """Refuse encoders that mix the tiles of a batch.

    Raises:
        ValueError: names the layers.
    """
    mixing = cross_sample_modules(encoder)
    if mixing:
        raise ValueError(
            f"exact gradients need an encoder without batch normalisation: {', '.join(mixing[:3])}"
            f"{' ...' if len(mixing) > 3 else ''}. Use one with layer or group normalisation, or another memory mode"
        )


class ExactBag:
    """One slide, all its tiles.

    Args:
        model: its tile encoder and codebook are used, the bank's rows are not.
        read: int64 [c] -> images [c, 3, H, W] of those tiles, the same at every call.
        tiles: number of tiles n.
        chunk: tiles encoded at once; memory grows with it, not with n.
        autocast: a context for the encoder.

    Raises:
        ValueError: the encoder has batch normalisation (layers named), or there is no tile.
    """

    def __init__(
        self,
        model: DRESLCL,
        read: Callable[[Tensor], Tensor],
        tiles: int,
        *,
        chunk: int = 256,
        autocast: Autocast = contextlib.nullcontext,
    ) -> None:
        check_exact(model.tile_encoder)
        if tiles < 1:
            raise ValueError("ExactBag: a slide needs at least one tile")
        self.model, self.read, self.tiles, self.chunk, self.autocast = model, read, tiles, chunk, autocast
        self._random: list[dict[str, Any]] = []

    @torch.no_grad()
    def encode(self, keep: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
        """Pass 1: residuals of all tiles, un-normalised, fp32 [K, D].

        Args:
            keep: called with the tiles int64 [c] and features fp32 [c, D] of every chunk, to store them.
        """
        self._random = []
        total = torch.zeros(self.model.codebook.shape, dtype=torch.float64, device=self.model.codebook.device)
        for tiles in self._chunks():
            self._random.append(_random_state(total.device))
            features = self._features(tiles)
            total += self._residuals(features)
            if keep is not None:
                keep(tiles, features)
        return total.float()

    @torch.no_grad()
    def rows(self, keep: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
        """Pass 1 for an aggregator of rows: features of all tiles, fp32 [n, D]. ``keep``: as for :meth:`encode`."""
        self._random, parts = [], []
        for tiles in self._chunks():
            self._random.append(_random_state(self.model.codebook.device))
            parts.append(self._features(tiles))
            if keep is not None:
                keep(tiles, parts[-1])
        return torch.cat(parts)

    def backward(self, grad: Tensor) -> None:
        """Pass 2: add the gradient of sum(grad * V) to that of the encoder's parameters. ``grad``: [K, D].

        Raises:
            RuntimeError: before :meth:`encode`.
        """
        self._back(lambda tiles: (self._residuals(self._features(tiles)), grad), grad.device)

    def backward_rows(self, grad: Tensor) -> None:
        """Pass 2 after :meth:`rows`: the same for sum(grad * rows). ``grad``: [n, D].

        Raises:
            RuntimeError: before :meth:`rows`.
        """
        self._back(lambda tiles: (self._features(tiles), grad[tiles.to(grad.device)]), grad.device)

    def _back(self, part: Callable[[Tensor], tuple[Tensor, Tensor]], device: torch.device) -> None:
        """Back-propagate what ``part`` makes of each chunk's tiles, (value, its gradient), as pass 1 drew it."""
        if not self._random:
            raise RuntimeError("ExactBag: encode() or rows() comes before the way back")
        after = _random_state(device)
        try:
            for tiles, state in zip(self._chunks(), self._random):
                _set_random_state(state, device)
                with torch.enable_grad():
                    value, grad = part(tiles)
                if value.requires_grad:
                    value.backward(grad)
        finally:
            _set_random_state(after, device)

    def _chunks(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.tiles).split(self.chunk))

    def _features(self, tiles: Tensor) -> Tensor:
        images = self.read(tiles).to(self.model.codebook.device, non_blocking=True)
        with self.autocast():
            return self.model.encode_tiles(images)

    def _residuals(self, features: Tensor) -> Tensor:
        V = residual_encode(features, self.model.codebook)
        assert isinstance(V, Tensor)  # not the pair that return_counts gives
        return V[0]


class ExactBatch:
    """The slides of a step, all their tiles: :meth:`forward`, the loss and its backward, then :meth:`backward`.

    Args:
        slides: ids, in the order of the output.
        read: (slide, tiles int64 [c]) -> images [c, 3, H, W], the same at every call.
        tiles: number of tiles of each slide.
        model, chunk, autocast: as for :class:`ExactBag`, which says what is refused.
    """

    def __init__(
        self,
        model: DRESLCL,
        slides: Sequence[int],
        read: Callable[[int, Tensor], Tensor],
        tiles: Sequence[int],
        *,
        chunk: int = 256,
        autocast: Autocast = contextlib.nullcontext,
    ) -> None:
        self.model, self.slides, self.autocast = model, list(slides), autocast
        self.bags = [
            ExactBag(model, partial(read, slide), n, chunk=chunk, autocast=autocast)
            for slide, n in zip(slides, tiles)
        ]
        self._summary: Tensor | None = None  # what the model is given of the slides: residuals, or rows

    def forward(self, keep: Callable[[int, Tensor, Tensor], None] | None = None) -> SlideOutput:
        """Every tile of every slide -> :class:`SlideOutput`.

        Args:
            keep: called with slide, tiles int64 [c] and features fp32 [c, D] of every chunk, to store them.
        """
        keeps = [None if keep is None else partial(keep, slide) for slide in self.slides]
        if isinstance(self.model.slide_encoder, RowAggregator):
            rows = [bag.rows(own) for bag, own in zip(self.bags, keeps)]
            ends = torch.tensor([0, *(len(own) for own in rows)]).cumsum(0)
            together, mask = padded(torch.cat(rows), ends)
            self._summary = together.requires_grad_()
            with self.autocast():
                return self.model.represent_rows(self._summary, mask)
        self._summary = torch.stack([bag.encode(own) for bag, own in zip(self.bags, keeps)]).requires_grad_()
        with self.autocast():
            return self.model.represent(self._summary)

    def backward(self) -> None:
        """After the loss's backward: bring its gradient to the tile encoder."""
        if self._summary is None or self._summary.grad is None:
            raise RuntimeError("ExactBatch: forward() and the loss's backward() come before backward()")
        rows = isinstance(self.model.slide_encoder, RowAggregator)
        for bag, grad in zip(self.bags, self._summary.grad):
            if rows:
                bag.backward_rows(grad[: bag.tiles])
            else:
                bag.backward(grad)


def _random_state(device: torch.device) -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
