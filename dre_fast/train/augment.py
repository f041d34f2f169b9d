"""Augmentation of tiles: the symmetries of the square and jitter of the stain, from a seeded generator."""

from __future__ import annotations

import torch
from torch import Tensor

from dre_fast.data.subset import Reader


def augmented(images: Tensor, flips: bool, stain: float, key: int) -> Tensor:
    """Tiles uint8 [m, 3, P, P], turned and stained anew by a generator of this key -> the same shape."""
    generator = torch.Generator().manual_seed(key % 2**63)
    if flips:
        images = turn_and_flip(images, generator)
    if stain:
        images = jitter_stain(images, stain, generator)
    return images


def read_augmented(
    reader: Reader, numbers: Tensor, flips: bool, stain: float, key: int, slide: int, tiles: Tensor
) -> Tensor:
    """Tiles int64 [m] of a slide as uint8 [m, 3, P, P], augmented by key, the slide's number and the first of them."""
    own = (key * 1_000_003 + int(numbers[slide])) * 1_000_003 + int(tiles[0])
    return augmented(reader.read(slide, tiles), flips, stain, own)


def turn_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """One of the 8 symmetries of the square for each tile; tissue has no up. [m, 3, P, P] -> the same shape."""
    choice = torch.randint(8, (len(images),), generator=generator)
    out = images.clone()
    for symmetry in range(1, 8):
        picked = choice == symmetry
        turned = torch.rot90(images[picked], symmetry % 4, dims=(2, 3))
        out[picked] = turned.flip(3) if symmetry >= 4 else turned
    return out


def jitter_stain(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change how strongly each tile is stained, uint8 [m, 3, P, P] -> the same.

    Optical density -log(I / 255) is linear in the amount of stain (Beer-Lambert). Each tile's is multiplied by
    exp(strength * N(0, 1)), half of it common to the channels, half of each channel's own, so that the stain of a
    slide cannot serve as its name.
    """
    common = torch.randn(len(images), 1, 1, 1, generator=generator)
    channel = torch.randn(len(images), 3, 1, 1, generator=generator)
    factor = (strength * (common + channel) / 2**0.5).exp()
    # I' = 255 (I / 255)^factor; one table of 256 values per tile and channel is cheaper than a power per pixel
    levels = torch.arange(256) / 255
    table = (levels ** factor.reshape(-1, 1) * 255).round().to(torch.uint8)
    flat = images.reshape(len(images) * 3, -1).long()
    return table.gather(1, flat).reshape(images.shape)
