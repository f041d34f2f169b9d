"""From a config to the parts of a run: cohort, tile readers, reports, tasks, model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dre_fast.data.cohort import Cohort, SlideRecord, Task
from dre_fast.data.coords import read_coords
from dre_fast.data.multiscale import MultiScaleReader
from dre_fast.data.reports import ReportEmbeddings
from dre_fast.data.subset import Reader, SubsetReader
from dre_fast.data.tiles import CachedTileReader, TileReader
from dre_fast.nn.aggregators import AGGREGATORS, RowAggregator
from dre_fast.nn.bank import MemoryBank
from dre_fast.nn.model import DRESLCL
from dre_fast.nn.slide_encoder import SlideEncoder
from dre_fast.nn.tile_encoders import TileEncoder, build_tile_encoder, load_hipt_checkpoint
from dre_fast.train.config import Config, MemoryConfig, ModelConfig
from dre_fast.train.tile_scales import scale_of


@dataclass
class SlideSet:
    """The slides of one split: records, a reader of their tiles, targets per task, rows into the report matrix."""

    records: list[SlideRecord]
    reader: Reader
    targets: dict[str, Tensor]  # task -> int64 [S] (-1 missing) or float [S, L] (NaN missing)
    report_rows: Tensor  # int64 [S], row of the slide's report, -1 = none
    tiles: list[int] = field(default_factory=list)  # tiles per slide

    def __len__(self) -> int:
        return len(self.records)

    def share(self, slides: Tensor) -> SlideSet:
        """Some of the slides, int64 [S], numbered anew; read by the same reader."""
        assert not isinstance(self.reader, SubsetReader)
        reader = SubsetReader(self.reader, slides)
        return SlideSet(
            [self.records[slide] for slide in slides.tolist()],
            reader,
            {name: target[slides] for name, target in self.targets.items()},
            self.report_rows[slides],
            reader.tiles_per_slide,
        )


@dataclass
class Reports:
    """Report embeddings of the cohort: ``matrix`` fp32 [M, T] and the case of each row."""

    matrix: Tensor
    row_of_case: dict[str, int]


def slide_set(
    cohort: Cohort,
    records: Sequence[SlideRecord],
    tiles_dir: str | Path | Sequence[str | Path],
    tasks: Sequence[Task] = (),
    reports: Reports | None = None,
    *,
    backend: str = "auto",
    mpp: float | None = None,
    max_open: int = 8,
    cache: str | Path | None = None,
    skip_untiled: bool = False,
) -> SlideSet:
    """Open the tiles of some records of a cohort.

    Args:
        tiles_dir: a folder of tilings, or several, one for each magnification: the tiles of a slide are those of all
            folders, in this order (see :class:`dre_fast.data.multiscale.MultiScaleReader`).
        skip_untiled: leave out slides without coordinate file in any of the folders, with a warning that names them.

    Raises:
        ValueError: no such folder; a slide has no coordinate file in one, or no tiles in any; the message names the
            slide and the file. No slide is left. Tilings of different ``tile_size``, of different um/px in one folder, or
            twice the same.
    """
    folders = [Path(tiles_dir)] if isinstance(tiles_dir, (str, Path)) else [Path(path) for path in tiles_dir]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder of tiles; run `dre-fast tile` on the cohort first")
    files = {record.slide_id: [folder / f"{record.slide_id}.h5" for folder in folders] for record in records}
    absent = {
        slide_id: next(file for file in paths if not file.exists())
        for slide_id, paths in files.items()
        if not all(file.exists() for file in paths)
    }
    where = " or ".join(str(folder) for folder in folders)
    if absent and skip_untiled and len(absent) < len(records):
        warnings.warn(
            f"{len(absent)} of {len(records)} slides have no tiles in {where} and are left out: {', '.join(absent)}",
            stacklevel=2,
        )
        records = [record for record in records if record.slide_id not in absent]
    elif absent:
        untiled, missing_file = next(iter(absent.items()))
        raise ValueError(
            f"slide {untiled}: no tile coordinates at {missing_file} ({len(absent)} of {len(records)} slides "
            "have none); run `dre-fast tile` on the cohort first, or leave such slides out (train: "
            "data.skip_untiled=true, encode and heatmap: --skip-untiled)"
        )
    tilings = []
    for record in records:
        scales = [read_coords(file) for file in files[record.slide_id]]
        if not any(len(tiling) for tiling in scales):
            shown = ", ".join(str(file) for file in files[record.slide_id])
            raise ValueError(f"slide {record.slide_id}: {shown} holds no tiles; take the slide out")
        tilings += scales
    sizes = [scale_of(tilings[i :: len(folders)], folder)["tile_size"] for i, folder in enumerate(folders)]
    if len(set(sizes)) > 1:
        shown = ", ".join(f"{folder} {size:g} px" for folder, size in zip(folders, sizes))
        raise ValueError(f"tiles of different sizes: {shown}; tile all with the same --tile-size")
    paths = [record.path for record in records if record.path is not None]
    if len(paths) != len(records):
        missing = next(record.slide_id for record in records if record.path is None)
        raise ValueError(f"slide {missing}: the cohort gives no path, but its tiles are to be read")
    flat = TileReader(
        [path for path in paths for _ in folders], tilings, backend=backend, max_open=max_open, mpp=mpp
    )
    tiles: TileReader | CachedTileReader = flat if cache is None else flat.cache_to(cache)
    reader = tiles if len(folders) == 1 else MultiScaleReader(tiles, len(folders))
    rows = [reports.row_of_case.get(r.case_id, -1) if reports else -1 for r in records]
    return SlideSet(
        list(records),
        reader,
        {task.name: cohort.encode(task, records) for task in tasks},
        torch.tensor(rows, dtype=torch.int64),
        reader.tiles_per_slide,
    )


def load_reports(path: str | Path | None) -> Reports | None:
    """Read the embeddings that ``dre-fast embed-reports`` wrote."""
    if path is None:
        return None
    embedded = ReportEmbeddings.load(path)
    return Reports(embedded.matrix, {case: row for row, case in enumerate(embedded.case_ids)})


def build_model(
    config: Config,
    bank_tiles: Sequence[int],
    report_dim: int | None,
    task_sizes: dict[str, int],
    device: torch.device,
) -> DRESLCL:
    """The model of a config on a device. ``bank_tiles``: tiles per training slide, empty for inference."""
    encoder = build_tile_encoder(config.model.encoder, **config.model.encoder_args)
    if config.model.encoder_weights:
        load_encoder_weights(encoder, config.model.encoder_weights)
    memory, dim = config.memory, encoder.dim
    modes: dict[str, str | int] = {"sampled": memory.retrieved, "exact": "full"}
    # made where it stays: a bank may be larger than the memory of the host
    bank = MemoryBank(
        list(bank_tiles),
        dim,
        dtype=memory.dtype,
        device=device,
        **_placement(memory if bank_tiles else MemoryConfig()),
    )
    return DRESLCL(
        encoder,
        bank,
        _slide_encoder(config.model, dim, report_dim),
        tasks=task_sizes,
        memory=modes.get(memory.mode, memory.mode),
        grad_scale=memory.grad_scale,
        normalize=config.model.normalize,
    ).to(device)


def _slide_encoder(config: ModelConfig, dim: int, report_dim: int | None) -> SlideEncoder | RowAggregator:
    sizes = {"depth": config.depth, "heads": config.heads, "dropout": config.dropout}
    if config.aggregator == "residual":
        return SlideEncoder(dim, config.codewords, width=config.width, report_dim=report_dim, **sizes)  # type: ignore[arg-type]
    if config.aggregator == "soft":
        sizes |= {"codewords": config.codewords, "normalize": config.normalize}  # type: ignore[dict-item]
    return AGGREGATORS[config.aggregator](dim, config.width, report_dim, **sizes)  # type: ignore[arg-type]


def _placement(memory: MemoryConfig) -> dict[str, Any]:
    """The arguments of the bank's tier; settings of another tier are left out, so that a run may change it."""
    found: dict[str, Any] = {"tier": memory.tier}
    if memory.tier in ("file", "auto"):
        found.update(folder=memory.folder, cache=memory.cache)
    if memory.tier == "auto":
        found["budget"] = memory.budget
    return found


def load_encoder_weights(encoder: TileEncoder, path: str | Path) -> None:
    """Load a tile encoder's weights: its own state dict as safetensors, else a HIPT / DINO checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the weights do not fit; names the file and the keys.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of encoder weights")
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
        if state.keys() == encoder.state_dict().keys():
            try:
                encoder.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(f"{path}: {error}") from error
            return
    load_hipt_checkpoint(encoder, path)


def task_card(task: Task) -> dict[str, Any]:
    """What a saved model or prediction file says of a task."""
    return task.card()


def parameter_groups(
    model: DRESLCL, loss: nn.Module, lr: float, encoder_scale: float, decay: float
) -> list[dict]:
    """AdamW groups: encoder and the rest, each with and without weight decay (none on vectors and scalars)."""
    encoder = {id(p) for p in model.tile_encoder.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in [*model.parameters(), *loss.parameters()]:
        decays = parameter.dim() > 1 and not getattr(parameter, "no_decay", False)
        groups.setdefault((id(parameter) in encoder, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "base_lr": lr * (encoder_scale if of_encoder else 1.0),
            "lr": lr,
            "weight_decay": decay if decays else 0.0,
            "encoder": of_encoder,
        }
        for (of_encoder, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def clip_gradients(groups: list[dict[str, Any]], longest: float) -> Tensor:
    """Shorten the gradient of the encoder, and that of the rest, to a length of ``longest`` (0: leave them).

    Each by itself: the encoder's gradient is often many times longer (of all tiles with memory.grad_scale=unbiased or
    mode exact), and under one common limit it would decide, step by step, how little the head learns.

    Args:
        groups: of :func:`parameter_groups`.

    Returns:
        fp32 [2], their lengths before: encoder, rest.
    """
    lengths = []
    for of_encoder in (True, False):
        parameters = [p for group in groups if group["encoder"] == of_encoder for p in group["params"]]
        lengths.append(nn.utils.clip_grad_norm_(parameters, longest or math.inf))
    return torch.stack([length.float().to(lengths[-1].device) for length in lengths])
