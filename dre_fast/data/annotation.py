"""A cohort from HistGen's ``annotation.json``: slides with their reports and splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dre_fast.data.cohort import SPLITS, Cohort, CohortError, SlideRecord, case_of


def read_annotation(path: str | Path) -> Cohort:
    """Reads ``{split: [{"id": ..., "report": ..., "image_path": ..., "split": ...}]}``.

    ``split`` of an entry, where given, must be its group's; ``image_path`` is a path or a list of one, relative to the
    file. Cases are those of TCGA barcodes, else the slide itself.

    Raises:
        CohortError: not such a file, an entry without id or report, a group that is no split, or a case in two splits;
            group and entry are named.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CohortError(f"{path}: cannot read this as JSON: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(group, list) for group in content.values()):
        raise CohortError(f"{path}: expected {{split: [entries with id and report]}}")
    records = [
        _record(path, group, number, entry)
        for group, entries in content.items()
        for number, entry in enumerate(entries)
    ]
    if not records:
        raise CohortError(f"{path}: no entries in it")
    return Cohort(records, (), str(path))


def _record(path: Path, group: str, number: int, entry: Any) -> SlideRecord:
    where = f"{path}, {group!r}, entry {number}"
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("id", "report")):
        raise CohortError(f"{where}: needs texts under 'id' and 'report'")
    if group.lower() not in SPLITS:
        raise CohortError(f"{where}: group {group!r} must be train, val or test")
    split = SPLITS[group.lower()]
    said = entry.get("split")
    if said is not None and SPLITS.get(str(said).lower()) != split:
        raise CohortError(
            f"{where}: slide {entry['id']!r} says split {said!r}, but is listed under {group!r}"
        )
    files = entry.get("image_path")
    files = files if isinstance(files, list) else [] if files is None else [files]
    if len(files) > 1 or not all(isinstance(file, str) for file in files):
        raise CohortError(f"{where}: 'image_path' must be one path, got {files!r}")
    return SlideRecord(
        entry["id"],
        case_of(entry["id"]),
        path.parent / files[0] if files else None,
        entry["report"].strip() or None,
        split=split,
        row=None,
    )
