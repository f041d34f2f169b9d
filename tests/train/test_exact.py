"""The oracle's gradient is that of back-propagation through all tiles at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dre_fast.nn.bank import MemoryBank
from dre_fast.nn.encoding import residual_encode
from dre_fast.nn.model import DRESLCL
from dre_fast.nn.slide_encoder import SlideEncoder
from dre_fast.nn.tile_encoders import build_tile_encoder
from dre_fast.train.exact import ExactBag, check_exact

K, SIDE = 5, 32


def model_of(encoder: str) -> DRESLCL:
    torch.manual_seed(0)
    tile_encoder = build_tile_encoder(encoder)
    dim = tile_encoder.dim
    codebook = torch.nn.functional.normalize(torch.randn(K, dim), dim=1)
    slide_encoder = SlideEncoder(dim, K, width=16, depth=1, heads=2, report_dim=8)
    return DRESLCL(tile_encoder, MemoryBank([], dim, codebook=codebook), slide_encoder, tasks={"t": 2})


def images(n: int) -> Tensor:
    return torch.randint(
        0, 256, (n, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def loss_of(model: DRESLCL, V: Tensor) -> Tensor:
    out = model.represent(V)
    return (
        nn.functional.cross_entropy(out.logits["t"], torch.tensor([1] * len(V))) + out.report.square().mean()
    )


@pytest.mark.parametrize("encoder", ["conv-tiny", "vit-tiny"])
@pytest.mark.parametrize(("n", "chunk"), [(1, 256), (37, 8), (37, 37), (64, 5)])
def test_equals_full_back_propagation(encoder: str, n: int, chunk: int) -> None:
    model, tiles = model_of(encoder).eval(), images(n)
    V = residual_encode(model.encode_tiles(tiles), model.codebook)
    loss_of(model, V).backward()
    expected = gradients(model)

    bag = ExactBag(model, lambda chosen: tiles[chosen], n, chunk=chunk)
    exact = bag.encode().requires_grad_()
    torch.testing.assert_close(exact[None], V, atol=1e-5, rtol=1e-5)
    loss_of(model, exact[None]).backward()
    assert exact.grad is not None
    bag.backward(exact.grad)
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        error = (got[name] - grad).norm() / grad.norm().clamp(min=1e-12)
        assert error < 1e-4 or grad.norm() < 1e-7, (name, float(error))


def test_several_slides_share_one_loss() -> None:
    model = model_of("conv-tiny").eval()
    slides = [images(9), images(14)]
    V = torch.cat([residual_encode(model.encode_tiles(tiles), model.codebook) for tiles in slides])
    loss_of(model, V).backward()
    expected = gradients(model)
    bags = [ExactBag(model, lambda i, tiles=tiles: tiles[i], len(tiles), chunk=4) for tiles in slides]
    exact = torch.stack([bag.encode() for bag in bags]).requires_grad_()
    loss_of(model, exact).backward()
    assert exact.grad is not None
    for bag, grad in zip(bags, exact.grad):
        bag.backward(grad)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-3)


class Dropping(nn.Module):
    """An encoder whose features are half noise."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * SIDE * SIDE, 12)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.linear(x.flatten(1).float() / 255), 0.5, training=True)


def test_dropout_is_the_same_in_both_passes_and_the_run_goes_on_as_before() -> None:
    encoder = Dropping()
    bank = MemoryBank([], 12, codebook=torch.nn.functional.normalize(torch.randn(K, 12), dim=1))
    model = DRESLCL(encoder, bank, SlideEncoder(12, K, width=16, depth=1, heads=2))
    tiles = images(20)
    bag = ExactBag(model, lambda i: tiles[i], 20, chunk=6)
    torch.manual_seed(3)
    V, kept = bag.encode(), []
    state = torch.get_rng_state()
    grad = torch.randn_like(V)
    torch.set_rng_state(state)
    bag.backward(grad)
    assert torch.equal(torch.get_rng_state(), state)  # what follows does not depend on the second pass
    got = encoder.linear.weight.grad.clone()

    encoder.zero_grad()
    torch.manual_seed(3)
    parts = [
        residual_encode(model.encode_tiles(tiles[i]), model.codebook)[0] for i in torch.arange(20).split(6)
    ]
    whole = torch.stack(parts).sum(0)
    torch.testing.assert_close(whole, V, atol=1e-5, rtol=1e-5)
    whole.backward(grad)
    torch.testing.assert_close(got, encoder.linear.weight.grad, atol=1e-5, rtol=1e-4)
    assert not kept


def test_memory_is_that_of_a_chunk() -> None:
    """Between chunks nothing of a graph is alive, and no chunk is larger than asked for."""
    model, sizes, alive = model_of("conv-tiny"), [], []

    def read(chosen: Tensor) -> Tensor:
        sizes.append(len(chosen))
        alive.append(sum(ref() is not None for ref in watched))
        return images(len(chosen))

    import weakref

    watched: list[weakref.ref[Tensor]] = []
    encode = model.encode_tiles

    def watching(x: Tensor) -> Tensor:
        features = encode(x)
        watched.append(weakref.ref(features))
        return features

    model.encode_tiles = watching  # type: ignore[method-assign]
    bag = ExactBag(model, read, 100, chunk=16)
    bag.backward(torch.randn_like(bag.encode()))
    assert sizes == [16] * 6 + [4] + [16] * 6 + [4]
    assert max(alive) <= 1  # the features of the chunk before, at most


def test_what_cannot_be_exact_is_refused() -> None:
    mixing = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="without batch normalisation: 1"):
        check_exact(mixing)
    model = model_of("conv-tiny")
    with pytest.raises(ValueError, match="at least one tile"):
        ExactBag(model, images, 0)
    with pytest.raises(RuntimeError, match=r"encode\(\) or rows\(\) comes before the way back"):
        ExactBag(model, lambda i: images(len(i)), 3).backward(torch.zeros(K, model.bank.dim))
