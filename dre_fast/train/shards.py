"""Which process holds which slides: dealt once, for good, balanced by their tiles, at any number of processes alike.

Slides are dealt to a fixed number of shards. A batch takes as many slides of every shard, and process r of W holds the
shards r, r + W, ... So the batches of a run depend on the number of shards alone: 1, 2 or 4 processes over 4 shards
see the same ones, and no row of the bank ever crosses from one process to another.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dre_fast.train.config import Config, ConfigError, load_config


def deal_slides(tiles: Sequence[int], shards: int, seed: int) -> list[Tensor]:
    """Deal slides to shards: numbers of slides that differ by one at most, tiles as equal as that allows.

    In rounds of ``shards`` slides, the largest first; in each, the largest slide goes to the shard that has fewest
    tiles so far. Slides of equal size are in an order drawn by ``seed``.

    Args:
        tiles: tiles of every slide.
        shards: at least 1, at most the number of slides.

    Returns:
        The slides of each shard, int64, ascending.

    Raises:
        ValueError: more shards than slides.
    """
    if not 1 <= shards <= len(tiles):
        raise ValueError(f"{len(tiles)} slides cannot be dealt to {shards} shards: each needs one at least")
    order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(seed))
    by_size = order[torch.tensor(tiles)[order].sort(descending=True, stable=True).indices].tolist()
    dealt: list[list[int]] = [[] for _ in range(shards)]
    load = [0] * shards
    for first in range(0, len(by_size), shards):
        lightest = sorted(range(shards), key=lambda shard: (load[shard], shard))
        for slide, shard in zip(by_size[first : first + shards], lightest):
            dealt[shard].append(slide)
            load[shard] += tiles[slide]
    return [torch.tensor(sorted(slides), dtype=torch.int64) for slides in dealt]


def with_shards(config: Config, written: Path | None, world: int) -> Config:
    """The config with ``run.shards`` decided: as given, else that of the run to go on with, else one a process.

    Args:
        written: config.yaml of that run.

    Raises:
        ConfigError: the slides of a batch cannot be shared out to the shards evenly.
    """
    config = copy.deepcopy(config)
    if config.run.shards is None and written is not None and written.exists():
        config.run.shards = load_config(written).run.shards
    if config.run.shards is None:
        config.run.shards = world
    if config.optim.batch_size % config.run.shards:
        raise ConfigError(
            f"optim.batch_size={config.optim.batch_size} must be a multiple of run.shards={config.run.shards}: every "
            "batch takes as many slides of each shard"
        )
    return config


def shards_of(rank: int, world: int, shards: int) -> list[int]:
    """The shards of a process.

    Raises:
        ValueError: the shards cannot be shared out evenly.
    """
    if shards % world:
        raise ValueError(
            f"run.shards={shards} cannot be shared out to {world} processes evenly; start a number of processes that "
            "divides it, or a new run with run.shards a multiple of it"
        )
    return list(range(rank, shards, world))
