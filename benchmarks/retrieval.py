"""Encoding slides straight from an int8 bank, and the chains of torch calls it is compared with: P3.

The chains are given their row numbers, which dre_fast works out from (seed, slide). ``live`` rows are computed this step
and come before the retrieved ones of their slide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import peers
from benchmarks.registry import Retrieval
from dre_fast import MemoryBank
from dre_fast.ops import bank as bank_ops

CYCLE, SEED = 3, 7


@dataclass(frozen=True)
class Stored:
    """A filled bank, the slides and live rows of a step, and the numbers of the rows to retrieve, slide by slide."""

    shape: Retrieval
    bank: MemoryBank
    slides: Tensor
    tiles: Tensor
    live: Tensor
    rows: Tensor

    def offsets(self, rows: int) -> Tensor:
        """cu_seqlens of so many rows a slide."""
        return torch.arange(self.shape.bags + 1, device=self.slides.device) * rows


def fill(shape: Retrieval, device: str) -> Stored:
    """A bank of ``shape.bags`` slides, every tile written, its codebook among the rows."""
    generator = torch.Generator(device).manual_seed(0)

    def unit(*size: int) -> Tensor:
        return normalize(torch.randn(*size, device=device, generator=generator), dim=-1)

    codebook = unit(shape.codewords, shape.dim)
    bank = MemoryBank([shape.tiles] * shape.bags, shape.dim, codebook=codebook, dtype="int8", device=device)
    for slide in range(shape.bags):
        nearest = torch.randint(shape.codewords, (shape.tiles,), device=device, generator=generator)
        features = codebook[nearest] + unit(shape.tiles, shape.dim)
        tiles = torch.arange(shape.tiles, device=device)
        bank.write(torch.full_like(tiles, slide), tiles, features, step=0)
    slides = torch.arange(shape.bags, device=device)
    tiles = bank.sample(slides, shape.live, CYCLE, SEED)
    return Stored(
        shape, bank, slides, tiles, unit(shape.bags, shape.live, shape.dim), retrieved(shape, bank, slides)
    )


def retrieved(shape: Retrieval, bank: MemoryBank, slides: Tensor) -> Tensor:
    """The numbers of the rows that follow the live ones in each slide's permutation, int64 [B r]."""
    tiles = bank_ops.tiles(bank.length[slides], slides, shape.live, shape.retrieved, shape.live, CYCLE, SEED)
    return (bank.start[slides, None] + tiles).reshape(-1)


# ------------------------------------------------------------------------------------ with live rows


def bank_encode(given: Stored) -> Tensor:
    """MemoryBank.encode: checks, permutation, live rows and retrieved ones."""
    V = given.bank.encode(
        given.slides, given.tiles, given.live, memory=given.shape.retrieved, cycle=CYCLE, seed=SEED
    )
    assert isinstance(V, Tensor)
    return V


def chain(given: Stored, form: str) -> Tensor:
    """index_select, dequantise, normalise, cat, then a GEMM form."""
    rows = normalize(_gather(given), dim=1).view(given.shape.bags, -1, given.shape.dim)
    x = torch.cat([given.live, rows], dim=1).view(-1, given.shape.dim)
    bounds = given.offsets(given.shape.live + given.shape.retrieved)
    return peers.GEMM_FORMS[form](x, given.bank.codebook, bounds)


def chain_with_codes(given: Stored, form: str) -> Tensor:
    """The same with the stored codes of the retrieved rows, and those as they are stored, not normalised again."""
    shape = given.shape
    live = given.live.view(-1, shape.dim)
    code = peers.nearest(live, given.bank.codebook).view(shape.bags, -1)
    codes = given.bank.code.index_select(0, given.rows).to(torch.int64).view(shape.bags, -1)
    rows = torch.cat([given.live, _gather(given).view(shape.bags, -1, shape.dim)], dim=1).view(-1, shape.dim)
    bounds = given.offsets(shape.live + shape.retrieved)
    return peers.SUMS[form](rows, torch.cat([code, codes], dim=1).view(-1), given.bank.codebook, bounds)


# ---------------------------------------------------------------------------------- retrieved rows alone


def op(given: Stored, *, stored_codes: bool = True, rows: Tensor | None = None) -> Tensor:
    """The registered operations: permutation positions (unless ``rows`` are given), then hard_encode on the payload."""
    bank = given.bank
    index = retrieved(given.shape, bank, given.slides) if rows is None else rows
    V: Tensor = torch.ops.dre_fast.hard_encode.default(
        bank.payload,
        bank.codebook,
        given.offsets(given.shape.retrieved),
        index,
        bank.scale,
        bank.code if stored_codes else None,
    )[0]
    return V


def rows_chain(given: Stored, form: str) -> Tensor:
    """index_select, dequantise, normalise, then a GEMM form."""
    rows = normalize(_gather(given), dim=1)
    return peers.GEMM_FORMS[form](rows, given.bank.codebook, given.offsets(given.shape.retrieved))


def rows_chain_with_codes(given: Stored, form: str) -> Tensor:
    """index_select, dequantise, sums by the stored codes."""
    code = given.bank.code.index_select(0, given.rows).to(torch.int64)
    return peers.SUMS[form](_gather(given), code, given.bank.codebook, given.offsets(given.shape.retrieved))


def _gather(given: Stored) -> Tensor:
    bank = given.bank
    stored = bank.payload.index_select(0, given.rows)[:, : given.shape.dim]
    return stored.float().mul_(bank.scale.index_select(0, given.rows)[:, None])


# name -> (function, the forms among which the quickest is taken); the first of each table is dre_fast
Way = tuple[Callable[..., Tensor], tuple[str, ...]]
_FORMS = ("one-hot padded", "index_add", "embedding_bag", "embedding_bag, codes in blocks")
WITH_LIVE: dict[str, Way] = {
    "MemoryBank.encode": (bank_encode, ()),
    "torch chain": (chain, _FORMS),
    "torch chain, stored codes": (chain_with_codes, tuple(peers.SUMS)),
}
ROWS_ALONE: dict[str, Way] = {
    "op, stored codes": (op, ()),
    "op, codes found": (lambda given: op(given, stored_codes=False), ()),
    "torch chain": (rows_chain, _FORMS),
    "torch chain, stored codes": (rows_chain_with_codes, tuple(peers.SUMS)),
}
TABLES = {"live and retrieved rows": WITH_LIVE, "retrieved rows": ROWS_ALONE}


def bound(what: str, name: str, form: str, given: Stored) -> Callable[[], Tensor]:
    """A way of a table as a call without arguments; ``form`` is "" where it has none."""
    function, forms = TABLES[what][name]
    return (lambda: function(given, form)) if forms else (lambda: function(given))


def quickest_form(what: str, name: str, given: Stored, device: str) -> str:
    """The quickest form of a chain, "" for what has none."""
    forms = [form for form in TABLES[what][name][1] if device == "cpu" or "blocks" not in form]
    if not forms:
        return ""
    return peers.quickest({form: bound(what, name, form, given) for form in forms}, device)[0]
