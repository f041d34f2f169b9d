"""Slide embeddings and predictions of a cohort, in one file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dre_fast.data.files import atomic_path, write_tensors
from dre_fast.data.optional import need
from dre_fast.data.tasks import KINDS, Task

FORMAT = "dre_fast.slide_embeddings"
VERSION = 1


@dataclass
class SlideEmbeddings:
    """What a slide model says about S slides.

    Attributes:
        slide_ids: S distinct names, in row order of every tensor.
        embedding: fp32 [S, E], the slide embeddings.
        report_embedding: fp32 [S, T], the projections into the report space, or None.
        logits: task name -> fp32 [S, C]; C is the number of classes (multiclass), 1 (binary, Cox), the number of
            columns (multilabel) or of intervals (hazards).
        tasks: task name -> :meth:`dre_fast.data.tasks.Task.card`; it has an entry for every task of ``logits``.

    Raises:
        ValueError: rows, dtypes, names or tasks do not fit together; the message says which.
    """

    slide_ids: list[str]
    embedding: Tensor
    report_embedding: Tensor | None = None
    logits: dict[str, Tensor] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slides = len(self.slide_ids)
        seen: set[str] = set()
        for name in self.slide_ids:
            if name in seen:
                raise ValueError(f"slide {name!r} appears twice in slide_ids")
            seen.add(name)
        for name, tensor in self._tensors().items():
            if tensor.ndim != 2 or tensor.shape[0] != slides:
                raise ValueError(
                    f"{name} must be [{slides}, *] for {slides} slides, got {list(tensor.shape)}"
                )
            if tensor.dtype != torch.float32:
                raise ValueError(f"{name} must be float32, got {tensor.dtype}; call .float()")
        for name, logits in self.logits.items():
            if name not in self.tasks:
                raise ValueError(f"logits of task {name!r} without an entry in tasks")
            card = self.tasks[name]
            if card.get("kind") not in KINDS:
                raise ValueError(
                    f"task {name!r}: kind must be one of {', '.join(KINDS)}, got {card.get('kind')!r}"
                )
            wanted = Task.from_card(name, card).outputs
            if logits.shape[1] != wanted:
                raise ValueError(
                    f"task {name!r} ({card['kind']}) needs {wanted} logits a slide, got {logits.shape[1]}"
                )

    def __len__(self) -> int:
        return len(self.slide_ids)

    def select(self, slide_ids: list[str]) -> SlideEmbeddings:
        """The same predictions for some slides, in the order given.

        Raises:
            ValueError: a slide that is not here; the message names it.
        """
        position = {name: i for i, name in enumerate(self.slide_ids)}
        absent = [name for name in slide_ids if name not in position]
        if absent:
            raise ValueError(
                f"no embedding of slide {absent[0]!r} ({len(absent)} of {len(slide_ids)} absent)"
            )
        rows = torch.tensor([position[name] for name in slide_ids], dtype=torch.int64)
        return SlideEmbeddings(
            list(slide_ids),
            self.embedding[rows],
            None if self.report_embedding is None else self.report_embedding[rows],
            {name: logits[rows] for name, logits in self.logits.items()},
            self.tasks,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to one file, whole or not at all.

        ``.safetensors``: tensors ``embedding``, ``report_embedding``, ``logits/TASK``; slide_ids and tasks as
        JSON in the header. ``.h5`` or ``.hdf5``: data sets of the same names, ``slide_ids`` as strings, tasks
        as a JSON attribute.

        Raises:
            ValueError: another suffix.
            ImportError: the package the format needs is missing.
        """
        suffix = _suffix(path)
        if suffix == ".safetensors":
            write_tensors(path, self._tensors(), self._metadata())
            return
        with atomic_path(path) as temporary, need("h5py", "wsi").File(temporary, "w") as file:
            for name, tensor in self._tensors().items():
                file.create_dataset(name, data=tensor.detach().cpu().numpy())
            file.create_dataset("slide_ids", data=self.slide_ids, dtype=need("h5py", "wsi").string_dtype())
            for name, value in self._metadata().items():
                if name != "slide_ids":
                    file.attrs[name] = value

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SlideEmbeddings:
        """Reads a file that ``save`` wrote; tensors are on the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another suffix, or a file that is damaged or not of this kind; the message names it.
        """
        suffix = _suffix(path)
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file of slide embeddings")
        try:
            if suffix == ".safetensors":
                with need("safetensors", "train").safe_open(path, framework="pt") as file:
                    metadata = dict(file.metadata() or {})
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no iterator
            else:
                with need("h5py", "wsi").File(path, "r") as file:
                    metadata = {name: str(value) for name, value in file.attrs.items()}
                    tensors = {}
                    for name in [*file, *(f"logits/{task}" for task in file.get("logits", ()))]:
                        if name not in ("slide_ids", "logits"):
                            tensors[name] = torch.from_numpy(file[name][()])
                    if "slide_ids" in file:
                        metadata["slide_ids"] = json.dumps([name.decode() for name in file["slide_ids"][()]])
        except ImportError:
            raise
        except Exception as error:  # both readers raise types of their own for a damaged file
            raise ValueError(
                f"{path}: cannot be read ({error}); write it again with `dre-fast encode`"
            ) from error
        if metadata.get("format") != FORMAT or "embedding" not in tensors:
            names = sorted(tensors)
            found = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "") or "nothing"
            raise ValueError(
                f"{path}: not a file of slide embeddings (holds {found}); make one with `dre-fast encode`"
            )
        if int(metadata["version"]) > VERSION:
            raise ValueError(
                f"{path}: written by a newer dre_fast (format version {metadata['version']}, this one reads "
                f"up to "
                f"{VERSION}); upgrade dre_fast"
            )
        logits = {n.removeprefix("logits/"): t for n, t in tensors.items() if n.startswith("logits/")}
        try:
            return cls(
                json.loads(metadata["slide_ids"]),
                tensors["embedding"],
                tensors.get("report_embedding"),
                logits,
                json.loads(metadata["tasks"]),
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"embedding": self.embedding}
        if self.report_embedding is not None:
            tensors["report_embedding"] = self.report_embedding
        tensors.update({f"logits/{name}": logits for name, logits in self.logits.items()})
        return tensors

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "version": str(VERSION),
            "slide_ids": json.dumps(self.slide_ids),
            "tasks": json.dumps(self.tasks),
        }


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".safetensors", ".h5", ".hdf5"):
        raise ValueError(f"{path}: slide embeddings are kept as .safetensors, .h5 or .hdf5, not {suffix!r}")
    return suffix
