"""Report embeddings of a cohort: reading report files, embedding them, and the file that training reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dre_fast.data.cohort import Cohort, case_of
from dre_fast.data.files import write_tensors
from dre_fast.data.optional import need
from dre_fast.data.tables import ReportError, read_table
from dre_fast.data.text_encoders import TextEncoder
from dre_fast.data.tfidf import FORMAT as TFIDF_FORMAT
from dre_fast.data.tfidf import TfidfSvd

__all__ = ["ReportEmbeddings", "ReportError", "TfidfSvd", "embed_reports", "match_reports", "read_reports"]

FORMAT = "dre_fast-reports-1"
ID_COLUMNS = ("case_id", "patient_filename", "patient_id", "slide_id", "id")
TEXT_COLUMNS = ("text", "report")


@dataclass
class ReportEmbeddings:
    """One frozen vector per case.

    Attributes:
        case_ids: M distinct cases.
        matrix: float32 [M, T].
        model: what embedded them; vectors of different models must not be mixed.
        details: settings and remarks, kept in the file.
        basis: the fitted TF-IDF basis when this call fitted or used one; not part of the file.
    """

    case_ids: list[str]
    matrix: Tensor
    model: str
    details: dict[str, Any] = field(default_factory=dict)
    basis: TfidfSvd | None = None

    def __post_init__(self) -> None:
        self.matrix = self.matrix.to(torch.float32)
        if self.matrix.ndim != 2 or len(self.matrix) != len(self.case_ids):
            raise ReportError(
                f"{len(self.case_ids)} cases need a matrix [M, T], got {tuple(self.matrix.shape)}"
            )
        self._row = {case: i for i, case in enumerate(self.case_ids)}
        if len(self._row) != len(self.case_ids):
            twice = next(case for i, case in enumerate(self.case_ids) if self._row[case] != i)
            raise ReportError(f"case {twice!r} has two report embeddings")
        finite = torch.isfinite(self.matrix).all(1)
        if not finite.all():
            raise ReportError(
                f"case {self.case_ids[int((~finite).nonzero()[0])]!r}: its embedding has NaN or Inf"
            )

    def __len__(self) -> int:
        return len(self.case_ids)

    def __contains__(self, case_id: object) -> bool:
        return case_id in self._row

    @property
    def dim(self) -> int:
        """Length T of a vector."""
        return self.matrix.shape[1]

    def rows(self, case_ids: Sequence[str]) -> Tensor:
        """Vectors of these cases, float32 [B, T].

        Raises:
            ReportError: a case has none.
        """
        for case in case_ids:
            if case not in self._row:
                raise ReportError(f"case {case!r} has no report embedding (model {self.model})")
        return self.matrix[[self._row[case] for case in case_ids]]

    def save(self, path: str | Path) -> None:
        """Write safetensors, atomically: ``embeddings`` [M, T], case ids, model and details as metadata."""
        # One metadata entry: safetensors writes several in no fixed order, and equal embeddings are to be equal files.
        card = {"case_ids": self.case_ids, "model": self.model, "details": self.details}
        metadata = {FORMAT: json.dumps(card, sort_keys=True)}
        write_tensors(path, {"embeddings": self.matrix}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> ReportEmbeddings:
        """Read a file of :meth:`save`, or any safetensors file with one vector [T] or [1, T] per case id.

        Raises:
            ReportError: unreadable, or vectors of different lengths; the case is named.
        """
        path = Path(path)
        safetensors = need("safetensors", "train")

        try:
            with safetensors.safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except FileNotFoundError:
            raise ReportError(
                f"{path}: no such file (report embeddings, written by dre-fast embed-reports)"
            ) from None
        except (safetensors.SafetensorError, OSError) as error:
            raise ReportError(
                f"{path}: cannot read these report embeddings ({error}); "
                "write them with dre-fast embed-reports"
            ) from error
        if FORMAT in metadata:
            card = json.loads(metadata[FORMAT])
            return cls(card["case_ids"], tensors["embeddings"], card["model"], card["details"])
        other = next((key for key in metadata if key.startswith(FORMAT.rstrip("0123456789"))), None)
        if other:
            raise ReportError(
                f"{path}: written by another dre_fast (format {other}, this one reads {FORMAT}); upgrade dre_fast, or "
                "write it again with dre-fast embed-reports"
            )
        if TFIDF_FORMAT in metadata:
            raise ReportError(
                f"{path}: this is a fitted tfidf-svd model, not embeddings; embed with --model {path} first"
            )
        if not tensors:
            raise ReportError(f"{path}: no vectors in this file")
        length = next(iter(tensors.values())).numel()
        for case, vector in tensors.items():
            if vector.numel() != length or vector.shape[-1:] != (length,):
                raise ReportError(
                    f"{path}, case {case!r}: shape {tuple(vector.shape)}; "
                    f"expected one vector [{length}] per case"
                )
        return cls(
            list(tensors), torch.stack([v.reshape(length).float() for v in tensors.values()]), str(path)
        )


def read_reports(path: str | Path) -> dict[str, str]:
    """Read report texts kept outside the cohort table.

    Known layouts: a CSV with an id column (``case_id``, ``patient_filename`` as in TCGA-Reports,
        ``patient_id``,
    ``slide_id`` or ``id``) and a ``text`` or ``report`` column; a JSON annotation file in the manner of
    HistGen, ``{split: [{"id": ..., "report": ...}]}``, a list of such entries, or ``{id: text}``; a folder
    of ``ID.txt``.

    Returns:
        id -> text, ids as the file has them (:func:`match_reports` finds their cases). Empty texts are left
        out.

    Raises:
        ReportError, CohortError: names the file, and the row or entry.
    """
    path = Path(path)
    if path.is_dir():
        pairs = [(file.stem, _read_text(file), file.name) for file in sorted(path.glob("*.txt"))]
    elif path.suffix.lower() == ".json":
        pairs = _json_reports(path)
    else:
        pairs = _csv_reports(path)
    texts: dict[str, str] = {}
    for name, text, where in pairs:
        text = text.strip()
        if text and texts.setdefault(name, text).split() != text.split():
            raise ReportError(f"{path}, {where}: {name!r} has two different reports")
    if not texts:
        raise ReportError(f"{path}: no report in it")
    return texts


def match_reports(texts: dict[str, str], cohort: Cohort) -> dict[str, str]:
    """Reports of a cohort's cases, from texts under case ids, slide ids, or file names that start with them.

    ``TCGA-CQ-7063.be787b58-...`` is case ``TCGA-CQ-7063``; a slide id of the cohort stands for its case.

    Returns:
        case -> text, in the order of the cohort; texts of other cases are left out.

    Raises:
        ReportError: no case matches, or two ids with different texts mean the same case.
    """
    cases = set(cohort.cases)
    found: dict[str, str] = {}
    origin: dict[str, str] = {}
    for name, text in texts.items():
        case = _case(name, cohort, cases)
        if case is None:
            continue
        if found.setdefault(case, text).split() != text.split():
            raise ReportError(f"case {case!r} has two different reports: {origin[case]!r} and {name!r}")
        origin.setdefault(case, name)
    if not found:
        raise ReportError(
            f"none of the {len(texts)} reports belongs to a case of the cohort: the reports have ids such as "
            f"{next(iter(texts))!r}, the cohort has cases such as {cohort.cases[0]!r}"
        )
    return {case: found[case] for case in cohort.cases if case in found}


def embed_reports(
    reports: dict[str, str],
    model: str = "tfidf-svd",
    pooling: str = "mean",
    *,
    fit_on: Iterable[str] | None = None,
    dim: int = 256,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    revision: str | None = None,
) -> ReportEmbeddings:
    """Embed the reports of cases.

    Args:
        reports: case -> text.
        model: ``"tfidf-svd"`` (:class:`dre_fast.data.tfidf.TfidfSvd`, fitted here), a file with a fitted
            one, or a Hugging Face name or local folder (:class:`dre_fast.data.text_encoders.TextEncoder`).
        pooling, max_length, dtype, device, batch_size, revision, cache_dir: of a text encoder.
        fit_on: cases whose reports tfidf-svd is fitted on, the training cases, so that nothing of the
            others leaks into the basis; ``None``: all.
        dim, seed: length T wanted of tfidf-svd, and the seed of its SVD.

    Raises:
        ReportError: an empty report, a case of ``fit_on`` without report, or what the encoder raises.
    """
    if not reports:
        raise ReportError("no reports to embed")
    for case, text in reports.items():
        if not text.strip():
            raise ReportError(f"case {case!r}: its report is empty; leave the case out")
    details: dict[str, Any] = {"notes": []}
    if model == "tfidf-svd" or model.endswith(".safetensors"):
        if model == "tfidf-svd":
            chosen = list(reports if fit_on is None else dict.fromkeys(fit_on))
            without = [case for case in chosen if case not in reports]
            if without:
                raise ReportError(f"fit_on: case {without[0]!r} has no report")
            basis = TfidfSvd.fit([reports[case] for case in chosen], dim, seed)
            details |= {"fitted_on": len(chosen), "seed": seed}
            if basis.dim < dim:
                details["notes"].append(
                    f"{basis.dim} dimensions instead of {dim}: the {len(chosen)} fitted reports span no more"
                )
        else:
            basis = TfidfSvd.load(model)
        return ReportEmbeddings(list(reports), basis.transform(reports), basis.identity, details, basis)
    encoder = TextEncoder(
        model,
        pooling,
        max_length=max_length,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        revision=revision,
    )
    matrix = encoder.embed(reports, cache_dir)
    different = len(set(reports.values())) > 1
    if different and torch.allclose(
        matrix, matrix[:1].expand_as(matrix), rtol=0, atol=1e-6 * float(matrix.abs().max())
    ):
        raise ReportError(
            f"{model!r} with pooling {pooling!r} gives the same vector for every report; the first token "
            "of a decoder-only model sees no text: use pooling 'mean' or 'last'"
        )
    return ReportEmbeddings(list(reports), matrix, f"{model} {encoder.identity}", details)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ReportError(f"{file}: not UTF-8 (at byte {error.start}); save it as UTF-8") from None


def _case(name: str, cohort: Cohort, cases: set[str]) -> str | None:
    """The cohort's case that an id of a report file means."""
    for candidate in (name, name.split(".")[0]):
        if candidate in cases:
            return candidate
        if candidate in cohort:
            return cohort[candidate].case_id
    tcga = case_of(name)
    return tcga if tcga in cases else None


def _csv_reports(path: Path) -> list[tuple[str, str, str]]:
    names, rows = read_table(path, ())
    lower = [name.lower() for name in names]
    chosen = []
    for what, wanted in (("id", ID_COLUMNS), ("text", TEXT_COLUMNS)):
        column = next((lower.index(name) for name in wanted if name in lower), None)
        if column is None:
            raise ReportError(
                f"{path}, row 1: no {what} column (one of {', '.join(wanted)}); columns: {', '.join(names)[:300]}"
            )
        chosen.append(column)
    pairs = []
    for row, cells in rows:
        name, text = cells[chosen[0]].strip(), cells[chosen[1]]
        if not name:
            raise ReportError(f"{path}, row {row}, column {names[chosen[0]]!r}: empty")
        pairs.append((name, text, f"row {row}"))
    return pairs


def _json_reports(path: Path) -> list[tuple[str, str, str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot read this as JSON: {error}") from error
    if isinstance(content, dict) and all(isinstance(text, str) for text in content.values()):
        return [(name, text, f"entry {name!r}") for name, text in content.items()]
    groups = content if isinstance(content, dict) else {"list": content}
    pairs = []
    for group, entries in groups.items():
        if not isinstance(entries, list):
            raise ReportError(f"{path}, {group!r}: expected a list of entries with 'id' and 'report'")
        for i, entry in enumerate(entries):
            where = f"{group!r}, entry {i}"
            if not isinstance(entry, dict) or not all(
                isinstance(entry.get(key), str) for key in ("id", "report")
            ):
                raise ReportError(f"{path}, {where}: needs texts under 'id' and 'report'")
            pairs.append((entry["id"], entry["report"], where))
    return pairs
