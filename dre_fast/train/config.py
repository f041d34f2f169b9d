"""The typed configuration of a run: defaults here, YAML on top, ``key.sub=value`` on the command line on top of that."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from dre_fast.data.files import write_text_atomic
from dre_fast.train.config_checks import ConfigError, check_config

# Settings that may change when a run is resumed: where it runs and where its data lie, not what it computes.
FREE_ON_RESUME = frozenset(
    {
        "data.cohort",
        "data.tiles",
        "data.reports",
        "data.cache",
        "data.workers",
        "data.threads",
        "data.max_open",
        "data.slow_seconds",
    }
    | {
        "memory.tier",
        "memory.folder",
        "memory.cache",
        "memory.budget",
    }  # where rows lie does not show in a run
    | {"run.device", "run.threads", "run.tensorboard", "run.loggers", "run.pictures"}
    | {"run.checkpoint_every"}
)


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
    threads: int = 0  # threads of the training process that read tiles ahead, in place of processes
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
    guided: float = 0.0  # part of the live tiles that is drawn by score, in [0, 1)
    guide: str = "report"  # report | loss: effect on the similarity with the report, or size of that on the tasks' loss
    candidates: int = 1024  # tiles of a slide (at each magnification) that it draws them from
    guide_temperature: float = 1.0  # low: the best candidates alone; high: any
    retrieved: int = 256  # r, rows per slide from the bank (mode: sampled)
    grad_scale: str | float = "none"  # none | unbiased | a number
    refresh: int = 0  # rows a step encoded again without gradient, the oldest of the step's slides first
    # most that features move in a refresh cycle (1: as far as to their codewords); 0: any
    drift_limit: float = 2.0
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
    grad_clip: float = 1.0  # longest gradient, of the encoder and of the rest by itself; 0: off
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
    loggers: list[str] = field(default_factory=list)  # live curves elsewhere, too: wandb, mlflow
    pictures: bool = (
        True  # in the run's folder: curves.png and staleness.png once a minute, report.html at the end
    )
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
        check_config(self)
        return self


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Defaults <- YAML file <- ``section.key=value`` overrides (values are YAML).

    Raises:
        ConfigError: unknown key (with the nearest known one), wrong type, no such file, or unreadable YAML.
    """
    import yaml

    tree: dict[str, Any] = {}
    try:
        if path is not None:
            if not Path(path).exists():
                raise ConfigError(f"{path}: no such config file; `dre-fast train --print-config` prints one")
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
