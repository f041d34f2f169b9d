"""TF-IDF + SVD report embeddings: no download, no GPU, and the fitted basis can be kept for later cohorts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dre_fast.data.files import write_tensors
from dre_fast.data.optional import need
from dre_fast.data.tables import ReportError

FORMAT = "dre_fast-tfidf-svd-1"
MAX_TERMS = 20_000


@dataclass(frozen=True)
class TfidfSvd:
    """A fitted basis: report text -> vector of length T, unit L2 norm.

    Terms are lower-case words and pairs of neighbouring words, weighted ``(1 + log tf) * idf`` with the
    smoothed inverse document frequency of scikit-learn and L2-normalised (Salton & Buckley 1988), then
    projected on the leading right singular vectors of the fitted reports (latent semantic analysis,
    Deerwester et al. 1990).

    Attributes:
        terms: vocabulary, V strings.
        idf: float32 [V].
        components: float32 [T, V], orthonormal rows.
    """

    terms: tuple[str, ...]
    idf: np.ndarray
    components: np.ndarray

    @property
    def dim(self) -> int:
        """Length T of an embedding."""
        return int(self.components.shape[0])

    @property
    def identity(self) -> str:
        """``tfidf-svd:`` and a hash of the fitted state: equal for embeddings that may be compared."""
        digest = hashlib.sha256("\n".join(self.terms).encode())
        digest.update(np.ascontiguousarray(self.idf).tobytes())
        digest.update(np.ascontiguousarray(self.components).tobytes())
        return f"tfidf-svd:{digest.hexdigest()[:16]}"

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int = 256, seed: int = 0) -> TfidfSvd:
        """Fit on reports of the training cases.

        Args:
            texts: M >= 2 reports.
            dim: wanted T; fewer are kept when the reports do not span as many directions.
            seed: of the randomised SVD.

        Raises:
            ReportError: fewer than two reports, or no word in them.
        """
        if dim < 1:
            raise ReportError(f"tfidf-svd: dim must be at least 1, got {dim}")
        if len(set(texts)) < 2:
            raise ReportError(
                f"tfidf-svd needs at least two different reports to fit on, got {len(set(texts))}; "
                "fit on more cases, or give a fitted model or a text encoder"
            )
        vectorizer = _vectorizer(max_features=MAX_TERMS)
        try:
            weights = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ReportError(f"tfidf-svd: {error}: is there any word in the reports?") from error
        rank = min(dim, *weights.shape)
        decomposition = need("sklearn.decomposition", "train")
        svd = decomposition.TruncatedSVD(n_components=rank, algorithm="randomized", random_state=seed).fit(
            weights
        )
        # Reports that repeat each other span fewer directions than their number; the rest is rounding noise.
        kept = svd.singular_values_ > 1e-4 * svd.singular_values_.max()
        return cls(
            terms=tuple(vectorizer.get_feature_names_out().tolist()),
            idf=vectorizer.idf_.astype(np.float32),
            components=svd.components_[kept].astype(np.float32),
        )

    def transform(self, reports: dict[str, str]) -> Tensor:
        """Embed reports.

        Args:
            reports: case -> text.

        Returns:
            float32 [M, T], rows of unit L2 norm, in the order of ``reports``.

        Raises:
            ReportError: a report without any known word, named by its case.
        """
        vectorizer = _vectorizer(vocabulary={term: i for i, term in enumerate(self.terms)})
        vectorizer.idf_ = self.idf.astype(np.float64)
        rows = vectorizer.transform(list(reports.values())) @ self.components.T.astype(np.float64)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        for case, norm in zip(reports, norms[:, 0]):
            if norm < 1e-9:
                raise ReportError(
                    f"case {case!r}: its report {reports[case][:60]!r} shares no word with the reports that "
                    "the tfidf-svd model was fitted on; leave the report out or fit on more cases"
                )
        return torch.from_numpy((rows / norms).astype(np.float32))

    def save(self, path: str | Path) -> None:
        """Write the state as safetensors, atomically: tensors ``idf``, ``components``, terms as metadata."""
        tensors = {
            "idf": torch.from_numpy(self.idf),
            "components": torch.from_numpy(self.components).contiguous(),
        }
        write_tensors(path, tensors, {FORMAT: json.dumps(self.terms)})

    @classmethod
    def load(cls, path: str | Path) -> TfidfSvd:
        """Read what :meth:`save` wrote.

        Raises:
            ReportError: not such a file.
        """
        safetensors = need("safetensors", "train")
        try:
            with safetensors.safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                if FORMAT not in metadata:
                    raise ReportError(f"{path}: not a fitted tfidf-svd model")
                terms = tuple(json.loads(metadata[FORMAT]))
                idf, components = file.get_tensor("idf").numpy(), file.get_tensor("components").numpy()
        except (safetensors.SafetensorError, OSError) as error:
            raise ReportError(f"{path}: cannot read this tfidf-svd model: {error}") from error
        return cls(terms, idf, components)


def _vectorizer(**options: Any) -> Any:
    text = need("sklearn.feature_extraction.text", "train")
    return text.TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), **options)
