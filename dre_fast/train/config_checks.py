"""What the settings of a run must be, each and together."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from torch import nn

from dre_fast.nn.aggregators import AGGREGATORS
from dre_fast.nn.bank_tiers import to_bytes
from dre_fast.nn.supervised import compares_slides
from dre_fast.train.loggers import LOGGERS

if TYPE_CHECKING:
    from dre_fast.train.config import Config, TaskConfig


class ConfigError(ValueError):
    """An unknown key, or a value of the wrong type, in a config; the message names the key."""


def check_config(config: Config) -> None:
    """Check values across fields.

    Raises:
        ConfigError: names the key.
    """
    _one_of("data.on_error", config.data.on_error, ("stop", "skip"))
    if config.data.on_error == "skip" and config.memory.mode == "exact":
        raise ConfigError("data.on_error=skip: memory.mode=exact needs every tile of every slide")
    if not 0 <= config.data.max_failing <= 1:
        raise ConfigError(f"data.max_failing={config.data.max_failing}: must be in [0, 1]")
    if not 0 < config.data.slow_seconds < math.inf:
        raise ConfigError(f"data.slow_seconds={config.data.slow_seconds}: must be > 0")
    _one_of("model.aggregator", config.model.aggregator, ("residual", *AGGREGATORS))
    _one_of("memory.mode", config.memory.mode, ("full", "sampled", "none", "exact"))
    if not 0 <= config.memory.writer_decay < 1:
        raise ConfigError(f"memory.writer_decay={config.memory.writer_decay}: must be in [0, 1)")
    if config.memory.mode == "exact" and (
        config.memory.refresh or config.memory.writer_decay or config.memory.max_refresh
    ):
        raise ConfigError(
            "memory.refresh, max_refresh and writer_decay have no use with memory.mode=exact: no row is old"
        )
    if config.memory.mode == "exact" and config.memory.grad_scale != "none":
        raise ConfigError(
            f"memory.grad_scale={config.memory.grad_scale} scales the gradient of some live tiles; with "
            "memory.mode=exact it is that of all: set memory.grad_scale=none"
        )
    if config.memory.mode == "none" and config.memory.grad_scale == "unbiased":
        raise ConfigError(
            "memory.grad_scale=unbiased has no use with memory.mode=none: a slide is its live tiles, and all have their "
            "gradient; set memory.grad_scale=none"
        )
    if config.memory.grad_scale == 0:
        raise ConfigError(
            "memory.grad_scale=0 leaves the encoder nothing to learn: set optim.freeze_encoder=true"
        )
    if config.memory.mode == "exact" and config.run.probe_every:
        raise ConfigError(
            "run.probe_every compares a memory mode with the exact gradient, which is what memory.mode=exact takes: "
            "set run.probe_every=0"
        )
    if config.memory.max_refresh and config.memory.max_refresh < config.memory.refresh:
        raise ConfigError(
            f"memory.max_refresh={config.memory.max_refresh}: less than memory.refresh={config.memory.refresh}"
        )
    if config.memory.max_refresh and not config.memory.drift_limit:
        raise ConfigError("memory.max_refresh is for the drift guard, and memory.drift_limit=0 leaves it out")
    if config.run.shards is not None and config.run.shards < 1:
        raise ConfigError(f"run.shards={config.run.shards}: must be at least 1, or null")
    _one_of("memory.tier", config.memory.tier, ("device", "host", "file", "auto"))
    if config.memory.tier == "file" and config.memory.folder is None:
        raise ConfigError(
            "memory.tier=file needs memory.folder: a folder on a fast disk, for the bank's rows"
        )
    for name in ("cache", "budget"):
        size = getattr(config.memory, name)
        try:
            _ = size is None or to_bytes(size)
        except ValueError as error:
            raise ConfigError(f"memory.{name}: {error}") from None
    if config.model.init and config.model.encoder_weights:
        raise ConfigError(
            "model.init brings the encoder's weights, too: set model.encoder_weights=null, or leave model.init out"
        )
    _one_of("loss.contrastive", config.loss.contrastive, ("infonce", "siglip", None))
    _one_of("loss.negatives", config.loss.negatives, ("batch", "all"))
    if config.loss.negatives == "all" and config.loss.contrastive is None:
        raise ConfigError(
            "loss.negatives=all is for loss.contrastive, and loss.contrastive=null leaves it out"
        )
    for name in config.run.loggers:
        _one_of("run.loggers", name, LOGGERS)
    if "tensorboard" in config.run.loggers and not config.run.tensorboard:
        raise ConfigError(
            "run.loggers names tensorboard, and run.tensorboard=false forbids it: leave one out"
        )
    _one_of("optim.amp", config.optim.amp, ("none", "bf16", "fp16"))
    if isinstance(config.memory.grad_scale, str):
        _one_of("memory.grad_scale", config.memory.grad_scale, ("none", "unbiased"))
    for key in (
        "model.codewords",
        "memory.live",
        "memory.candidates",
        "optim.epochs",
        "optim.batch_size",
        "run.encode_chunk",
        "run.checkpoint_every",
        "run.validate_every",
        "data.max_open",
        "memory.drift_every",
        "memory.drift_tiles",
    ):
        section, name = key.split(".")
        if getattr(getattr(config, section), name) < 1:
            raise ConfigError(f"{key} must be at least 1")
    optim = config.optim
    for name in ("lr", "encoder_lr_scale", "weight_decay", "grad_clip"):
        if not 0 <= getattr(optim, name) < math.inf:  # false for NaN, too
            raise ConfigError(f"optim.{name}={getattr(optim, name)}: must be a number >= 0")
    if optim.lr == 0:
        raise ConfigError("optim.lr must be > 0")
    if config.data.val_split and config.data.train_split in (None, config.data.val_split):
        raise ConfigError(
            f"data.train_split={config.data.train_split or 'null'} holds the slides of data.val_split="
            f"{config.data.val_split}: they would be trained on; set data.val_split=null or another split"
        )
    for key in (
        "data.workers",
        "data.threads",
        "memory.refresh",
        "memory.max_refresh",
        "memory.refit_every",
        "memory.retrieved",
        "memory.kmeans_iterations",
        "optim.warmup_steps",
        "optim.head_warmup_epochs",
        "run.threads",
        "run.probe_every",
        "run.seed",
    ):
        section, name = key.split(".")
        if not 0 <= getattr(getattr(config, section), name) < 2**31:
            raise ConfigError(f"{key} must be 0 or more, and less than 2^31")
    if config.data.workers and config.data.threads:
        raise ConfigError(
            f"data.workers={config.data.workers} and data.threads={config.data.threads}: tiles are read ahead by "
            "processes or by threads; set one of them to 0 (threads for cuCIM and few cores, processes for many)"
        )
    for key, number in (
        ("data.stain", config.data.stain),
        ("memory.grad_scale", config.memory.grad_scale),
        ("memory.drift_limit", config.memory.drift_limit),
        ("loss.contrastive_weight", config.loss.contrastive_weight),
        *((f"loss.tasks[{task.name}].weight", task.weight) for task in config.loss.tasks),
    ):
        if not isinstance(number, str) and not 0 <= number < math.inf:
            raise ConfigError(f"{key}={number}: must be a number >= 0")
    if not config.data.cohort:
        raise ConfigError("data.cohort is not set: the cohort CSV")
    if not config.data.tiles or not all(config.data.tile_folders):
        raise ConfigError("data.tiles is not set: the folder that `dre-fast tile` wrote")
    _check_sampling(config)
    if config.loss.contrastive and not config.data.reports:
        raise ConfigError(
            "loss.contrastive needs data.reports (a file from `dre-fast embed-reports`); "
            "set loss.contrastive=null to train on labels alone"
        )
    if not config.loss.contrastive and not config.loss.tasks:
        raise ConfigError("nothing to train on: set loss.contrastive, loss.tasks or both")
    if not (config.loss.contrastive and config.loss.contrastive_weight) and not any(
        task.weight for task in config.loss.tasks
    ):
        raise ConfigError(
            "nothing to train on: loss.contrastive_weight and the weights of loss.tasks are all 0"
        )
    names = [task.name for task in config.loss.tasks]
    if len(set(names)) != len(names) or "" in names:
        raise ConfigError(f"loss.tasks: every task needs a name of its own, got {names}")
    for name in names:
        if "." in name or hasattr(nn.ModuleDict, name):
            raise ConfigError(
                f"loss.tasks: {name!r} cannot name a module of torch; name the task otherwise and give the "
                f"column as columns: [{name}]"
            )
    for task in config.loss.tasks:
        _check_task(config, task)


def _check_sampling(config: Config) -> None:
    """Of tiles at several magnifications, and tiles that the report draws."""
    memory, scales = config.memory, len(config.data.tile_folders)
    if len({os.path.abspath(folder) for folder in config.data.tile_folders}) < scales:
        raise ConfigError(f"data.tiles={config.data.tiles}: a folder is given twice")
    if memory.scale_shares and len(memory.scale_shares) != scales:
        raise ConfigError(
            f"memory.scale_shares={memory.scale_shares}: needs one share for each of the {scales} folders of "
            "data.tiles"
        )
    if not all(0 < share < math.inf for share in memory.scale_shares):
        raise ConfigError(f"memory.scale_shares={memory.scale_shares}: shares must be numbers > 0")
    if memory.live < scales:
        raise ConfigError(
            f"memory.live={memory.live}: each of the {scales} magnifications needs one live tile at least"
        )
    if not 0 <= memory.guided < 1:
        raise ConfigError(f"memory.guided={memory.guided}: must be in [0, 1)")
    _one_of("memory.guide", memory.guide, ("report", "loss"))
    if not 0 < memory.guide_temperature < math.inf:
        raise ConfigError(f"memory.guide_temperature={memory.guide_temperature}: must be a number > 0")
    drawn = int(memory.guided * memory.live + 1e-9)  # 0.29 * 100 is a little less than 29
    if memory.guided and drawn < scales:
        raise ConfigError(
            f"memory.guided={memory.guided} of memory.live={memory.live} live tiles are {drawn}: less than one "
            "at each magnification"
        )
    if memory.guided and memory.candidates < drawn:
        raise ConfigError(f"memory.candidates={memory.candidates}: {drawn} tiles are to be drawn from them")
    if memory.guided and config.model.aggregator != "residual":
        raise ConfigError("memory.guided scores rows by their residuals: it needs model.aggregator=residual")
    if memory.guided and memory.guide == "report" and not config.loss.contrastive:
        raise ConfigError(
            "memory.guided draws tiles by the slides' reports: it needs loss.contrastive and data.reports; with "
            "memory.guide=loss it draws them by their effect on the loss of the tasks"
        )
    alone = any(task.weight and not compares_slides(task.kind, task.method) for task in config.loss.tasks)
    if memory.guided and memory.guide == "loss" and not alone:
        raise ConfigError(
            "memory.guide=loss draws tiles by their effect on the loss of their slide: it needs loss.tasks, and one "
            "with a weight that is not the Cox loss, which compares slides (method: hazard is not)"
        )
    if memory.guided and memory.mode == "exact":
        raise ConfigError("memory.guided has no use with memory.mode=exact: every tile is live")
    if scales > 1 and memory.mode == "sampled":
        raise ConfigError(
            "memory.mode=sampled retrieves the rows that follow the live ones in the one permutation of a slide, which "
            "several folders in data.tiles depart from; use memory.mode=full, which sees all rows at less cost, or none"
        )
    which = "memory.guided" if memory.guided else "several folders in data.tiles" if scales > 1 else None
    if which and memory.grad_scale == "unbiased":
        raise ConfigError(
            f"memory.grad_scale=unbiased: n/m is the right factor when all tiles of a slide are live equally "
            f"often; with {which} they are not: use none or a number"
        )


def _check_task(config: Config, task: TaskConfig) -> None:
    key = f"loss.tasks[{task.name}]"
    _one_of(f"{key}.kind", task.kind, ("multiclass", "binary", "multilabel", "survival"))
    _one_of(f"{key}.balance", task.balance, ("none", "inverse", "effective"))
    _one_of(f"{key}.method", task.method, ("cox", "hazard"))
    if task.bins < 2:
        raise ConfigError(f"{key}.bins={task.bins}: must be at least 2")
    plain = type(task)()
    if task.kind != "survival":
        for name in ("method", "bins"):
            if getattr(task, name) != getattr(plain, name):
                raise ConfigError(f"{key}.{name} is of survival tasks only; this one is {task.kind}")
        return
    if len(task.columns) != 2:
        raise ConfigError(f"{key}.columns={task.columns}: a survival task reads two, [time, event]")
    if task.balance != "none":
        raise ConfigError(f"{key}.balance={task.balance}: a survival task has no classes to balance")
    if task.method == "cox":
        if task.bins != plain.bins:
            raise ConfigError(f"{key}.bins is of method: hazard; Cox's model has no intervals")
        if config.optim.batch_size == 1:
            raise ConfigError(
                f"{key}.method=cox compares the slides of a batch with one another, and optim.batch_size=1 leaves "
                "nothing to compare; take more slides a batch, or method: hazard"
            )


def _one_of(key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        shown = ", ".join("null" if a is None else str(a) for a in allowed)
        raise ConfigError(f"{key}={value!r}: must be one of {shown}")
