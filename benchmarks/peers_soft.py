"""What soft encoding is compared with, forward and backward: each idea written as fast as it allows, from its formula.

All take rows [N, D] of B equal bags, a codebook [K, D], the number of bags, and either ``scale`` [K] (Deep-TEN:
a_ik = softmax_k(-s_k |x_i - c_k|^2)) or ``weight`` [K, D] and ``bias`` [K] (NetVLAD: a_ik = softmax_k(w_k.x_i + b_k)),
and return V [B, K, D] = sum_i a_ik (x_i - c_k), fp32, float64 for float64 rows. Products are taken in the dtype of
the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks.peers import RESIDUAL_VALUES


@dataclass(frozen=True)
class Assignment:
    """The parameters of one soft assignment: ``scale``, or ``weight`` and ``bias``."""

    scale: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that are there, in the order scale, weight, bias."""
        return tuple(t for t in (self.scale, self.weight, self.bias) if t is not None)


SoftEncoder = Callable[[Tensor, Tensor, int, Assignment], Tensor]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _assign(x: Tensor, c: Tensor, by: Assignment) -> Tensor:
    """A [N, K] in the dtype of x, from one product and as few passes over N x K as torch has."""
    if by.scale is not None:
        s = by.scale.to(x.dtype)
        logits = torch.addmm(-s * (c * c).sum(1), x, (2 * s[:, None] * c).T)
        logits = torch.addcmul(logits, (x * x).sum(1, keepdim=True), s, value=-1)
    else:
        assert by.weight is not None
        assert by.bias is not None
        logits = torch.addmm(by.bias.to(x.dtype), x, by.weight.to(x.dtype).T)
    return logits.softmax(1, dtype=_wide(x)).to(x.dtype)


def gemm(x: Tensor, codebook: Tensor, bags: int, by: Assignment) -> Tensor:
    """A^T X - diag(sum A) C in batched products; autograd keeps A."""
    a = _assign(x, codebook.to(x.dtype), by).view(bags, -1, codebook.shape[0])
    sums = torch.bmm(a.transpose(1, 2), x.view(bags, -1, x.shape[1]))
    return sums.to(_wide(x)) - a.sum(1, dtype=_wide(x))[:, :, None] * codebook


@cache
def _compiled() -> Callable[..., Tensor]:
    def traced(x: Tensor, codebook: Tensor, bags: int, *parameters: Tensor | None) -> Tensor:
        return gemm(x, codebook, bags, Assignment(*parameters))

    return torch.compile(traced, dynamic=False)


def gemm_compiled(x: Tensor, codebook: Tensor, bags: int, by: Assignment) -> Tensor:
    """torch.compile of :func:`gemm`, forward and backward."""
    return _compiled()(x, codebook, bags, by.scale, by.weight, by.bias)


def residual_broadcast(x: Tensor, codebook: Tensor, bags: int, by: Assignment) -> Tensor:
    """The common form: residuals [B, K, D, n] of every row to every codeword, weighted, summed over n."""
    c = codebook.to(x.dtype)
    rows = x.view(bags, -1, x.shape[1]).transpose(1, 2)
    residual = rows[:, None] - c[None, :, :, None]
    if by.scale is not None:
        distance = residual.square().sum(2, dtype=_wide(x))
        a = torch.softmax(-by.scale[:, None] * distance, dim=1).to(x.dtype)
    else:
        a = _assign(x, c, by).view(bags, -1, codebook.shape[0]).transpose(1, 2)
    return (residual * a[:, :, None]).sum(3, dtype=_wide(x))


def residual_broadcast_chunked(x: Tensor, codebook: Tensor, bags: int, by: Assignment) -> Tensor:
    """The same in chunks of rows, their residuals formed again in the backward."""
    rows = x.view(bags, -1, x.shape[1])
    step = max(1, RESIDUAL_VALUES[x.device.type] // (bags * codebook.numel()))

    def part(block: Tensor) -> Tensor:
        return residual_broadcast(block.reshape(-1, block.shape[2]), codebook, bags, by)

    total = torch.zeros(bags, *codebook.shape, dtype=_wide(x), device=x.device)
    for block in rows.split(step, dim=1):
        total = total + checkpoint(part, block, use_reentrant=False)
    return total


class _ScaledL2(torch.autograd.Function):
    """s_k |x_i - c_k|^2 [B, n, K] with a backward of matrix products; of what is formed only the result is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        # |x|^2 - 2 x.c + |c|^2, a product per batch, as a kernel over (i, k) would leave it
        square = (x * x).sum(2, keepdim=True) + (c * c).sum(1)
        scaled = torch.baddbmm(square, x, c.T.expand(x.shape[0], -1, -1), alpha=-2).mul_(s)
        ctx.save_for_backward(x, c, s, scaled)
        return scaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x, c, s, scaled = ctx.saved_tensors
        pull = 2 * s * grad
        d_x = pull.sum(2, keepdim=True) * x - pull @ c
        d_c = pull.sum((0, 1))[:, None] * c - torch.einsum("bnk,bnd->kd", pull, x)
        return d_x, d_c, (grad * scaled).sum((0, 1)) / s


class _Aggregate(torch.autograd.Function):
    """sum_i a_ik (x_i - c_k) [B, K, D] with a backward of matrix products."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(a, x, c)
        return torch.baddbmm(a.sum(1)[:, :, None] * c, a.transpose(1, 2), x, beta=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        a, x, c = ctx.saved_tensors
        offset = (grad * c).sum(2)[:, None]
        d_a = torch.baddbmm(offset, x, grad.transpose(1, 2), beta=-1)
        return d_a, torch.bmm(a, grad), -(a.sum(1)[:, :, None] * grad).sum(0)


def encoding_style(x: Tensor, codebook: Tensor, bags: int, by: Assignment) -> Tensor:
    """PyTorch-Encoding's layer: scaled_l2, softmax, aggregate, each an operation of its own with its own backward.

    In fp32 whatever the rows, because it computes in nothing less; Deep-TEN only.
    """
    assert by.scale is not None
    rows = x.to(_wide(x)).view(bags, -1, x.shape[1])
    a = torch.softmax(-_ScaledL2.apply(rows, codebook, by.scale), dim=2)
    return _Aggregate.apply(a, rows, codebook)


def netvlad_port(x: Tensor, codebook: Tensor, bags: int, by: Assignment) -> Tensor:
    """The common port of NetVLAD: a 1x1 convolution over feature maps [B, D, n, 1], softmax, one codeword at a time.

    Autograd keeps two [B, D, n] tensors a codeword. NetVLAD only.
    """
    assert by.weight is not None
    assert by.bias is not None
    maps = x.view(bags, -1, x.shape[1]).transpose(1, 2)[..., None]
    weight, bias = by.weight.to(x.dtype), by.bias.to(x.dtype)
    scores = functional.conv2d(maps, weight[:, :, None, None], bias).flatten(2)
    a = scores.softmax(1, dtype=_wide(x)).to(x.dtype)
    flat, c = maps.flatten(2), codebook.to(x.dtype)
    parts = []
    for k in range(codebook.shape[0]):
        residual = (flat - c[k][:, None]) * a[:, k : k + 1]
        parts.append(residual.sum(2, dtype=_wide(x)))
    return torch.stack(parts, 1)


SOFT_PEERS: dict[str, SoftEncoder] = {
    "gemm": gemm,
    "gemm, compiled": gemm_compiled,
    "residual broadcast": residual_broadcast,
    "residual broadcast, chunked": residual_broadcast_chunked,
    "PyTorch-Encoding style": encoding_style,
    "NetVLAD port": netvlad_port,
}


def covers(name: str, assignment: str, residual_bytes: int, device: str) -> bool:
    """Whether a peer knows an assignment ("Deep-TEN" or "NetVLAD") and its residuals fit where it runs."""
    if name == "PyTorch-Encoding style":
        return assignment == "Deep-TEN"
    if name == "NetVLAD port" and assignment != "NetVLAD":
        return False
    if name in (
        "NetVLAD port",
        "residual broadcast",
    ):  # both keep two tensors of residuals, and their gradients
        return residual_bytes <= (20e9 if device == "cuda" else 3e8)
    if name == "residual broadcast, chunked":
        return residual_bytes <= (1e12 if device == "cuda" else 2e9)
    return True
