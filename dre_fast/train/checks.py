"""What must hold before a run starts or goes on: of its folder, splits and labels, and that the data are the same."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from dre_fast.data.cohort import Cohort, CohortError, SlideRecord, Task
from dre_fast.data.multiscale import scales_of
from dre_fast.data.tiles import fingerprint
from dre_fast.train import state as on_disk
from dre_fast.train.build import Reports, SlideSet
from dre_fast.train.config import FREE_ON_RESUME, Config, DataConfig, load_config

Records = Sequence[SlideRecord]


def check_folder(out: Path, config: Config, resume: bool) -> None:
    """Refuse to mix two runs in one folder; remove what a killed process was writing.

    Raises:
        ValueError: ``out`` holds a run and ``resume`` is False, or a run of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in (on_disk.CHECKPOINT, on_disk.BEST, on_disk.CONFIG):
        for unfinished in out.glob(f".{Path(name).stem}.*{Path(name).suffix}"):
            unfinished.unlink()
    written = out / on_disk.CONFIG
    if not resume and (written.exists() or (out / on_disk.CHECKPOINT).exists()):
        raise ValueError(f"{out} already holds a run: pass --resume to go on with it, or name another folder")
    if written.exists() and (out / on_disk.CHECKPOINT).exists():  # before it, nothing is bound to the config
        check_same_config(written, config)


def check_same_config(written: Path, config: Config) -> None:
    """Raises ValueError when a config differs from a saved one in more than where its files lie and it runs."""
    before, now = asdict(load_config(written)), asdict(config)
    for section, values in now.items():
        for key, value in values.items():
            if before[section][key] != value and f"{section}.{key}" not in FREE_ON_RESUME:
                raise ValueError(
                    f"{written}: {section}.{key} was {before[section][key]!r} when the run began and is {value!r} "
                    "now; a resumed run keeps its config: to change it, start a run in another folder"
                )


def split_records(cohort: Cohort, data: DataConfig) -> tuple[Records, Records]:
    """Training and validation slides of a cohort; the latter empty without ``data.val_split``.

    Raises:
        ValueError: no slide is in a split; says which setting does without it. One slide file, under two names, is in
            the training split and in another.
    """
    try:
        train = cohort.subset(data.train_split).records
    except CohortError as error:
        raise CohortError(f"{error}; data.train_split=null trains on every slide") from error
    _refuse_trained_files(cohort, train)
    if not data.val_split:
        return train, ()
    try:
        return train, cohort.subset(data.val_split).records
    except CohortError as error:
        raise CohortError(f"{error}; data.val_split=null does without validation") from error


def _refuse_trained_files(cohort: Cohort, train: Records) -> None:
    """A file that is trained on under one name must not be judged under another."""
    trained = {os.path.realpath(record.path): record for record in train if record.path is not None}
    ids = {record.slide_id for record in train}
    for record in cohort.records:
        if record.path is None or record.split is None or record.slide_id in ids:
            continue
        other = trained.get(os.path.realpath(record.path))
        if other is not None:
            raise CohortError(
                f"{cohort.source}, column 'path': slides {other.slide_id!r} ({other.split}) and {record.slide_id!r} "
                f"({record.split}) are the same file, {record.path}; take one out, or give them one split and case_id"
            )


def check_labels(tasks: Sequence[Task], train: SlideSet, val: SlideSet | None) -> None:
    """:func:`check_targets`, and validation slides that cannot judge are refused.

    Raises:
        ValueError: a label column without a label among the training slides, or validation slides with neither label
            nor report.
    """
    check_targets(tasks, train.targets, None if val is None else val.targets)
    if val is None or (val.report_rows >= 0).any():
        return
    if not any(labelled(val.targets[task.name]).any() for task in tasks):
        raise ValueError(
            "no validation slide has a label or a report, so no epoch is better than another; "
            "label some, or set data.val_split=null"
        )


def check_targets(
    tasks: Sequence[Task], train: Mapping[str, Tensor], val: Mapping[str, Tensor] | None
) -> None:
    """Refuse tasks that cannot learn; warn of classes never seen and of tasks that validation cannot judge.

    Args:
        train, val: task -> targets of the training and the validation slides.

    Raises:
        ValueError: a label column without a label among the training slides.
    """
    for task in tasks:
        target = train[task.name].reshape(len(train[task.name]), -1)
        for i, column in enumerate(task.columns):
            if not labelled(target[:, i]).any():
                raise ValueError(f"task {task.name!r}, column {column!r}: no training slide has a label")
        if task.kind == "multiclass":
            unseen = [name for c, name in enumerate(task.classes) if not (target == c).any()]
            if unseen:
                warnings.warn(
                    f"task {task.name!r}: no training slide is {' or '.join(unseen)}; it will never be predicted",
                    stacklevel=3,
                )
        elif task.kind != "survival":
            for i, column in enumerate(task.columns):
                seen = target[:, i][labelled(target[:, i])].unique()
                if len(seen) == 1:
                    warnings.warn(
                        f"task {task.name!r}, column {column!r}: every training slide with a label is "
                        f"{(task.classes or ('negative', 'positive'))[int(seen)]}, so there is nothing to tell apart",
                        stacklevel=3,
                    )
        if val is not None and not labelled(val[task.name]).any():
            warnings.warn(
                f"task {task.name!r}: no validation slide has a label; it has no part in picking the best epoch",
                stacklevel=3,
            )


def data_fingerprint(train: SlideSet, val: SlideSet | None, reports: Reports | None) -> dict[str, str]:
    """Hashes of all that a run learns from, wherever its files lie. The rows of the bank have meaning only with it."""
    marks = {"reports": _hash(reports.matrix if reports else None)}
    for name, slides in (("training", train), ("validation", val)):
        if slides is not None:
            marks[f"{name} slides and tiles"] = _hash(
                *(fingerprint(t) for joined in slides.reader.tilings for t in scales_of(joined))
            )
            marks[f"{name} labels"] = _hash(*(slides.targets[task] for task in sorted(slides.targets)))
            marks[f"cases of the {name} slides"] = _hash(slides.report_rows)
    return marks


def check_same_data(before: dict[str, str], now: dict[str, str], out: Path) -> None:
    """Raises ValueError when a run is resumed on other data than it began with; names what differs."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise ValueError(
            f"{out}: since the run began, there is a change in: {', '.join(changed)}; restore the former cohort table, "
            "tiles and reports, or start a run in another folder"
        )


def labelled(target: Tensor) -> Tensor:
    """Where a task's targets hold a label, bool of their shape."""
    return ~torch.isnan(target) if target.is_floating_point() else target >= 0


def _hash(*parts: Tensor | str | None) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(repr(tuple(part.shape)).encode())
            digest.update(part.contiguous().numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:32]


def pick_device(name: str) -> torch.device:
    """``auto`` = CUDA where there is one.

    Raises:
        ValueError: no such kind of device, or none on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}: must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here; "
            "see `dre-fast info`"
        )
    return device
