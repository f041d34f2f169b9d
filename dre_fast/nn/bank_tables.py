"""The tables of the memory bank: their layout, how slides come and go, codebook and sums, state dicts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dre_fast.nn import bank_checks as checks
from dre_fast.nn.bank_disk import FileRows
from dre_fast.nn.bank_tiers import Placement, choose_tier
from dre_fast.ops import bank as ops
from dre_fast.ops.encode import assign_stored
from dre_fast.reference.fixed_point import accumulate_
from dre_fast.reference.quantize import has_scale, quantize, row_dtype

_CHUNK = 2048  # rows worked on at a time when the whole bank is gone through: they stay in the cache


class BankTables(nn.Module):
    """The buffers of :class:`~dre_fast.MemoryBank` (layout: its docstring) and what keeps them consistent."""

    payload: Tensor
    scale: Tensor
    code: Tensor
    age: Tensor
    drift: Tensor
    start: Tensor
    length: Tensor
    slide_sums: Tensor
    slide_counts: Tensor
    codebook: Tensor
    number: Tensor

    def __init__(
        self,
        tiles_per_slide: Sequence[int] | Tensor,
        dim: int,
        *,
        codebook: Tensor | None = None,
        dtype: str | torch.dtype = "int8",
        device: torch.device | str | None = None,
        tier: str = "device",
        folder: str | os.PathLike[str] | None = None,
        cache: int | str | None = None,
        budget: int | str | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"MemoryBank: dim must be at least 1, got {dim}")
        row = row_dtype(dtype)
        place = torch.empty(0, device=device).device
        lengths = _lengths(tiles_per_slide)
        known = torch.zeros(0, dim) if codebook is None else checks.check_codebook(codebook, dim)
        rows, slides, k = int(lengths.sum()), lengths.shape[0], known.shape[0]
        if tier == "auto":
            tier = choose_tier(rows, dim, row, slides, k, place, budget, folder)
            if tier != "file":
                folder = cache = None
        elif budget is not None:
            raise ValueError(f"MemoryBank: budget= is for tier='auto', not for tier={tier!r}")
        self._placement = Placement(tier, dim, row, place, folder, cache)
        checks.check_fits(rows, dim, row, slides, k, place, tier=tier)

        tables = {"payload": self._placement.blank(rows), **_blank_rows(rows, row, place)}
        tables["start"] = (lengths.cumsum(0) - lengths).to(place)
        tables["length"] = lengths.to(place)
        tables["slide_sums"] = torch.zeros(slides, k, dim, dtype=torch.int64, device=place)
        tables["slide_counts"] = torch.zeros(slides, k, dtype=torch.int64, device=place)
        tables["codebook"] = known.to(place, copy=True)
        for name in checks.TABLES:
            self.register_buffer(name, tables[name])
        # what a slide is called in the whole cohort: its id, unless this bank holds a part of it
        self.register_buffer("number", torch.arange(slides, device=place), persistent=False)
        self._check_cache(lengths)

    # ------------------------------------------------------------------ what it is

    @property
    def dim(self) -> int:
        """D."""
        return self.codebook.shape[1]

    @property
    def num_slides(self) -> int:
        """Slide ids given out so far, removed ones included."""
        return self.start.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Row format."""
        return self.payload.dtype

    @property
    def device(self) -> torch.device:
        """Where kernels run and the small tables lie; the payload too, unless it lies in a file."""
        return self.start.device

    @property
    def tier(self) -> str:
        """Where the payload lies: "device", "host" or "file"."""
        return self._placement.tier

    @property
    def nbytes(self) -> int:
        """Bytes of all tables, wherever they lie."""
        return sum(getattr(self, name).nbytes for name in checks.TABLES)

    def extra_repr(self) -> str:
        return (
            f"slides={self.num_slides}, rows={self.payload.shape[0]}, dim={self.dim}, "
            f"dtype={str(self.dtype).removeprefix('torch.')}, codewords={self.codebook.shape[0]}, "
            f"{self.nbytes / 1e6:,.1f} MB{'' if self.tier == 'device' else f', tier={self.tier}'}"
        )

    # ------------------------------------------------------------------ codebook and sums

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor) -> None:
        """Take a (new) codebook [K, D]: every written row gets its code again, and the sums are rebuilt.

        Raises:
            ValueError: wrong shape, more than 32767 codewords, a codeword that is not finite, or no memory
                for the sums of a larger K.
        """
        codebook = checks.check_codebook(codebook, self.dim)
        k = codebook.shape[0]
        if k != self.codebook.shape[0]:
            holds = checks.table_bytes(
                self.payload.shape[0], self.dim, self.dtype, self.num_slides, self.codebook.shape[0]
            )
            self._check_fits(self.payload.shape[0], self.num_slides, k, holds=holds)
            self.slide_sums = self.slide_sums.new_zeros(self.num_slides, k, self.dim)
            self.slide_counts = self.slide_counts.new_zeros(self.num_slides, k)
            self.codebook = codebook.to(self.device, copy=True)
        else:
            self.codebook.copy_(codebook)
        self._sum_up(recode=True)

    @torch.no_grad()
    def rebuild(self) -> None:
        """Recompute sums and counts from the stored rows and codes; their bits do not change."""
        self._sum_up(recode=False)

    def _sum_up(self, recode: bool) -> None:
        """Sums and counts from the stored rows, after giving every row its code again where ``recode``."""
        if self._file is not None:
            self._file.ring.clear()  # its slabs have copies of the codes
        self.slide_sums.zero_()
        self.slide_counts.zero_()
        if self.codebook.shape[0] == 0:
            return
        for slide, rows in self._row_chunks(_CHUNK):
            payload, scale, index = self._stored(rows)
            stored = ops.read(payload, scale, index, self.dim)
            if recode:
                row_scale = scale if has_scale(self.dtype) else None
                self.code[rows] = assign_stored(payload, row_scale, index, self.codebook)
            accumulate_(self.slide_sums, self.slide_counts, slide, self.code[rows], stored)

    # ------------------------------------------------------------------ slides come and go

    def add_slide(self, tiles: int) -> int:
        """Add a slide of ``tiles`` unwritten rows; returns its id. :meth:`add_slides` adds many at once.

        Raises:
            ValueError: no tiles, or more memory needed than is free.
        """
        return self.add_slides([tiles])[0]

    @torch.no_grad()
    def add_slides(self, tiles_per_slide: Sequence[int] | Tensor) -> list[int]:
        """Add slides of unwritten rows; returns their ids.

        A slide goes into the first gap left by removed slides that is large enough; otherwise the tables grow
        by copying. Ids and rows of the other slides stay as they are.

        Raises:
            ValueError: a slide without tiles, or more memory needed than is free.
        """
        lengths = _lengths(tiles_per_slide, first=self.num_slides).tolist()
        gaps, rows = self._gaps()
        starts = []
        for n in lengths:
            for gap in gaps:
                if gap[1] >= n:
                    starts.append(gap[0])
                    gap[0], gap[1] = gap[0] + n, gap[1] - n
                    break
            else:
                starts.append(rows)
                rows += n
        self._check_cache(torch.tensor(lengths))
        s, k, new_rows = self.num_slides, self.codebook.shape[0], rows - self.payload.shape[0]
        self._check_fits(rows, s + len(lengths), k)  # the old tables stay until the new ones are filled
        if new_rows:
            self.payload = self._placement.grow(self.payload, rows)
            for name, blank in _blank_rows(new_rows, self.dtype, self.device).items():
                setattr(self, name, torch.cat([getattr(self, name), blank]))
        more = {"start": starts, "length": lengths}
        for name, values in more.items():
            table = getattr(self, name)
            setattr(self, name, torch.cat([table, torch.tensor(values, dtype=torch.int64).to(table.device)]))
        for name in ("slide_sums", "slide_counts"):
            table = getattr(self, name)
            setattr(self, name, torch.cat([table, table.new_zeros(len(lengths), *table.shape[1:])]))
        self.set_numbers(torch.cat([self.number, torch.arange(s, s + len(lengths), device=self.device)]))
        return list(range(s, s + len(lengths)))

    def set_numbers(self, numbers: Tensor) -> None:
        """Say what the slides are called in a cohort of which this bank holds a part; by default their ids.

        The permutation that samples a slide is keyed by its number, so a slide has the same live tiles whichever rank
        holds it. Not part of ``state_dict``; :meth:`load_shards` sets them.

        Args:
            numbers: int64 [S], >= 0.

        Raises:
            ValueError: not one number for each slide, or negative ones.
        """
        if numbers.shape != (self.num_slides,) or not are_ids(numbers) or bool((numbers < 0).any()):
            raise ValueError(
                f"MemoryBank: numbers must be {self.num_slides} integers >= 0, got {numbers.dtype} {list(numbers.shape)}"
            )
        self.number = numbers.to(self.device, torch.int64)

    @torch.no_grad()
    def remove_slide(self, slide: int) -> None:
        """Forget a slide. Its id is never used again; its rows become a gap that :meth:`add_slides` fills.

        Raises:
            ValueError: no such slide.
        """
        slab = self._slab(slide)
        if self._file is not None:
            self._file.ring.forget(slide)
        for name, value in _BLANK.items():
            table = getattr(self, name)
            if table.shape[0]:
                table[slab] = value
        self.slide_sums[slide] = 0
        self.slide_counts[slide] = 0
        self.start[slide] = 0
        self.length[slide] = 0

    def _gaps(self) -> tuple[list[list[int]], int]:
        """Free runs of rows as [first, rows], and the number of rows in all."""
        start, length = self.start.cpu(), self.length.cpu()
        used = length > 0
        first, order = start[used].sort()
        end = first + length[used][order]
        edges_from = [0, *end.tolist()]
        edges_to = [*first.tolist(), self.payload.shape[0]]
        return [[a, z - a] for a, z in zip(edges_from, edges_to) if z > a], self.payload.shape[0]

    # ------------------------------------------------------------------ rows in a file

    def prefetch(self, slides: Tensor | Sequence[int]) -> int:
        """With rows in a file: begin to read the slides that are needed next, and return at once.

        Call it with all slides of the coming steps, in their order; those that an earlier call named and this one
        does not may leave memory again. Slides in use are never overwritten: when there is no room for more, the
        rest is left for the next call. Other tiers have nothing to do.

        Returns:
            How many of them, from the front, are in memory or on their way.

        Raises:
            ValueError: an unknown slide (named).
            OSError: rows that left memory could not be written to the file; names the slide, its rows are kept.
        """
        ids = self._slide_ids(torch.as_tensor(slides))
        if self._file is None:
            return ids.shape[0]
        return self._file.prefetch(ids, self.start, self.length)

    def cache_statistics(self) -> dict[str, float]:
        """With rows in a file: how well reading ahead works, counted since the start. {} in other tiers.

        ``hits`` slides were in memory when they were needed, ``late`` ones were still being read, ``misses`` had not
        been asked for; ``refused`` prefetches found no room, ``dropped`` slides were read ahead in vain, ``evicted``
        ones made room for others. ``reads`` and ``bytes_read`` from the file, ``writes`` and ``bytes_written`` to it,
        ``busy_seconds`` of all threads copying, ``wait_seconds`` of calls that waited. ``slides_in_memory``,
        ``rows_in_memory`` of ``rows_cached`` at most, of ``row_bytes`` each.
        """
        return {} if self._file is None else self._file.statistics()

    def close(self) -> None:
        """With rows in a file: stop the threads that read and write it. The bank cannot be used afterwards."""
        self._placement.close()

    # ------------------------------------------------------------------ state dicts and devices

    @torch.no_grad()
    def _adopt(self, tables: Mapping[str, Tensor]) -> None:
        """Take over checked tables of any size, converting the rows when their format differs."""
        rows, k, device = tables["payload"].shape[0], tables["codebook"].shape[0], self.device
        self._check_fits(rows, tables["start"].shape[0], k, holds=self.nbytes)
        self._check_cache(tables["length"])
        if tables["start"].shape != self.start.shape:
            self.number = torch.arange(tables["start"].shape[0], device=device)
        convert = tables["payload"].dtype != self.dtype
        if convert or tables["payload"].shape != self.payload.shape:
            self.payload = self._placement.blank(rows)
        elif self._file is not None:
            self._file.ring.clear()
        for name in checks.TABLES:
            mine, theirs = getattr(self, name), tables[name]
            if convert and name in ("payload", "scale"):
                continue
            if mine.shape == theirs.shape and mine.dtype == theirs.dtype:
                mine.copy_(theirs)
            else:
                setattr(self, name, theirs.to(device, copy=True))
        if not convert:
            return
        self.scale = _blank_rows(rows, self.dtype, device)["scale"]
        for _, number in self._row_chunks(_CHUNK):
            there = number.to(tables["payload"].device)
            self._store(number, ops.read(tables["payload"], tables["scale"], there, self.dim))
        self._sum_up(recode=True)

    @torch.no_grad()
    def _take_slide(self, slide: int, tables: Mapping[str, Tensor], theirs: int) -> None:
        """Copy a slide of other tables with the same codebook over a slide of as many tiles, never written.

        Where the row format differs the rows are converted, and codes and sums are left to :meth:`_sum_up`.
        """
        own, n = self._slab(slide), int(tables["length"][theirs])
        start = int(tables["start"][theirs])
        there = slice(start, start + n)
        for name in ("code", "age", "drift"):
            getattr(self, name)[own] = tables[name][there].to(self.device)
        if tables["payload"].dtype == self.dtype:
            self.payload[own] = tables["payload"][there].to(self.payload.device)
            if has_scale(self.dtype):
                self.scale[own] = tables["scale"][there].to(self.device)
            self.slide_sums[slide] = tables["slide_sums"][theirs].to(self.device)
            self.slide_counts[slide] = tables["slide_counts"][theirs].to(self.device)
            return
        for first in range(0, n, _CHUNK):
            part = torch.arange(start + first, start + min(first + _CHUNK, n))
            rows = ops.read(tables["payload"], tables["scale"], part, self.dim)
            self._store(part - start + own.start, rows)

    def _store(self, number: Tensor, rows: Tensor) -> None:
        """Put rows [n, D] as they are, not normalised, into the row format. number: int64 [n]."""
        values, scale = quantize(rows.to(self.device), self.dtype)
        place = self.payload.device
        self.payload[number.to(place), : self.dim] = values.to(place)
        if has_scale(self.dtype):
            self.scale[number.to(self.device)] = scale

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._file is not None:
            self._file.ring.flush()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads a bank of any size and row format; a state dict with the codebook alone sets the codebook."""
        found = {name: state_dict[prefix + name] for name in checks.TABLES if prefix + name in state_dict}
        missing_keys.extend(prefix + name for name in checks.TABLES if name not in found)
        if strict:
            ours = {prefix + name for name in checks.TABLES}
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in ours)
        if not found:
            return
        only_codebook = set(found) == {"codebook"}
        problem = None if only_codebook else checks.table_problem(found)
        if problem is None and found["codebook"].shape[1:] != (self.dim,):
            problem = f"codebook {list(found['codebook'].shape)}, but this bank has D = {self.dim}"
        if problem is None:
            try:
                if not only_codebook:
                    self._adopt(found)
                elif found["codebook"].shape[0]:
                    self.set_codebook(found["codebook"])
            except ValueError as error:
                problem = str(error)
        if problem is not None:
            error_msgs.append(f"{prefix.rstrip('.') or 'MemoryBank'}: {problem}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BankTables:
        # model.half() and the like must not change what the tables mean: only the device follows
        if self._file is not None and fn(self.start).device != self.device:
            raise RuntimeError(
                "MemoryBank: rows in a file stay with the device they were made for; make the bank there (device=...)"
            )
        for name, table in self._buffers.items():
            if table is not None and not (name == "payload" and self._file is not None):
                moved = fn(table)
                self._buffers[name] = moved if moved.dtype == table.dtype else table.to(moved.device)
        self._placement.device = self.device
        return self

    # ------------------------------------------------------------------ helpers

    @property
    def _file(self) -> FileRows | None:
        return self._placement.file

    def _check_fits(self, rows: int, slides: int, codewords: int, holds: int = 0) -> None:
        checks.check_fits(
            rows, self.dim, self.dtype, slides, codewords, self.device, holds=holds, tier=self.tier
        )

    def _check_cache(self, lengths: Tensor) -> None:
        """Rows in a file: the cache must hold any one slide."""
        if self._file is None or not lengths.numel():
            return
        cached, most = self._file.ring.rows, int(lengths.max())
        if most > cached:
            need = checks.size_text(most * self._file.row_bytes)
            raise ValueError(
                f"MemoryBank: cache= holds {cached:,} rows, the largest slide has {most:,}: it needs at least "
                f"{need}, and should hold the slides of a few steps"
            )

    def _stored(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Payload, scales and numbers of the rows ``rows`` on the bank's device, where they lie if they lie there."""
        if self.payload.device == self.device:
            return self.payload, self.scale, rows
        payload = self.payload[rows.cpu()].to(self.device)
        scale = self.scale[rows] if has_scale(self.dtype) else self.scale
        return payload, scale, torch.arange(rows.shape[0], device=self.device)

    def _slide_ids(self, slides: Tensor) -> Tensor:
        slides = torch.as_tensor(slides, device=self.device)
        if slides.ndim != 1 or not are_ids(slides):
            raise ValueError(
                f"MemoryBank: slides must be integers [B], got {slides.dtype} {list(slides.shape)}"
            )
        slides = slides.to(torch.int64)
        if checks.can_look():
            checks.check_slides(self.length, slides)
        return slides

    def _known(self, slide: int) -> int:
        checks.check_slides(self.length, torch.tensor([slide], device=self.length.device))
        return slide

    def _slab(self, slide: int) -> slice:
        start, n = int(self.start[self._known(slide)]), int(self.length[slide])
        return slice(start, start + n)

    def _row_chunks(self, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(slide [c], row number [c]) of the written rows in slide order, from ``chunk`` rows at a time."""
        if self._file is not None:
            self._file.ring.flush()
        ends = self.length.cumsum(0)
        total = int(ends[-1]) if self.num_slides else 0
        for first in range(0, total, chunk):
            index = torch.arange(first, min(first + chunk, total), device=ends.device)
            slide = torch.searchsorted(ends, index, right=True)
            rows = self.start[slide] + index - (ends - self.length)[slide]
            written = self.age[rows] >= 0
            yield slide[written], rows[written]


# What a row holds before it is written.
_BLANK: dict[str, float] = {"payload": 0, "scale": 0, "code": -1, "age": -1, "drift": 0}


def _blank_rows(rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The small tables of rows never written."""
    return {
        "scale": torch.zeros(rows if has_scale(dtype) else 0, device=device),
        "code": torch.full((rows,), -1, dtype=torch.int16, device=device),
        "age": torch.full((rows,), -1, dtype=torch.int32, device=device),
        "drift": torch.zeros(rows, device=device),
    }


def are_ids(ids: Tensor) -> bool:
    """Integers; a mask is none, though its values could be taken for 0 and 1."""
    return not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)


def _lengths(tiles_per_slide: Sequence[int] | Tensor, first: int = 0) -> Tensor:
    lengths = torch.as_tensor(tiles_per_slide).cpu().reshape(-1)
    if lengths.numel() and lengths.is_floating_point():
        raise ValueError("MemoryBank: tiles_per_slide must be integers")
    lengths = lengths.to(torch.int64)
    empty = (lengths < 1).nonzero()
    if len(empty):
        slide = int(empty[0, 0])
        raise ValueError(
            f"MemoryBank: slide {first + slide} has {int(lengths[slide])} tiles; every slide needs at "
            "least one (leave slides without tissue out)"
        )
    return lengths
