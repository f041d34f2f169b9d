"""Settings of a classifier of bags and of its training."""

from __future__ import annotations

from dataclasses import dataclass

from dre_fast.nn.residual_mil import ResidualMIL


@dataclass(frozen=True)
class MILSettings:
    """How a :class:`~dre_fast.ResidualMIL` is built and trained.

    Attributes:
        codewords, assignment, head, width, depth, heads, dropout: of the model.
        epochs, batch_size: passes over the training slides, slides a step.
        lr, weight_decay, grad_clip: of AdamW; gradients longer than ``grad_clip`` are shortened, 0: none is.
        balance: weights against rare classes: none, inverse or effective (:func:`dre_fast.nn.supervised.class_weights`).
        amp: none or bf16; the encoding is fp32 either way.
        codebook_tiles: tiles of the cohort, as many of each slide, from which codebooks are fitted.
        kmeans_iterations: at most.
        seed: of weights, order, dropout, codebook and samples.

    Raises:
        ValueError: a value that cannot be.
    """

    codewords: int = 16
    assignment: str = "hard"
    head: str = "transformer"
    width: int = 256
    depth: int = 2
    heads: int = 4
    dropout: float = 0.1
    epochs: int = 30
    batch_size: int = 16
    lr: float = 3e-4
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    balance: str = "none"
    amp: str = "none"
    codebook_tiles: int = 100_000
    kmeans_iterations: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("codewords", "epochs", "batch_size", "codebook_tiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr <= 0 or self.weight_decay < 0 or self.grad_clip < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "lr must be > 0, weight_decay and grad_clip >= 0 and dropout in [0, 1), got "
                f"{self.lr}, {self.weight_decay}, {self.grad_clip} and {self.dropout}"
            )
        for name, known in (("balance", ("none", "inverse", "effective")), ("amp", ("none", "bf16"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def build(self, dim: int, outputs: int) -> ResidualMIL:
        """An untrained model for features of D = ``dim`` with ``outputs`` logits."""
        return ResidualMIL(
            dim,
            outputs,
            self.codewords,
            self.assignment,
            self.width,
            head=self.head,
            depth=self.depth,
            heads=self.heads,
            dropout=self.dropout,
        )
