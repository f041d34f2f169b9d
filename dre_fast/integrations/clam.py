"""ResidualMIL as a model of CLAM, in place of CLAM_SB and CLAM_MB. CLAM itself is not imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dre_fast.integrations.build import CodebookFile, build_model
from dre_fast.nn.residual_mil import ResidualMIL

SIZES = {"small": 256, "big": 384}


class ResidualSB(nn.Module):
    """Called and answering as CLAM_SB.

    CLAM's attention scores become contributions to the predicted class (:meth:`~dre_fast.ResidualMIL.contributions`):
    signed, larger is more in favour, not made for a softmax.

    Instance clustering works on single tiles: an instance is the embedding of a bag of that tile alone. With the bag's
    label c, the k tiles that contribute most to c are instances of c and the k that contribute least are not; with
    ``subtyping``, the k tiles that contribute most to another class c' are no instances of c'. Of bags below 2 k tiles
    k is half the tiles, so no tile is both.

    Args:
        gate: CLAM's first argument, gated attention or not; there is no attention here, so it changes nothing.
        size_arg: "small" or "big", the embedding's width (256, 384). k_sample: k.
        dropout: in the head; True is 0.25, as in CLAM's first releases, which only said whether.
        n_classes, embed_dim: as in CLAM; embed_dim is D of the features.
        instance_loss_fn: of logits [m, 2] and int64 targets [m]; default: cross-entropy.
        subtyping: the classes exclude each other.
        codebook: file of :func:`~dre_fast.integrations.build.save_codebook`. model: an existing model.
        options: of a new :class:`~dre_fast.ResidualMIL`: codewords, assignment, head, ...

    Raises:
        ValueError: fewer than two classes, an unknown size, or as :func:`~dre_fast.integrations.build.build_model`.

    Source: instance-level clustering after Lu et al. 2021, Data-efficient and weakly supervised computational
    pathology on whole-slide images (CLAM).
    """

    every_class = False  # whether A_raw has a row for each class, as CLAM_MB's

    def __init__(
        self,
        gate: bool = True,
        size_arg: str = "small",
        dropout: float = 0.0,
        k_sample: int = 8,
        n_classes: int = 2,
        instance_loss_fn: nn.Module | None = None,
        subtyping: bool = False,
        embed_dim: int = 1024,
        *,
        codebook: CodebookFile | None = None,
        model: ResidualMIL | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if n_classes < 2:
            raise ValueError(f"{type(self).__name__}: CLAM needs at least two classes, got {n_classes}")
        if size_arg not in SIZES:
            raise ValueError(f"{type(self).__name__}: size_arg must be 'small' or 'big', got {size_arg!r}")
        dropout = 0.25 if dropout is True else float(dropout)
        options = {"width": SIZES[size_arg], "dropout": dropout, **options}
        self.mil = build_model(embed_dim, n_classes, model, codebook, **options)
        self.n_classes, self.k_sample, self.subtyping = n_classes, k_sample, subtyping
        self.instance_loss_fn = nn.CrossEntropyLoss() if instance_loss_fn is None else instance_loss_fn
        self.instance_classifiers = nn.ModuleList(nn.Linear(self.mil.width, 2) for _ in range(n_classes))

    def forward(
        self,
        h: Tensor,
        label: Tensor | None = None,
        instance_eval: bool = False,
        return_features: bool = False,
        attention_only: bool = False,
    ) -> Any:
        """One bag h [N, D] -> (logits [1, C], Y_prob [1, C], Y_hat [1, 1], A_raw [1, N], results_dict).

        Args:
            label: class of the bag, one int64; only with ``instance_eval``.
            instance_eval: results_dict gets instance_loss (0-d, with gradient), inst_labels and inst_preds (numpy).
            return_features: results_dict gets features [1, width].
            attention_only: return A_raw alone.

        Raises:
            ValueError: h is not [N, D], or ``instance_eval`` without a label.
        """
        if h.dim() != 2:
            raise ValueError(f"{type(self).__name__}: h must be one bag [N, D], got {tuple(h.shape)}")
        embedding = self.mil.embed(h)
        logits = self.mil.classifier(embedding)
        chosen = logits.argmax(1)
        if self.every_class or instance_eval:
            scores = self.mil.class_contributions(h)
            A_raw = scores if self.every_class else scores[chosen]
        else:
            A_raw = self.mil.contributions(h, chosen)[None]
        if attention_only:
            return A_raw
        results: dict[str, Any] = {}
        if instance_eval:
            if label is None:
                raise ValueError(f"{type(self).__name__}: instance_eval needs the bag's label")
            results = self._instances(h, int(label), scores)
        if return_features:
            results["features"] = embedding
        return logits, logits.softmax(1), chosen[:, None], A_raw, results

    def _instances(self, h: Tensor, label: int, scores: Tensor) -> dict[str, Any]:
        k = min(self.k_sample, len(h) // 2)
        loss, labels, predictions = h.new_zeros(()), [], []
        for number, classifier in enumerate(self.instance_classifiers):
            if k == 0 or not (number == label or self.subtyping):
                continue
            order = scores[number].argsort(descending=True, stable=True)
            tiles = torch.cat([order[:k], order[-k:]]) if number == label else order[:k]
            target = torch.zeros(len(tiles), dtype=torch.int64, device=h.device)
            if number == label:
                target[:k] = 1
            alone = torch.arange(len(tiles) + 1, device=h.device)  # each tile is a bag
            found = classifier(self.mil.embed(h[tiles], cu_seqlens=alone))
            loss = loss + self.instance_loss_fn(found, target)
            labels.append(target)
            predictions.append(found.argmax(1))
        empty = torch.zeros(0, dtype=torch.int64, device=h.device)
        return {
            "instance_loss": loss / len(self.instance_classifiers) if self.subtyping else loss,
            "inst_labels": torch.cat([empty, *labels]).cpu().numpy(),
            "inst_preds": torch.cat([empty, *predictions]).cpu().numpy(),
        }


class ResidualMB(ResidualSB):
    """Called and answering as CLAM_MB: A_raw [C, N] holds the contributions to every class."""

    every_class = True
