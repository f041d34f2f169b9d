"""The typed configuration of a run: defaults here, YAML on top, ``key.sub=value`` on the command line on top of that."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import os
import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dre_fast.data.files import write_text_atomic
from dre_fast.nn.aggregators import AGGREGATORS
from dre_fast.nn.bank_tiers import to_bytes

# Settings that may change when a run is resumed: where it runs and where its data lie, not what it computes.
FREE_ON_RESUME = frozenset(
    {
        "data.cohort",
        "data.tiles",
        "data.reports",
        "data.cache",
        "data.workers",
        "data.max_open",
        "data.slow_seconds",
    }
    | {
        "memory.tier",
        "memory.folder",
        "memory.cache",
        "memory.budget",
    }  # where rows lie does not show in a run
    | {"run.device", "run.threads", "run.tensorboard", "run.pictures", "run.checkpoint_every"}
)


class ConfigError(ValueError):
    """An unknown key, or a value of the wrong type, in a config; the message names the key."""


@dataclass
class TaskConfig:
    """One supervised task. ``columns`` are label columns of the cohort (default: the task's name)."""

    name: str = ""
    kind: str = "multiclass"  # multiclass | binary | multilabel | survival (columns: [time, event])
    columns: list[str] = field(default_factory=list)
    classes: list[str] = field(
        default_factory=list
    )  # order of the logits; binary: [negative, positive] in other words, survival: [censored, event]
    weight: float = 1.0
    balance: str = "none"  # none | inverse | effective: weights of the classes, by their number of slides
    method: str = "cox"  # survival: cox | hazard
    bins: int = 4  # intervals of a hazard head


@dataclass
class DataConfig:
    cohort: str = ""  # cohort CSV
    tiles: str | list[str] = ""  # folder that `dre-fast tile` wrote, or a list of them, one a magnification
    reports: str | None = None  # safetensors written by `dre-fast embed-reports`
    backend: str = "auto"  # auto | openslide | cucim | images | array
    mpp: float | None = None  # um/px of slides that do not say
    workers: int = 0  # processes that read tiles ahead
    max_open: int = 8  # slide handles open at once in each worker
    on_error: str = "stop"  # stop | skip: leave a slide that cannot be read out of its step, and say so
    max_failing: float = (
        0.05  # on_error skip: share of an epoch's visits above which the run stops all the same
    )
    slow_seconds: float = 60.0  # a warning names the slides whose tiles take longer
    cache: str | None = None  # folder for files that hold every tile decoded once (uint8), made on first use
    missing_values: list[str] = field(
        default_factory=lambda: ["", "NA"]
    )  # cells without a label; add NS for cBioPortal
    augment: bool = True  # flips and quarter turns of the live tiles
    stain: float = 0.0  # strength of the stain jitter of the live tiles; 0.2 is plenty
    train_split: str | None = "train"  # null: the whole cohort
    val_split: str | None = "val"  # null: no validation
    skip_untiled: bool = (
        False  # leave out slides without tiles, e.g. those that `dre-fast tile --skip-bad` skipped
    )

    @property
    def tile_folders(self) -> list[str]:
        """``tiles`` as a list."""
        return [self.tiles] if isinstance(self.tiles, str) else self.tiles


@dataclass
class ModelConfig:
    encoder: str = "vit-s16"  # conv-tiny | vit-tiny | vit-s16 | timm:NAME | hf:NAME
    encoder_args: dict[str, Any] = field(default_factory=dict)
    encoder_weights: str | None = (
        None  # the encoder's own weights (.safetensors), or a HIPT / DINO checkpoint
    )
    aggregator: str = "residual"  # residual | soft | mean | max | abmil | abmilx | transmil
    init: str | None = None  # run folder or model file: start from all its weights that fit (fine-tuning)
    codewords: int = 64
    normalize: list[str] = field(default_factory=lambda: ["intra", "l2"])
    width: int = 256
    depth: int = 2
    heads: int = 4
    dropout: float = 0.0


@dataclass
class MemoryConfig:
    dtype: str = "int8"  # int8 | bfloat16 | float16 | float32 | float8_e4m3fn
    mode: str = "full"  # full | sampled | none | exact (every tile with gradient, in two passes: the oracle)
    live: int = 32  # m, tiles per slide with gradient
    scale_shares: list[float] = field(
        default_factory=list
    )  # parts of the live tiles for each folder of data.tiles, e.g. [3, 1]; none: equal ones
    guided: float = 0.0  # part of the live tiles that the slide's report draws, in [0, 1)
    candidates: int = 1024  # tiles of a slide (at each magnification) that it draws them from
    guide_temperature: float = 1.0  # low: the best candidates alone; high: any
    retrieved: int = 256  # r, rows per slide from the bank (mode: sampled)
    grad_scale: str | float = "none"  # none | unbiased | a number
    refresh: int = 0  # rows a step encoded again without gradient, the oldest of the step's slides first
    drift_limit: float = (
        1.0  # most that features move in a refresh cycle (1: as far as to their codewords); 0: any
    )
    drift_every: int = 10  # steps between two looks of the drift guard
    drift_tiles: int = 256  # tiles it looks at
    max_refresh: int = 0  # > refresh: when features move too fast, up to so many rows a step are renewed
    writer_decay: float = (
        0.0  # > 0: a moving average of the encoder with this decay (0.99, say) writes the rows
    )
    refit_every: int = 1  # epochs between warm-started codebook fits; 0: fit once
    kmeans_iterations: int = 10
    tier: str = (
        "device"  # device | host (pinned memory) | file (rows on disk) | auto: where the bank's rows lie
    )
    folder: str | None = None  # tier file: a folder on a fast disk with room for the rows
    cache: int | str | None = None  # tier file: memory for the slides of the coming steps, e.g. 8GB
    budget: int | str | None = None  # tier auto: device memory the bank may take (null: what is free)


@dataclass
class LossConfig:
    contrastive: str | None = "infonce"  # infonce | siglip | null
    negatives: str = "batch"  # batch | all
    contrastive_weight: float = 1.0
    tasks: list[TaskConfig] = field(default_factory=list)


@dataclass
class OptimConfig:
    epochs: int = 50
    batch_size: int = 16  # slides per step
    lr: float = 1e-3
    encoder_lr_scale: float = 0.1  # encoder rate = lr * this; the encoder must move slowly
    freeze_encoder: bool = False
    head_warmup_epochs: int = 1  # epochs at the start in which the encoder does not move
    warmup_steps: int = 20
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # 0: off
    amp: str = "none"  # none | bf16 | fp16 (fp16 needs a GPU)


@dataclass
class RunConfig:
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: int = 0  # CPU threads, 0: torch's own choice
    checkpoint_every: int = 50  # steps between checkpoints; one more at the end of every epoch
    validate_every: int = 1  # epochs
    encode_chunk: int = 256  # tiles encoded at once without gradient
    tensorboard: bool = True
    pictures: bool = True  # curves.png and staleness.png in the run's folder, drawn once a minute
    shards: int | None = (
        None  # groups of slides that processes share; null: one for each process at the start
    )
    probe_every: int = 0  # steps between comparisons with the exact gradient on one slide; 0: none


@dataclass
class Config:
    """Everything a run depends on. Saved resolved as ``config.yaml`` in the run's folder."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def with_absolute_paths(self) -> Config:
        """The same with every path absolute, so that a saved config means the same in any working folder."""
        changed = copy.deepcopy(self)
        data, model = changed.data, changed.model
        data.cohort = os.path.abspath(data.cohort)
        if isinstance(data.tiles, str):
            data.tiles = os.path.abspath(data.tiles)
        else:
            data.tiles = [os.path.abspath(folder) for folder in data.tiles]
        data.reports = data.reports and os.path.abspath(data.reports)
        data.cache = data.cache and os.path.abspath(data.cache)
        memory = changed.memory
        memory.folder = memory.folder and os.path.abspath(memory.folder)
        model.encoder_weights = model.encoder_weights and os.path.abspath(model.encoder_weights)
        model.init = model.init and os.path.abspath(model.init)
        return changed

    def validate(self) -> Config:
        """Check values across fields; return self.

        Raises:
            ConfigError: names the key.
        """
        _one_of("data.on_error", self.data.on_error, ("stop", "skip"))
        if self.data.on_error == "skip" and self.memory.mode == "exact":
            raise ConfigError("data.on_error=skip: memory.mode=exact needs every tile of every slide")
        if not 0 <= self.data.max_failing <= 1:
            raise ConfigError(f"data.max_failing={self.data.max_failing}: must be in [0, 1]")
        if not 0 < self.data.slow_seconds < math.inf:
            raise ConfigError(f"data.slow_seconds={self.data.slow_seconds}: must be > 0")
        _one_of("model.aggregator", self.model.aggregator, ("residual", *AGGREGATORS))
        _one_of("memory.mode", self.memory.mode, ("full", "sampled", "none", "exact"))
        if not 0 <= self.memory.writer_decay < 1:
            raise ConfigError(f"memory.writer_decay={self.memory.writer_decay}: must be in [0, 1)")
        if self.memory.mode == "exact" and (
            self.memory.refresh or self.memory.writer_decay or self.memory.max_refresh
        ):
            raise ConfigError(
                "memory.refresh, max_refresh and writer_decay have no use with memory.mode=exact: no row is old"
            )
        if self.memory.max_refresh and self.memory.max_refresh < self.memory.refresh:
            raise ConfigError(
                f"memory.max_refresh={self.memory.max_refresh}: less than memory.refresh={self.memory.refresh}"
            )
        if self.memory.max_refresh and not self.memory.drift_limit:
            raise ConfigError(
                "memory.max_refresh is for the drift guard, and memory.drift_limit=0 leaves it out"
            )
        if self.run.shards is not None and self.run.shards < 1:
            raise ConfigError(f"run.shards={self.run.shards}: must be at least 1, or null")
        _one_of("memory.tier", self.memory.tier, ("device", "host", "file", "auto"))
        if self.memory.tier == "file" and self.memory.folder is None:
            raise ConfigError(
                "memory.tier=file needs memory.folder: a folder on a fast disk, for the bank's rows"
            )
        for name in ("cache", "budget"):
            size = getattr(self.memory, name)
            try:
                _ = size is None or to_bytes(size)
            except ValueError as error:
                raise ConfigError(f"memory.{name}: {error}") from None
        if self.model.init and self.model.encoder_weights:
            raise ConfigError(
                "model.init brings the encoder's weights, too: set model.encoder_weights=null, or leave model.init out"
            )
        _one_of("loss.contrastive", self.loss.contrastive, ("infonce", "siglip", None))
        _one_of("loss.negatives", self.loss.negatives, ("batch", "all"))
        _one_of("optim.amp", self.optim.amp, ("none", "bf16", "fp16"))
        if isinstance(self.memory.grad_scale, str):
            _one_of("memory.grad_scale", self.memory.grad_scale, ("none", "unbiased"))
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
            if getattr(getattr(self, section), name) < 1:
                raise ConfigError(f"{key} must be at least 1")
        optim = self.optim
        for name in ("lr", "encoder_lr_scale", "weight_decay", "grad_clip"):
            if not 0 <= getattr(optim, name) < math.inf:  # false for NaN, too
                raise ConfigError(f"optim.{name}={getattr(optim, name)}: must be a number >= 0")
        if optim.lr == 0:
            raise ConfigError("optim.lr must be > 0")
        if self.data.val_split and self.data.train_split in (None, self.data.val_split):
            raise ConfigError(
                f"data.train_split={self.data.train_split or 'null'} holds the slides of data.val_split="
                f"{self.data.val_split}: they would be trained on; set data.val_split=null or another split"
            )
        for key in (
            "data.workers",
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
            if not 0 <= getattr(getattr(self, section), name) < 2**31:
                raise ConfigError(f"{key} must be 0 or more, and less than 2^31")
        for key, number in (
            ("data.stain", self.data.stain),
            ("memory.grad_scale", self.memory.grad_scale),
            ("memory.drift_limit", self.memory.drift_limit),
        ):
            if not isinstance(number, str) and not 0 <= number < math.inf:
                raise ConfigError(f"{key}={number}: must be a number >= 0")
        if not self.data.cohort:
            raise ConfigError("data.cohort is not set: the cohort CSV")
        if not self.data.tiles or not all(self.data.tile_folders):
            raise ConfigError("data.tiles is not set: the folder that `dre-fast tile` wrote")
        self._validate_sampling()
        if self.loss.contrastive and not self.data.reports:
            raise ConfigError(
                "loss.contrastive needs data.reports (a file from `dre-fast embed-reports`); "
                "set loss.contrastive=null to train on labels alone"
            )
        if not self.loss.contrastive and not self.loss.tasks:
            raise ConfigError("nothing to train on: set loss.contrastive, loss.tasks or both")
        names = [task.name for task in self.loss.tasks]
        if len(set(names)) != len(names) or "" in names:
            raise ConfigError(f"loss.tasks: every task needs a name of its own, got {names}")
        for name in names:
            if "." in name or hasattr(nn.ModuleDict, name):
                raise ConfigError(
                    f"loss.tasks: {name!r} cannot name a module of torch; name the task otherwise and give the "
                    f"column as columns: [{name}]"
                )
        for task in self.loss.tasks:
            self._validate_task(task)
        return self

    def _validate_sampling(self) -> None:
        """Of tiles at several magnifications, and tiles that the report draws."""
        memory, scales = self.memory, len(self.data.tile_folders)
        if len({os.path.abspath(folder) for folder in self.data.tile_folders}) < scales:
            raise ConfigError(f"data.tiles={self.data.tiles}: a folder is given twice")
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
        if not 0 < memory.guide_temperature < math.inf:
            raise ConfigError(f"memory.guide_temperature={memory.guide_temperature}: must be a number > 0")
        drawn = int(memory.guided * memory.live)
        if memory.guided and drawn < scales:
            raise ConfigError(
                f"memory.guided={memory.guided} of memory.live={memory.live} live tiles are {drawn}: less than one "
                "at each magnification"
            )
        if memory.guided and memory.candidates < drawn:
            raise ConfigError(
                f"memory.candidates={memory.candidates}: {drawn} tiles are to be drawn from them"
            )
        if memory.guided and self.model.aggregator != "residual":
            raise ConfigError(
                "memory.guided scores rows by their residuals: it needs model.aggregator=residual"
            )
        if memory.guided and not self.loss.contrastive:
            raise ConfigError(
                "memory.guided draws tiles by the slides' reports: it needs loss.contrastive and data.reports"
            )
        if memory.guided and memory.mode == "exact":
            raise ConfigError("memory.guided has no use with memory.mode=exact: every tile is live")
        which = "memory.guided" if memory.guided else "several folders in data.tiles" if scales > 1 else None
        if which and memory.mode == "sampled":
            raise ConfigError(
                f"memory.mode=sampled retrieves the rows that follow the live ones in the one permutation of a slide, "
                f"which {which} departs from; use memory.mode=full, which sees all rows at less cost, or none"
            )
        if which and memory.grad_scale == "unbiased":
            raise ConfigError(
                f"memory.grad_scale=unbiased: n/m is the right factor when all tiles of a slide are live equally "
                f"often; with {which} they are not: use none or a number"
            )

    def _validate_task(self, task: TaskConfig) -> None:
        key = f"loss.tasks[{task.name}]"
        _one_of(f"{key}.kind", task.kind, ("multiclass", "binary", "multilabel", "survival"))
        _one_of(f"{key}.balance", task.balance, ("none", "inverse", "effective"))
        _one_of(f"{key}.method", task.method, ("cox", "hazard"))
        if task.bins < 2:
            raise ConfigError(f"{key}.bins={task.bins}: must be at least 2")
        plain = TaskConfig()
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
            if self.optim.batch_size == 1:
                raise ConfigError(
                    f"{key}.method=cox compares the slides of a batch with one another, and optim.batch_size=1 leaves "
                    "nothing to compare; take more slides a batch, or method: hazard"
                )


def _one_of(key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        shown = ", ".join("null" if a is None else str(a) for a in allowed)
        raise ConfigError(f"{key}={value!r}: must be one of {shown}")


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Defaults <- YAML file <- ``section.key=value`` overrides (values are YAML).

    Raises:
        ConfigError: unknown key (with the nearest known one), wrong type, or unreadable YAML.
    """
    import yaml

    tree: dict[str, Any] = {}
    try:
        if path is not None:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
            if not isinstance(tree, dict):
                raise ConfigError(f"{path}: expected sections data, model, memory, loss, optim, run")
        for item in overrides:
            key, equals, text = item.partition("=")
            if not equals:
                raise ConfigError(f"override {item!r}: expected section.key=value")
            value = yaml.safe_load(text)
            if isinstance(value, str) and _is_number(value):
                value = float(value)  # YAML 1.1 reads 1e-3 as a string
            _put(tree, key.strip().split("."), value)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path or 'override'}: not readable as YAML: {error}") from error
    return config_from_dict(tree)


def config_from_dict(tree: dict[str, Any]) -> Config:
    """A config from nested dicts, as ``dataclasses.asdict`` gives them; missing keys take their defaults.

    Raises:
        ConfigError: unknown key or wrong type; names the key.
    """
    return _build(Config, tree, "")


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config as YAML, atomically."""
    import yaml

    write_text_atomic(Path(path), yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(keys[: depth + 1])} is a value, not a section")
    tree[keys[-1]] = value


def _build(cls: type, tree: Any, where: str) -> Any:
    """A dataclass from a nested dict, every key and type checked."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{where or 'config'}: expected keys and values, got {tree!r}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    values = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown config key {name!r}{hint}")
        values[key] = _convert(hints[key], value, name)
    return cls(**values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, name)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _convert(option, value, name)
            except ConfigError:
                continue
    elif origin is list:
        if isinstance(value, (list, tuple)):
            return [_convert(args[0], item, f"{name}[{i}]") for i, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return dict(value)
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and _is_number(value):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif isinstance(value, hint):
        return value
    kind = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{name}={value!r}: expected {kind}")
