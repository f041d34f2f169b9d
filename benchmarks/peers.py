"""What hard and soft encoding are compared with: each written as fast as its idea allows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Encoder = Callable[[Tensor, Tensor, Tensor], Tensor]


def gemm_form(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """A^T X - diag(sum A) C with a one-hot A: two matrix products in the dtype of x, the strongest eager form.

    Several bags: the rows are added up by (bag, codeword), which beats a one-hot matrix of B K columns.
    """
    c = codebook.to(x.dtype)
    bags, (words, dim) = cu_seqlens.shape[0] - 1, c.shape
    code = torch.addmm((c * c).sum(1).div_(-2), x, c.T).argmax(1)
    if bags == 1:
        one_hot = torch.zeros(x.shape[0], words, dtype=x.dtype, device=x.device).scatter_(1, code[:, None], 1)
        return ((one_hot.T @ x).float() - torch.bincount(code, minlength=words)[:, None] * codebook)[None]
    bag = torch.repeat_interleave(
        torch.arange(bags, device=x.device), cu_seqlens.diff(), output_size=x.shape[0]
    )
    place = bag * words + code
    sums = torch.zeros(bags * words, dim, device=x.device).index_add_(0, place, x.float())
    members = torch.bincount(place, minlength=bags * words)
    return sums.view(bags, words, dim) - members.view(bags, words, 1) * codebook


def _gemm_form_traced(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """gemm_form for one bag in operations a compiler fuses (bincount is not one)."""
    c = codebook.to(x.dtype)
    code = torch.addmm((c * c).sum(1) * -0.5, x, c.T).argmax(1)
    one_hot = (code[:, None] == torch.arange(c.shape[0], device=x.device)).to(x.dtype)
    return ((one_hot.T @ x).float() - one_hot.sum(0, dtype=torch.float32)[:, None] * codebook)[None]


@cache
def _compiled() -> Encoder:
    return torch.compile(_gemm_form_traced, dynamic=False)


def gemm_form_compiled(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """torch.compile of the GEMM form. One bag only.

    Raises ValueError for several bags.
    """
    if cu_seqlens.shape[0] != 2:
        raise ValueError("the compiled GEMM form covers one bag")
    return _compiled()(x, codebook, cu_seqlens)


def codeword_loop(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """One codeword after the other, as most VLAD code has it; bags one after the other."""
    c = codebook.to(x.dtype)
    code = torch.addmm((c * c).sum(1).div_(-2), x, c.T).argmax(1)
    bounds = cu_seqlens.tolist()
    out = torch.zeros(len(bounds) - 1, *codebook.shape, device=x.device)
    for bag, (start, end) in enumerate(itertools.pairwise(bounds)):
        rows, codes = x[start:end], code[start:end]
        for k in range(codebook.shape[0]):
            out[bag, k] = (rows[codes == k].float() - codebook[k]).sum(0)
    return out


HARD_PEERS: dict[str, Encoder] = {
    "gemm": gemm_form,
    "gemm-compiled": gemm_form_compiled,
    "codeword-loop": codeword_loop,
}


def soft_gemm_form(x: Tensor, codebook: Tensor, scale: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Deep-TEN encoding, A^T X - diag(sum A) C, of equal bags in batched matrix products; differentiable."""
    bags = cu_seqlens.shape[0] - 1
    rows = x.view(bags, -1, x.shape[1])
    c = codebook.to(x.dtype)
    distance = (rows * rows).sum(2, keepdim=True) - 2 * rows @ c.T + (c * c).sum(1)
    weight = torch.softmax(-scale * distance.float(), dim=2).to(x.dtype)
    return (weight.transpose(1, 2) @ rows).float() - weight.float().sum(1)[:, :, None] * codebook
