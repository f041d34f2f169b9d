"""What goes into the bank during training: the first fill, the live rows, the oldest rows again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dre_fast.nn.model import DRESLCL
from dre_fast.progress import progress
from dre_fast.train.build import SlideSet
from dre_fast.train.config import DataConfig
from dre_fast.train.read_ahead import chunks_of, read_jobs, read_or_error

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


class BankWriter:
    """Encodes rows for the bank, with the encoder or its moving average, and writes them.

    A tile that is live is refreshed once in ceil(n/m) visits of its slide. Beside them :meth:`renew` encodes some rows
    again before a step, without gradient, the oldest of its slides first. With ``decay`` the rows come from a moving
    average of the encoder's weights, which moves more slowly (as in MoCo, He et al. 2020).

    Args:
        shards: shard -> its slides, int64, of ``all_shards`` of the run: each renews its part of the rows of a step,
            so that it does not matter which process holds it.
        decay: of the moving average, in [0, 1); 0 writes what the encoder itself gives.
        chunk: tiles encoded at once.
        data: ``workers``, ``threads``, ``slow_seconds``, ``on_error``, ``max_failing``.
    """

    def __init__(
        self,
        model: DRESLCL,
        slides: SlideSet,
        shards: Mapping[int, Tensor],
        all_shards: int,
        *,
        decay: float,
        chunk: int,
        data: DataConfig,
        autocast: Autocast,
    ) -> None:
        self.model, self.slides, self.shards, self.all_shards = model, slides, shards, all_shards
        self.chunk, self.data, self.autocast = chunk, data, autocast
        self.average: AveragedModel | None = None
        if decay:
            self.average = AveragedModel(model.tile_encoder, multi_avg_fn=get_ema_multi_avg_fn(decay))
            self.average.update_parameters(model.tile_encoder)  # its first call copies, later ones average

    @torch.no_grad()
    def fill(self) -> None:
        """Encode and write every tile of every slide, as of step 0; read ahead as the live tiles are.

        Raises:
            ValueError: a feature that is not finite, or tiles that cannot be read; names slide and tile. With
                ``data.on_error="skip"`` such tiles stay unwritten, unless there are more than ``data.max_failing``.
            OSError: a process that reads died.
        """
        jobs = chunks_of(self.slides.tiles, self.chunk)
        names = [record.slide_id for record in self.slides.records]
        data = self.data
        read = read_jobs(
            self.slides.reader,
            jobs,
            names,
            workers=data.workers,
            threads=data.threads,
            slow=data.slow_seconds,
        )
        failed = 0
        for (slide, tiles), images in progress(
            zip(jobs, read), "pre-fill bank", total=len(jobs), unit="chunk"
        ):
            if isinstance(images, ValueError):
                error, wanted = images, len(tiles)
                tiles, images = self._readable(slide, tiles) if self._skips else (tiles[:0], torch.empty(0))
                failed += wanted - len(tiles)
                self._skip(error, failed, sum(self.slides.tiles))
                if not len(tiles):
                    continue
            features = self._encode(images)
            bad = self._first_bad(features)
            if bad is not None:
                raise ValueError(
                    f"{self._name(slide, tiles[bad])}: the encoder's feature is not finite; look at "
                    "model.encoder_weights, optim.amp"
                )
            self.keep(slide, tiles, features, step=0)

    def _skip(self, error: ValueError, failed: int, tiles: int) -> None:
        """Go on without tiles that cannot be read, or raise."""
        if not self._skips or failed > self.data.max_failing * tiles:
            raise error
        warnings.warn(f"{failed} of {tiles} tiles left out of the bank so far: {error}", stacklevel=3)

    @torch.no_grad()
    def renew(self, slides: Tensor, tiles: Tensor, rows: int, *, step: int) -> None:
        """Before a step: encode the oldest rows of its slides again, except the tiles that are live.

        Args:
            slides: int64 [B]; tiles: int64 [B, m], the live ones; both on the CPU.
            rows: R of the whole step; every shard of the run renews its part.
            step: age stamp of the rows.
        """
        for shard, own in self.shards.items() if rows else ():
            share = rows // self.all_shards + (shard < rows % self.all_shards)
            there = torch.isin(slides, own)
            if share and bool(there.any()):
                self._renew(slides[there], tiles[there], share, step)

    def _renew(self, slides: Tensor, tiles: Tensor, rows: int, step: int) -> None:
        bank = self.model.bank
        ages, slide, tile = [], [], []
        for s, live in zip(slides.tolist(), tiles):
            age = bank.ages(s).cpu().to(torch.int64)
            others = torch.ones_like(age, dtype=torch.bool)
            others[live[live >= 0]] = False
            number = others.nonzero().squeeze(1)
            ages.append(age[number])
            slide.append(torch.full_like(number, s))
            tile.append(number)
        oldest = torch.cat(ages).sort(stable=True).indices[:rows]
        slide_of, tile_of = torch.cat(slide)[oldest], torch.cat(tile)[oldest]
        for s in slide_of.unique().tolist():  # a slide at a time, as they are read
            for chosen in tile_of[slide_of == s].sort().values.split(self.chunk):
                there, images = self._readable(s, chosen, "row not renewed")
                if len(there):
                    self.keep(s, there, self._encode(images), step=step)

    @property
    def _skips(self) -> bool:
        return self.data.on_error == "skip"

    def _readable(self, slide: int, tiles: Tensor, warning: str = "") -> tuple[Tensor, Tensor]:
        """Tiles int64 [c] that can be read, with their images: one that cannot must not keep the others from it.

        Args:
            warning: what is said of each that cannot.
        """
        images = read_or_error(self.slides.reader, slide, tiles)
        if isinstance(images, Tensor):
            return tiles, images
        if not self._skips:
            raise images
        if len(tiles) == 1:
            if warning:
                warnings.warn(f"{warning}: {images}", stacklevel=4)
            return tiles[:0], torch.empty(0)
        halves = [self._readable(slide, half, warning) for half in tiles.tensor_split(2)]
        there = [half for half in halves if len(half[0])]
        if not there:
            return tiles[:0], torch.empty(0)
        return torch.cat([own for own, _ in there]), torch.cat([own for _, own in there])

    @torch.no_grad()
    def live(self, slides: Tensor, tiles: Tensor, images: Tensor, features: Tensor, *, step: int) -> None:
        """After a step: write its live rows.

        Args:
            slides: int64 [B]; tiles: int64 [B, m]; images [B, m, 3, P, P]; features [B, m, D] of the step.
        """
        device = features.device
        slides, tiles = slides.to(device), tiles.to(device)
        rows = slides[:, None].expand_as(tiles).reshape(-1)
        found = features.flatten(0, 1)
        if self.average is not None:
            found = torch.cat([self._encode(part) for part in images.flatten(0, 1).split(self.chunk)])
        self.model.bank.write(rows, tiles.reshape(-1), found, step=step)

    @torch.no_grad()
    def keep(self, slide: int, tiles: Tensor, features: Tensor, *, step: int) -> None:
        """Write features [c, D] of tiles int64 [c] of one slide.

        Raises:
            FloatingPointError: one is not finite; names slide and tile.
        """
        self._require_finite(features, slide, tiles, step)
        tiles = tiles.to(features.device)
        self.model.bank.write(torch.full_like(tiles, slide), tiles, features, step=step)

    def follow(self) -> None:
        """After the encoder moved: bring the moving average after it."""
        if self.average is not None:
            self.average.update_parameters(self.model.tile_encoder)

    def state_dict(self) -> dict[str, Tensor]:
        """The moving average; empty without one."""
        return {} if self.average is None else self.average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        if self.average is not None:
            self.average.load_state_dict(state)

    def _encode(self, images: Tensor) -> Tensor:
        encoder: nn.Module = self.model.tile_encoder if self.average is None else self.average
        training = encoder.training
        encoder.eval()
        try:
            with self.autocast():
                return self.model.encode_tiles(
                    images.to(self.model.codebook.device, non_blocking=True), encoder
                )
        finally:
            encoder.train(training)

    @staticmethod
    def _first_bad(features: Tensor) -> int | None:
        bad = ~torch.isfinite(features).all(1)
        return int(bad.nonzero()[0, 0]) if bool(bad.any()) else None

    def _require_finite(self, features: Tensor, slide: int, tiles: Tensor, step: int) -> None:
        bad = self._first_bad(features)
        if bad is not None:
            raise FloatingPointError(
                f"{self._name(slide, tiles[bad])}: the encoder's feature is not finite at step {step}; the last "
                "checkpoint is intact. Lower optim.lr or optim.encoder_lr_scale, or set optim.amp=none"
            )

    def _name(self, slide: int, tile: Tensor) -> str:
        return f"slide {self.slides.records[slide].slide_id}, tile {int(tile)}"
