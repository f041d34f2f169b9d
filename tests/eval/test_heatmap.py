"""Contributions sum to the first-order term; maps put colours where the tiles are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dre_fast.data.tiling import Tiling
from dre_fast.eval import heatmap
from dre_fast.eval.heatmap import codeword_colours, draw_codewords, draw_contributions
from dre_fast.nn.contributions import contributions


def tiling(n: int = 6) -> Tiling:
    coords = np.array([[100 + 256 * (i % 3), 50 + 256 * (i // 3)] for i in range(n)], dtype=np.int64).reshape(
        -1, 2
    )
    return Tiling(
        slide_id="S1",
        coords=coords,
        tile_size=128,
        mpp=1.0,
        slide_mpp=0.5,
        level=0,
        read_size=256,
        tile_size_level0=256,
        dimensions=(1000, 600),
    )


def thumbnail() -> np.ndarray:
    return np.full((120, 200, 3), 255, dtype=np.uint8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_contributions_sum_to_the_first_order_term(dtype: torch.dtype):
    g = torch.Generator().manual_seed(0)
    codebook = torch.randn(5, 8, generator=g, dtype=torch.float64)
    rows = torch.randn(40, 8, generator=g, dtype=torch.float64).to(dtype)
    codes = torch.randint(0, 5, (40,), generator=g)
    v = torch.zeros(5, 8, dtype=torch.float64).index_add_(0, codes, rows.double() - codebook[codes])
    gradient = torch.randn(5, 8, generator=g, dtype=torch.float64)
    found = contributions(gradient, rows, codebook, codes)
    assert found.shape == (40,)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = ((rows.double() - codebook[codes]) * gradient[codes]).sum(1)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.double().sum(), (gradient * v).sum(), atol=1e-4, rtol=1e-4)


def test_a_tile_without_codeword_contributes_nothing():
    value = contributions(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([-1, 1]))
    assert value.tolist() == [0.0, 3.0]


def test_contributions_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="gradient"):
        contributions(torch.ones(2, 4), torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="codes"):
        contributions(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([0]))


def test_overlay_covers_exactly_the_tiles():
    # 1000 px of slide on 200 px of thumbnail: a fifth
    overlay = heatmap._overlay(thumbnail(), tiling(), np.arange(6.0)[:, None], np.ones(6, dtype=bool))
    ys, xs = np.nonzero(overlay[..., 1])
    assert (xs.min(), xs.max() + 1) == (20, 173)
    assert (ys.min(), ys.max() + 1) == (10, 112)
    for i, (x, y) in enumerate(tiling().coords):
        assert overlay[(y + 128) // 5, (x + 128) // 5, 0] == i


def test_overlapping_tiles_are_averaged():
    two = replace(tiling(2), coords=np.array([[0, 0], [128, 0]]))
    overlay = heatmap._overlay(thumbnail(), two, np.array([[1.0], [3.0]]), np.ones(2, dtype=bool))
    assert overlay[10, 10, 0] == 1
    assert overlay[10, 40, 0] == 2
    assert overlay[10, 60, 0] == 3


def pixels_near(path: Path, colour: np.ndarray) -> int:
    image = np.asarray(Image.open(path).convert("RGB")).astype(float)
    return int((np.abs(image - colour).max(2) < 6).sum())


def test_codeword_map_shows_each_codeword_in_its_colour(tmp_path: Path):
    codes = torch.tensor([0, 1, 2, 2, -1, 0])
    path = draw_codewords(tmp_path / "c.png", thumbnail(), tiling(), codes, 8, title="a slide")
    mixed = codeword_colours(8) * 255 * 0.62 + 255 * 0.38
    area = [pixels_near(path, mixed[k]) for k in range(8)]
    assert min(area[:3]) > 500
    assert area[2] > 1.5 * area[1]
    assert max(area[3:]) < 50


def test_contribution_map_is_symmetric_about_zero(tmp_path: Path):
    values = torch.tensor([-2.0, 0.0, 1.0, 2.0, -1.0, 0.5])
    path = draw_contributions(
        tmp_path / "v.png", thumbnail(), tiling(), values, outline=torch.tensor([True, *[False] * 5])
    )
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    red = (image[..., 0] - image[..., 2] > 60).sum()
    blue = (image[..., 2] - image[..., 0] > 60).sum()
    assert red > 500
    assert blue > 500


def test_names_are_no_formulas(tmp_path: Path):
    name = r"S1 $\frac$ <b>"
    codes = torch.arange(6)
    assert draw_codewords(tmp_path / "c.png", thumbnail(), tiling(), codes, 6, title=name).exists()
    found = draw_contributions(
        tmp_path / "d.png", thumbnail(), tiling(), codes.float(), title=name, label=rf"logit of {name}"
    )
    assert found.exists()


def test_maps_of_nothing_and_of_many_codewords(tmp_path: Path):
    empty = replace(tiling(0), coords=np.zeros((0, 2), dtype=np.int64))
    draw_contributions(tmp_path / "a.png", thumbnail(), empty, torch.zeros(0))
    draw_contributions(tmp_path / "b.png", thumbnail(), tiling(), torch.zeros(6))
    draw_codewords(tmp_path / "c.png", thumbnail(), empty, torch.zeros(0, dtype=torch.int64), 4)
    draw_codewords(tmp_path / "d.png", thumbnail(), tiling(), torch.arange(6) * 40, 256)
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png", "c.png", "d.png"}
    assert len(np.unique(codeword_colours(64).round(3), axis=0)) == 64


def test_values_that_do_not_fit_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="tile 2"):
        draw_contributions(
            tmp_path / "a.png", thumbnail(), tiling(), torch.tensor([0, 0, float("nan"), 0, 0, 0])
        )
    with pytest.raises(ValueError, match="'S1': 5 values for 6 tiles"):
        draw_contributions(tmp_path / "a.png", thumbnail(), tiling(), torch.zeros(5))
    with pytest.raises(ValueError, match="codes must lie"):
        draw_codewords(tmp_path / "a.png", thumbnail(), tiling(), torch.full((6,), 8), 8)
    with pytest.raises(ValueError, match="slide's size"):
        draw_codewords(
            tmp_path / "a.png", thumbnail(), replace(tiling(), dimensions=None), torch.zeros(6).long(), 8
        )
    assert not list(tmp_path.iterdir())
