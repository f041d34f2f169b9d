"""The contract of soft encode and its backward on one input: interpreted and compiled Triton kernels, C++."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from dre_fast.kernels import soft_encode, soft_encode_backward
from dre_fast.reference import soft as reference
from dre_fast.reference.rows import l2_normalize
from encode_check import make_bags, read_rows, stored
from error_rule import within_error_rule

KINDS = ("scale", "weight", "weight and bias")
GRADIENTS = ("rows", "codebook", "scale", "weight", "bias")


def parameters(kind: str, codebook: Tensor, sharpness: float = 1.0) -> dict[str, Tensor]:
    """Random slopes (Deep-TEN), or weights and perhaps biases (NetVLAD)."""
    words = codebook.shape[0]
    if kind == "scale":
        return {"scale": sharpness * (torch.rand(words, device=codebook.device) * 4 + 1)}
    found = {"weight": sharpness * torch.randn(codebook.shape, device=codebook.device)}
    if "bias" in kind:
        found["bias"] = torch.randn(words, device=codebook.device)
    return found


def source(
    rows: int, lengths: list[int], dim: int, codewords: int, dtype: torch.dtype, device: str, padding: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Stored rows of ``dtype``, codebook, cu_seqlens, an index into the rows with skips and repeats, row_scale."""
    x, codebook, _ = make_bags([rows], dim, codewords, torch.float32, device)
    x, row_scale = stored(x, dtype, padding)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    index = torch.randint(-1, rows, (sum(lengths),)).to(device)
    return x, codebook, bounds, index, row_scale


def plain(
    rows: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    given: dict[str, Tensor],
    index: Tensor | None,
    unit: bool,
    dtype: torch.dtype,
    grads: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """V, mass and, with ``grads`` of both, every gradient, by plain torch and autograd in ``dtype``."""
    read = rows if index is None else torch.where((index >= 0)[:, None], rows[index.clamp(min=0)], 0.0)
    leaves = {"rows": read, "codebook": codebook, **given}
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in leaves.items()}
    centre, x = leaves["codebook"], leaves["rows"]
    if unit:
        x = l2_normalize(x).to(dtype)
    if "scale" in given:
        squares = (x * x).sum(1, keepdim=True) - 2 * x @ centre.T + (centre * centre).sum(1)
        logits = -leaves["scale"] * squares
    else:
        logits = x @ leaves["weight"].T + leaves.get("bias", 0)
    a = logits.softmax(1)
    if index is not None:
        a = torch.where((index >= 0)[:, None], a, 0.0)
    V, mass = [x.new_zeros(0, *centre.shape)], [x.new_zeros(0, len(centre))]
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        part, total = a[start:stop], a[start:stop].sum(0)
        V.append((part.T @ x[start:stop] - total[:, None] * centre)[None])
        mass.append(total[None])
    found = {"V": torch.cat(V), "mass": torch.cat(mass)}
    if grads is not None:
        torch.autograd.backward(list(found.values()), [g.to(dtype) for g in grads])
        found |= {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
    return {name: t.detach() for name, t in found.items()}


def _plain_dtypes(rows: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """What plain torch computes in: sums over rows, and the gradient of the rows.

    fp16 and 8-bit rows are held to fp32 in all sums; bf16 parts of codewords are not that fine. Their gradient is made
    of 16-bit products.
    """
    if rows in (torch.float32, torch.bfloat16):
        return rows, rows
    return torch.float32, torch.float16


def _follows(got: Tensor, plain_one: Tensor, exact: Tensor, name: str) -> None:
    atol = 1e-6 * max(1.0, float(exact.abs().max()) if exact.numel() else 0.0)
    within_error_rule(got, plain_one, exact, atol, name)


def check(
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    given: dict[str, Tensor],
    index: Tensor | None = None,
    row_scale: Tensor | None = None,
    unit: bool = False,
    encode: Callable[..., tuple[Tensor, ...]] = soft_encode,
) -> tuple[Tensor, Tensor]:
    """The whole contract of the forward on one input; returns the V and mass of ``encode``."""
    arguments = {**given, "index": index, "row_scale": row_scale, "unit": unit}
    V, mass = encode(x, codebook, cu_seqlens, **arguments)
    again = encode(x, codebook, cu_seqlens, **arguments)
    assert torch.equal(V, again[0]), "two runs differ"
    assert torch.equal(mass, again[1]), "two runs differ"
    assert V.dtype == mass.dtype == torch.float32
    rows = read_rows(x, codebook.shape[1], None, row_scale, False, torch.float64)
    double = {name: t.double() for name, t in given.items()}
    exact = reference.soft_encode(rows, codebook.double(), cu_seqlens, **double, index=index, unit=unit)
    by_torch = plain(rows, codebook, cu_seqlens, given, index, unit, _plain_dtypes(x.dtype)[0])
    _follows(V, by_torch["V"], exact[0], "V")
    _follows(mass, by_torch["mass"], exact[1], "mass")
    return V, mass


def check_backward(
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor,
    given: dict[str, Tensor],
    index: Tensor | None = None,
    row_scale: Tensor | None = None,
    unit: bool = False,
    backward: Callable[..., tuple[Tensor, ...]] = soft_encode_backward,
) -> dict[str, Tensor]:
    """The whole contract of the backward on one input; returns the gradients of ``backward`` by name."""
    (words, dim), bags = codebook.shape, len(cu_seqlens) - 1
    rows = read_rows(x, dim, None, row_scale, False, torch.float64)
    double = {name: t.double() for name, t in given.items()}
    source = {"index": index, "unit": unit}
    mass = reference.soft_encode(rows, codebook.double(), cu_seqlens, **double, **source)[1]
    grads = (
        torch.randn(bags, words, dim, device=x.device),
        torch.randn(bags, words, device=x.device),
    )
    arguments = (*grads, x, codebook, cu_seqlens, mass.float())
    got, again = (backward(*arguments, **given, **source, row_scale=row_scale) for _ in range(2))
    for one, other in zip(got, again, strict=True):
        assert torch.equal(one, other), "two runs differ"
    exact = reference.soft_encode_backward(
        *(g.double() for g in grads), rows, codebook.double(), cu_seqlens, mass, **double, **source
    )
    assert got[0].dtype == (torch.float32 if row_scale is not None else x.dtype)
    sums, narrow = (
        plain(rows, codebook, cu_seqlens, given, index, unit, dtype, grads)
        for dtype in _plain_dtypes(x.dtype)
    )
    for name, one, right in zip(GRADIENTS, got, exact, strict=True):
        if name not in ("rows", "codebook", *given):
            assert one.shape == (0,), name
            continue
        _follows(one, (narrow if name == "rows" else sums)[name], right, f"gradient of {name}")
    return dict(zip(GRADIENTS, got, strict=True))
