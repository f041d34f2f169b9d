"""Report embeddings by a Hugging Face text encoder: long reports in windows, each text embedded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dre_fast.data.files import write_tensors
from dre_fast.data.optional import need
from dre_fast.data.tables import ReportError
from dre_fast.progress import progress

POOLINGS = ("mean", "last", "cls")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST_WINDOW = 4096  # tokens; bounds memory for models that would take far more at once
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "longformer", "xmod", "data2vec-text")


class TextEncoder:
    """A frozen text encoder: text -> vector of length T.

    A text longer than the model's window is cut into windows that overlap by an eighth; the vectors of the
    windows are averaged, weighted by their number of tokens. Batches are padded on the right with an
    attention mask, so models without a padding token (LLaMA) give the same vectors at any batch size.

    Args:
        name: Hugging Face name or local folder. Code shipped with a model is never run.
        pooling: ``"mean"`` over the tokens of a window, its ``"last"`` token (decoder-only models such as
            LLaMA) or its first, ``"cls"`` (BERT-like models).
        max_length: tokens of a window, special ones included; default what the model allows, at most 4096.
        dtype: of the weights: ``"float32"``, ``"bfloat16"``, ``"float16"``; pooling is done in float32.
        device: ``"auto"`` = CUDA when there is one.
        batch_size: windows encoded at once.
        revision: branch, tag or commit of a Hugging Face name.

    Raises:
        ReportError: the model cannot be loaded or used, with the reason.
    """

    def __init__(
        self,
        name: str,
        pooling: str = "mean",
        *,
        max_length: int | None = None,
        dtype: str = "float32",
        device: str = "auto",
        batch_size: int = 8,
        revision: str | None = None,
    ) -> None:
        if pooling not in POOLINGS:
            raise ReportError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        if dtype not in DTYPES:
            raise ReportError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if batch_size < 1:
            raise ReportError(f"batch_size must be at least 1, got {batch_size}")
        self.name, self.pooling, self.batch_size, self._dtype = name, pooling, batch_size, dtype
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._revision = revision
        self.transformers = need("transformers", "train")
        self._config = self._load(self.transformers.AutoConfig)
        self._tokenizer = self._load(self.transformers.AutoTokenizer)
        self._prefix, self._suffix = self._special_tokens()
        self.max_length = self._window(max_length)
        self._model: Any = None

    @property
    def identity(self) -> str:
        """What an embedding depends on besides its text, as JSON: model, pooling, window, dtype.

        A local folder counts by the content of its files, so a model that was trained further is another
        model.
        """
        if not hasattr(self, "_identity"):
            folder = Path(self.name).expanduser()
            model = (
                {"content": _folder_hash(folder)}
                if folder.is_dir()
                else {
                    "name": self.name,
                    "revision": getattr(self._config, "_commit_hash", None) or self._revision,
                }
            )
            settings = {"pooling": self.pooling, "max_length": self.max_length, "dtype": self._dtype}
            self._identity = json.dumps({**model, **settings}, sort_keys=True)
        return self._identity

    def embed(self, reports: dict[str, str], cache_dir: str | Path | None = None) -> Tensor:
        """Embed reports; equal texts are embedded once, and texts found in the cache not at all.

        Args:
            reports: case -> text.
            cache_dir: one small file per text is kept here as soon as it is embedded, so that an
                interrupted run continues where it stopped. Keyed by :attr:`identity` and the text's
                SHA-256.

        Returns:
            float32 [M, T], in the order of ``reports``, as the model gives them (not normalised).

        Raises:
            ReportError: NaN or Inf in an embedding, a report without tokens, or a damaged cache file.
        """
        keys = {case: hashlib.sha256(text.encode()).hexdigest() for case, text in reports.items()}
        cases = {key: case for case, key in reversed(keys.items())}
        folder = None
        if cache_dir is not None:
            folder = Path(cache_dir) / hashlib.sha256(self.identity.encode()).hexdigest()[:16]
        found = {key: vector for key in cases if (vector := _from_cache(folder, key)) is not None}
        # Longest first: running out of memory shows at once, and a batch holds texts of like length.
        new = sorted((k for k in cases if k not in found), key=lambda k: (-len(reports[cases[k]]), k))
        groups = [new[i : i + self.batch_size] for i in range(0, len(new), self.batch_size)]
        for group in progress(groups, f"embedding {len(new)} reports", unit="batch"):
            vectors = self._embed_texts([reports[cases[key]] for key in group], [cases[key] for key in group])
            for key, vector in zip(group, vectors):
                if not torch.isfinite(vector).all():
                    raise ReportError(
                        f"case {cases[key]!r}: its embedding has NaN or Inf under dtype {self._dtype}; "
                        "use bfloat16 or float32"
                    )
                found[key] = vector
                _to_cache(folder, key, vector)
        return torch.stack([found[keys[case]] for case in reports])

    @torch.no_grad()
    def _embed_texts(self, texts: Sequence[str], cases: Sequence[str]) -> list[Tensor]:
        windows: list[list[int]] = []
        weights: list[int] = []
        owner: list[int] = []
        for i, text in enumerate(texts):
            tokens = self._tokens(text)
            if not tokens:
                raise ReportError(
                    f"case {cases[i]!r}: the tokenizer finds nothing in its report {text[:60]!r}"
                )
            for chunk in chunks(tokens, self.max_length - len(self._prefix) - len(self._suffix)):
                windows.append([*self._prefix, *chunk, *self._suffix])
                weights.append(len(chunk))
                owner.append(i)
        order = sorted(range(len(windows)), key=lambda w: len(windows[w]))
        pooled: dict[int, Tensor] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            pooled.update(zip(batch, self._encode([windows[w] for w in batch])))
        vectors = []
        for i in range(len(texts)):
            mine = [w for w in range(len(windows)) if owner[w] == i]
            share = torch.tensor([float(weights[w]) for w in mine])
            vectors.append((torch.stack([pooled[w] for w in mine]) * (share / share.sum())[:, None]).sum(0))
        return vectors

    def _encode(self, windows: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of W windows -> pooled fp32 [W, T] on the CPU."""
        length = max(len(window) for window in windows)
        pad = self._tokenizer.pad_token_id
        ids = torch.full((len(windows), length), 0 if pad is None else int(pad), dtype=torch.long)
        mask = torch.zeros(len(windows), length, dtype=torch.long)
        for i, window in enumerate(windows):
            ids[i, : len(window)] = torch.tensor(window)
            mask[i, : len(window)] = 1
        model = self._loaded_model()
        output = model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device))
        states = getattr(output, "last_hidden_state", None)
        if states is None:
            raise ReportError(f"text encoder {self.name!r} gives no token states; it is not a text encoder")
        return pool(states.float(), mask.to(states.device), self.pooling).cpu()

    def _loaded_model(self) -> Any:
        if self._model is None:
            model = self._load(self.transformers.AutoModel, dtype=DTYPES[self._dtype])
            if getattr(self._config, "is_encoder_decoder", False):
                model = model.get_encoder()
            elif hasattr(model, "text_model"):  # CLIP-like: image and text towers in one
                model = model.text_model
            self._model = model.to(self._device).eval()
        return self._model

    def _load(self, auto: Any, **options: Any) -> Any:
        folder = Path(self.name).expanduser()
        source = str(folder) if folder.is_dir() else self.name
        try:
            return auto.from_pretrained(source, revision=self._revision, trust_remote_code=False, **options)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ReportError(
                f"cannot load the text encoder {self.name!r}: {error}\n"
                "Give a Hugging Face name that this machine can reach or a local folder with the model and "
                "its tokenizer; tfidf-svd needs no download."
            ) from error

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        bare = self._tokens("tissue")
        whole = list(self._tokenizer("tissue")["input_ids"])
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        raise ReportError(f"text encoder {self.name!r}: its tokenizer does not turn a word into tokens")

    def _window(self, wanted: int | None) -> int:
        """Tokens of a window."""
        text_config = self._config.get_text_config()
        limits = []
        positions = getattr(text_config, "max_position_embeddings", None)
        if positions:
            # These models count positions from the padding index + 1.
            offset = (text_config.pad_token_id or 0) + 1 if text_config.model_type in _OFFSET_POSITIONS else 0
            limits.append(positions - offset)
        if self._tokenizer.model_max_length < 10**9:  # a tokenizer that does not know says 10**30
            limits.append(self._tokenizer.model_max_length)
        if wanted is None:
            return min([*limits, LONGEST_WINDOW]) if limits else 512
        least = len(self._prefix) + len(self._suffix) + 8
        if wanted < least or (limits and wanted > min(limits)):
            most = min(limits) if limits else "any"
            raise ReportError(f"max_length must be {least} to {most} for {self.name!r}, got {wanted}")
        return wanted


def chunks(tokens: Sequence[int], size: int) -> list[Sequence[int]]:
    """Windows of at most ``size`` tokens that cover ``tokens``; each repeats an eighth of the one before."""
    if len(tokens) <= size:
        return [tokens]
    step = size - size // 8
    starts = range(0, len(tokens) - size // 8, step)
    return [tokens[start : start + size] for start in starts]


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector per row of token states.

    Args:
        states: float [W, L, T].
        mask: [W, L], 1 = token, 0 = padding on the right; at least one token a row.
        pooling: ``"mean"`` | ``"last"`` | ``"cls"``.

    Returns:
        float [W, T].
    """
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    weight = mask.to(states.dtype)[..., None]
    return (states * weight).sum(1) / weight.sum(1)


def _folder_hash(folder: Path) -> str:
    """SHA-256 over names and content of the files a model is loaded from."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _from_cache(folder: Path | None, key: str) -> Tensor | None:
    if folder is None or not (path := folder / f"{key}.safetensors").exists():
        return None
    safetensors = need("safetensors.torch", "train")
    try:
        return safetensors.load_file(str(path))["embedding"]
    except (need("safetensors", "train").SafetensorError, KeyError, OSError) as error:
        raise ReportError(f"cache file {path} is damaged ({error}); delete it") from error


def _to_cache(folder: Path | None, key: str, vector: Tensor) -> None:
    if folder is None:
        return
    write_tensors(folder / f"{key}.safetensors", {"embedding": vector})
