"""The contract of hard encode on one input, for the interpreted and for the compiled Triton kernels."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from dre_fast.kernels import hard_encode


def make_bags(
    lengths: list[int], dim: int, codewords: int, dtype: torch.dtype, device: str, noise: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit rows around random unit codewords, the codebook, cu_seqlens."""
    codebook = normalize(torch.randn(codewords, dim), dim=1)
    nearest = torch.randint(codewords, (sum(lengths),))
    rows = normalize(codebook[nearest] + noise * torch.randn(sum(lengths), dim) / dim**0.5, dim=1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return rows.to(dtype).to(device), codebook.to(device), bounds.to(device)


def given_codes(
    x: torch.Tensor, codebook: torch.Tensor, cu_seqlens: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """V and counts that follow from the codes, in the dtype of x: what is left to check once codes are right."""
    bags, words = cu_seqlens.shape[0] - 1, codebook.shape[0]
    bag = torch.repeat_interleave(torch.arange(bags, device=x.device), cu_seqlens.diff())
    place = bag * words + codes
    V = x.new_zeros(bags * words, x.shape[1]).index_add_(0, place, x - codebook.to(x.dtype)[codes])
    return V.view(bags, words, -1), torch.bincount(place, minlength=bags * words).view(bags, words)


def check(x: torch.Tensor, codebook: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The whole contract on one input; returns the kernel's V, counts, codes."""
    V, counts, codes = hard_encode(x, codebook, cu_seqlens)
    again = hard_encode(x, codebook, cu_seqlens)
    assert all(torch.equal(a, b) for a, b in zip((V, counts, codes), again, strict=True)), "two runs differ"
    assert V.dtype == torch.float32
    assert counts.dtype == codes.dtype == torch.int64

    # Codes: nearest in float64, up to the rounding of an fp32 score (a difference of halved squared distances).
    exact, words = x.double(), codebook.double()
    dim = x.shape[1]
    scores = exact @ words.T - words.square().sum(1) / 2
    chosen = scores.gather(1, codes[:, None])[:, 0]
    parts = 2.0**-18 if x.dtype == torch.bfloat16 else 2.0**-22 if x.dtype == torch.float16 else 0.0
    size = exact.norm(dim=1) * words.norm(dim=1).max() + words.square().sum(1).max()
    bound = 2 * (parts + (dim + 2) * 2.0**-24) * size
    assert (scores.max(1).values - chosen <= bound).all()
    best, second = scores.topk(min(2, scores.shape[1]), dim=1).values[:, [0, -1]].unbind(1)
    clear = best - second > bound
    assert torch.equal(codes[clear], scores.argmax(1)[clear])

    # Counts exactly, V by the error rule: at most twice the error of plain torch in the same dtype.
    expected, expected_counts = given_codes(exact, words, cu_seqlens, codes)
    assert torch.equal(counts, expected_counts)
    plain = given_codes(x.float(), codebook, cu_seqlens, codes)[0]
    if V.numel():
        error, allowed = (V - expected).abs().max(), (plain - expected).abs().max()
        assert error <= 2 * allowed + 1e-6, f"error {error} against {allowed} of plain torch"
    return V, counts, codes
