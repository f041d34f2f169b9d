"""The memory bank: the last feature of every tile of every slide, with exact running sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dre_fast.nn import bank_checks as checks
from dre_fast.nn.bank_files import BankFiles
from dre_fast.nn.bank_rows import Rows
from dre_fast.nn.bank_stats import Freshness, measure
from dre_fast.nn.bank_tables import are_ids
from dre_fast.ops import bank as ops
from dre_fast.ops.encode import encode_stored, hard_encode
from dre_fast.reference.layout import kept_rows
from dre_fast.reference.quantize import has_scale


class MemoryBank(BankFiles):
    """One row for every tile of every slide: written as tiles are encoded, read for the tiles that are not.

    Source: the memory bank of DRE-SLCL (arXiv 2511.05034). The running sums that make ``memory="full"`` cost
    the same for any slide size, quantised rows, ages, drift and permutation sampling are dre_fast's own.

    Layout. Slide s owns the rows start[s] .. start[s] + length[s] - 1, one a tile. All tables are buffers, so
    ``state_dict``, ``.to(device)`` and ``copy.deepcopy`` work; ``.half()`` and other dtype changes of a model
    leave the tables' dtypes alone. R rows, S slides, D values a row, K codewords:

        payload       [R, Dp] in ``dtype``  stored rows, unit L2 norm before storage; padded to 16 bytes
        scale         fp32 [R]              one a row for int8 and float8_e4m3fn, [0] otherwise
        code          int16 [R]             nearest codeword of the stored row; -1 = none (yet)
        age           int32 [R]             step of the last write; -1 = never written
        drift         fp32 [R]              1 - cos(stored before, after) at the last write; 0 at the first
        start         int64 [S]             first row of a slide
        length        int64 [S]             tiles of a slide; 0 = removed
        slide_sums    int64 [S, K, D]       sums of the written rows by codeword, 24 fraction bits
        slide_counts  int64 [S, K]          written rows by codeword
        codebook      fp32 [K, D]           K = 0 until there is one

    The sums and counts always equal a recomputation from the stored rows and codes, bit for bit.

    Ids. Slides are 0 .. S-1 in the order given; ids stay when others are removed and are not used again.
    Tiles are 0 .. n-1 within a slide. -1 as a slide or tile id means "no row": writes skip it, reads give
    zeros. Id arguments are int64 tensors or anything ``torch.as_tensor`` takes, moved to the bank's device.

    Methods of one slide (``sums``, ``counts``, ``codes``, ``ages``, ``drifts``, ``written``, ``remove_slide``) raise
    ValueError for an id that no slide has.

    Checks read a flag back from the device once a call; inside ``torch.compile`` and while a CUDA graph is captured
    they are left out, because they depend on the data, and the caller answers for ids and finite features.

    Rows in a file need the host in every call: no torch.compile over them, no CUDA graph, and ids that lie on a GPU
    are read back.

    With DistributedDataParallel use ``broadcast_buffers=False``: every rank holds the slides it trains on.

    Args:
        tiles_per_slide: tiles n_s >= 1 of each slide, ints. May be empty.
        dim: feature size D.
        codebook: [K, D], or None to set one later with :meth:`set_codebook`.
        dtype: row format, ``"int8"`` (default, D + 4 bytes a row), ``"float8_e4m3fn"``, ``"bfloat16"``,
            ``"float16"`` or ``"float32"``.
        device: where the tables lie and the kernels run.
        tier: where the payload lies. "device": with the other tables. "host": in pinned host memory, which the
            kernels of a CUDA device read and write over the bus. "file": in a file of ``folder``, with ``cache`` bytes
            of memory for the slides of the coming steps, see :meth:`prefetch`. "auto": the first of these that holds
            the bank. The other tables (14 bytes a row, sums) are on ``device`` in any tier.
        folder: tier "file": a folder with room for the rows. The file has no name and is gone with the process: it is
            working space, :meth:`save` keeps a bank.
        cache: tier "file": bytes of memory, an int or a string such as "8GB" (default: what the rows need,
            within 64 MB and 4.3 GB). It must hold all slides of one call, and should hold those of a few.
        budget: tier "auto": bytes of ``device`` that the bank may take (default: what is free).

    Raises:
        ValueError: a slide without tiles (named), an unknown dtype or tier, a codebook of the wrong shape, or more
            memory or disk needed than is free (with the numbers).
        RuntimeError: tier "file" without the compiled host part of dre_fast (says how to get it).
        OSError: tier "file": the folder cannot be written to.
    """

    # ------------------------------------------------------------------ rows

    @torch.no_grad()
    def write(self, slides: Tensor, tiles: Tensor, features: Tensor, *, step: int) -> None:
        """Store features, L2-normalised and quantised, and bring age, drift, code and sums up to date.

        Args:
            slides, tiles: int64 [R] (or broadcastable to it); -1 in either skips the row. When a row is given
                more than once the last one counts.
            features: [R, D], any floating dtype (or what ``torch.as_tensor`` takes); need not be normalised. No gradient
                is kept.
            step: current step, 0 .. 2^31 - 1; becomes the rows' age stamp. Use 0 for the initial fill.

        Raises:
            ValueError: shapes, ids outside the bank, or features that are not finite, naming slide and tile.
                Nothing is written then.
        """
        slides, tiles = self._rows(slides, tiles)
        features = torch.as_tensor(features)
        if features.shape != (tiles.shape[0], self.dim):
            raise ValueError(
                f"MemoryBank.write: features must be [{tiles.shape[0]}, {self.dim}] for these ids, "
                f"got {list(features.shape)}"
            )
        features = features.detach().to(self.device, torch.float32)
        if checks.can_look():
            if not 0 <= step < 1 << 31:
                raise ValueError(f"MemoryBank.write: step must lie in 0 .. 2^31 - 1, got {step}")
            checks.check_rows(self.length, slides, tiles, features)
        with self._in_memory(slides) as rows:
            ops.write(
                rows.payload,
                rows.scale,
                rows.code,
                rows.age,
                rows.drift,
                self.slide_sums,
                self.slide_counts,
                self.codebook,
                rows.start,
                slides.contiguous(),
                tiles.contiguous(),
                features.contiguous(),
                step,
            )
            if self._file is not None:
                self._file.wrote(slides, tiles, rows, self._own_rows())

    @torch.no_grad()
    def read(self, slides: Tensor, tiles: Tensor) -> Tensor:
        """Stored rows, dequantised: slides, tiles int64 [R] (or broadcastable) -> fp32 [R, D].

        Skipped (-1) and never written rows are zeros.

        Raises:
            ValueError: ids outside the bank, naming slide and tile.
        """
        slides, tiles = self._rows(slides, tiles)
        if checks.can_look():
            checks.check_rows(self.length, slides, tiles)
        with self._in_memory(slides) as rows:
            return ops.read(rows.payload, rows.scale, _row_numbers(rows.start, slides, tiles), self.dim)

    @torch.no_grad()
    def iter_rows(self, chunk: int = 65536) -> Iterator[Tensor]:
        """The written rows in slide order, dequantised: fp32 [n, D], 1 <= n <= ``chunk``."""
        for _, rows in self._row_chunks(chunk):
            if rows.numel():
                yield ops.read(*self._stored(rows), self.dim)

    @torch.no_grad()
    def iter_stored(self, chunk: int = 65536) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """The written rows in slide order: (payload, scale or None, row numbers int64 [n]) on the bank's device.

        They are read where they lie, unless that is a file and the device is another.
        """
        for _, rows in self._row_chunks(chunk):
            if rows.numel():
                payload, scale, index = self._stored(rows)
                yield payload, scale if has_scale(self.dtype) else None, index

    @torch.no_grad()
    def slide_weights(self) -> Tensor:
        """Weights for :func:`dre_fast.fit_codebook` by which every slide counts equally, fp32 [written rows].

        A written row of slide s weighs N / (S' n_s): N written rows in all, n_s of the slide, S' slides that
        have any. In the order of :meth:`iter_rows`.
        """
        slides = torch.cat([slide for slide, _ in self._row_chunks(65536)] or [self.start[:0]])
        written = torch.bincount(slides, minlength=self.num_slides)
        return (len(slides) / (int((written > 0).sum()) * written.double()))[slides].float()

    def sums(self, slide: int) -> Tensor:
        """Sums of a slide's written rows by codeword: int64 [K, D] in units of 2^-24, a copy."""
        return self.slide_sums[self._known(slide)].clone()

    def counts(self, slide: int) -> Tensor:
        """Written rows of a slide by codeword: int64 [K], a copy."""
        return self.slide_counts[self._known(slide)].clone()

    def codes(self, slide: int) -> Tensor:
        """Nearest codeword of each tile of a slide: int64 [n], -1 where there is none yet."""
        return self.code[self._slab(slide)].to(torch.int64)

    def ages(self, slide: int) -> Tensor:
        """Step of the last write of each tile of a slide: int32 [n], -1 where never written. A copy."""
        return self.age[self._slab(slide)].clone()

    def drifts(self, slide: int) -> Tensor:
        """1 - cos(before, after) at the last write of each tile of a slide: fp32 [n], a copy."""
        return self.drift[self._slab(slide)].clone()

    def written(self, slide: int) -> Tensor:
        """Which tiles of a slide were ever written: bool [n]."""
        return self.age[self._slab(slide)] >= 0

    @torch.no_grad()
    def measure(self, step: int, *, fill_step: int = 0) -> Freshness:
        """:meth:`statistics`, measured now and read later: does not wait for the device, so it may stand in a step.

        ``bank.measure(step).read()`` is ``bank.statistics(step)``.
        """
        return measure(self.age, self.drift, self.start, self.length, step, fill_step)

    def statistics(self, step: int, *, fill_step: int = 0) -> dict[str, Any]:
        """How fresh the bank is, for logs and plots. Waits for the device; :meth:`measure` does not.

        Args:
            step: the current step; an age here is ``step`` minus the step of the row's last write.
            fill_step: rows last written at or before this step still hold their initial feature.

        Returns:
            Scalars ``step``, ``rows``, ``written``, ``never_written`` and ``never_refreshed`` (fractions of
            all rows; the second counts rows of the initial fill too), ``age_mean`` and ``age_max`` (of
            written rows), ``drift_mean`` and ``drift`` {"q50", "q90", "q99", "max"} (of rows written after
            ``fill_step``; a quantile is the lower of its two neighbours). None where no row qualifies.

            ``age_histogram`` and ``drift_histogram`` {"edges" fp32 [33], "rows" int64 [32]}; drift has a log
            scale, and what lies beyond either end counts in the end bin.

            ``per_slide``: ``rows``, ``never_written``, ``never_refreshed``, ``age_mean``, ``age_max`` (-1
            without a written row) and ``drift`` {...} as CPU tensors [S], NaN where undefined;
            ``age_histogram`` and ``drift_histogram`` int64 [S, 32], with the edges above.
        """
        return self.measure(step, fill_step=fill_step).read()

    # ------------------------------------------------------------------ sampling and encoding

    @torch.no_grad()
    def sample(self, slides: Tensor, m: int, cycle: Tensor | int, seed: int) -> Tensor:
        """The live tiles of a visit, so that every tile is live once in ceil(n/m) visits of its slide.

        Visit v takes the next m tiles of a permutation of the slide keyed by (seed, v // ceil(n/m), number): a pure
        function of the arguments, n and the slide's number (its id, unless :meth:`set_numbers` says otherwise), see
        :func:`dre_fast.reference.sampling.sample_tiles`.

        Args:
            slides: int64 [B].
            m: live tiles a slide, at least 1.
            cycle: visit number v of each slide, from 0; int or int64 [B].
            seed: any int.

        Returns:
            int64 [B, m], distinct tiles of each slide; slots beyond n_s are -1. On the bank's device.

        Raises:
            ValueError: m < 1, visits that are negative or neither one nor [B], or an unknown slide (named).
        """
        slides = self._slide_ids(slides)
        if m < 1:
            raise ValueError(f"MemoryBank.sample: m must be at least 1, got {m}")
        return ops.tiles(self.length[slides], self.number[slides], 0, m, m, self._visits(cycle, slides), seed)

    @torch.no_grad()
    def retrieved(self, slides: Tensor, tiles: Tensor, r: int, cycle: Tensor | int, seed: int) -> Tensor:
        """The tiles that ``encode(memory=r)`` takes from the bank beside the live ones: the next r of the permutation.

        Args:
            slides: int64 [B]. tiles: int64 [B, m], the live ones, as :meth:`sample` gave them.
            r: tiles a slide. cycle, seed: as given to :meth:`sample`.

        Returns:
            int64 [B, r], distinct and none of them live; -1 where a slide has no more, or the row was never written.

        Raises:
            ValueError: as :meth:`sample`.
        """
        slides = self._slide_ids(slides)
        m = tiles.shape[1]
        if m < 1 or r < 0:
            raise ValueError(f"MemoryBank.retrieved: needs live tiles and r >= 0, got m = {m} and r = {r}")
        found = ops.tiles(
            self.length[slides], self.number[slides], m, r, m, self._visits(cycle, slides), seed
        )
        return self._stored_others(slides, tiles, found)

    @torch.no_grad()
    def others(self, slides: Tensor, tiles: Tensor) -> Tensor:
        """All written tiles of each slide but the live ones.

        Args:
            slides: int64 [B]. tiles: int64 [B, m], the live ones; -1 = unused slot.

        Returns:
            int64 [B, n], n that of the largest slide; -1 in the places of live, unwritten and missing tiles.

        Raises:
            ValueError: an unknown slide (named).
        """
        slides = self._slide_ids(slides)
        most = int(self.length[slides].max()) if len(slides) else 0
        every = torch.arange(most, device=self.device).expand(len(slides), -1)
        return self._stored_others(slides, tiles, torch.where(every < self.length[slides, None], every, -1))

    def _stored_others(self, slides: Tensor, tiles: Tensor, found: Tensor) -> Tensor:
        """``found`` [B, q] with -1 for tiles that are live or were never written."""
        live = _in_row(found, tiles)
        number = _row_numbers(self.start, slides[:, None], found)
        written = (self.age[number.clamp(min=0)] >= 0) if self.age.shape[0] else torch.zeros_like(live)
        return torch.where((found >= 0) & ~live & written, found, -1)

    def encode(
        self,
        slides: Tensor,
        tiles: Tensor,
        live: Tensor,
        memory: str | int = "full",
        *,
        cycle: Tensor | int | None = None,
        seed: int | None = None,
        return_counts: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Residual encoding of slides: the live rows with gradient, the bank's rows without.

            V[b, k] = sum over the rows i of slide b nearest to codeword k of (f_i - c_k)

        ``memory="full"``: every written row of the slide, the live ones in place of their stored versions.
        From the running sums, V = (S - sum of z_old) 2^-24 + sum of f_new - n' C, at a cost that does not
        grow with n_s (dre_fast's own).

        ``memory=r``, an int: the live rows and up to r others, those that follow the live ones in the
        permutation of :meth:`sample`. Needs the ``cycle`` and ``seed`` given there, and its m columns in
        ``tiles``. At most n_s - m other rows exist, and rows never written are left out. (DRE-SLCL, arXiv
        2511.05034, with a permutation in place of independent draws.)

        ``memory="none"``: the live rows only.

        Args:
            slides: int64 [B].
            tiles: int64 [B, m], the tiles of the live rows, no tile twice; -1 leaves a slot out. m = 0 with
                ``memory="full"`` encodes what the bank holds.
            live: [B, m, D] features, L2-normalised by the caller; fp32, half types (computed in fp32) or
                float64. They may lie on another device than the bank; V lies where they do.
            return_counts: also return the rows by codeword.

        Returns:
            V fp32 [B, K, D] (float64 for float64 ``live``), not normalised; with ``return_counts`` also int64
            [B, K]. The gradient reaches ``live`` only; live rows of left-out slots get zero.

        Raises:
            ValueError: no codebook yet, wrong shapes or dtypes, unknown ``memory``, an int without cycle,
                seed and live slots; ids outside the bank, a tile twice or a live row that is not finite (naming slide and
                tile).
        """
        slides, tiles = self._slide_ids(slides), torch.as_tensor(tiles, device=self.device)
        b = slides.shape[0]
        if tiles.ndim != 2 or tiles.shape[0] != b or live.shape != (*tiles.shape, self.dim):
            raise ValueError(
                f"MemoryBank.encode: slides [B], tiles [B, m], live [B, m, {self.dim}] do not fit: got "
                f"{list(slides.shape)}, {list(tiles.shape)}, {list(live.shape)}"
            )
        if not are_ids(tiles) or not live.is_floating_point():
            raise ValueError(
                f"MemoryBank.encode: tiles must be integers and live floating point, got {tiles.dtype} and "
                f"{live.dtype}"
            )
        tiles, m = tiles.to(torch.int64), tiles.shape[1]
        if self.codebook.shape[0] == 0:
            raise ValueError(
                "MemoryBank.encode: no codebook yet; set one with set_codebook(fit_codebook(bank, K)[0])"
            )
        if checks.can_look():
            features = live.detach().reshape(b * m, self.dim)
            checks.check_rows(self.length, slides.repeat_interleave(m), tiles.reshape(-1), features)
            checks.check_distinct(slides, tiles)

        valid = tiles >= 0
        if memory == "full":
            encoded, counts = self._encode_bags(live, valid)
            with torch.no_grad(), self._in_memory(slides) as rows:
                others, n_others = ops.rest(
                    rows.payload,
                    rows.scale,
                    rows.code,
                    self.slide_sums,
                    self.slide_counts,
                    self.codebook,
                    rows.start,
                    slides,
                    tiles,
                    live.dtype == torch.float64,
                )
            encoded, counts = encoded + others.to(encoded), counts + n_others.to(counts)
        elif memory == "none":
            encoded, counts = self._encode_bags(live, valid)
        elif isinstance(memory, int) and not isinstance(memory, bool) and memory >= 0:
            if cycle is None or seed is None:
                raise ValueError("MemoryBank.encode: memory=r needs the cycle and seed given to sample")
            if m < 1:
                raise ValueError(
                    "MemoryBank.encode: memory=r takes the rows after the live ones: m must be at least 1"
                )
            encoded, counts = self._encode_bags(live, valid)
            others, n_others = self._encode_retrieved(
                slides, tiles, memory, self._visits(cycle, slides), seed
            )
            encoded, counts = encoded + others.to(encoded), counts + n_others
        else:
            raise ValueError(
                f"MemoryBank.encode: memory must be 'full', 'none' or an int r >= 0, got {memory!r}"
            )
        return (encoded, counts) if return_counts else encoded

    @torch.no_grad()
    def _encode_retrieved(
        self, slides: Tensor, tiles: Tensor, r: int, visit: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """V fp32 [B, K, D] and counts of up to r stored rows of each slide, read where they lie."""
        b, m = tiles.shape
        others = ops.tiles(self.length[slides], self.number[slides], m, r, m, visit, seed)
        with self._in_memory(slides) as rows:
            number = _row_numbers(rows.start, slides[:, None], others)
            # only tiles that do not come from sample() can meet their own stored version here
            live_number = _row_numbers(rows.start, slides[:, None], tiles)
            bag = torch.arange(b, device=tiles.device)[:, None] * max(rows.payload.shape[0], 1)
            again = torch.isin(
                bag + number.clamp(min=0), torch.where(live_number >= 0, bag + live_number, -1)
            )
            # the code of a row that was never written is -1: it is skipped
            return encode_stored(
                rows.payload,
                rows.scale if has_scale(self.dtype) else None,
                rows.code,
                torch.where(again, -1, number).reshape(-1),
                self.codebook,
                torch.arange(b + 1, device=tiles.device) * r,
            )

    def _encode_bags(self, rows: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Hard residual encoding of rows [B, q, D] where valid [B, q]: V [B, K, D], counts int64 [B, K]."""
        b, q = valid.shape
        x = rows.reshape(b * q, self.dim)
        x = x if x.dtype == torch.float64 else x.float()
        encoded, counts, *_ = hard_encode(
            x,
            self.codebook.to(x),
            torch.arange(b + 1, device=x.device) * q,
            kept_rows(valid.reshape(-1).to(x.device)),
            masked=True,
        )
        return encoded, counts

    # ------------------------------------------------------------------ helpers

    def _rows(self, slides: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Both ids as int64 [R] on the bank's device."""
        device = self.device
        slides, tiles = torch.broadcast_tensors(
            torch.as_tensor(slides, device=device), torch.as_tensor(tiles, device=device)
        )
        if tiles.ndim != 1 or not (are_ids(tiles) and are_ids(slides)):
            raise ValueError(
                "MemoryBank: slides and tiles must be integers in one dimension, [R], got "
                f"{slides.dtype} and {tiles.dtype} {list(tiles.shape)}"
            )
        return slides.to(torch.int64), tiles.to(torch.int64)

    def _visits(self, cycle: Tensor | int, slides: Tensor) -> Tensor:
        if isinstance(cycle, int):  # made on the device, as a graph that is captured needs it
            if cycle < 0:
                raise ValueError(f"MemoryBank: cycle (the visit number) counts from 0, got {cycle}")
            return torch.full_like(slides, cycle)
        visit = torch.as_tensor(cycle, device=slides.device)
        if visit.is_floating_point() or visit.shape not in ((), slides.shape):
            raise ValueError(
                f"MemoryBank: cycle (the visit number) must be an integer or integers {list(slides.shape)}, "
                f"got {visit.dtype} {list(visit.shape)}"
            )
        visit = visit.to(torch.int64).expand_as(slides)
        if checks.can_look() and bool((visit < 0).any()):
            raise ValueError(f"MemoryBank: cycle (the visit number) counts from 0, got {int(visit.min())}")
        return visit

    def _own_rows(self) -> Rows:
        return Rows(self.payload, self.scale, self.code, self.age, self.drift, self.start)

    def _in_memory(self, slides: Tensor) -> AbstractContextManager[Rows]:
        """The row tables of ``slides`` where kernels can read and write them."""
        own = self._own_rows()
        return nullcontext(own) if self._file is None else self._file.lease(slides, own, self.length)


def _in_row(found: Tensor, tiles: Tensor) -> Tensor:
    """Which entries of found [B, q] are among the tiles [B, m] of their row."""
    bag = torch.arange(len(found), device=found.device)[:, None] << 40
    return torch.isin(bag + found.clamp(min=0), torch.where(tiles >= 0, bag + tiles, -1))


def _row_numbers(start: Tensor, slides: Tensor, tiles: Tensor) -> Tensor:
    """start + tile, or -1 where an id is negative; broadcasts."""
    if start.shape[0] == 0:
        return torch.full_like(tiles, -1)
    return torch.where((slides >= 0) & (tiles >= 0), start[slides.clamp(min=0)] + tiles, -1)
