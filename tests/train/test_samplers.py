"""Which tiles go live: permutations for each magnification, and tiles that the report draws."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, softplus

from dre_fast.nn.bank import MemoryBank
from dre_fast.nn.model import DRESLCL, SlideOutput
from dre_fast.nn.slide_encoder import SlideEncoder
from dre_fast.train.config import ConfigError, MemoryConfig, load_config
from dre_fast.train.guided import LossGuide, ReportGuide
from dre_fast.train.planner import Planner
from dre_fast.train.samplers import draw, guided_slots, next_tiles, packed, scale_slots

SIZES = torch.tensor([[40, 9], [3, 2], [50, 1], [7, 30], [1, 1], [25, 0], [0, 11]])


class Favourites:
    """A guide that likes tiles with high numbers, and knows all slides but those of ``unknown``."""

    at_once = 3

    def __init__(self, unknown: tuple[int, ...] = ()) -> None:
        self.unknown = torch.tensor(unknown, dtype=torch.int64)
        self.asked: dict[int, Tensor] = {}

    def knows(self, slides: Tensor) -> Tensor:
        return ~torch.isin(slides, self.unknown)

    def expect(self, slides: Tensor) -> None:
        pass

    def scores(self, slides: Tensor, candidates: Tensor) -> Tensor:
        self.asked.update(zip(slides.tolist(), candidates, strict=True))
        return torch.where(candidates >= 0, candidates.float(), torch.nan)


def planner(sizes: Tensor = SIZES, guide: Favourites | None = None, **memory: object) -> Planner:
    settings = MemoryConfig(**{"live": 6, **memory})  # type: ignore[arg-type]
    count = len(sizes)
    shards = {0: torch.arange(count)}
    return Planner(
        settings,
        sizes,
        torch.arange(count) * 3 + 1,
        shards,
        per_shard=2,
        steps=math.ceil(count / 2),
        seed=5,
        guide=guide,  # type: ignore[arg-type]
    )


def by_slide(of: Planner, epoch: int) -> list[list[int]]:
    """The live tiles of each slide, checked: distinct, existing, unused slots last, as many as there can be."""
    plan = of.plan(epoch)
    assert plan.slides.sort().values.equal(torch.arange(len(of.sizes)))
    found: list[list[int]] = [[]] * len(of.sizes)
    for slide, tiles in zip(plan.slides.tolist(), plan.tiles.tolist(), strict=True):
        used = [tile for tile in tiles if tile >= 0]
        n = int(of.sizes[slide].sum())
        assert tiles == used + [-1] * (len(tiles) - len(used))
        assert len(set(used)) == len(used) == min(of.memory.live, n)
        assert all(tile < n for tile in used)
        assert of.tiles_of(slide).tolist() == tiles
        found[slide] = used
    return found


# ---------------------------------------------------------------------- shares and permutations


def test_slots_are_shared_out_as_far_as_there_are_tiles():
    assert scale_slots(SIZES, 6).tolist() == [[3, 3], [3, 2], [5, 1], [3, 3], [1, 1], [6, 0], [0, 6]]
    assert scale_slots(SIZES, 8, [3, 1]).tolist() == [
        [6, 2], [3, 2], [7, 1], [6, 2], [1, 1], [8, 0], [0, 8],
    ]  # fmt: skip
    assert scale_slots(SIZES, 7)[0].tolist() == [4, 3]
    assert scale_slots(SIZES, 4, [1000, 1])[0].tolist() == [3, 1]  # each has one at least
    three = torch.tensor([[50, 50, 2]])
    assert scale_slots(three, 20, [1, 1, 2]).tolist() == [[9, 9, 2]]


def test_one_scale_is_the_permutation_of_the_bank():
    sizes = torch.tensor([[40], [3], [100], [6], [1]])
    numbers = torch.arange(5) * 3 + 1
    bank = MemoryBank(sizes[:, 0].tolist(), 4)
    bank.set_numbers(numbers)
    for epoch in range(9):
        plan = planner(sizes).plan(epoch)
        assert plan.tiles.equal(bank.sample(plan.slides, 6, cycle=epoch, seed=5))


def test_every_tile_of_every_scale_is_live_within_a_pass():
    of = planner(scale_shares=[2, 1])
    slots = scale_slots(SIZES, 6, [2, 1])
    seen = [by_slide(of, epoch) for epoch in range(20)]
    for slide, (fine, coarse) in enumerate(SIZES.tolist()):
        for n, m, first in ((fine, slots[slide, 0], 0), (coarse, slots[slide, 1], fine)):
            length = math.ceil(n / int(m)) if n else 1
            for begin in range(0, 20 - length + 1, length):
                visits = [set(seen[v][slide]) for v in range(begin, begin + length)]
                assert set.union(*visits) >= set(range(first, first + n))
            assert all(sum(first <= tile < first + n for tile in visit[slide]) == int(m) for visit in seen)


def test_permutations_of_scales_and_slides_differ():
    sizes = torch.tensor([[64, 64], [64, 64]])
    tiles = [torch.tensor(row) for row in by_slide(planner(sizes, live=60), 0)]
    orders = [(row[row // 64 == scale] % 64).tolist() for row in tiles for scale in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_next_tiles_for_slots_of_any_size():
    sizes, keys, slots = torch.tensor([10, 10, 0, 4]), torch.arange(4), torch.tensor([3, 0, 0, 4])
    found = next_tiles(sizes, keys, slots, 2, visit=0, seed=0)
    assert found.shape == (4, 6)
    assert (found >= 0).sum(1).tolist() == [5, 0, 0, 4]
    assert found[3, :4].sort().values.tolist() == [0, 1, 2, 3]
    assert next_tiles(sizes[:0], keys[:0], slots[:0], 2, visit=0, seed=0).shape == (0, 2)


def test_packed_keeps_the_order_and_fits_the_width():
    tiles = torch.tensor([[-1, 5, -1, 2], [1, -1, 0, 7]])
    assert packed(tiles, 3).tolist() == [[5, 2, -1], [1, 0, 7]]
    assert packed(tiles, 5).tolist() == [[5, 2, -1, -1, -1], [1, 0, 7, -1, -1]]


# ---------------------------------------------------------------------- drawing by score


def test_drawing_is_softmax_of_standardised_scores():
    scores = torch.tensor([[0.0, 1.0, 3.0, torch.nan]])
    uniform = torch.rand(40_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    many = scores.expand(40_000, 4)
    z = (scores[0, :3] - scores[0, :3].mean()) / scores[0, :3].std(correction=0)
    p = (z / 0.7).softmax(0)
    two = draw(many, torch.full((40_000,), 2), 0.7, uniform)
    first = torch.bincount(two[:, 0], minlength=4) / 40_000
    torch.testing.assert_close(first[:3], p, atol=0.01, rtol=0)
    assert first[3] == 0  # no candidate
    # without replacement: the second is softmax among those that are left
    after_last = two[two[:, 0] == 2, 1]
    expected = p[0] / (p[0] + p[1])
    assert float((after_last == 0).double().mean()) == pytest.approx(float(expected), abs=0.01)
    # neither scale nor origin of the scores counts
    assert draw(many * 1e-9 - 2e-9, torch.full((40_000,), 2), 0.7, uniform).equal(two)


def test_drawing_of_equal_scores_and_of_all_candidates():
    uniform = torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = draw(torch.tensor([[1.0, 1.0, 1.0], [2.0, torch.nan, 5.0]]), torch.tensor([3, 2]), 1.0, uniform)
    assert found[0].sort().values.tolist() == [0, 1, 2]
    assert found[1].sort().values.tolist() == [-1, 0, 2]


def test_guided_slots_go_to_the_best_candidates_and_the_others_keep_their_turn():
    sizes = torch.tensor([[400, 90], [200, 60], [60, 500]])
    guide = Favourites()
    of = planner(sizes, guide, live=16, guided=0.5, candidates=50, guide_temperature=1e-6)
    plain = planner(sizes, live=8)  # the slots that are not drawn: 4 a scale
    for epoch in range(8):
        guided, turn = by_slide(of, epoch), by_slide(plain, epoch)
        for slide, (live, own) in enumerate(zip(guided, turn, strict=True)):
            drawn = set(live) - set(own)
            assert len(drawn) == 8
            candidates = guide.asked[slide][guide.asked[slide] >= 0].tolist()
            assert len(set(candidates)) == len(candidates) == 100
            for first, last in pairwise((0, int(sizes[slide, 0]), int(sizes[slide].sum()))):
                best = sorted(tile for tile in candidates if first <= tile < last)[-4:]
                assert {tile for tile in drawn if first <= tile < last} == set(best)


def test_what_is_sure_with_a_guide_is_a_pass_of_the_slots_left():
    sizes = torch.tensor([[90], [120], [7]])
    of = planner(sizes, Favourites(), live=10, guided=0.7, candidates=20, guide_temperature=1e-6)
    seen = [by_slide(of, epoch) for epoch in range(40)]  # 120 / 3
    for slide, (n,) in enumerate(sizes.tolist()):
        length = math.ceil(n / 3)
        assert set().union(*(visit[slide] for visit in seen[:length])) == set(range(n))
    # and no more than sure: the last tile of the permutation has to wait when no candidate window likes it
    assert set().union(*(visit[1] for visit in seen[:20])) != set(range(120))


def test_slides_without_report_and_small_slides():
    guide = Favourites(unknown=(2, 3))
    of, plain = planner(SIZES, guide, guided=0.5, candidates=10), planner(SIZES)
    for epoch in range(5):
        guided, others = by_slide(of, epoch), by_slide(plain, epoch)
        assert guided[2:4] == others[2:4]
        for slide in (1, 4):  # fewer tiles than slots: all are live
            assert sorted(guided[slide]) == list(range(int(SIZES[slide].sum())))
    assert not {2, 3} & guide.asked.keys()
    with pytest.raises(ValueError, match="needs a guide"):
        planner(SIZES, guided=0.5)


def test_plans_are_functions_of_seed_epoch_and_scores():
    sizes = torch.tensor([[400, 90], [200, 60], [60, 500]])
    settings = {"live": 16, "guided": 0.5, "candidates": 50}
    one, two = (planner(sizes, Favourites(), **settings) for _ in range(2))
    assert by_slide(one, 3) == by_slide(two, 3)
    again = by_slide(two, 4)
    assert again != by_slide(one, 3)
    other_seed = planner(sizes, Favourites(), **settings)
    other_seed.seed = 6
    assert by_slide(other_seed, 3) != by_slide(one, 3)


def test_a_plan_is_taken_over_at_another_number_of_processes():
    sizes = torch.tensor([[40], [30], [50], [60], [20]])
    whole = planner(sizes, Favourites(), guided=0.5, candidates=10)
    plan = whole.plan(2)
    state = whole.state_dict()
    assert state is not None
    parts = [
        {**state, "slides": state["slides"][own], "tiles": state["tiles"][own]} for own in ([3, 0], [1, 4, 2])
    ]
    shy = Favourites(unknown=tuple(range(5)))  # whatever it makes itself is another plan
    other = planner(sizes, shy, guided=0.5, candidates=10)
    assert not other.plan(2).tiles.equal(plan.tiles)
    other.load_state_dict(parts)
    assert other.plan(2).tiles.equal(plan.tiles)
    assert not other.plan(3).tiles.equal(whole.plan(3).tiles)  # only of its own epoch
    assert planner(sizes).state_dict() is None  # can be made again


def test_what_is_drawn_does_not_depend_on_the_other_slides_of_the_process():
    # one process holds the largest slide, which decides how many candidates there are columns for
    sizes = torch.tensor([[12, 9], [30, 20], [9, 14], [80, 70]])
    memory = {"live": 8, "guided": 0.5, "candidates": 64}
    whole = planner(sizes, Favourites(), **memory)
    part = planner(sizes[:3], Favourites(), **memory)
    for epoch in range(4):
        assert by_slide(whole, epoch)[:3] == by_slide(part, epoch)


def test_as_many_slots_are_drawn_as_whole_ones_fit():
    slots = torch.arange(1, 513)
    for hundredths in range(100):
        assert guided_slots(slots, hundredths / 100).equal(slots * hundredths // 100)


def test_a_step_without_slides():
    of = planner(SIZES, Favourites(), guided=0.5, candidates=4)
    of.steps += 1
    plan = of.plan(0)
    assert plan.sizes[-1] == 0
    assert len(plan.tiles) == len(SIZES)


# ---------------------------------------------------------------------- scores from the bank


def guided_model() -> tuple[DRESLCL, ReportGuide, list[int]]:
    torch.manual_seed(0)
    sizes, dim, words = [60, 45, 30], 12, 5
    bank = MemoryBank(
        sizes, dim, dtype="float32", codebook=normalize(torch.randn(words, dim), dim=1), device="cpu"
    )
    for slide, n in enumerate(sizes):
        bank.write(torch.full((n,), slide), torch.arange(n), torch.randn(n, dim), step=0)
    encoder = SlideEncoder(dim, words, width=16, depth=1, heads=2, report_dim=7, dropout=0.5)
    model = DRESLCL(torch.nn.Identity(), bank, encoder)
    return model, ReportGuide(model, torch.randn(2, 7), torch.tensor([1, -1, 0])), sizes


def similarity(model: DRESLCL, residuals: Tensor, report: Tensor) -> float:
    projected = model.represent(residuals[None]).report
    assert projected is not None
    return float(cosine_similarity(projected[0].double(), report.double(), dim=0))


@torch.no_grad()
def test_scores_are_what_a_row_more_does_to_the_similarity():
    model, guide, sizes = guided_model()
    assert guide.knows(torch.arange(3)).tolist() == [True, False, True]
    slides = torch.tensor([2, 0])
    candidates = torch.arange(60).expand(2, 60).clone()
    candidates[0, 30:] = -1
    scores = guide.scores(slides, candidates)
    assert scores.isnan().equal(candidates < 0)
    model.double().eval()
    for slide, found in zip(slides.tolist(), scores, strict=True):
        n, report = sizes[slide], guide.reports[guide.report_rows[slide]]
        rows = model.bank.read(torch.full((n,), slide), torch.arange(n)).double()
        codes = model.bank.codes(slide)
        each = torch.zeros(n, *model.codebook.shape, dtype=torch.float64)
        each[torch.arange(n), codes] = rows - model.codebook.double()[codes]
        whole = each.sum(0)
        for tile in range(n):
            step = 1e-4 * each[tile]
            more, less = (similarity(model, whole + way * step, report) for way in (1, -1))
            assert float(found[tile]) == pytest.approx((more - less) / 2e-4, abs=2e-5, rel=1e-3)


@torch.no_grad()
def test_scores_of_the_loss_are_the_size_of_what_a_row_more_does_to_it():
    model, _, sizes = guided_model()

    def loss(out: SlideOutput, slides: Tensor) -> Tensor:
        return (slides + 1.0).double() @ softplus(out.embedding.double().sum(1))

    guide = LossGuide(model, loss, torch.tensor([True, True, False]))
    assert guide.knows(torch.arange(3)).tolist() == [True, True, False]
    found = guide.scores(torch.tensor([1, 0]), torch.arange(45).expand(2, 45))
    assert (found >= 0).all()
    assert (found > 0).float().mean() > 0.9
    model.double().eval()
    for slide, scores in ((1, found[0]), (0, found[1])):
        rows = model.bank.read(torch.full((sizes[slide],), slide), torch.arange(sizes[slide])).double()
        codes = model.bank.codes(slide)
        each = torch.zeros(sizes[slide], *model.codebook.shape, dtype=torch.float64)
        each[torch.arange(sizes[slide]), codes] = rows - model.codebook.double()[codes]
        whole, own = each.sum(0), torch.tensor([slide])
        for tile in range(45):
            step = 1e-4 * each[tile]
            more, less = (float(loss(model.represent((whole + way * step)[None]), own)) for way in (1, -1))
            assert float(scores[tile]) == pytest.approx(abs(more - less) / 2e-4, abs=2e-5, rel=1e-3)


def test_scores_compare_tiles_with_those_of_their_codeword():
    # intra-normalisation makes V_k a direction: what all its rows do together changes nothing
    model, guide, sizes = guided_model()
    for slide in (0, 2):
        scores = guide.scores(torch.tensor([slide]), torch.arange(sizes[slide])[None])[0]
        codes = model.bank.codes(slide)
        assert int(torch.bincount(codes).max()) > 3
        assert float(scores.std()) > 1e-3
        assert float(torch.zeros(5).index_add(0, codes, scores).abs().max()) < 1e-6
    alone = model.bank.add_slide(1)
    guide.report_rows = torch.tensor([1, -1, 0, 0])
    model.bank.write([alone], [0], torch.randn(1, 12), step=0)
    assert abs(float(guide.scores(torch.tensor([alone]), torch.tensor([[0]])))) < 1e-6


def test_scores_leave_no_trace_and_rows_never_written_score_nothing():
    model, guide, _ = guided_model()
    new = model.bank.add_slide(8)
    guide.report_rows = torch.tensor([1, -1, 0, 0])
    model.bank.write(torch.full((4,), new), torch.arange(4), torch.randn(1, 12).expand(4, 12), step=0)
    model.bank.write(torch.full((2,), new), torch.arange(2), torch.randn(2, 12), step=0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    scores = guide.scores(torch.tensor([new]), torch.arange(8)[None])
    assert (scores[0, 4:] == 0).all()
    assert scores[0, 2] == scores[0, 3]
    assert guide.scores(torch.tensor([new]), torch.arange(8)[None]).equal(scores)  # dropout is off
    assert all(p.grad is None for p in model.parameters())
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


def test_scores_of_many_candidates_are_read_in_parts(monkeypatch: pytest.MonkeyPatch):
    model, guide, _ = guided_model()
    slides, candidates = torch.tensor([2, 0]), torch.arange(30).expand(2, 30)
    scores = guide.scores(slides, candidates)
    read, most = model.bank.read, []
    monkeypatch.setattr(model.bank, "read", lambda s, t: (most.append(len(s)), read(s, t))[1])
    monkeypatch.setattr("dre_fast.train.guided._ROWS_AT_ONCE", 40)
    assert guide.scores(slides, candidates).equal(scores)
    assert most == [30, 30]


def test_guided_tiles_raise_the_similarity_more_than_those_in_turn():
    _, guide, sizes = guided_model()
    of = Planner(
        MemoryConfig(live=10, guided=0.5, candidates=50, guide_temperature=0.2),
        torch.tensor(sizes)[:, None],
        torch.arange(3),
        {0: torch.arange(3)},
        per_shard=3,
        steps=1,
        seed=0,
        guide=guide,
    )
    for slide in (0, 2):
        every = guide.scores(torch.tensor([slide]), torch.arange(sizes[slide])[None])[0]
        drawn = torch.cat([(of.plan(epoch), of.tiles_of(slide)[5:])[1] for epoch in range(10)])
        assert float(every[drawn].mean()) > float(every.mean() + every.std())


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.tiles=[a, b]", "memory.scale_shares=[1]"], "memory.scale_shares"),
        (["data.tiles=[a, b]", "memory.scale_shares=[1, 0]"], "memory.scale_shares"),
        (["data.tiles=[a, b]", "memory.live=1"], "memory.live=1"),
        (["data.tiles=[a, b]", "memory.mode=sampled"], "memory.mode=sampled.*several folders"),
        (["data.tiles=[a, b]", "memory.grad_scale=unbiased"], "unbiased.*several folders"),
        (["data.tiles=[a, ./a]"], "given twice"),
        (["data.tiles=[]"], "data.tiles is not set"),
        (["data.tiles=[a, '']"], "data.tiles is not set"),
        (["memory.guided=1"], r"memory.guided=1.0: must be in \[0, 1\)"),
        (["memory.guided=0.01"], "memory.guided=0.01 of memory.live=32 live tiles are 0"),
        (["memory.guided=0.5", "memory.candidates=15"], "memory.candidates=15"),
        (["memory.guided=0.5", "memory.candidates=0"], "memory.candidates"),
        (["memory.guided=0.5", "memory.mode=exact"], "memory.mode=exact"),
        (["memory.guided=0.5", "model.aggregator=mean"], "model.aggregator=residual"),
        (["memory.guided=0.5", "memory.guide=loss", "loss.tasks=[]"], "memory.guide=loss .*needs loss.tasks"),
        (
            [
                "memory.guided=0.5",
                "memory.guide=loss",
                "loss.tasks=[{name: os, kind: survival, columns: [t, e]}]",
            ],
            "Cox loss",
        ),
        (
            ["memory.guided=0.5", "memory.guide=loss", "loss.tasks=[{name: a, weight: 0}]"],
            "memory.guide=loss .*with a weight",
        ),
        (["memory.guided=0.5", "memory.guide=label"], "memory.guide='label'"),
        (["memory.guided=0.5", "memory.grad_scale=unbiased"], "unbiased.*memory.guided"),
        (["memory.guided=0.5", "memory.guide_temperature=0"], "memory.guide_temperature"),
        (["memory.guided=0.5", "loss.contrastive=null", "loss.tasks=[{name: a}]"], "loss.contrastive"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], words: str):
    plain = ["data.cohort=c", "data.tiles=t", "data.reports=r"]
    load_config(None, plain).validate()
    with pytest.raises(ConfigError, match=words):
        load_config(None, [*plain, *overrides]).validate()


def test_lines_of_the_page_are_settings():
    page = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(lines) == 6
    for line in lines:
        load_config(
            None,
            ["data.cohort=c", "data.tiles=t", "data.reports=r", "loss.tasks=[{name: a}]", *line.split()],
        ).validate()
