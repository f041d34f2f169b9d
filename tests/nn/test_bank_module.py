"""MemoryBank: memory modes against brute force, errors, slides that come and go, statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dre_fast.nn import bank_checks
from dre_fast.nn.bank import MemoryBank
from dre_fast.reference import bank as reference
from dre_fast.reference import residual_encode
from dre_fast.reference.quantize import DTYPES
from dre_fast.reference.sampling import retrieve_tiles

D, K = 12, 5
LENGTHS = [7, 40, 3, 18]


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def filled(dtype: str = "int8", part: float = 1.0, lengths: list[int] = LENGTHS) -> MemoryBank:
    """A bank with a codebook, each row written with probability ``part``."""
    bank = MemoryBank(lengths, D, codebook=torch.randn(K, D) * 0.4, dtype=dtype)
    for slide, n in enumerate(lengths):
        tiles = torch.arange(n)[torch.rand(n) < part]
        bank.write(slide, tiles, torch.randn(len(tiles), D), step=0)
    return bank


def brute_force(
    bank: MemoryBank, slides: Tensor, tiles: Tensor, live: Tensor, others: list[Tensor]
) -> Tensor:
    """V of live rows and of the stored rows ``others`` of each slide, by the reference in float64."""
    out = []
    for slide, ids, rows, rest in zip(slides, tiles, live, others):
        stored = bank.read(int(slide), rest).double()
        out.append(residual_encode(torch.cat([rows[ids >= 0], stored]), bank.codebook.double()))
    return torch.cat(out)


def written_others(bank: MemoryBank, slides: Tensor, tiles: Tensor) -> list[Tensor]:
    others = []
    for slide, ids in zip(slides.tolist(), tiles):
        rest = bank.written(slide).clone()
        rest[ids[ids >= 0]] = False
        others.append(rest.nonzero()[:, 0])
    return others


def assert_same_with_gradient(got: Tensor, expected: Tensor, live: Tensor, atol: float) -> None:
    assert torch.allclose(got.double(), expected, rtol=0, atol=atol)
    g = torch.randn_like(expected)
    (a,) = torch.autograd.grad((got * g).sum(), live, retain_graph=True)
    (b,) = torch.autograd.grad((expected * g).sum(), live)
    assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert a.abs().sum() > 0


# ---------------------------------------------------------------------------------------------- memory modes


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("part", [1.0, 0.5, 0.0])
def test_full_is_the_encoding_of_all_written_rows_with_live_ones_swapped_in(dtype: str, part: float) -> None:
    bank = filled(dtype, part)
    slides = torch.tensor([1, 3, 0, 1])
    tiles = bank.sample(slides, 8, torch.tensor([0, 2, 0, 3]), 5)
    tiles[0, 2] = tiles[3, 0] = -1
    live = unit(4, 8, D).requires_grad_()
    got, counts = bank.encode(slides, tiles, live, return_counts=True)
    others = written_others(bank, slides, tiles)
    assert_same_with_gradient(got, brute_force(bank, slides, tiles, live, others), live, atol=50 * 2.0**-25)
    rows = torch.tensor([len(o) for o in others]) + (tiles >= 0).sum(1)
    assert torch.equal(counts.sum(1), rows)


def test_full_in_fp32_is_fp32_accurate() -> None:
    bank = filled("float32", lengths=[4000])
    slides, tiles = torch.tensor([0]), torch.arange(64)[None]
    live = unit(1, 64, D, dtype=torch.float32)
    got = bank.encode(slides, tiles, live)
    expected = brute_force(bank, slides, tiles, live.double(), written_others(bank, slides, tiles))
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_full_after_writing_the_live_rows_is_the_plain_encoding_of_the_bank() -> None:
    bank = filled("float32")
    slides, tiles = torch.tensor([1]), torch.arange(10, 20)[None]
    live = unit(1, 10, D, dtype=torch.float32)
    before = bank.encode(slides, tiles, live)
    bank.write(1, tiles[0], live[0], step=1)
    after = bank.encode(slides, torch.full((1, 1), -1), torch.zeros(1, 1, D))
    assert torch.allclose(before, after, atol=1e-5)


class _Shapes(TorchDispatchMode):
    """Every operation with the shapes of what it newly computes; views of the tables cost nothing."""

    def __init__(self, tables: list[Tensor]) -> None:
        super().__init__()
        self.tables = {table.untyped_storage().data_ptr() for table in tables}
        self.seen: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [r for r in (out if isinstance(out, tuple) else (out,)) if isinstance(r, Tensor)]
        new = [r.shape for r in results if r.untyped_storage().data_ptr() not in self.tables]
        self.seen.append((str(func), new))
        return out


def test_full_does_the_same_work_for_any_slide_size() -> None:
    seen = []
    for n in (100, 50_000):
        bank = MemoryBank([n], D, codebook=torch.randn(K, D))
        bank.write(0, torch.arange(100), torch.randn(100, D), step=0)
        keys = ("payload", "scale", "code", "slide_sums", "slide_counts", "codebook", "start")
        tables = [getattr(bank, k) for k in keys]
        with _Shapes(tables) as shapes:
            reference.rest(*tables, torch.tensor([0]), torch.arange(64)[None])
        seen.append(shapes.seen)
    assert seen[0] == seen[1]  # the same operations with results of the same shapes
    assert len(seen[0]) > 5


@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("r", [0, 1, 11, 100])
def test_an_int_retrieves_the_next_rows_of_the_permutation(part: float, r: int) -> None:
    bank = filled("bfloat16", part)
    slides, visit, m = torch.tensor([1, 2, 3]), torch.tensor([4, 1, 2]), 6
    tiles = bank.sample(slides, m, visit, 9)
    live = unit(3, m, D).requires_grad_()
    got = bank.encode(slides, tiles, live, memory=r, cycle=visit, seed=9)
    found = retrieve_tiles(bank.length[slides], slides, m, r, visit, 9)
    others = []
    for slide, ids in zip(slides.tolist(), found):
        ids = ids[ids >= 0]
        others.append(ids[bank.written(slide)[ids]])
    if part == 1.0:
        assert [len(o) for o in others] == [min(r, max(n - m, 0)) for n in (40, 3, 18)]
    assert_same_with_gradient(got, brute_force(bank, slides, tiles, live, others), live, atol=1e-5)


def test_retrieving_all_other_rows_is_full() -> None:
    bank = filled("float32")
    slides = torch.tensor([1, 3])
    tiles, live = bank.sample(slides, 6, 0, 0), unit(2, 6, D, dtype=torch.float32)
    some = bank.encode(slides, tiles, live, memory=1000, cycle=0, seed=0)
    assert torch.allclose(some, bank.encode(slides, tiles, live), atol=1e-5)


def test_tiles_of_ones_own_choice_are_never_counted_twice() -> None:
    bank = filled("float32")
    slides, tiles = torch.tensor([1]), torch.tensor([[3, 8, 20, -1]])
    live = unit(1, 4, D)
    _, counts = bank.encode(slides, tiles, live, memory=1000, cycle=2, seed=0, return_counts=True)
    # 40 tiles, at most 36 of them retrieved, those that are live left out
    found = retrieve_tiles(torch.tensor([40]), slides, 4, 1000, 2, 0)[0]
    expected = 3 + len(set(found[found >= 0].tolist()) - {3, 8, 20})
    assert int(counts.sum()) == expected


def test_none_is_the_live_rows_alone() -> None:
    bank = filled()
    slides = torch.tensor([2, 1])
    tiles, live = bank.sample(slides, 5, 0, 0), unit(2, 5, D).requires_grad_()
    nothing = [torch.zeros(0, dtype=torch.int64)] * 2
    expected = brute_force(bank, slides, tiles, live, nothing)
    assert_same_with_gradient(bank.encode(slides, tiles, live, "none"), expected, live, atol=1e-12)


@pytest.mark.parametrize("memory", ["full", 4, "none"])
def test_left_out_slots_get_no_gradient_even_when_they_hold_nan(memory: str | int) -> None:
    bank = filled()
    live = unit(2, 6, D)
    tiles = bank.sample(torch.tensor([2, 0]), 6, 0, 0)  # slide 2 has three tiles
    live[0, 3:] = float("nan")
    live.requires_grad_()
    got = bank.encode(torch.tensor([2, 0]), tiles, live, memory, cycle=0, seed=0)
    assert torch.isfinite(got).all()
    (grad,) = torch.autograd.grad(got.square().sum(), live)
    assert not grad[0, 3:].any()
    assert torch.isfinite(grad).all()


def test_gradcheck() -> None:
    bank = filled()
    slides, tiles = torch.tensor([1, 0]), torch.tensor([[3, -1], [0, 6]])
    live = unit(2, 2, D).requires_grad_()
    for memory in ("full", 5, "none"):
        assert torch.autograd.gradcheck(
            lambda x, mode=memory: bank.encode(slides, tiles, x, mode, cycle=0, seed=1), live
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_live_rows_are_computed_in_fp32_and_autocast_changes_nothing(dtype: torch.dtype) -> None:
    bank = filled()
    slides = torch.tensor([1])
    tiles, live = bank.sample(slides, 8, 0, 0), unit(1, 8, D).to(dtype)
    expected = bank.encode(slides, tiles, live.float())
    assert expected.dtype == torch.float32
    assert torch.equal(bank.encode(slides, tiles, live), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bank.encode(slides, tiles, live), expected)


# ---------------------------------------------------------------------------------------------------- errors


def snapshot(bank: MemoryBank) -> dict[str, Tensor]:
    return {name: table.clone() for name, table in bank.state_dict().items()}


def assert_unchanged(bank: MemoryBank, before: dict[str, Tensor]) -> None:
    for name, table in bank.state_dict().items():
        assert torch.equal(table.float(), before[name].float()), name


@pytest.mark.parametrize(
    ("slides", "tiles", "message"),
    [
        ([1, 9], [0, 0], "slide 9"),
        ([1, -2], [0, 0], "slide -2"),
        ([1, 1], [0, 40], "slide 1, tile 40.*40 tiles"),
        ([1, 3], [0, -3], "slide 3, tile -3"),
        ([2, 1], [0, 0], "slide 2.*removed"),
    ],
)
def test_ids_outside_the_bank_are_named_and_nothing_is_written(
    slides: list[int], tiles: list[int], message: str
) -> None:
    bank = filled()
    bank.remove_slide(2)
    before = snapshot(bank)
    with pytest.raises(ValueError, match=message):
        bank.write(slides, tiles, torch.randn(2, D), step=1)
    with pytest.raises(ValueError, match=message):
        bank.read(slides, tiles)
    assert_unchanged(bank, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_features_that_are_not_finite_are_named_and_nothing_is_written(value: float) -> None:
    bank = filled()
    before = snapshot(bank)
    x = torch.randn(3, D, dtype=torch.float64)
    x[1, 4] = value
    with pytest.raises(ValueError, match=r"slide 3, tile 17.*not finite"):
        bank.write([1, 3, 0], [2, 17, 5], x, step=1)
    assert_unchanged(bank, before)
    bank.write([1, -1, 0], [2, 17, 5], x, step=1)  # a skipped row may hold anything


def test_shapes_and_steps_are_checked() -> None:
    bank = filled()
    with pytest.raises(ValueError, match=r"\[2, 12\]"):
        bank.write([0, 0], [0, 1], torch.randn(2, D + 1), step=0)
    with pytest.raises(ValueError, match="step"):
        bank.write([0], [0], torch.randn(1, D), step=2**31)
    with pytest.raises(ValueError, match="step"):
        bank.write([0], [0], torch.randn(1, D), step=-1)
    with pytest.raises(ValueError, match="integers"):
        bank.read(torch.tensor([0.0]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"\[B, m, 12\]"):
        bank.encode([0], [[1, 2]], unit(1, 3, D))
    with pytest.raises(ValueError, match="m must be"):
        bank.sample([0], 0, 0, 0)
    with pytest.raises(ValueError, match="counts from 0"):
        bank.sample([0], 4, -1, 0)
    with pytest.raises(ValueError, match="no slide 4"):
        bank.sample([4], 4, 0, 0)


def test_encode_errors() -> None:
    bank = filled()
    live = unit(1, 2, D)
    with pytest.raises(ValueError, match="slide 1, tile 5 is live twice"):
        bank.encode([1], [[5, 5]], live)
    with pytest.raises(ValueError, match="slide 1, tile 99"):
        bank.encode([1], [[5, 99]], live)
    with pytest.raises(ValueError, match="cycle and seed"):
        bank.encode([1], [[5, 6]], live, memory=3)
    for memory in ("half", -1, True, 2.5):
        with pytest.raises(ValueError, match="memory must be"):
            bank.encode([1], [[5, 6]], live, memory=memory)
    with pytest.raises(ValueError, match="no codebook yet"):
        MemoryBank([3], D).encode([0], [[0, 1]], live)
    with pytest.raises(ValueError, match="tiles must be integers"):
        bank.encode([1], [[5.0, 6.0]], live)
    with pytest.raises(ValueError, match="live floating point"):
        bank.encode([1], [[5, 6]], live.long())
    live[0, 1, 3] = torch.nan
    with pytest.raises(ValueError, match="slide 1, tile 6: feature is not finite"):
        bank.encode([1], [[5, 6]], live)


@pytest.mark.parametrize(
    "visit", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), 0.5]
)
def test_visits_that_do_not_fit_the_slides_are_refused(visit: Tensor | float) -> None:
    bank = filled()
    with pytest.raises(ValueError, match="visit number"):
        bank.sample([0, 1], 2, visit, 0)
    with pytest.raises(ValueError, match="visit number"):
        bank.encode([0, 1], [[0, 1], [0, 1]], unit(2, 2, D), memory=2, cycle=visit, seed=0)


@pytest.mark.parametrize("memory", ["full", "none"])
def test_no_live_rows_and_no_slides(memory: str | int) -> None:
    bank, slides = filled(part=0.7), torch.tensor([1, 3])
    none = torch.zeros(2, 0, dtype=torch.int64)
    encoded, counts = bank.encode(slides, none, torch.zeros(2, 0, D), memory=memory, return_counts=True)
    if memory == "full":
        expected = brute_force(bank, slides, none, torch.zeros(2, 0, D), written_others(bank, slides, none))
        torch.testing.assert_close(encoded.double(), expected, rtol=0, atol=1e-5)
        assert torch.equal(counts, bank.slide_counts[slides])
    else:
        assert not encoded.any()
    no_slides = torch.zeros(0, dtype=torch.int64)
    assert bank.encode(no_slides, none[:0], torch.zeros(0, 0, D), memory=memory).shape == (0, K, D)
    with pytest.raises(ValueError, match="m must be at least 1"):
        bank.encode(slides, none, torch.zeros(2, 0, D), memory=4, cycle=0, seed=1)


def test_construction_errors() -> None:
    with pytest.raises(ValueError, match="slide 1 has 0 tiles"):
        MemoryBank([3, 0], D)
    with pytest.raises(ValueError, match="integers"):
        MemoryBank(torch.tensor([3.0]), D)
    with pytest.raises(ValueError, match="dim"):
        MemoryBank([3], 0)
    with pytest.raises(ValueError, match="int4"):
        MemoryBank([3], D, dtype="int4")
    for codebook in (torch.zeros(3, D + 1), torch.zeros(D), torch.zeros(0, D), torch.zeros(40_000, D)):
        with pytest.raises(ValueError, match=r"codewords|codebook"):
            MemoryBank([3], D, codebook=codebook)
    with pytest.raises(ValueError, match="codeword 2 is not finite"):
        MemoryBank([3], D, codebook=torch.tensor([0.0, 1.0, float("inf")])[:, None].expand(3, D))


def test_a_bank_larger_than_the_free_memory_is_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bank_checks, "free_bytes", lambda device: 61 * 10**9)
    with pytest.raises(
        ValueError, match=r"200,000,000 rows x 384 int8.*needs 79\.\d GB; 61\.0 GB free on cpu"
    ):
        MemoryBank([10_000] * 20_000, 384)
    bank = filled()
    monkeypatch.setattr(bank_checks, "free_bytes", lambda device: 0)
    with pytest.raises(ValueError, match="0 bytes free on cpu"):
        bank.add_slide(100)
    with pytest.raises(ValueError, match="0 bytes free on cpu"):
        bank.set_codebook(torch.randn(K + 1, D))
    bank.set_codebook(torch.randn(K, D))  # the same size needs no memory
    assert bank.num_slides == len(LENGTHS)


def test_free_memory_is_known_on_linux() -> None:
    free = bank_checks.free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


# --------------------------------------------------------------------------------------- rows and codebook


def test_construction() -> None:
    bank = MemoryBank(torch.tensor(LENGTHS), D, dtype=torch.bfloat16)
    assert bank.num_slides == 4
    assert bank.length.tolist() == LENGTHS
    assert bank.dim == D
    assert bank.payload.shape == (sum(LENGTHS), 16)
    assert bank.scale.shape == (0,)
    assert (bank.age == -1).all()
    assert not bank.written(2).any()
    assert "slides=4" in repr(bank)
    assert list(MemoryBank([], D).iter_rows()) == []


def test_read_and_the_per_slide_views() -> None:
    bank = MemoryBank(LENGTHS, D, codebook=torch.eye(K, D), dtype="float32")
    x = torch.randn(3, D)
    bank.write([0, 3, 0], [6, 2, 1], x, step=4)
    stored = bank.read([0, 3, -1, 0, 1], [6, 2, 0, 1, 5])
    expected = torch.nn.functional.normalize(x, dim=1)
    assert torch.allclose(stored[[0, 1, 3]], expected, atol=1e-7)
    assert not stored[[2, 4]].any()
    assert bank.ages(0).tolist() == [-1, 4, -1, -1, -1, -1, 4]
    assert bank.written(3).nonzero().tolist() == [[2]]
    assert bank.codes(0)[6] == expected[0, :K].argmax()
    assert bank.codes(1).unique().tolist() == [-1]
    assert int(bank.counts(0).sum()) == 2
    assert bank.sums(0).dtype == torch.int64
    bank.sums(0).zero_()  # a copy: the bank keeps its own
    assert int(bank.sums(0).abs().sum()) > 0
    bank.write(0, [6], -x[:1], step=5)
    assert float(bank.drifts(0)[6]) == pytest.approx(2.0)


def test_the_write_keeps_no_graph() -> None:
    bank, x = filled(), torch.randn(1, D, requires_grad=True)
    bank.write([0], [0], x * 2, step=1)
    assert not any(table.requires_grad for table in bank.buffers())


def test_iter_rows_gives_the_written_rows_in_slide_order() -> None:
    bank = filled("float32", 0.6)
    expected = torch.cat([bank.read(s, bank.written(s).nonzero()[:, 0]) for s in range(4)])
    for chunk in (1, 7, 65536):
        parts = list(bank.iter_rows(chunk))
        assert max(len(p) for p in parts) <= chunk
        assert torch.equal(torch.cat(parts), expected)


def test_set_codebook_codes_every_row_again() -> None:
    bank = filled("int8", 0.7)
    for k in (K, 9):
        codebook = torch.randn(k, D) * 0.3
        bank.set_codebook(codebook)
        rows = torch.cat(list(bank.iter_rows()))
        codes = torch.cat([bank.codes(s)[bank.written(s)] for s in range(4)])
        assert torch.equal(codes, torch.cdist(rows.double(), codebook.double()).argmin(1))
        assert torch.equal(bank.slide_counts.sum(0), torch.bincount(codes, minlength=k))
        sums = bank.slide_sums.clone()
        bank.slide_sums.fill_(77)
        bank.rebuild()
        assert torch.equal(bank.slide_sums, sums)


@pytest.mark.slow  # it fills 2.3 GB
def test_more_than_2_to_31_elements() -> None:
    lengths = [3_000_000, 2_700_000]
    dim = 384
    need = bank_checks.table_bytes(sum(lengths), dim, torch.int8, 2, 2)
    free = bank_checks.free_bytes(torch.device("cpu"))
    if free is not None and free < need:
        pytest.skip(f"needs {need / 1e9:.1f} GB of free memory")
    bank = MemoryBank(lengths, dim, codebook=torch.eye(2, dim))
    assert bank.payload.numel() > 2**31
    slides, tiles, x = [1, 1, 0], [2_699_999, 0, 2_999_999], torch.randn(3, dim)
    bank.write(slides, tiles, x, step=1)
    assert torch.allclose(bank.read(slides, tiles), torch.nn.functional.normalize(x, dim=1), atol=2e-3)
    assert bank.written(1).nonzero()[:, 0].tolist() == [0, 2_699_999]
    assert bank.slide_counts.sum(1).tolist() == [1, 2]
    got = bank.encode([1], [[2_699_999]], unit(1, 1, dim, dtype=torch.float32))
    assert torch.isfinite(got).all()


# ------------------------------------------------------------------------------------------------- slides


def test_add_and_remove_keep_the_others() -> None:
    bank = filled()
    before = {s: bank.read(s, torch.arange(LENGTHS[s])) for s in (0, 2, 3)}
    sums = bank.slide_sums[[0, 2, 3]].clone()
    bank.remove_slide(1)  # leaves a gap of 40 rows
    rows = bank.payload.shape[0]
    assert bank.add_slide(30) == 4
    assert bank.add_slides([10, 11]) == [5, 6]  # 10 fit in the gap, 11 do not
    assert bank.payload.shape[0] == rows + 11
    assert bank.num_slides == 7
    for slide, stored in before.items():
        assert torch.equal(bank.read(slide, torch.arange(LENGTHS[slide])), stored)
    assert torch.equal(bank.slide_sums[[0, 2, 3]], sums)
    for slide in (4, 5, 6):
        assert not bank.written(slide).any()
        assert not bank.counts(slide).any()
    bank.write([4, 6], [29, 10], torch.randn(2, D), step=3)
    assert torch.equal(bank.read(0, torch.arange(7)), before[0])
    for call in (bank.remove_slide, bank.ages, bank.codes, bank.sums, bank.counts, bank.written):
        with pytest.raises(ValueError, match="no slide 1, it was removed"):
            call(1)
    with pytest.raises(ValueError, match="slide 7 has 0 tiles"):
        bank.add_slide(0)


def test_a_bank_can_start_empty() -> None:
    bank = MemoryBank([], D, codebook=torch.randn(K, D))
    assert bank.add_slides([4, 2]) == [0, 1]
    bank.write(1, torch.arange(2), torch.randn(2, D), step=0)
    assert int(bank.counts(1).sum()) == 2
    bank.remove_slide(0)
    bank.remove_slide(1)
    assert bank.add_slide(6) == 2
    assert bank.payload.shape[0] == 6


# --------------------------------------------------------------------------------- module and state dict


def test_model_dtype_changes_leave_the_tables_alone() -> None:
    for dtype in DTYPES:
        bank = filled(dtype)
        before = {name: table.clone() for name, table in bank.state_dict().items()}
        for change in (bank.half, bank.double, bank.bfloat16, lambda b=bank: b.to(torch.float16)):
            change()
        for name, table in bank.state_dict().items():
            assert table.dtype == before[name].dtype
            assert torch.equal(table.float(), before[name].float())
    assert filled().to("meta").payload.device.type == "meta"


def test_deepcopy_is_independent() -> None:
    bank = filled()
    other = copy.deepcopy(bank)
    before = snapshot(bank)
    other.write([0], [0], torch.randn(1, D), step=9)
    assert_unchanged(bank, before)
    assert other.ages(0)[0] == 9


def test_state_dict_round_trip_of_any_size() -> None:
    bank = filled(part=0.7)
    bank.remove_slide(2)
    for other in (MemoryBank([1], D), MemoryBank(LENGTHS, D, codebook=torch.zeros(K, D)), MemoryBank([], D)):
        other.load_state_dict(bank.state_dict())
        assert_unchanged(other, snapshot(bank))
        other.write([3], [3], torch.randn(1, D), step=5)  # nothing is shared with the source
        assert bank.ages(3)[3] != 5


def test_state_dict_of_another_row_format_is_converted() -> None:
    bank, other = filled("float32", 0.8), MemoryBank([2], D, dtype="int8")
    other.load_state_dict(bank.state_dict())
    assert other.dtype == torch.int8
    assert torch.equal(other.age, bank.age)
    difference = other.read(1, torch.arange(40)) - bank.read(1, torch.arange(40))
    assert 0 < difference.abs().max() < 0.5 / 127 + 1e-6
    sums = other.slide_sums.clone()
    other.rebuild()
    assert torch.equal(sums, other.slide_sums)


def test_state_dict_with_the_codebook_alone_sets_the_codebook() -> None:
    bank, codebook = filled(), torch.randn(9, D)
    missing, unexpected = bank.load_state_dict({"codebook": codebook}, strict=False)
    assert len(missing) == 9
    assert unexpected == []
    assert bank.slide_sums.shape == (4, 9, D)
    expected = filled()
    expected.load_state_dict(bank.state_dict())
    expected.set_codebook(codebook)
    assert torch.equal(expected.slide_sums, bank.slide_sums)


def test_a_damaged_state_dict_changes_nothing() -> None:
    bank = filled()
    before = snapshot(bank)
    state = filled("int8", 0.5).state_dict()
    cases = {
        "missing": {k: v for k, v in state.items() if k != "age"},
        "age is": {**state, "age": state["age"][:-1]},
        "outside the 68 rows": {**state, "length": state["length"] + 100},
        "overlap": {**state, "start": torch.zeros_like(state["start"])},
        "codes outside": {**state, "code": state["code"] + 100},
        "not the same": {**state, "code": torch.zeros_like(state["code"])},
        "codebook holds NaN": {**state, "codebook": state["codebook"] * torch.nan},
        "D = 12": MemoryBank([3], D + 1).state_dict(),
    }
    for message, bad in cases.items():
        with pytest.raises(RuntimeError, match=message):
            bank.load_state_dict(bad, strict=False)
        assert_unchanged(bank, before)
    with pytest.raises(RuntimeError, match="Unexpected"):
        bank.load_state_dict({**state, "extra": torch.zeros(1)})


# ---------------------------------------------------------------------------------------------- statistics


def test_statistics_against_a_loop() -> None:
    bank = filled(part=0.5, lengths=[50, 1, 30])
    bank.add_slide(4)
    bank.remove_slide(1)
    for step in range(1, 6):
        bank.write(0, torch.randperm(50)[:9], torch.randn(9, D), step=step)
        bank.write(2, torch.randperm(30)[:2], torch.randn(2, D), step=step)
    got = bank.statistics(step=7)

    ages, drifts = {s: bank.ages(s) for s in (0, 2, 3)}, {s: bank.drifts(s) for s in (0, 2, 3)}
    age, drift = torch.cat(list(ages.values())), torch.cat(list(drifts.values()))
    assert got["rows"] == 84
    assert got["written"] == int((age >= 0).sum())
    assert got["never_written"] == pytest.approx(float((age < 0).double().mean()))
    assert got["never_refreshed"] == pytest.approx(float((age <= 0).double().mean()))
    assert got["age_mean"] == pytest.approx(float((7 - age[age >= 0]).double().mean()))
    assert got["age_max"] == 7
    moved = drift[age > 0]
    assert got["drift_mean"] == pytest.approx(float(moved.double().mean()))
    for name, q in (("q50", 0.5), ("q90", 0.9), ("q99", 0.99), ("max", 1.0)):
        assert got["drift"][name] == pytest.approx(float(moved.quantile(q, interpolation="lower")))
    assert int(got["age_histogram"]["rows"].sum()) == got["written"]
    assert int(got["drift_histogram"]["rows"].sum()) == len(moved)
    for s in (0, 2):
        mine = {k: v[s] for k, v in got["per_slide"].items() if k != "drift"}
        seen = ages[s] >= 0
        assert mine["never_written"] == pytest.approx(float((~seen).float().mean()))
        assert mine["never_refreshed"] == pytest.approx(float((ages[s] <= 0).float().mean()))
        assert mine["age_mean"] == pytest.approx(float((7 - ages[s][seen]).float().mean()))
        assert mine["age_max"] == int((7 - ages[s][seen]).max())
        own = drifts[s][ages[s] > 0]
        assert int(mine["age_histogram"].sum()) == int(seen.sum())
        edges = got["drift_histogram"]["edges"]
        expected_rows = torch.histogram(own.clamp(edges[0], edges[-1]), edges).hist.long()
        assert torch.equal(mine["drift_histogram"], expected_rows)
        for name, q in (("q50", 0.5), ("q90", 0.9), ("max", 1.0)):
            expected = float(own.quantile(q, interpolation="lower"))
            assert float(got["per_slide"]["drift"][name][s]) == pytest.approx(expected)
    assert got["per_slide"]["age_max"][3] == -1
    assert got["per_slide"]["drift"]["q50"][3].isnan()
    assert got["per_slide"]["never_written"][1].isnan()  # removed
    later = bank.measure(7)
    bank.write(0, [0], torch.randn(1, D), step=7)
    assert later.read()["age_mean"] == got["age_mean"]  # of the moment it was measured


def test_statistics_of_an_unwritten_and_an_empty_bank() -> None:
    for bank in (MemoryBank([5, 2], D), MemoryBank([], D)):
        got = bank.statistics(step=3)
        assert got["written"] == 0
        assert got["age_mean"] is None
        assert got["drift"]["q50"] is None
    assert MemoryBank([5], D).statistics(0)["never_written"] == 1.0


def test_what_looks_like_ids_or_a_codebook_but_is_not() -> None:
    bank = filled()
    with pytest.raises(ValueError, match=r"integers in one dimension.*torch.bool"):
        bank.write(0, torch.tensor([True, False]), torch.randn(2, D), step=1)
    with pytest.raises(ValueError, match=r"integers in one dimension.*\[\]"):
        bank.read(0, 1)
    with pytest.raises(ValueError, match="slides must be integers"):
        bank.sample(torch.tensor([True]), 2, 0, 0)
    with pytest.raises(ValueError, match=r"codebook must be a tensor.*got tuple .fit_codebook returns"):
        bank.set_codebook((torch.randn(K, D), 1.0))  # type: ignore[arg-type]
    bank.write(0, [1], torch.ones(1, D).numpy(), step=3)  # type: ignore[arg-type]
    assert bank.ages(0)[1] == 3
