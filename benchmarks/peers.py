"""What hard encoding is compared with: each idea written as fast as it allows, from its formula.

All take rows [N, D], a codebook fp32 [K, D] and offsets int64 [B + 1] that cover every row, and return V fp32
[B, K, D]. Products are taken in the dtype of the rows.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Encoder = Callable[[Tensor, Tensor, Tensor], Tensor]
_BLOCK = 8192  # rows whose scores against 64 codewords stay in a core's cache
# Residual values of one chunk where residuals are formed: they stay in a CPU's cache, or fill a GPU.
RESIDUAL_VALUES = {"cpu": 1 << 20, "cuda": 1 << 28}


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """argmax_k x.c_k - |c_k|^2 / 2: the nearest codeword from one matrix product, int64 [N]."""
    c = codebook.to(x.dtype)
    return torch.addmm((c * c).sum(1) * -0.5, x, c.T).max(1).indices


def nearest_blocked(x: Tensor, codebook: Tensor) -> Tensor:
    """:func:`nearest` a block of rows at a time, so that scores are read while they are in cache."""
    c = codebook.to(x.dtype)
    bias, words = (c * c).sum(1) * -0.5, c.T
    return torch.cat([torch.addmm(bias, rows, words).max(1).indices for rows in x.split(_BLOCK)])


def _place(code: Tensor, cu_seqlens: Tensor, words: int) -> Tensor:
    """bag_i K + code_i: which row of V, seen as [B K, D], row i is added to."""
    if cu_seqlens.shape[0] == 2:
        return code
    rows = torch.arange(code.shape[0], device=code.device)
    return torch.bucketize(rows, cu_seqlens[1:], right=True) * words + code


# ------------------------------------------------------------------- the GEMM form A^T X - diag(sum A) C


def one_hot_product(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """A^T X by a matrix product with one-hot A [N, K], one product a bag."""
    words, outputs = torch.arange(codebook.shape[0], device=x.device), []
    one_hot = (nearest(x, codebook)[:, None] == words).to(x.dtype)
    bounds = [0, x.shape[0]] if cu_seqlens.shape[0] == 2 else cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        a = one_hot[start:end]
        outputs.append((a.T @ x[start:end]).float() - a.sum(0, dtype=torch.float32)[:, None] * codebook)
    return torch.stack(outputs)


def one_hot_padded(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """A^T X of all bags in one batched product, the bags padded to the longest."""
    bags, words, length = cu_seqlens.shape[0] - 1, codebook.shape[0], int(cu_seqlens.diff().max())
    slot = cu_seqlens[:-1, None] + torch.arange(length, device=x.device)
    inside = slot < cu_seqlens[1:, None]
    code = torch.where(inside, nearest(x, codebook)[slot.clamp(max=x.shape[0] - 1)], -1)
    a = (code[:, None, :] == torch.arange(words, device=x.device)[:, None]).to(x.dtype)
    rows = x[slot.clamp(max=x.shape[0] - 1)] if inside.numel() > x.shape[0] else x.view(bags, length, -1)
    return torch.bmm(a, rows).float() - a.sum(2, dtype=torch.float32)[:, :, None] * codebook


def sums_by_index_add(x: Tensor, code: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """V from given codes: each row, as fp32, added where it belongs."""
    bags, (words, dim) = cu_seqlens.shape[0] - 1, codebook.shape
    place = _place(code, cu_seqlens, words)
    sums = torch.zeros(bags * words, dim, device=x.device).index_add(0, place, x.float())
    ones = torch.ones_like(place, dtype=torch.float32)
    members = torch.zeros(bags * words, device=x.device).index_add(0, place, ones)
    return sums.view(bags, words, dim) - members.view(bags, words, 1) * codebook


def sums_by_embedding_bag(x: Tensor, code: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """V from given codes: places sorted, each run of rows summed by embedding_bag, which makes no copy of them."""
    bags, (words, dim) = cu_seqlens.shape[0] - 1, codebook.shape
    place, order = _place(code, cu_seqlens, words).to(torch.int32).sort()
    ends = torch.searchsorted(place, torch.arange(bags * words + 1, device=x.device, dtype=torch.int32))
    sums = functional.embedding_bag(order, x, ends[:-1], mode="sum").float()
    return sums.view(bags, words, dim) - ends.diff().view(bags, words, 1) * codebook


def index_add(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """A^T X by adding each row where it belongs."""
    return sums_by_index_add(x, nearest(x, codebook), codebook, cu_seqlens)


def embedding_bag(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """A^T X by summing the rows of each codeword."""
    return sums_by_embedding_bag(x, nearest(x, codebook), codebook, cu_seqlens)


def embedding_bag_blocked(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The same with the codes found block by block."""
    return sums_by_embedding_bag(x, nearest_blocked(x, codebook), codebook, cu_seqlens)


SUMS = {"index_add": sums_by_index_add, "embedding_bag": sums_by_embedding_bag}
GEMM_FORMS: dict[str, Encoder] = {
    "one-hot": one_hot_product,
    "one-hot padded": one_hot_padded,
    "index_add": index_add,
    "embedding_bag": embedding_bag,
    "embedding_bag, codes in blocks": embedding_bag_blocked,
}


@cache
def compiled(name: str) -> Encoder:
    """torch.compile of a GEMM form, static shapes."""
    return torch.compile(GEMM_FORMS[name], dynamic=False)


@cache
def why_no_compiler(device: str) -> str:
    """Why torch.compile does not work here, or "" where it does: found out by compiling a sum."""
    try:
        torch.compile(lambda a: (a + 1).sum(), dynamic=False)(torch.ones(64, device=device))
    except Exception as problem:  # whatever the compiler stack raises, the reason is what matters
        return f"torch.compile does not work on {device}: {str(problem).strip().splitlines()[0]}"
    return ""


# ---------------------------------------------------------------------------------------- other ideas


def codeword_loop(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """One codeword after the other, as most VLAD code has it; bags one after the other."""
    code = nearest(x, codebook)
    out = torch.zeros(cu_seqlens.shape[0] - 1, *codebook.shape, device=x.device)
    for bag, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        rows, codes = x[start:end], code[start:end]
        for k in range(codebook.shape[0]):
            members = rows[codes == k]
            out[bag, k] = members.sum(0, dtype=torch.float32) - members.shape[0] * codebook[k]
    return out


def residual_broadcast(x: Tensor, codebook: Tensor, cu_seqlens: Tensor, *, values: int = 0) -> Tensor:
    """Every residual of every row to every codeword, [n, K, D], weighted by the one-hot assignment and summed.

    values: rows go through in chunks of so many residual values; 0 takes a bag whole, the common form.
    """
    c, words = codebook.to(x.dtype), torch.arange(codebook.shape[0], device=x.device)
    code = nearest(x, codebook)
    out = torch.zeros(cu_seqlens.shape[0] - 1, *codebook.shape, device=x.device)
    step = max(1, values // codebook.numel()) if values else max(1, x.shape[0])
    for bag, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        for rows, codes in zip(x[start:end].split(step), code[start:end].split(step), strict=True):
            residual = rows[:, None, :] - c
            residual *= (codes[:, None] == words)[:, :, None]
            out[bag] += residual.sum(0, dtype=torch.float32)
    return out


def residual_broadcast_chunked(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """:func:`residual_broadcast` in chunks."""
    return residual_broadcast(x, codebook, cu_seqlens, values=RESIDUAL_VALUES[x.device.type])


def scaled_l2_aggregate(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """PyTorch-Encoding's two steps in fp32, all it computes in: |x - c|^2 of every pair, then aggregation with A.

    Its soft assignment becomes the one-hot one of the smallest distance.
    """
    rows = x.float()
    nearest_word = torch.cdist(rows, codebook).argmin(1)
    a = functional.one_hot(nearest_word, codebook.shape[0]).float()
    parts = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        weights = a[start:end]
        parts.append(weights.T @ rows[start:end] - weights.sum(0)[:, None] * codebook)
    return torch.stack(parts)


def netvlad_port(x: Tensor, codebook: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The common port of NetVLAD: a 1x1 convolution scores feature maps, then residuals one codeword at a time.

    Feature maps are [1, D, n, 1]; the soft assignment becomes the one-hot one of the largest score.
    """
    c = codebook.to(x.dtype)
    kernel, bias = c[:, :, None, None], (c * c).sum(1) * -0.5
    out = torch.zeros(cu_seqlens.shape[0] - 1, *codebook.shape, device=x.device)
    for bag, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if start == end:
            continue
        maps = x[start:end].T[None, :, :, None]
        chosen = functional.conv2d(maps, kernel, bias).flatten(2).argmax(1, keepdim=True)
        flat = maps.flatten(2)
        for k in range(codebook.shape[0]):
            residual = (flat - c[k][:, None]) * (chosen == k)
            out[bag, k] = residual.sum(2, dtype=torch.float32)[0]
    return out


# Those that form the residuals, or touch every row once a codeword: kept to sizes where they end.
RESIDUAL_PEERS: dict[str, Encoder] = {
    "residual broadcast": residual_broadcast,
    "residual broadcast, chunked": residual_broadcast_chunked,
    "NetVLAD port": netvlad_port,
}
OTHER_PEERS: dict[str, Encoder] = {
    "codeword loop": codeword_loop,
    "PyTorch-Encoding style": scaled_l2_aggregate,
    **RESIDUAL_PEERS,
}


# ------------------------------------------------------------------------------------- which one, where


def fits(name: str, residual_bytes: int, device: str) -> bool:
    """Whether a peer is timed at a size: forming residuals stops where they no longer fit, or take many seconds."""
    if name not in RESIDUAL_PEERS:
        return True
    whole = 60e9 if device == "cuda" else 1e9
    chunked = 1e12 if device == "cuda" else 1e9
    return residual_bytes <= (whole if name == "residual broadcast" else chunked)


def quickest(
    candidates: Mapping[str, Callable[[], Any]], device: str, repeats: int = 2
) -> tuple[str, dict[str, str]]:
    """The name of the candidate with the smallest time, after a warm-up, and why any of them did not run."""
    times, failed = {}, {}
    for name, run in candidates.items():
        try:
            run()
            taken = []
            for _ in range(repeats):
                _wait(device)
                start = time.perf_counter()
                run()
                _wait(device)
                taken.append(time.perf_counter() - start)
            times[name] = min(taken)
        except torch.OutOfMemoryError as problem:  # padded bags may not fit
            failed[name] = str(problem).splitlines()[0]
    if not times:
        raise RuntimeError(f"no candidate ran: {failed}")
    return min(times, key=times.__getitem__), failed


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


KINDS = {
    "gemm": tuple(GEMM_FORMS),
    "gemm by matmul": ("one-hot", "one-hot padded"),
    "gemm, compiled": (
        "one-hot",
        "embedding_bag",
    ),  # compiling the others breaks their graph or makes them slower
}


def resolve(name: str) -> Encoder:
    """A peer by name: one of OTHER_PEERS, or "KIND: FORM" of KINDS and GEMM_FORMS.

    Raises KeyError for a name that is none of them.
    """
    kind, _, form = name.partition(": ")
    if kind in KINDS:
        return compiled(form) if kind == "gemm, compiled" else GEMM_FORMS[form]
    return OTHER_PEERS[name]


def candidates(kind: str, bags: int, device: str) -> list[str]:
    """The full names of the forms among which the quickest stands for a kind."""
    names = KINDS[kind]
    if bags == 1:
        names = tuple(name for name in names if name != "one-hot padded")
    elif kind == "gemm, compiled":
        names = ("embedding_bag",)  # the loop over bags would compile anew for every bag
    if device == "cuda":
        names = tuple(name for name in names if "blocks" not in name)  # a cache measure of CPUs
    return [f"{kind}: {name}" for name in names]
