"""The training loop of DRE-SLCL, top to bottom: pre-fill, codebook, steps with write-back, validation, checkpoints."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dre_fast.nn.aggregators import RowAggregator
from dre_fast.nn.model import SlideOutput
from dre_fast.progress import progress
from dre_fast.train import checkpoint
from dre_fast.train import state as on_disk
from dre_fast.train.augment import read_augmented
from dre_fast.train.batches import Batch, read_batches, without_tiles
from dre_fast.train.build import build_model, clip_gradients, parameter_groups, task_card
from dre_fast.train.checks import check_folder, check_same_data, pick_device
from dre_fast.train.codebook import fit_on_bank
from dre_fast.train.config import Config, save_config
from dre_fast.train.cost import say_cost
from dre_fast.train.data_card import data_card, write_data_card
from dre_fast.train.distributed import Group, own_device
from dre_fast.train.exact import ExactBatch, check_exact
from dre_fast.train.failures import Failures
from dre_fast.train.fidelity import FidelityProbe, contrast_with_all
from dre_fast.train.freshness import Scalars, freshness
from dre_fast.train.guard import EncoderGuard
from dre_fast.train.inference import validate
from dre_fast.train.loggers import Loggers, check_loggers, loggers_of
from dre_fast.train.objective import Objective
from dre_fast.train.pictures import Pictures
from dre_fast.train.planner import planner_of
from dre_fast.train.run_data import RunData
from dre_fast.train.samplers import epoch_order
from dre_fast.train.shards import with_shards
from dre_fast.train.start import start_from
from dre_fast.train.supervision import describe_tasks
from dre_fast.train.tile_scales import scales_seen
from dre_fast.train.writer import BankWriter

_LEAST_SCALE = 1e-4  # of fp16 gradients; a scaler begins at 65,536


class Trainer:
    """One run in one folder. ``fit()`` trains, or resumes where the last checkpoint stands.

    Under torchrun every process makes one, with the same arguments: each holds its share of the slides and of the
    bank, the first one writes the files (see :mod:`dre_fast.train.distributed`).

    Args:
        config: validated configuration; written resolved to ``out/config.yaml``.
        out: folder of the run. Files: config.yaml, metrics.jsonl, last.pt (checkpoint) and the bank's folder, which it
            names, best.safetensors (model), data.json (what it learns from), tensorboard/, loggers.json; at the end
            cost.json, and report.html (a page about the run).
        resume: go on from ``out/last.pt`` (from the start when there is no checkpoint yet). Without it a folder that
            already holds a run is refused.

    Raises:
        ValueError: bad config, cohort, tiles or reports (named); the folder holds a run and ``resume`` is False; the
            config of the run differs from the one given.
    """

    def __init__(self, config: Config, out: str | Path, *, resume: bool = False) -> None:
        self.out = Path(out)
        self.device = pick_device(own_device(config.run.device))
        self.group = Group(self.device)
        config = with_shards(config, self.out / on_disk.CONFIG if resume else None, self.group.world)
        self.config = config = config.validate().with_absolute_paths()
        check_loggers(loggers_of(config.run))
        self.group.first_then_others(lambda: check_folder(self.out, config, resume))
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        torch.manual_seed(config.run.seed)
        self.data = RunData(config, self.group)
        self.train, self.val, self.tasks = self.data.own, self.data.val, self.data.tasks
        last = self.out / on_disk.CHECKPOINT
        self._resumed = resume and last.exists()
        self._prepare_model()
        self.step = self.epoch = self.batch = 0
        self.best: float | None = None
        self.best_epoch = -1
        self.epoch_loss, self.epoch_steps = 0.0, 0
        self.log_size = 0
        self.bank_folder: str | None = None
        self._state = on_disk.load_checkpoint(last) if self._resumed else None
        if self._state is not None:
            check_same_data(self._state["data"], self.data.fingerprint, self.out)
        # last, so that a run refused for a fault of its settings leaves no run behind
        if self.group.first:
            save_config(config, self.out / on_disk.CONFIG)
            write_data_card(self.out, data_card(self.data.train, self.data.val, self.tasks))

    def _prepare_model(self) -> None:
        config, reports = self.config, self.data.reports
        self.model = build_model(
            config,
            self.train.tiles,
            reports.matrix.shape[1] if reports else None,
            {task.name: task.outputs for task in self.tasks},
            self.device,
        )
        if config.model.init and not self._resumed:
            taken = start_from(self.model, self.tasks, config.model.init)
            if self.group.first:
                print(taken, file=sys.stderr)
        self.model.bank.set_numbers(self.data.numbers)
        if config.memory.mode == "exact" or config.run.probe_every:
            check_exact(self.model.tile_encoder)
        self.writer = BankWriter(
            self.model,
            self.train,
            self.data.shards,
            config.run.shards or 1,
            decay=config.memory.writer_decay,
            chunk=config.run.encode_chunk,
            data=config.data,
            autocast=self._autocast,
        )
        self.failures = Failures(config.data, self.group)
        self.objective = Objective(config.loss, self.data.train, self.tasks, reports).to(self.device)
        self.group.same_start(self.model)
        if self.group.world > 1:  # dropout differs from process to process
            torch.manual_seed(config.run.seed * 1_000_003 + self.group.rank)
        self.planner = planner_of(config, self.data, self.model, self.objective)
        self.guard = EncoderGuard(config, self.model, self.data, self.group, self._autocast)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(
                self.model,
                self.objective,
                config.optim.lr,
                0.0 if config.optim.freeze_encoder else config.optim.encoder_lr_scale,
                config.optim.weight_decay,
            ),
            fused=True,  # one pass over all parameters, on a CPU too
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.optim.amp == "fp16")
        # so that the first step puts all modules within into training mode: an encoder may come with some that are not
        self.model.eval()

    # ------------------------------------------------------------------ run

    def fit(self) -> Path:
        """Train to the end of the last epoch; return the run's folder.

        Raises:
            FloatingPointError: the loss is not finite; names step and slides. The last checkpoint stays as it was.
        """
        if self._state is not None:
            checkpoint.restore(self, self._state)
            self._state = None
        self.log = self.loggers = self.pictures = None
        if self.group.first:
            self.log = on_disk.MetricsLog(self.out / on_disk.METRICS, self.log_size)
            self.loggers = Loggers(loggers_of(self.config.run), self.out, self.step, self.config)
            self.pictures = Pictures(self.out) if self.config.run.pictures else None
        if self.group.first:
            for line in describe_tasks(self.tasks, self.data.train.targets, self.objective.class_weights):
                print(line, file=sys.stderr)
        done = False
        try:
            if not self._resumed:
                self._prefill()
                self._fit_codebook(warm=False)
                checkpoint.save(self)
            for epoch in range(self.epoch, self.config.optim.epochs):
                self._run_epoch(epoch)
            done = True
        finally:
            if self.log is not None:
                self.log.close()
            if self.loggers is not None:
                self.loggers.close(failed=not done)
        say_cost(self.out, self.data.train.tiles, self.device, self.group)
        if self.pictures is not None:
            self.pictures.report()
        return self.out

    def _run_epoch(self, epoch: int) -> None:
        config = self.config
        refit = config.memory.refit_every
        if self.batch == 0 and epoch > 0 and refit and epoch % refit == 0 and self._encoder_moved(epoch):
            self._fit_codebook(warm=True)
        batches = self._batches(epoch)
        remaining = self.data.steps - self.batch
        started = time.perf_counter()
        for batch in progress(
            batches, f"epoch {epoch + 1}/{config.optim.epochs}", total=remaining, unit="step"
        ):
            self.failures.note(batch)
            metrics = self._train_step(batch, epoch)
            if metrics["loss"] is not None:  # else no slide of the step could be read
                self.epoch_loss += float(metrics["loss"])
                self.epoch_steps += 1
            self.step += 1
            self.batch += 1
            now = time.perf_counter()
            self._record("step", seconds=now - started, data_seconds=batch.seconds, **metrics)
            if config.run.probe_every and self.step % config.run.probe_every == 0:
                self._measure_fidelity(epoch)
            started = time.perf_counter()
            if self.step % config.run.checkpoint_every == 0 and self.batch < self.data.steps:
                checkpoint.save(self)
        self._finish_epoch(epoch)

    def _batches(self, epoch: int) -> Iterator[Batch]:
        config, seed = self.config, self.config.run.seed
        plan = self.planner.plan(epoch)
        if config.memory.mode == "exact":
            return without_tiles(plan, self.batch)
        return read_batches(
            plan,
            self.train.reader,
            self.model.bank,
            [record.slide_id for record in self.train.records],
            config.data,
            key=seed * 100_003 + epoch,
            start=self.batch,
            pin=self.device.type == "cuda",
        )

    def _measure_fidelity(self, epoch: int) -> None:
        started, config = time.perf_counter(), self.config
        probe = FidelityProbe(
            self.model,
            self.train,
            self.objective.without_contrast,
            contrast_with_all(
                self.objective.contrast, self.data.reports, self.data.train, config.loss.contrastive_weight
            ),
            chunk=config.run.encode_chunk,
            seed=config.run.seed,
            skip=config.data.on_error == "skip",
            autocast=self._autocast,
        )
        order = epoch_order(len(self.data.train), config.run.seed, 0)
        number = order[self.step // config.run.probe_every % len(order)]
        own = (
            (self.data.numbers == number).nonzero().flatten().tolist()
        )  # the process that holds the slide measures
        answers = self.group.everyones(
            probe.measure(own[0], epoch, self.planner.tiles_of(own[0])) if own else None
        )
        found = next(answer for answer in answers if answer is not None)
        self._record("fidelity", step=self.step, epoch=epoch, **found, seconds=time.perf_counter() - started)

    def _finish_epoch(self, epoch: int) -> None:
        started = time.perf_counter()
        summary: Scalars = {"epoch": epoch, "train_loss": self.epoch_loss / max(self.epoch_steps, 1)}
        summary.update(self.failures.of_epoch(len(self.data.train)))
        statistics = self.model.bank.statistics(step=self.step)
        summary.update(freshness(statistics, self.group))
        last = epoch + 1 == self.config.optim.epochs
        if self.val is not None and ((epoch + 1) % self.config.run.validate_every == 0 or last):
            summary.update(self._validate())
            score = float(summary["val_score"])  # type: ignore[arg-type]
            if self.best is None or math.isnan(self.best) or score > self.best:
                self.best, self.best_epoch = score, epoch
                self._save_model()
        elif self.val is None and last:
            self._save_model()
        self.epoch, self.batch = epoch + 1, 0
        self.epoch_loss, self.epoch_steps = 0.0, 0
        self._record("epoch", seconds=time.perf_counter() - started, **summary)
        if self.pictures is not None:
            self.pictures.draw(statistics, last=last)
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
        if self.group.first:
            print(f"epoch {epoch + 1}/{self.config.optim.epochs}: {', '.join(shown)}", file=sys.stderr)
        checkpoint.save(self)

    # ------------------------------------------------------------------ one step

    def _train_step(self, batch: Batch, epoch: int) -> Scalars:
        moves = self._encoder_moves(epoch)
        _set_training(self.model, True)
        # at rest it is also in eval mode: batch statistics and dropout belong to an encoder that learns
        _set_training(self.model.tile_encoder, moves)
        if moves:
            self.guard.before(self.step)
        self._set_rates(epoch)
        exact = self._exact(batch.slides, epoch) if self.config.memory.mode == "exact" else None
        own = self._forward(batch, exact, epoch)
        self._require_finite("slide embedding", own.embedding, self.data.numbers[batch.slides])
        out, numbers = self.group.outputs(own), self.group.numbers(self.data.numbers[batch.slides])
        if not len(numbers):  # no slide of the step could be read
            return {"step": self.step, "epoch": epoch, "tiles": 0, "loss": None}
        loss, parts = self.objective(out, numbers)
        self._require_finite("loss", loss, numbers)
        self.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:  # else this process has no slide in this step, and the loss nothing to learn
            self.scaler.scale(loss).backward()
        if exact is not None and moves and len(batch.slides):
            exact.backward()
        lengths = self._update(numbers)
        found = None
        if moves:
            self.group.average_statistics(self.model.tile_encoder)
            self.writer.follow()
            found = self.guard.after(self.step + 1, self._schedule())
        if own.live is not None:  # step 0 is the pre-fill
            self.writer.live(batch.slides, batch.tiles, batch.images, own.live.detach(), step=self.step + 1)
        if found is not None:
            self._record("drift", step=self.step + 1, epoch=epoch, **found)
        rates = {bool(g["encoder"]): g["lr"] for g in self.optimizer.param_groups}
        return {
            "step": self.step,
            "epoch": epoch,
            "tiles": sum(self._live_tiles(number) for number in numbers.tolist()),
            "loss": loss.item(),
            **{f"loss_{name}": value.item() for name, value in parts.items()},
            **lengths,
            "lr": rates[False],
            "encoder_lr": rates.get(True, 0.0),
            "temperature": self.objective.temperature,
        }

    def _live_tiles(self, number: int) -> int:
        """Tiles of a slide that have a gradient in a step."""
        n, memory = self.data.train.tiles[number], self.config.memory
        return n if memory.mode == "exact" else min(n, memory.live)

    def _forward(self, batch: Batch, exact: ExactBatch | None, epoch: int) -> SlideOutput:
        """The slides of this process; each with its memory mode's share of tiles."""
        if not len(batch.slides):
            return self.model.no_slides()
        if exact is not None:
            # every feature goes to the bank, so that codebooks are fitted to what is now
            return exact.forward(partial(self.writer.keep, step=self.step + 1))
        if self._encoder_moves(epoch) or self._encoder_moved(epoch):  # else no row is out of date
            self.writer.renew(batch.slides, batch.tiles, self.guard.refresh, step=self.step + 1)
        with self._autocast():
            return self.model(  # type: ignore[no-any-return]
                batch.images.to(self.device, non_blocking=True),
                batch.slides.to(self.device),
                batch.tiles.to(self.device),
                visit=epoch,
                seed=self.config.run.seed,
            )

    def _update(self, numbers: Tensor) -> dict[str, float]:
        """The optimiser's step, with the gradient of all processes; returns the lengths of its gradients."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.group.add_gradients(parameters, list(self.objective.parameters()))
        self.scaler.unscale_(self.optimizer)
        lengths = clip_gradients(self.optimizer.param_groups, self.config.optim.grad_clip)
        # the scaler leaves such steps out and lowers its scale; once that is this small it was not the cause
        if not self.scaler.is_enabled() or self.scaler.get_scale() < _LEAST_SCALE:
            self._require_finite("gradient", lengths, numbers)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        of_encoder, of_rest = lengths.tolist()
        return {"grad_norm": math.hypot(of_encoder, of_rest), "encoder_grad_norm": of_encoder}

    def _require_finite(self, what: str, value: Tensor, numbers: Tensor) -> None:
        if not torch.isfinite(value).all():
            names = ", ".join(self.data.train.records[i].slide_id for i in numbers.tolist())
            raise FloatingPointError(
                f"{what} is not finite at step {self.step} (slides {names}); the last checkpoint is intact. "
                "Lower optim.lr or optim.encoder_lr_scale, or set optim.amp=none"
            )

    def _exact(self, slides: Tensor, epoch: int) -> ExactBatch:
        """All tiles of the slides, augmented as live tiles are."""
        data, key = self.config.data, self.config.run.seed * 100_003 + epoch
        return ExactBatch(
            self.model,
            slides.tolist(),
            partial(read_augmented, self.train.reader, self.data.numbers, data.augment, data.stain, key),
            [self.train.tiles[slide] for slide in slides.tolist()],
            chunk=self.config.run.encode_chunk,
            autocast=self._autocast,
        )

    def _schedule(self) -> float:
        """The share of all rates that this step has: a linear warm-up, then a cosine."""
        optim = self.config.optim
        total = optim.epochs * self.data.steps
        warm = min(1.0, (self.step + 1) / max(optim.warmup_steps, 1))
        return warm * 0.5 * (1 + math.cos(math.pi * self.step / max(total, 1)))

    def _set_rates(self, epoch: int) -> None:
        share = self._schedule()
        moves = self._encoder_moves(epoch)
        self.model.tile_encoder.requires_grad_(moves)
        for group in self.optimizer.param_groups:
            factor = self.guard.factor * moves if group["encoder"] else 1.0
            group["lr"] = group["base_lr"] * share * factor

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
        self._record("prefill", tiles=sum(self.data.train.tiles), seconds=time.perf_counter() - started)

    def _fit_codebook(self, *, warm: bool) -> None:
        started = time.perf_counter()
        config = self.config
        codebook, inertia = fit_on_bank(
            self.model.bank,
            self.group,
            config.model.codewords,
            iterations=config.memory.kmeans_iterations,
            warm=warm,
            seed=config.run.seed,
        )
        self.model.bank.set_codebook(codebook)
        aggregator = self.model.slide_encoder
        if isinstance(aggregator, RowAggregator) and not warm:
            aggregator.start_from(codebook, self.group.everyones(aggregator.measure(self.model.bank)))
        self._record(
            "codebook",
            epoch=self.epoch,
            inertia=inertia,
            warm=int(warm),
            seconds=time.perf_counter() - started,
        )

    # ------------------------------------------------------------------ validation and files

    def _validate(self) -> Scalars:
        assert self.val is not None
        there = self.objective.reports is not None
        return validate(
            self.model,
            self.val,
            self.tasks,
            self.objective.contrast if there else None,
            self.objective.reports,
            chunk=self.config.run.encode_chunk,
            group=self.group,
            data=self.config.data,
            supervised=self.objective.supervised,
            weights=self.objective.weights,
            autocast=self._autocast,
        )

    def _record(self, kind: str, **fields: float | int | str | None) -> None:
        if self.log is not None:
            self.log.write(kind=kind, **fields)
        if self.loggers is not None:
            self.loggers.log(kind, fields, self.step)

    def _save_model(self) -> None:
        card = {
            "config": asdict(self.config),
            "tasks": {task.name: task_card(task) for task in self.tasks},
            "report_dim": self.model.slide_encoder.report_dim,
            "tiles": scales_seen(self.data.train.reader.tilings),
            "epoch": self.epoch,
        }
        if not self.group.first:
            return
        on_disk.save_model(self.out / on_disk.BEST, self.model.state_dict(), card)


def _set_training(module: nn.Module, on: bool) -> None:
    """``module.train(on)`` where it changes anything: it goes through all modules within, and this is done each step."""
    if module.training != on:
        module.train(on)
