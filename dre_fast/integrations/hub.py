"""Models in folders and on the Hugging Face Hub: safetensors, config.json and a model card. Nothing is unpickled.

Importing this module imports huggingface_hub.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from dre_fast.data.files import write_tensors, write_text_atomic
from dre_fast.data.optional import need
from dre_fast.eval.compare import read_runs, results
from dre_fast.eval.compare_figures import validation_title
from dre_fast.eval.grids import Grid
from dre_fast.eval.tables import SHOWN, read_tables, shown
from dre_fast.integrations.model_card import Card, render
from dre_fast.nn.residual_mil import ResidualMIL
from dre_fast.train import state as on_disk
from dre_fast.train.cost import read_cost
from dre_fast.train.data_card import read_data_card
from dre_fast.train.inference import LoadedRun, load_run

WEIGHTS, CONFIG, README = on_disk.EXPORTED, "config.json", "README.md"
FILES = (CONFIG, README, WEIGHTS)
MIL, RUN = "dre_fast.ResidualMIL", "dre_fast.DRESLCL"
PathLike = str | os.PathLike[str]
Model = TypeVar("Model", bound=ResidualMIL)

_hub: Any = need("huggingface_hub", "train")
_SAVED_WITH = "dre_fast.ResidualMIL"  # key in the header of the weights: the options again
# "owner/name" or "name", as the Hub allows them
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Where files of the machine that trained it lie is of no use elsewhere, and may tell more than it should.
_PATHS = {
    "data": ("cohort", "tiles", "reports", "cache"),
    "memory": ("folder",),
    "model": ("encoder_weights", "init"),
}


class _Files(_hub.ModelHubMixin):  # type: ignore[misc]
    """Files that a function writes into a folder, for the saving and pushing of huggingface_hub's mixin."""

    def __init__(self, write: Callable[[Path], None]) -> None:
        self._write = write

    def _save_pretrained(self, save_directory: Path) -> None:
        self._write(save_directory)


def save_pretrained(model: ResidualMIL, folder: PathLike, *, card: Card | None = None) -> Path:
    """Write model.safetensors, config.json and, unless there is one, README.md into a folder.

    Args:
        card: what the model card should say: data, splits, metrics, intended use; see :class:`Card`.

    Returns:
        The folder.

    Raises:
        ValueError: the codebook is not fitted.
    """
    _Files(lambda there: _write_mil(model, there, card)).save_pretrained(Path(folder))
    return Path(folder)


def push_to_hub(model: ResidualMIL, repo: str, *, card: Card | None = None, **options: Any) -> str:
    """Upload the same to a repository of the Hub, made where there is none; returns the address of the commit.

    Args:
        repo: ``owner/name``.
        options: of ``huggingface_hub.ModelHubMixin.push_to_hub``: private, token, branch, commit_message, create_pr.
    """
    return _Files(lambda there: _write_mil(model, there, card, repo)).push_to_hub(repo, **options)  # type: ignore[no-any-return]


def from_pretrained(
    cls: type[Model], folder_or_repo: PathLike, *, device: str | torch.device = "cpu", **options: Any
) -> Model:
    """A model of :func:`save_pretrained`, in eval mode.

    Args:
        folder_or_repo: a folder, or ``owner/name`` of the Hub.
        options: of the download: revision, token, cache_dir, force_download, local_files_only.

    Raises:
        FileNotFoundError: neither a folder nor a repository that the Hub gives.
        ValueError: a file is missing, damaged, or of another model; named.
    """
    folder = _fetch(folder_or_repo, **options)
    config = _read_config(folder, MIL)
    try:
        model = cls(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / CONFIG}: not the config of a {MIL} ({error})") from error
    tensors = need("safetensors", "train")
    try:
        state = need("safetensors.torch", "train").load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise ValueError(f"{folder}: holds no {WEIGHTS}") from None
    except tensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: damaged or not a safetensors file ({error})") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS}: does not fit {CONFIG}: {error}") from error
    _check_whole(folder, model.options, state)
    return model.to(device).eval()


def _check_whole(folder: Path, options: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    """What loads without a fault and yet is not what was saved: numbers that are none, options of another model."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{folder / WEIGHTS}: {name} holds NaN or Inf; save or fetch the model again")
    with need("safetensors", "train").safe_open(str(folder / WEIGHTS), "pt") as file:
        saved = (file.metadata() or {}).get(_SAVED_WITH)
    before = options if saved is None else json.loads(saved)  # older files do not say
    for key, value in options.items():
        if before.get(key) != value:
            raise ValueError(
                f"{folder / CONFIG}: {key} is {value!r}, and {WEIGHTS} was saved with "
                f"{before.get(key)!r}; fetch both again"
            )


def export_run(
    run: PathLike,
    folder: PathLike,
    *,
    card: Card | None = None,
    scores: PathLike | None = None,
    repo: str | None = None,
) -> Path:
    """Write the best model of a run into a folder for others: weights, config.json and a model card.

    The card gets the run's splits, validation scores, settings and cost from its files. Paths of this machine are cut
    down to names. Every command that takes a run takes the folder, too: encode, heatmap, codewords.

    Args:
        run: folder of a run.
        card: what the run does not know: data, license, ...; its splits and metrics are put before those of the run.
        scores: folder that `dre-fast evaluate --out` wrote: scores on unseen slides.
        repo: ``owner/name`` under which it will be found, for the card.

    Raises:
        FileNotFoundError: the run has no model yet.
        ValueError: no run, no scores there, or ``folder`` is the run's own.
    """
    source, target = Path(run), Path(folder)
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} is the run's own folder; name another one to export it to")
    state, known = on_disk.load_model(source / on_disk.BEST)
    known = {**known, "config": _without_paths(known["config"])}
    filled = _facts_of_run(source, card or Card(), scores)

    def write(there: Path) -> None:
        on_disk.save_model(there / WEIGHTS, state, known)
        write_text_atomic(there / CONFIG, json.dumps({"model_type": RUN, **known}, indent=2) + "\n")
        usage = (
            "from dre_fast.integrations.hub import load_exported\n"
            f'run = load_exported("{repo or target.name}")  # run.model, run.tasks, run.config'
        )
        config = known["config"]
        facts: dict[str, Any] = {
            "tile encoder": config["model"]["encoder"],
            "aggregator": config["model"]["aggregator"],
            "codewords": config["model"]["codewords"],
            "memory": config["memory"]["mode"],
            "tasks": ", ".join(known["tasks"]) or "none",
            "contrastive loss": config["loss"]["contrastive"] or "none",
            "tiles": "; ".join(map(_scale, known.get("tiles") or ())) or "not told",
        }
        kind = "A whole-slide model trained end to end with dre_fast (DRE-SLCL, arXiv 2511.05034), tile encoder included."
        _write_card(there, render(filled, kind=kind, facts=facts, usage=usage))

    _Files(write).save_pretrained(target)
    return target


def push_exported(folder: PathLike, repo: str, **options: Any) -> str:
    """Upload an exported folder, as it is, to the Hub; returns the address of the commit.

    Args:
        repo, options: as of :func:`push_to_hub`.

    Raises:
        ValueError: a file is missing; named.
    """
    source = Path(folder)
    for name in FILES:
        if not (source / name).exists():
            raise ValueError(f"{source}: holds no {name}; `dre-fast export` writes it")

    def copy(there: Path) -> None:
        for name in FILES:
            shutil.copyfile(source / name, there / name)

    return _Files(copy).push_to_hub(repo, **options)  # type: ignore[no-any-return]


def load_exported(folder_or_repo: PathLike, device: str | torch.device = "cpu", **options: Any) -> LoadedRun:
    """The model of :func:`export_run` with its tasks and config, from a folder or ``owner/name`` of the Hub.

    Args:
        options: of the download, as of :func:`from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: as :func:`from_pretrained`.
    """
    folder = _fetch(folder_or_repo, **options)
    _read_config(folder, RUN)
    return load_run(folder / WEIGHTS, device)


def _fetch(folder_or_repo: PathLike, **options: Any) -> Path:
    """The folder itself, or that of the repository's files in the Hub's cache."""
    folder = Path(folder_or_repo)
    if folder.is_dir():
        return folder
    name = os.fspath(folder_or_repo)
    if not _REPO.fullmatch(name) or folder.exists():
        raise FileNotFoundError(f"{name}: no such folder, and no name of a repository (owner/name)")
    try:
        return Path(_hub.snapshot_download(name, allow_patterns=list(FILES), **options))
    except (
        OSError,
        ValueError,
    ) as error:  # of the Hub's library: no such repository, no network, no right to read
        raise FileNotFoundError(f"{name}: no such folder, and the Hub does not give it ({error})") from error


def _read_config(folder: Path, kind: str) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.exists():
        raise ValueError(f"{folder}: holds no {CONFIG}, so no model of dre_fast")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        found = config.pop("model_type", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file}: not readable as a config ({error})") from error
    if found != kind:
        hints = {
            MIL: "; load it with ResidualMIL.from_pretrained",
            RUN: "; load it with dre_fast.integrations.hub.load_exported",
        }
        raise ValueError(f"{file}: of model_type {found!r}, not {kind}{hints.get(found, '')}")
    return config  # type: ignore[no-any-return]


def _write_mil(model: ResidualMIL, folder: Path, card: Card | None, repo: str | None = None) -> None:
    if not model.fitted:
        raise ValueError("save_pretrained: the codebook is not fitted; call model.fit_codebook(bags) first")
    options = json.dumps(model.options, sort_keys=True)
    write_tensors(folder / WEIGHTS, model.state_dict(), {_SAVED_WITH: options})
    write_text_atomic(folder / CONFIG, json.dumps({"model_type": MIL, **model.options}, indent=2) + "\n")
    usage = (
        "from dre_fast import ResidualMIL\n"
        f'model = ResidualMIL.from_pretrained("{repo or folder.name}")\n'
        f"logits = model(features)  # one slide, [tiles, {model.dim}] -> [1, {model.classes}]"
    )
    kind = "A slide classifier on stored tile features: residuals to a codebook, read by a small network (dre_fast)."
    _write_card(folder, render(card or Card(), kind=kind, facts=model.options, usage=usage))


def _write_card(folder: Path, text: str) -> None:
    """A card that is there stays, with a warning where it says something else: its owner may have written into it."""
    card = folder / README
    if not card.exists():
        write_text_atomic(card, text)
    elif card.read_text(encoding="utf-8") != text:
        warnings.warn(
            f"{card} was there and stays as it is: it may speak of another model; delete it to have it written anew",
            stacklevel=2,
        )


def _facts_of_run(run: Path, card: Card, scores: PathLike | None) -> Card:
    """The card with what the files of a run tell."""
    (read,) = read_runs([run])
    found, data = results(read.logs[0]), read_data_card(run)
    tables = dict(card.tables)
    kept = [[validation_title(key), value] for key, value in found.items() if key.startswith("val_")]
    if scores is not None:
        file = Path(scores) / "metrics.json"
        if not file.exists():
            raise ValueError(
                f"{scores}: holds no metrics.json; `dre-fast evaluate ... --out {scores}` writes it"
            )
        tables["Unseen slides, with bootstrap intervals by case"] = Grid(
            SHOWN, [shown(row) for row in read_tables(file)]
        )
    tables[f"Validation slides, epoch {found['best epoch']}, whose model this is"] = Grid(
        ["score", "value"], kept
    )
    notes = list(card.notes)
    if (cost := read_cost(run)) is not None:
        line = cost.line()
        notes.append(f"Training {line}.")
    splits = card.splits or (data["splits"] if data else {})
    title = card.title or f"Whole-slide model {read.name}"
    return replace(card, title=title, splits=splits, tables=tables, notes=notes)


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(each) for each in value]
        return os.path.basename(value) if isinstance(value, str) else value

    return {
        section: {
            key: name(value) if key in _PATHS.get(section, ()) else value for key, value in values.items()
        }
        for section, values in config.items()
    }


def _scale(scale: dict[str, float | None]) -> str:
    return f"{scale['tile_size']:g} px" + ("" if scale["mpp"] is None else f" at {scale['mpp']:g} um/px")
