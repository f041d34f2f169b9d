"""The training loop of DRE-SLCL, top to bottom: pre-fill, codebook, steps with write-back, validation, checkpoints."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dre_fast.codebook import fit_codebook
from dre_fast.data.cohort import Cohort, Task
from dre_fast.nn.loss import SlideReportLoss
from dre_fast.nn.model import SlideOutput
from dre_fast.nn.supervised import supervised_loss
from dre_fast.progress import progress
from dre_fast.train import state as on_disk
from dre_fast.train.augment import read_augmented
from dre_fast.train.batches import Batch, read_batches, without_tiles
from dre_fast.train.build import (
    SlideSet,
    build_model,
    load_reports,
    parameter_groups,
    slide_set,
    task_card,
)
from dre_fast.train.checks import (
    check_folder,
    check_labels,
    check_same_data,
    data_fingerprint,
    pick_device,
    split_records,
)
from dre_fast.train.config import Config, save_config
from dre_fast.train.exact import ExactBatch, check_exact
from dre_fast.train.fidelity import FidelityProbe, contrast_with_all
from dre_fast.train.inference import validate
from dre_fast.train.samplers import epoch_order, plan_epoch
from dre_fast.train.writer import BankWriter

Metrics = dict[str, float | int | str | None]


class Trainer:
    """One run in one folder. ``fit()`` trains, or resumes where the last checkpoint stands.

    Args:
        config: validated configuration; written resolved to ``out/config.yaml``.
        out: folder of the run. Files: config.yaml, metrics.jsonl, last.pt (checkpoint), best.safetensors (model),
            tensorboard/.
        resume: go on from ``out/last.pt`` (from the start when there is no checkpoint yet). Without it a folder that
            already holds a run is refused.

    Raises:
        ValueError: bad config, cohort, tiles or reports (named); the folder holds a run and ``resume`` is False; the
            config of the run differs from the one given.
    """

    def __init__(self, config: Config, out: str | Path, *, resume: bool = False) -> None:
        self.config = config = config.validate().with_absolute_paths()
        self.out = Path(out)
        check_folder(self.out, config, resume)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        torch.manual_seed(config.run.seed)
        self.device = pick_device(config.run.device)
        self._prepare_data()
        self._prepare_model()
        self.step = self.epoch = self.batch = 0
        self.best: float | None = None
        self.best_epoch = -1
        self._epoch_loss, self._epoch_steps = 0.0, 0
        self._log_size = 0
        checkpoint = self.out / on_disk.CHECKPOINT
        self._resumed = resume and checkpoint.exists()
        self._state = on_disk.load_checkpoint(checkpoint) if self._resumed else None
        if self._state is not None:
            check_same_data(self._state["data"], self._data, self.out)
        # last, so that a run refused for a fault of its settings leaves no run behind
        save_config(config, self.out / on_disk.CONFIG)

    # ------------------------------------------------------------------ parts

    def _prepare_data(self) -> None:
        data, loss = self.config.data, self.config.loss
        cohort = Cohort.read(data.cohort, missing_values=data.missing_values)
        train, val = split_records(cohort, data)
        self.tasks = [
            cohort.resolve(Task(task.name, task.kind, tuple(task.classes), tuple(task.columns)))
            for task in loss.tasks
        ]
        self.task_weight = {task.name: task.weight for task in loss.tasks}
        self.reports = load_reports(data.reports) if loss.contrastive else None
        options = {"backend": data.backend, "mpp": data.mpp, "max_open": data.max_open}
        options["skip_untiled"] = data.skip_untiled

        def open_split(records: Any, name: str) -> SlideSet:
            cache = Path(data.cache) / f"{name}.h5" if data.cache else None
            return slide_set(cohort, records, data.tiles, self.tasks, self.reports, cache=cache, **options)  # type: ignore[arg-type]

        self.train = open_split(train, "train")
        self.val = open_split(val, "val") if val else None
        if self.reports is not None and not (self.train.report_rows >= 0).any():
            raise ValueError(f"{data.reports}: holds a report for none of the training cases")
        check_labels(self.tasks, self.train, self.val)
        if self.config.model.codewords > sum(self.train.tiles):
            raise ValueError(
                f"model.codewords={self.config.model.codewords}, but the training slides have only "
                f"{sum(self.train.tiles)} tiles; ask for fewer codewords"
            )
        self._data = data_fingerprint(self.train, self.val, self.reports)

    def _prepare_model(self) -> None:
        config, reports = self.config, self.reports
        self.model = build_model(
            config,
            self.train.tiles,
            reports.matrix.shape[1] if reports else None,
            {task.name: task.outputs for task in self.tasks},
            self.device,
        )
        if config.memory.mode == "exact" or config.run.probe_every:
            check_exact(self.model.tile_encoder)
        self.writer = BankWriter(
            self.model,
            self.train,
            refresh=config.memory.refresh,
            decay=config.memory.writer_decay,
            chunk=config.run.encode_chunk,
            autocast=self._autocast,
        )
        self.loss = SlideReportLoss(
            kind=config.loss.contrastive or "infonce", negatives=config.loss.negatives
        )
        if reports is not None:
            self.report_matrix = reports.matrix.to(self.device)
            if config.loss.negatives == "all":
                rows = self.train.report_rows.unique()
                rows = rows[rows >= 0]
                self.loss.set_reports(reports.matrix[rows], rows)
        self.loss.to(self.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(
                self.model,
                self.loss,
                config.optim.lr,
                0.0 if config.optim.freeze_encoder else config.optim.encoder_lr_scale,
                config.optim.weight_decay,
            )
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.optim.amp == "fp16")
        self.steps_per_epoch = math.ceil(len(self.train) / config.optim.batch_size)

    # ------------------------------------------------------------------ run

    def fit(self) -> Path:
        """Train to the end of the last epoch; return the run's folder.

        Raises:
            FloatingPointError: the loss is not finite; names step and slides. The last checkpoint stays as it was.
        """
        if self._state is not None:
            self._restore(self._state)
            self._state = None
        self.log = on_disk.MetricsLog(self.out / on_disk.METRICS, self._log_size)
        self.board = on_disk.open_board(self.out, self.step) if self.config.run.tensorboard else None
        try:
            if not self._resumed:
                self._prefill()
                self._fit_codebook(warm=False)
                self._checkpoint()
            for epoch in range(self.epoch, self.config.optim.epochs):
                self._run_epoch(epoch)
        finally:
            self.log.close()
            if self.board is not None:
                self.board.close()
        return self.out

    def _run_epoch(self, epoch: int) -> None:
        config = self.config
        refit = config.memory.refit_every
        if self.batch == 0 and epoch > 0 and refit and epoch % refit == 0 and self._encoder_moved(epoch):
            self._fit_codebook(warm=True)
        batches = self._batches(epoch)
        remaining = self.steps_per_epoch - self.batch
        started = time.perf_counter()
        for batch in progress(
            batches, f"epoch {epoch + 1}/{config.optim.epochs}", total=remaining, unit="step"
        ):
            metrics = self._train_step(batch, epoch)
            self._epoch_loss += float(metrics["loss"] or 0.0)
            self._epoch_steps += 1
            self.step += 1
            self.batch += 1
            now = time.perf_counter()
            self._record("step", seconds=now - started, **metrics)
            if config.run.probe_every and self.step % config.run.probe_every == 0:
                self._measure_fidelity(epoch)
            started = time.perf_counter()
            if self.step % config.run.checkpoint_every == 0 and self.batch < self.steps_per_epoch:
                self._checkpoint()
        self._finish_epoch(epoch)

    def _batches(self, epoch: int) -> Iterator[Batch]:
        config = self.config
        size, seed = config.optim.batch_size, config.run.seed
        if config.memory.mode == "exact":
            return without_tiles(epoch_order(len(self.train), seed, epoch), size, self.batch)
        plan = plan_epoch(self.model.bank, epoch=epoch, live=config.memory.live, seed=seed)
        return read_batches(
            plan,
            self.train.reader,
            self.model.bank,
            batch_size=size,
            key=seed * 100_003 + epoch,
            start=self.batch,
            augment=config.data.augment,
            stain=config.data.stain,
            workers=config.data.workers,
        )

    def _measure_fidelity(self, epoch: int) -> None:
        started, config = time.perf_counter(), self.config
        probe = FidelityProbe(
            self.model,
            self.train,
            lambda out, slide: self._losses(out, slide)[0],
            contrast_with_all(self.loss, self.reports, self.train, config.loss.contrastive_weight),
            live=config.memory.live,
            chunk=config.run.encode_chunk,
            seed=config.run.seed,
            autocast=self._autocast,
        )
        found = probe.measure(self.step // config.run.probe_every, epoch)
        self._record("fidelity", step=self.step, epoch=epoch, **found, seconds=time.perf_counter() - started)

    def _finish_epoch(self, epoch: int) -> None:
        started = time.perf_counter()
        summary: Metrics = {"epoch": epoch, "train_loss": self._epoch_loss / max(self._epoch_steps, 1)}
        summary.update(_freshness(self.model.bank.statistics(step=self.step)))
        last = epoch + 1 == self.config.optim.epochs
        if self.val is not None and ((epoch + 1) % self.config.run.validate_every == 0 or last):
            summary.update(self._validate())
            score = float(summary["val_score"])  # type: ignore[arg-type]
            if self.best is None or score > self.best:
                self.best, self.best_epoch = score, epoch
                self._save_model()
        elif self.val is None and last:
            self._save_model()
        self.epoch, self.batch = epoch + 1, 0
        self._epoch_loss, self._epoch_steps = 0.0, 0
        self._record("epoch", seconds=time.perf_counter() - started, **summary)
        shown = [
            f"{k} {v:.3f}"
            for k, v in summary.items()
            if k.startswith(("train_loss", "val_")) and v is not None
        ]
        if not (self._encoder_moves(epoch) or self.config.optim.freeze_encoder):
            shown.append("encoder held still (optim.head_warmup_epochs)")
        if cache := self.model.bank.cache_statistics():
            used = cache["hits"] + cache["late"] + cache["misses"]
            shown.append(f"bank: {cache['hits'] / max(used, 1):.0%} of slides in memory when needed")
        print(f"epoch {epoch + 1}/{self.config.optim.epochs}: {', '.join(shown)}", file=sys.stderr)
        self._checkpoint()

    # ------------------------------------------------------------------ one step

    def _train_step(self, batch: Batch, epoch: int) -> Metrics:
        optim = self.config.optim
        self.model.train()
        # at rest it is also in eval mode: batch statistics and dropout belong to an encoder that learns
        self.model.tile_encoder.train(self._encoder_moves(epoch))
        self._set_rates(epoch)
        slides, tiles = batch.slides.to(self.device), batch.tiles.to(self.device)
        exact = self._exact(batch.slides, epoch) if self.config.memory.mode == "exact" else None
        if exact is not None:
            # every feature goes to the bank, so that codebooks are fitted to what is now
            out = exact.forward(partial(self.writer.keep, step=self.step + 1))
        else:
            if self._encoder_moves(epoch) or self._encoder_moved(epoch):  # else no row is out of date
                self.writer.renew(batch.slides, batch.tiles, step=self.step + 1)
            with self._autocast():
                out = self.model(
                    batch.images.to(self.device, non_blocking=True),
                    slides,
                    tiles,
                    visit=epoch,
                    seed=self.config.run.seed,
                )
        self._require_finite("slide embedding", out.embedding, batch)
        loss, parts = self._losses(out, batch.slides)
        self._require_finite("loss", loss, batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if exact is not None and self._encoder_moves(epoch):
            exact.backward()
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, optim.grad_clip or math.inf)
        if (
            not self.scaler.is_enabled()
        ):  # the scaler leaves such steps out; any other would spoil the weights
            self._require_finite("gradient", norm, batch)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self._encoder_moves(epoch):
            self.writer.follow()
        if out.live is not None:  # step 0 is the pre-fill
            self.writer.live(slides, tiles, batch.images, out.live.detach(), step=self.step + 1)
        rates = {bool(g["encoder"]): g["lr"] for g in self.optimizer.param_groups}
        return {
            "step": self.step,
            "epoch": epoch,
            "loss": loss.item(),
            **{f"loss_{name}": value.item() for name, value in parts.items()},
            "grad_norm": norm.item(),
            "lr": rates[False],
            "encoder_lr": rates.get(True, 0.0),
            "temperature": self.loss.temperature.item() if self.reports else None,
        }

    def _require_finite(self, what: str, value: Tensor, batch: Batch) -> None:
        if not torch.isfinite(value).all():
            names = ", ".join(self.train.records[i].slide_id for i in batch.slides.tolist())
            raise FloatingPointError(
                f"{what} is not finite at step {self.step} (slides {names}); the last checkpoint is intact. "
                "Lower optim.lr or optim.encoder_lr_scale, or set optim.amp=none"
            )

    def _losses(self, out: SlideOutput, slides: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        parts: dict[str, Tensor] = {}
        weights = {"contrastive": self.config.loss.contrastive_weight, **self.task_weight}
        if self.reports is not None and out.report is not None:
            rows = self.train.report_rows[slides]
            there = rows >= 0
            if there.any():
                cases = rows[there].to(self.device)
                parts["contrastive"] = self.loss(
                    out.report.float()[there.to(self.device)], self.report_matrix[cases], cases
                )
        for task in self.tasks:
            target = self.train.targets[task.name][slides].to(self.device)
            parts[task.name] = supervised_loss(task.kind, out.logits[task.name], target)
        total = sum(
            (weights[name] * part for name, part in parts.items()), out.embedding.new_zeros(()).float()
        )
        # a batch in which no slide has a report or label still has a graph, and a zero gradient
        return total + 0.0 * out.embedding.float().sum(), parts

    def _exact(self, slides: Tensor, epoch: int) -> ExactBatch:
        """All tiles of the slides, augmented as live tiles are."""
        data, key = self.config.data, self.config.run.seed * 100_003 + epoch
        return ExactBatch(
            self.model,
            slides.tolist(),
            partial(read_augmented, self.train.reader, data.augment, data.stain, key),
            [self.train.tiles[slide] for slide in slides.tolist()],
            chunk=self.config.run.encode_chunk,
            autocast=self._autocast,
        )

    def _set_rates(self, epoch: int) -> None:
        optim = self.config.optim
        total = optim.epochs * self.steps_per_epoch
        warm = min(1.0, (self.step + 1) / max(optim.warmup_steps, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / max(total, 1)))
        moves = self._encoder_moves(epoch)
        self.model.tile_encoder.requires_grad_(moves)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * warm * cosine if moves or not group["encoder"] else 0.0

    def _encoder_moves(self, epoch: int) -> bool:
        optim = self.config.optim
        return not optim.freeze_encoder and optim.encoder_lr_scale > 0 and epoch >= optim.head_warmup_epochs

    def _encoder_moved(self, epoch: int) -> bool:
        """Whether any epoch before this one trained the encoder: otherwise a refit has nothing to follow."""
        return any(self._encoder_moves(earlier) for earlier in range(epoch))

    def _autocast(self) -> torch.autocast:
        dtype = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.optim.amp]
        return torch.autocast(self.device.type, dtype, enabled=self.config.optim.amp != "none")

    # ------------------------------------------------------------------ bank and codebook

    def _prefill(self) -> None:
        started = time.perf_counter()
        self.writer.fill()
        self._record("prefill", tiles=sum(self.train.tiles), seconds=time.perf_counter() - started)

    def _fit_codebook(self, *, warm: bool) -> None:
        started = time.perf_counter()
        bank, config = self.model.bank, self.config
        codebook, inertia = fit_codebook(
            bank,
            config.model.codewords,
            iterations=config.memory.kmeans_iterations,
            warm_start=bank.codebook if warm else None,
            seed=config.run.seed,
        )
        bank.set_codebook(codebook)
        self._record(
            "codebook",
            epoch=self.epoch,
            inertia=inertia,
            warm=int(warm),
            seconds=time.perf_counter() - started,
        )

    # ------------------------------------------------------------------ validation and files

    def _validate(self) -> Metrics:
        assert self.val is not None
        return validate(
            self.model,
            self.val,
            self.tasks,
            self.loss if self.reports is not None else None,
            self.report_matrix if self.reports is not None else None,
            chunk=self.config.run.encode_chunk,
            autocast=self._autocast,
        )

    def _record(self, kind: str, **fields: float | int | str | None) -> None:
        self.log.write(kind=kind, **fields)
        if self.board is not None:
            for name, value in fields.items():
                if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                    self.board.add_scalar(f"{kind}/{name}", value, self.step)

    def _save_model(self) -> None:
        card = {
            "config": asdict(self.config),
            "tasks": {task.name: task_card(task) for task in self.tasks},
            "report_dim": self.model.slide_encoder.report_dim,
            "epoch": self.epoch,
        }
        on_disk.save_model(self.out / on_disk.BEST, self.model.state_dict(), card)

    def _checkpoint(self) -> None:
        self.log.sync()
        # the checkpoint names the bank's file, and is what makes both count: until it is there, the former two do
        bank = on_disk.bank_file(self.out, self.step)
        self.model.bank.save(bank)
        on_disk.save_checkpoint(
            self.out / on_disk.CHECKPOINT,
            {
                "model": on_disk.without_bank(self.model.state_dict()),
                "bank": bank.name,
                "writer": self.writer.state_dict(),
                "loss": self.loss.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
                "step": self.step,
                "epoch": self.epoch,
                "batch": self.batch,
                "epoch_loss": self._epoch_loss,
                "epoch_steps": self._epoch_steps,
                "best": self.best,
                "best_epoch": self.best_epoch,
                "log_size": self.log.size,
                "data": self._data,
            },
        )
        on_disk.remove_other_banks(self.out, bank)

    def _restore(self, state: dict[str, Any]) -> None:
        missing, unexpected = self.model.load_state_dict(state["model"], strict=False)
        missing = [key for key in missing if not key.startswith("bank.")]
        if missing or unexpected:
            raise ValueError(f"{self.out / on_disk.CHECKPOINT}: of another model: {missing + unexpected}")
        self.model.bank.restore(self.out / state["bank"])
        self.writer.load_state_dict(state["writer"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self._epoch_loss, self._epoch_steps = state["epoch_loss"], state["epoch_steps"]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self._log_size = state["log_size"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])


def _freshness(statistics: dict[str, Any]) -> Metrics:
    """The scalars of the bank's statistics, for the log."""
    scalars = {f"bank_{k}": v for k, v in statistics.items() if v is None or isinstance(v, (int, float))}
    return scalars | {f"bank_drift_{k}": v for k, v in statistics["drift"].items()}
