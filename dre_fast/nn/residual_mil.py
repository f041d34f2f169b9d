"""A slide classifier on stored tile features: bag -> residual encoding -> slide embedding -> logits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dre_fast.nn.contributions import contributions
from dre_fast.nn.encoding import ResidualEncoding, residual_encode
from dre_fast.nn.slide_encoder import SlideEncoder
from dre_fast.ops.normalize import normalize_residuals
from dre_fast.reference.encode import l2_normalize, normalization_steps
from dre_fast.reference.layout import as_ragged
from dre_fast.reference.soft import soft_assign

_CHUNK_ENTRIES = 1 << 24  # rows x codewords, or rows x features, held at once by the contributions


class LightHead(nn.Module):
    """The slide encoder without its transformer: a layer shared by the residuals, joined in codeword order.

    h = W [gelu(U V_1 + e_1), ..., gelu(U V_K + e_K)] with U [width / 4, D] shared and e_k of each codeword.

    Args:
        dim: D. codewords: K. width: of the embedding, a multiple of 4. dropout: on the joined codewords.

    Shapes:
        ``forward(residuals)``: normalised residuals [B, K, D] -> [B, width].
    """

    def __init__(self, dim: int, codewords: int, *, width: int = 256, dropout: float = 0.0) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"LightHead: width {width} must be a multiple of 4")
        self.dim, self.codewords = dim, codewords
        self.tokens = nn.Linear(dim, width // 4)
        self.codeword = nn.Parameter(torch.randn(codewords, width // 4) * 0.02)
        self.readout = nn.Sequential(nn.Dropout(dropout), nn.Linear(codewords * (width // 4), width))

    def forward(self, residuals: Tensor) -> Tensor:
        """Normalised residuals [B, K, D] -> slide embedding [B, width]."""
        # as in the slide encoder: entries of unit variance after intra + global L2
        scaled = residuals.to(self.tokens.weight.dtype) * math.sqrt(self.codewords * self.dim)
        return self.readout(nn.functional.gelu(self.tokens(scaled) + self.codeword).flatten(1))  # type: ignore[no-any-return]


class ResidualMIL(nn.Module):
    """Multiple-instance classifier of bags of tile features by their residuals to a codebook.

        bag [n, D]  ->  V [K, D] = sum of residuals  ->  normalised  ->  h [width]  ->  logits [C]

    The codebook is fitted to the training bags by one call, :meth:`fit_codebook`, before training; it travels in the
    state_dict. Nothing depends on the order of the tiles or on how bags are batched.

    Args:
        dim: D of the tile features.
        classes: C, the number of logits; 1 for a binary task with one logit.
        codewords: K.
        assignment: ``"hard"`` (the paper's), ``"soft"`` (Deep-TEN) or ``"netvlad"``.
        width: of the slide embedding; a multiple of 4, and of ``heads``.
        head: ``"transformer"``, :class:`~dre_fast.SlideEncoder`, or ``"light"``, :class:`LightHead`.
        depth, heads: of the transformer.
        dropout: in the head, in [0, 1).
        learnable: train codebook and assignment by gradient. Default: with soft assignment and NetVLAD, as their
            papers do, and not with hard assignment.
        normalize: normalisations of V: any of intra, power, l2 in that order.
        normalize_rows: encode features divided by their L2 norm, as DRE-SLCL does.

    Shapes:
        ``forward(x, cu_seqlens=None, mask=None)`` takes bags in one of three layouts and gives logits [B, C]:

        ==========  ==========  ==========================================
        bags        x           with
        ==========  ==========  ==========================================
        one         [n, D]                                  (B = 1)
        ragged      [N, D]      ``cu_seqlens`` int [B+1]
        padded      [B, n, D]   ``mask`` bool [B, n], True = valid
        ==========  ==========  ==========================================

        fp32, or the dtype of autocast; the encoding is fp32 whatever autocast says. Masked rows may hold anything. A bag
        without tiles has V = 0 and finite logits.

    Raises:
        ValueError: options or sizes that do not fit; from ``forward`` as of :func:`dre_fast.residual_encode` (shapes,
            offsets, NaN or Inf in a row, named by bag and row).
        RuntimeError: ``forward`` before the codebook is fitted. A learnable one under soft assignment may start from
            random codewords.

    Source: DRE-SLCL, arXiv 2511.05034; Deep-TEN, Zhang et al. 2017; NetVLAD, Arandjelovic et al. 2016.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        codewords: int = 16,
        assignment: str = "hard",
        width: int = 256,
        *,
        head: str = "transformer",
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        learnable: bool | None = None,
        normalize: str | Sequence[str] = ("intra", "l2"),
        normalize_rows: bool = True,
    ) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"ResidualMIL: classes must be at least 1, got {classes}")
        if head not in ("transformer", "light"):
            raise ValueError(f"ResidualMIL: head must be 'transformer' or 'light', got {head!r}")
        self.dim, self.classes, self.width = dim, classes, width
        self._sizes: dict[str, Any] = {
            **{"dim": dim, "codewords": codewords, "assignment": assignment, "width": width, "head": head},
            **{"depth": depth, "heads": heads, "dropout": dropout, "normalize_rows": normalize_rows},
        }
        self.normalize = normalization_steps(normalize)
        if learnable is None:
            learnable = assignment != "hard"
        # the residuals are normalised here, so that contributions can be taken of their plain sums
        self.encoding = ResidualEncoding(dim, codewords, assignment, (), learnable, normalize_rows)
        self.head: SlideEncoder | LightHead
        if head == "transformer":
            self.head = SlideEncoder(dim, codewords, width=width, depth=depth, heads=heads, dropout=dropout)
        else:
            self.head = LightHead(dim, codewords, width=width, dropout=dropout)
        self.classifier = nn.Linear(width, classes)
        self.codebook_fitted: Tensor
        self.register_buffer("codebook_fitted", torch.tensor(False))
        self._fitted = False  # the buffer's value, known without waiting for a GPU

    @property
    def codewords(self) -> int:
        """K."""
        return self.encoding.codewords

    @property
    def options(self) -> dict[str, Any]:
        """What makes a model of the same sizes, as JSON holds it: ``ResidualMIL(**model.options)``."""
        learnable = self.encoding.learnable
        return {
            **self._sizes,
            "classes": self.classes,
            "learnable": learnable,
            "normalize": list(self.normalize),
        }

    @property
    def fitted(self) -> bool:
        """Whether the codebook has been fitted to features, here or in the model whose state_dict was loaded."""
        return self._fitted

    def fit_codebook(self, bags: Any, *, seed: int = 0, **options: Any) -> float:
        """Fit the codebook, and the sharpness of soft assignments, to the tiles of the training bags.

        Args:
            bags: list of bags [n, D] (tensors or arrays, empty ones are passed over), or any other source of rows that
                :func:`dre_fast.fit_codebook` reads, such as an object whose ``__iter__`` reads one bag file at a time.
            seed: of the k-means start.
            options: of :meth:`dre_fast.ResidualEncoding.fit`: iterations, init, weights, warm_start, ...

        Returns:
            Inertia: the sum of squared distances of the tiles to their nearest codewords.

        Raises:
            ValueError: fewer tiles than codewords, features of another D, NaN or Inf in a tile.
        """
        inertia = self.encoding.fit(bags, seed=seed, **options)
        self._mark_fitted()
        return inertia

    def load_codebook(self, state: Mapping[str, Tensor]) -> None:
        """Take the fitted codebook of another model: the state_dict of its ``encoding``.

        Raises:
            ValueError: it is of another K, D or assignment.
        """
        own = {name: tuple(tensor.shape) for name, tensor in self.encoding.state_dict().items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if own != given:
            raise ValueError(f"ResidualMIL: this codebook holds {given}, the model needs {own}")
        self.encoding.load_state_dict(dict(state))
        self._mark_fitted()

    def _mark_fitted(self) -> None:
        self.codebook_fitted.fill_(True)
        self._fitted = True

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._fitted = bool(self.codebook_fitted)

    def sums(self, x: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """V fp32 [B, K, D], the residual sums before normalisation. Layouts and errors: the class."""
        self._check_fitted()
        with torch.autocast(x.device.type, enabled=False):
            return self.encoding(x, cu_seqlens=cu_seqlens, mask=mask)  # type: ignore[no-any-return]

    def embed_sums(self, sums: Tensor) -> Tensor:
        """V [B, K, D] -> slide embeddings [B, width]."""
        with torch.autocast(sums.device.type, enabled=False):
            normalised = normalize_residuals(sums, self.normalize)
        return self.head(normalised)  # type: ignore[no-any-return]

    def embed(self, x: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Slide embeddings h [B, width], before the classifier. Layouts and errors: the class."""
        return self.embed_sums(self.sums(x, cu_seqlens, mask))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits [B, C]. Layouts and errors: the class."""
        return self.classifier(self.embed(x, cu_seqlens, mask))  # type: ignore[no-any-return]

    def contributions(
        self,
        x: Tensor,
        target: int | Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What each tile adds to a logit, to first order: sum_k a_ik <d logit / d V_k, x_i - c_k>.

        The score is how fast the logit grows with the weight of the tile in its bag; the scores of a bag sum to
        <d logit / d V, V>, V the residual sums. Under ``intra`` the logit does not change when all tiles of a codeword
        weigh more, so under hard assignment the scores of the tiles of one codeword sum to zero: they compare the tiles
        of a codeword with each other, and a tile like all others of its codeword scores about zero.

        Taken as in evaluation (no dropout), in fp32, without gradient; also under ``torch.no_grad`` and
        ``torch.inference_mode``.

        Args:
            x, cu_seqlens, mask: bags, as for ``forward``.
            target: class, or int64 [B], one a bag. Default: of each bag the class of its largest logit.

        Returns:
            fp32 of the shape of the rows: [n] or [N], or [B, n]; 0 where masked.

        Raises:
            ValueError: ``target`` is not a class; or as ``forward``.
        """

        def chosen(logits: Tensor) -> list[Tensor]:
            if target is None:
                classes = logits.argmax(1)
            else:
                # cloned: a tensor of inference mode could not be part of the graph
                classes = torch.as_tensor(target, device=logits.device).clone().expand(len(logits))
                if len(logits) and not 0 <= int(classes.min()) <= int(classes.max()) < self.classes:
                    raise ValueError(f"ResidualMIL: target must lie in 0 .. {self.classes - 1}, got {target}")
            return [logits.gather(1, classes[:, None]).sum()]

        return self._first_order(x, cu_seqlens, mask, chosen)[0]

    def class_contributions(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """:meth:`contributions` to every class: fp32 [C, n], [C, N] or [C, B, n]."""
        return self._first_order(x, cu_seqlens, mask, lambda logits: list(logits.sum(0)))

    def _first_order(self, x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, scalars: Any) -> Tensor:
        """Contributions to each of the scalars that ``scalars(logits)`` gives: [number of them, *shape of the rows].

        Each must be a sum over bags, whose V do not mix: its gradient at V is then that of every bag by itself.
        """
        self._check_fitted()
        # inference_mode(False): a gradient is taken here even while the caller records none
        with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                V, codes = self._sums_and_codes(x, cu_seqlens, mask)
            with torch.enable_grad(), _evaluating(self):
                V = V.detach().clone().requires_grad_(True)
                found = scalars(self.classifier(self.embed_sums(V)))
                gradients = [torch.autograd.grad(scalar, V, retain_graph=True)[0] for scalar in found]
            with torch.no_grad():
                rows, offsets, taken = as_ragged(x, cu_seqlens, mask)
                values = V.new_zeros(len(gradients), len(rows))
                bounds = offsets.tolist()
                step = max(1, _CHUNK_ENTRIES // max(self.dim, self.codewords))
                for bag, (first, last) in enumerate(pairwise(bounds)):
                    for start in range(first, last, step):
                        own = slice(start, min(start + step, last))
                        block, assigned = self._assigned(rows[own], codes, taken, own)
                        for number, gradient in enumerate(gradients):
                            values[number, own] = contributions(
                                gradient[bag], block, self.encoding.codebook, assigned
                            )
                return values.view(len(gradients), *x.shape[:-1])

    def _sums_and_codes(
        self, x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.encoding.assignment != "hard":
            return self.sums(x, cu_seqlens, mask), None
        # the codes of the sums themselves: another way of finding them may choose otherwise where two codewords tie
        V, codes = residual_encode(
            x,
            self.encoding.codebook,
            cu_seqlens=cu_seqlens,
            mask=mask,
            normalize_rows=self.encoding.normalize_rows,
            return_codes=True,
        )
        return V, codes.flatten()

    def _assigned(
        self, rows: Tensor, codes: Tensor | None, taken: Tensor | None, own: slice
    ) -> tuple[Tensor, Tensor]:
        """The rows as they were encoded, and their codes or weights; zero where masked."""
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        valid = None if taken is None else (taken[own] >= 0)[:, None]
        if valid is not None:
            rows = torch.where(valid, rows, 0.0)
        if self.encoding.normalize_rows:
            rows = l2_normalize(rows)
        if codes is not None:
            return rows, codes[own]
        encoding = self.encoding
        weights = soft_assign(rows, encoding.codebook, encoding.scale, encoding.weight, encoding.bias)
        return rows, weights if valid is None else weights * valid

    def reset_classifier(self, classes: int) -> None:
        """A new last layer with as many logits, its weights drawn anew; the rest stays.

        Raises:
            ValueError: ``classes`` below 1.
        """
        if classes < 1:
            raise ValueError(f"ResidualMIL: classes must be at least 1, got {classes}")
        old = self.classifier.weight
        self.classes = classes
        self.classifier = nn.Linear(self.width, classes, device=old.device, dtype=old.dtype)

    # Folders and the Hub: dre_fast.integrations.hub, imported on first use, since it needs huggingface_hub.

    def save_pretrained(self, folder: Any, *, card: Any = None) -> Any:
        """Write model.safetensors, config.json and a model card into a folder.

        See :func:`dre_fast.integrations.hub.save_pretrained`.
        """
        from dre_fast.integrations import hub

        return hub.save_pretrained(self, folder, card=card)

    @classmethod
    def from_pretrained(cls, folder_or_repo: Any, **options: Any) -> ResidualMIL:
        """The model of a folder of :meth:`save_pretrained`, or of a repository ``owner/name`` of the Hub, in eval mode.

        See :func:`dre_fast.integrations.hub.from_pretrained`.
        """
        from dre_fast.integrations import hub

        return hub.from_pretrained(cls, folder_or_repo, **options)

    def push_to_hub(self, repo: str, *, card: Any = None, **options: Any) -> str:
        """Upload what :meth:`save_pretrained` writes to a repository of the Hub.

        See :func:`dre_fast.integrations.hub.push_to_hub`.
        """
        from dre_fast.integrations import hub

        return hub.push_to_hub(self, repo, card=card, **options)

    def _check_fitted(self) -> None:
        if not self._fitted and not (self.encoding.learnable and self.encoding.assignment != "hard"):
            raise RuntimeError(
                "ResidualMIL: the codebook is not fitted; call model.fit_codebook(bags) with the training bags before "
                "training, or load the state_dict of a fitted model"
            )

    def extra_repr(self) -> str:
        return f"classes={self.classes}, codebook {'fitted' if self._fitted else 'not fitted'}"


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Every part of the module in evaluation mode, and back as it was."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
