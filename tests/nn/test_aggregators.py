"""Aggregators of rows: masks, order, empty slides, gradients, and what each computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dre_fast import DRESLCL, MemoryBank, SlideEncoder, fit_codebook
from dre_fast.nn.aggregators import AGGREGATORS, GatedAttention, MeanPool, RowAggregator, SoftResiduals
from dre_fast.nn.model import padded

D, WIDTH, K = 12, 16, 4
NAMES = sorted(AGGREGATORS)
ORDERLESS = [name for name in NAMES if name != "transmil"]


def made(name: str, report_dim: int | None = None) -> RowAggregator:
    torch.manual_seed(0)
    options = {"heads": 4, "depth": 1, "dropout": 0.0}
    if name == "soft":
        options |= {"codewords": K, "normalize": ("intra", "l2")}
    return AGGREGATORS[name](D, WIDTH, report_dim, **options).eval()


def bags(*lengths: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(len(lengths), max(lengths), D, generator=generator)
    return rows, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("name", NAMES)
def test_masked_rows_have_no_influence_and_no_gradient(name: str) -> None:
    aggregator, (rows, mask) = made(name), bags(7, 3, 12)
    rows.requires_grad_()
    out = aggregator(rows, mask)
    assert out.shape == (3, WIDTH)
    out.square().sum().backward()
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()
    assert (rows.grad[~mask] == 0).all()
    assert (rows.grad[mask] != 0).any(1).sum() > 3
    other = torch.where(mask[..., None], rows, 1e6)
    torch.testing.assert_close(aggregator(other, mask), out, rtol=1e-5, atol=1e-6)
    for slide, n in enumerate((7, 3, 12)):  # each slide alone, without padding
        alone = aggregator(rows[slide : slide + 1, :n], mask[slide : slide + 1, :n])
        torch.testing.assert_close(alone[0], out[slide], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_slides_without_rows_are_finite(name: str) -> None:
    aggregator, (rows, mask) = made(name), bags(5, 4)
    mask[1] = False
    rows.requires_grad_()
    out = aggregator(rows, mask)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()
    assert (rows.grad[1] == 0).all()
    assert torch.isfinite(aggregator(rows[:, :0], mask[:, :0])).all()


@pytest.mark.parametrize("name", ORDERLESS)
def test_the_order_of_rows_does_not_matter(name: str) -> None:
    aggregator, (rows, mask) = made(name), bags(9, 9)
    turned = rows[:, torch.randperm(9, generator=torch.Generator().manual_seed(2))]
    torch.testing.assert_close(aggregator(turned, mask), aggregator(rows, mask), rtol=1e-4, atol=1e-5)


def test_transmil_sees_where_a_tile_lies() -> None:
    aggregator, (rows, mask) = made("transmil"), bags(9)
    assert not torch.allclose(aggregator(rows.flip(1), mask), aggregator(rows, mask), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name: str) -> None:
    aggregator, (rows, mask) = made(name, report_dim=5), bags(8, 6)
    aggregator.project(aggregator(rows, mask)).square().sum().backward()
    without = [n for n, p in aggregator.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert not without
    with pytest.raises(ValueError, match="without report_dim"):
        made(name).project(torch.zeros(1, WIDTH))


def test_mean_and_attention_are_what_their_formulas_say() -> None:
    rows, mask = bags(6, 4)
    mean, attention = made("mean"), made("abmil")
    assert isinstance(mean, MeanPool)
    assert isinstance(attention, GatedAttention)
    for slide, n in enumerate((6, 4)):
        x = rows[slide, :n]
        expected = torch.relu(x @ mean.tokens[0].weight.T + mean.tokens[0].bias).mean(0)
        torch.testing.assert_close(mean(rows, mask)[slide], expected)
        t = attention.tokens(x)
        V, U = attention.tanh[0], attention.gate[0]
        score = (torch.tanh(V(t)) * torch.sigmoid(U(t))) @ attention.score.weight[0] + attention.score.bias
        torch.testing.assert_close(attention(rows, mask)[slide], (score.softmax(0)[:, None] * t).sum(0))


def test_abmilx_refines_its_scores_by_the_correlation_of_all_tiles() -> None:
    from dre_fast.nn.aggregators import CorrelatedAttention

    aggregator, (rows, mask) = made("abmilx"), bags(7)
    assert isinstance(aggregator, CorrelatedAttention)
    t = aggregator.tokens(rows[0]).view(7, 4, 4)
    q, k = (layer(t.reshape(7, 16)).view(7, 4, 4) for layer in (aggregator.query, aggregator.key))
    expected = []
    for head in range(4):
        s = aggregator.score(torch.tanh(aggregator.local(t[:, head])))[:, 0]
        U = (q[:, head] @ k[:, head].T / 2).softmax(1)
        expected.append(((s + U @ s).softmax(0)[:, None] * t[:, head]).sum(0))
    torch.testing.assert_close(aggregator(rows, mask)[0], torch.cat(expected))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_refused(name: str) -> None:
    aggregator, (rows, mask) = made(name), bags(5, 5)
    for wrong in ((rows[..., :-1], mask), (rows, mask[:, :-1]), (rows[0], mask[0])):
        with pytest.raises(ValueError, match=r"rows must be \[B, N, 12\]"):
            aggregator(*wrong)


def test_soft_residuals_start_from_the_bank() -> None:
    rows = nn.functional.normalize(torch.randn(60, D, generator=torch.Generator().manual_seed(0)), dim=1)
    bank = MemoryBank([40, 20], D, dtype="float32")
    bank.write(torch.tensor([0] * 40 + [1] * 20), torch.tensor([*range(40), *range(20)]), rows, step=0)
    bank.set_codebook(fit_codebook(bank, K)[0])
    soft = made("soft")
    assert isinstance(soft, SoftResiduals)
    soft.start_from(bank.codebook, [soft.measure(bank)])
    torch.testing.assert_close(soft.encoding.codebook.detach(), bank.codebook)
    assert soft.encoding.scale is not None
    squared = torch.cdist(rows, bank.codebook).square().sort(1).values
    gap = (squared[:, 1] - squared[:, 0]).mean()
    assert float(soft.encoding.scale.detach().mean()) * float(gap) == pytest.approx(
        torch.tensor(100.0).log().item(), rel=1e-3
    )


def test_banks_of_several_processes_start_soft_residuals_as_one_does() -> None:
    rows = nn.functional.normalize(torch.randn(60, D, generator=torch.Generator().manual_seed(0)), dim=1)
    codebook = fit_codebook(rows, K)[0]

    def bank_of(own: Tensor) -> MemoryBank:
        bank = MemoryBank([len(own)] if len(own) else [], D, codebook=codebook, dtype="float32")
        if len(own):
            bank.write(torch.zeros(len(own), dtype=torch.int64), torch.arange(len(own)), own, step=0)
        return bank

    whole, shared = made("soft"), made("soft")
    whole.start_from(codebook, [whole.measure(bank_of(rows))])
    # one with fewer rows than codewords, and one of a process that has no slide
    parts = [shared.measure(bank_of(own)) for own in rows.split([57, 3, 0])]
    shared.start_from(codebook, parts)
    assert parts[2] == (0.0, 0)
    assert isinstance(whole, SoftResiduals)
    assert isinstance(shared, SoftResiduals)
    assert whole.encoding.log_scale is not None
    assert float(whole.encoding.log_scale.detach()[0]) > 1
    torch.testing.assert_close(shared.encoding.log_scale, whole.encoding.log_scale, rtol=1e-6, atol=0)
    assert shared.encoding.codebook.equal(whole.encoding.codebook)


# ---------------------------------------------------------------- with a bank, in the model


class Encoder(nn.Module):
    """A linear encoder of 4 x 4 tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, D)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.float().flatten(1))


def model_of(name: str, memory: str | int, images: list[Tensor]) -> DRESLCL:
    aggregator = made(name, report_dim=5)
    encoder = Encoder()
    codebook = nn.functional.normalize(torch.randn(K, D), dim=1)
    bank = MemoryBank([len(own) for own in images], D, codebook=codebook, dtype="float32")
    model = DRESLCL(encoder, bank, aggregator, tasks={"t": 2}, memory=memory).eval()
    for slide, own in enumerate(images):
        bank.write(
            torch.full((len(own),), slide), torch.arange(len(own)), model.encode_tiles(own).detach(), step=0
        )
    return model


def images_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(n, 3, 4, 4, generator=generator) for n in lengths]


def live(model: DRESLCL, images: list[Tensor], m: int) -> tuple[Tensor, Tensor, Tensor]:
    slides = torch.arange(len(images))
    tiles = model.bank.sample(slides, m, cycle=2, seed=5)
    batch = torch.stack([own[ids.clamp(min=0)] for own, ids in zip(images, tiles)])
    return batch, slides, tiles


@pytest.mark.parametrize("name", NAMES)
def test_whole_memory_sees_what_inference_sees(name: str) -> None:
    images = images_of(11, 2, 6)
    model = model_of(name, "full", images)
    batch, slides, tiles = live(model, images, 4)
    out = model(batch, slides, tiles, visit=2, seed=5)
    features = torch.cat([model.encode_tiles(own) for own in images])
    whole = model.encode_bags(features, torch.tensor([0, 11, 13, 19]))
    torch.testing.assert_close(out.embedding, whole.embedding, rtol=1e-4, atol=1e-5)
    assert out.residuals is None
    out.logits["t"].sum().backward()
    grad = model.tile_encoder.linear.weight.grad
    assert grad is not None
    assert (grad != 0).any()


@pytest.mark.parametrize("name", ["mean", "soft"])
def test_live_tiles_alone_and_some_of_the_bank(name: str) -> None:
    images = images_of(11, 2, 6)
    seen: dict[str | int, list[int]] = {}
    for memory in ("none", 3):
        model = model_of(name, memory, images)
        forward: Callable[..., Tensor] = model.slide_encoder.forward
        given = []

        def recorded(rows: Tensor, mask: Tensor, forward=forward, given=given) -> Tensor:  # type: ignore[no-untyped-def]
            given.append(mask.sum(1).tolist())
            return forward(rows, mask)

        model.slide_encoder.forward = recorded  # type: ignore[method-assign]
        model(*live(model, images, 4), visit=2, seed=5)
        seen[memory] = given[0]
    assert seen == {"none": [4, 2, 4], 3: [7, 2, 6]}


def test_retrieved_tiles_are_those_that_encode_takes() -> None:
    images = images_of(30, 9)
    model = model_of("mean", 5, images)
    bank, slides = model.bank, torch.arange(2)
    tiles = bank.sample(slides, 4, cycle=1, seed=7)
    others = bank.retrieved(slides, tiles, 5, cycle=1, seed=7)
    assert not any(set(a.tolist()) & set(b.tolist()) for a, b in zip(tiles, others))
    rows = bank.read(slides.repeat_interleave(9), torch.cat([tiles, others], 1).flatten()).view(2, 9, D)
    V = bank.encode(slides, tiles, rows[:, :4].clone(), memory=5, cycle=1, seed=7)
    whole = bank.encode(slides, torch.cat([tiles, others], 1), rows.clone(), memory="none")
    torch.testing.assert_close(V, whole, rtol=1e-5, atol=1e-6)
    everything = bank.others(slides, tiles)
    assert everything.shape == (2, 30)
    for slide, n in enumerate((30, 9)):
        got = everything[slide][everything[slide] >= 0].tolist()
        assert got == [t for t in range(n) if t not in tiles[slide].tolist()]


def test_rows_that_were_never_written_are_left_out() -> None:
    bank = MemoryBank([6], D, dtype="float32")
    bank.write([0, 0], [1, 4], torch.randn(2, D), step=0)
    assert bank.others(torch.tensor([0]), torch.tensor([[4, -1]])).tolist() == [[-1, 1, -1, -1, -1, -1]]


def test_padding_of_ragged_rows() -> None:
    rows = torch.arange(10.0).view(5, 2)
    together, mask = padded(rows, torch.tensor([0, 2, 2, 5]))
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert together[mask].equal(rows)
    assert padded(rows)[0].equal(rows[None])


@pytest.mark.parametrize("name", NAMES)
def test_bags_that_cannot_be_right_are_refused_at_inference(name: str) -> None:
    model, rows = model_of(name, "full", images_of(4)), torch.randn(5, D)
    for wrong in ([0, 3], [1, 5], [0, 4, 2, 5], []):
        with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to the number of rows, 5"):
            model.encode_bags(rows, torch.tensor(wrong, dtype=torch.int64))
    rows[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"row 1 of bag 1 holds NaN or Inf \(1 such rows in all\)"):
        model.encode_bags(rows, torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="rows must be"):
        model.encode_bags(rows[None])


def test_a_slide_encoder_of_residuals_is_as_before() -> None:
    images = images_of(11, 6)
    model = model_of("mean", "full", images)
    residual = DRESLCL(model.tile_encoder, model.bank, SlideEncoder(D, K, width=16), tasks={"t": 2})
    out = residual(*live(model, images, 4), visit=2, seed=5)
    assert out.residuals is not None
    assert out.residuals.shape == (2, K, D)
