"""The page on bags: its Python runs as printed, its messages are those that are raised."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("h5py", reason="needs h5py")

from bag_makers import coords_of, features_of, stamp, write_h5, write_pt

from dre_fast.data.bags import Bag, BagError, BagFolder, open_bag

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "bags.md").read_text(encoding="utf-8")


def test_the_block_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1
    check = (
        "\nassert repr(bag) == \"Bag('S3', 600 tiles, D=512, trident, features/S3.h5)\" and len(bags) == 2"
        "\nassert x.shape == (600, 512) and x.dtype == torch.float16 and torch.equal(some, x[[5, 0, 599]])"
        "\nassert xy.shape == (600, 2) and xy.dtype == torch.int64 and bag.tile_size_level0 == 512"
        "\nassert model.fitted and logits.shape == (1, 2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocks[0] + check], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def provoked():
    """In the order of the page, what raises each message; runs in an empty folder."""
    x, xy = features_of(5), coords_of(5)
    here, nan = Path(), features_of(9)
    nan[6, 3] = nan[8, 1] = torch.nan
    yield lambda: open_bag(write_h5(here / "S1.h5", {"embeddings": x, "coords": xy}))
    yield lambda: open_bag(write_h5(here / "S1.h5", {"features": torch.zeros(768)}))
    yield lambda: open_bag(write_h5(here / "S1.h5", {"features": x, "coords": xy[:4]}))
    yield lambda: open_bag(stamp(here, x, xy)).coords()
    yield lambda: open_bag(write_pt(here / "S1.pt", nan)).features()
    yield lambda: open_bag(write_pt(here / "S1.pt", Path()))
    for name, dim in (("S2", 8), ("S3", 6)):
        write_pt(here / "features" / f"{name}.pt", features_of(2, dim))
    yield lambda: list(BagFolder("features").values())
    for name in ("S1.pt", "S1.h5"):
        (here / "features" / name).touch()
    yield lambda: BagFolder("features")
    yield lambda: open_bag(write_h5(here / "S1.h5", {"feats": x, "coords": coords_of(5, 224)})).coords()


def test_the_messages_are_those_that_are_raised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = PAGE.split("## What it says")[1].split("## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    for message, raises in itertools.zip_longest(messages, provoked()):
        with pytest.raises(BagError) as raised:
            raises()
        assert str(raised.value).startswith(message.removesuffix("...").rstrip())
        assert message.endswith("...") or str(raised.value) == message


def test_every_layout_is_in_the_table():
    named = set(re.findall(r'"(\w+)"', Bag.__doc__.split("layout:")[1].split("\n")[0]))
    assert named == set(re.findall(r"^\| .* \| `(\w+)` \|$", PAGE, re.MULTILINE)) - {"layout"}
