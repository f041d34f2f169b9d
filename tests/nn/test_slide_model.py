from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dre_fast.nn.aggregators import AGGREGATORS
from dre_fast.nn.bank import MemoryBank
from dre_fast.nn.model import DRESLCL
from dre_fast.nn.slide_encoder import SlideEncoder
from dre_fast.nn.supervised import supervised_loss
from dre_fast.reference.encode import l2_normalize

D, K = 8, 4


class Flat(nn.Module):
    def __init__(self, dim=D):
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, dim)

    def forward(self, images):
        return self.linear(images.float().flatten(1))


def build(memory="full", grad_scale="none", dtype="float32", encoder=None, tiles=(10, 7)):
    torch.manual_seed(0)
    bank = MemoryBank(list(tiles), D, codebook=l2_normalize(torch.randn(K, D)), dtype=dtype)
    slide_encoder = SlideEncoder(D, K, width=16, depth=1, heads=2, report_dim=5)
    return DRESLCL(
        encoder or Flat(), bank, slide_encoder, tasks={"t": 3}, memory=memory, grad_scale=grad_scale
    )


def fill(model, images):
    for slide, tiles in enumerate(images):
        rows = torch.arange(len(tiles))
        with torch.no_grad():
            model.bank.write(torch.full_like(rows, slide), rows, model.encode_tiles(tiles), step=0)


def test_full_memory_equals_encoding_every_tile():
    """With a bank that holds the current features, the training forward is the inference forward."""
    model = build().eval()
    images = [torch.rand(10, 3, 4, 4), torch.rand(7, 3, 4, 4)]
    fill(model, images)
    tiles = torch.tensor([[1, 5, 9], [0, 6, 3]])
    live = torch.stack([images[s][tiles[s]] for s in range(2)])
    trained = model(live, torch.tensor([0, 1]), tiles)
    features = torch.cat([model.encode_tiles(x) for x in images])
    inferred = model.encode_bags(features, torch.tensor([0, 10, 17]))
    torch.testing.assert_close(trained.residuals, inferred.residuals, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trained.embedding, inferred.embedding, atol=1e-5, rtol=1e-5)
    assert trained.report.shape == (2, 5)
    assert trained.logits["t"].shape == (2, 3)


@pytest.mark.parametrize(
    ("grad_scale", "factor"), [("unbiased", torch.tensor([10 / 2, 7 / 2])), (3.0, torch.full((2,), 3.0))]
)
def test_grad_scale_multiplies_the_gradient_of_each_slides_live_tiles(grad_scale, factor):
    images = torch.rand(2, 2, 3, 4, 4)
    slides, tiles = torch.tensor([0, 1]), torch.tensor([[0, 1], [2, 3]])

    def gradient(scale):
        model = build(grad_scale=scale)
        fill(model, [torch.rand(10, 3, 4, 4), torch.rand(7, 3, 4, 4)])
        out = model(images, slides, tiles)
        out.live.retain_grad()
        out.logits["t"].square().sum().backward()
        return out.live.grad, out.logits["t"].detach()

    plain, logits = gradient("none")
    scaled, same = gradient(grad_scale)
    torch.testing.assert_close(logits, same)
    torch.testing.assert_close(scaled, plain * factor[:, None, None])


@pytest.mark.parametrize("aggregator", ["residual", "mean", "abmil"])
@pytest.mark.parametrize(("memory", "rel"), [("full", 1e-3), (16, 0.2)])
def test_unbiased_gradients_have_the_mean_of_the_whole_one(aggregator: str, memory: str | int, rel: float):
    """Over 5 passes of a slide whose bank is up to date; 16 rows retrieved make a summary that varies."""
    torch.manual_seed(0)
    n, m, width = 48, 4, 8
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    images = torch.rand(n, 3, 2, 2)
    features = F.normalize(encoder(images), dim=1).detach()
    bank = MemoryBank([n], 6, codebook=features[:3] + 0.1, dtype="float32")
    bank.write(torch.zeros(n, dtype=torch.int64), torch.arange(n), features, step=0)
    reader = SlideEncoder(6, 3, width=width, depth=1, heads=2)
    if aggregator != "residual":
        reader = AGGREGATORS[aggregator](6, width)
    model = DRESLCL(encoder, bank, reader, tasks={"t": 2}, memory=memory, grad_scale="unbiased").eval()

    def gradient(out) -> torch.Tensor:
        loss = F.cross_entropy(out.logits["t"], torch.tensor([1]))
        return torch.autograd.grad(loss, encoder[1].weight)[0]

    whole = gradient(model.encode_bags(encoder(images)))
    slide, mean = torch.tensor([0]), torch.zeros_like(whole)
    visits = 5 * n // m
    for visit in range(visits):
        tiles = bank.sample(slide, m, visit, seed=0)
        mean += gradient(model(images[tiles[0]][None], slide, tiles, visit=visit, seed=0)) / visits
    assert float((mean * whole).sum() / whole.square().sum()) == pytest.approx(1, rel=rel)


@pytest.mark.parametrize("memory", ["full", 3, "none"])
def test_gradient_reaches_the_tile_encoder_but_not_the_bank(memory):
    model = build(memory=memory)
    fill(model, [torch.rand(10, 3, 4, 4), torch.rand(7, 3, 4, 4)])
    before = {name: buffer.clone() for name, buffer in model.bank.state_dict().items()}
    out = model(
        torch.rand(2, 2, 3, 4, 4), torch.tensor([0, 1]), torch.tensor([[0, 1], [2, -1]]), visit=0, seed=1
    )
    out.logits["t"].sum().backward()
    assert model.tile_encoder.linear.weight.grad.abs().sum() > 0
    assert all(before[name].equal(buffer) for name, buffer in model.bank.state_dict().items())


def test_one_name_of_a_normalisation_will_do():
    encoder = SlideEncoder(D, K, width=8, heads=2)
    assert DRESLCL(Flat(), MemoryBank([3], D), encoder, normalize="intra").normalize == ("intra",)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="D=8"):
        DRESLCL(Flat(), MemoryBank([3], D), SlideEncoder(9, K, width=8, heads=2))
    with pytest.raises(ValueError, match="grad_scale"):
        build(grad_scale="some")
    with pytest.raises(ValueError, match="K=4, slide encoder K=5"):
        DRESLCL(Flat(), MemoryBank([3], D, codebook=torch.randn(4, D)), SlideEncoder(D, 5, width=8, heads=2))
    for memory in ("ful", -1, True, 2.5):
        with pytest.raises(ValueError, match="memory must be"):
            build(memory=memory)
    with pytest.raises(ValueError, match="order is intra"):
        DRESLCL(Flat(), MemoryBank([3], D), SlideEncoder(D, K, width=8, heads=2), normalize=("l2", "intra"))
    for size in ({"depth": 0}, {"heads": 0}, {"width": -4}, {"report_dim": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            SlideEncoder(D, K, **size)
    model = build(encoder=Flat(dim=D + 1))
    with pytest.raises(ValueError, match="tile encoder returned"):
        model.encode_tiles(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match="heads"):
        SlideEncoder(D, K, width=10, heads=3)
    with pytest.raises(ValueError, match="residuals must be"):
        SlideEncoder(D, K, width=8, heads=2)(torch.zeros(1, K + 1, D))
    with pytest.raises(ValueError, match="report_dim"):
        SlideEncoder(D, K, width=8, heads=2).project(torch.zeros(1, 8))


def test_empty_bag_has_a_finite_embedding():
    model = build().eval()
    out = model.encode_bags(torch.zeros(0, D), torch.tensor([0, 0]))
    assert torch.isfinite(out.embedding).all()


def test_supervised_loss_leaves_missing_labels_out():
    logits = torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([0, -1, 2, -1])
    expected = nn.functional.cross_entropy(logits[[0, 2]], target[[0, 2]])
    torch.testing.assert_close(supervised_loss("multiclass", logits, target), expected)
    nothing = supervised_loss("multiclass", logits, torch.full((4,), -1))
    nothing.backward()
    assert nothing.item() == 0.0
    assert logits.grad.abs().max() == 0.0
    binary = torch.tensor([[1.0, float("nan")], [float("nan"), 0.0]])
    scores = torch.randn(2, 2)
    expected = nn.functional.binary_cross_entropy_with_logits(scores.diagonal(), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(supervised_loss("multilabel", scores, binary), expected)
    one = supervised_loss("binary", torch.zeros(2, 1), torch.tensor([1.0, float("nan")]))
    torch.testing.assert_close(one, torch.tensor(2.0).log())
    with pytest.raises(ValueError, match="kind"):
        supervised_loss("ranking", logits, target)


@pytest.mark.parametrize(
    ("kind", "logits", "target"),
    [
        ("multilabel", (2, 3), (3, 2)),
        ("multilabel", (2, 3), (6,)),
        ("binary", (4, 1), (1, 4)),
        ("multiclass", (4, 3), (4, 1)),
    ],
)
def test_targets_of_another_shape_are_refused(kind, logits, target):
    with pytest.raises(ValueError, match="does not fit"):
        supervised_loss(kind, torch.zeros(logits), torch.zeros(target))
