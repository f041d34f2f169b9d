from __future__ import annotations

import torch

from dre_fast.train.augment import jitter_stain, turn_and_flip
from dre_fast.train.samplers import epoch_order


def test_turn_and_flip_keeps_each_tile_one_of_its_eight_symmetries():
    tile = torch.arange(3 * 4 * 4, dtype=torch.uint8).reshape(3, 4, 4)
    images = tile.expand(64, 3, 4, 4).contiguous()
    turned = turn_and_flip(images, torch.Generator().manual_seed(0))
    symmetries = {
        tuple(candidate.flatten().tolist())
        for turn in range(4)
        for candidate in (torch.rot90(tile, turn, (1, 2)), torch.rot90(tile, turn, (1, 2)).flip(2))
    }
    seen = {tuple(image.flatten().tolist()) for image in turned}
    assert seen == symmetries
    assert torch.equal(images[0], tile)  # the input is left alone


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    first = epoch_order(50, 0, 0)
    assert first.sort().values.equal(torch.arange(50))
    assert first.equal(epoch_order(50, 0, 0))
    assert not first.equal(epoch_order(50, 0, 1))
    assert not first.equal(epoch_order(50, 1, 0))


def test_stain_jitter_follows_beer_lambert_and_leaves_glass_alone():
    images = (
        torch.tensor([255, 128, 40], dtype=torch.uint8).view(1, 1, 1, 3).expand(200, 3, 1, 3).contiguous()
    )
    jittered = jitter_stain(images, 0.3, torch.Generator().manual_seed(0))
    assert (jittered[..., 0] == 255).all()  # no stain, nothing to change
    density = -torch.log(jittered[..., 1:].double().clamp(min=0.5) / 255)
    factor = density / -torch.log(torch.tensor([128.0, 40.0]).double() / 255)
    torch.testing.assert_close(factor[..., 0], factor[..., 1], atol=0.06, rtol=0.1)  # uint8 rounding
    assert 0.2 < factor.log().std() < 0.4
    assert jitter_stain(images, 0.3, torch.Generator().manual_seed(0)).equal(jittered)
