"""The copy into planes against numpy, compiled and not; memory that is lent again only when nobody holds it."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from dre_fast.data.buffers import Buffers
from dre_fast.ops import backends, native, planes


@pytest.fixture(params=["C++", "numpy"])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(planes, "_split", None)
    elif planes.backend() != "C++":
        pytest.skip(f"needs the compiled host part: {native.why_not('host') or 'it is of an older checkout'}")
    assert backends()["put_planar"] == f"CPU: {request.param}"
    return request.param


@pytest.mark.parametrize("side", [0, 1, 3, 31, 64, 255])
@pytest.mark.parametrize("channels", [3, 4])
def test_planes_hold_the_first_three_channels(split: str, side: int, channels: int) -> None:
    tile = np.random.default_rng(side).integers(0, 256, (side, side, channels), dtype=np.uint8)
    around = np.full((3, 3, side, side), 7, dtype=np.uint8)
    planes.put_planar(tile, around[1])
    np.testing.assert_array_equal(around[1], tile[..., :3].transpose(2, 0, 1))
    assert (around[::2] == 7).all()  # nothing beyond the tile is written
    tile.flags.writeable = False
    planes.put_planar(tile[::-1, ::-1], around[2])  # neither writable nor contiguous
    np.testing.assert_array_equal(around[2], tile[::-1, ::-1, :3].transpose(2, 0, 1))


def test_the_compiled_copy_checks_what_it_is_given() -> None:
    if planes.backend() != "C++":
        pytest.skip("needs the compiled host part")
    from dre_fast._host import split_planes

    tile, out = np.zeros((4, 5, 3), np.uint8), np.zeros((3, 4, 5), np.uint8)
    split_planes(tile, out)
    for pixels, into in (
        (tile[..., :2].copy(), out),
        (tile[0], out),
        (tile, out[:2]),
        (tile, np.zeros((3, 5, 4), np.uint8)),
        (tile, np.zeros((1, 3, 4, 5), np.uint8)),
    ):
        with pytest.raises(ValueError, match="split_planes: p"):
            split_planes(pixels, into)
    with pytest.raises(TypeError):
        split_planes(tile.astype(np.int16), out)
    with pytest.raises(TypeError):
        split_planes(tile, out[:, :, ::-1])
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        split_planes(tile, out)


def test_memory_is_lent_again_when_the_last_view_of_it_is_gone() -> None:
    buffers = Buffers()
    gc.disable()  # by reference counts alone
    try:
        tiles = torch.from_numpy(buffers.take((4, 3, 8, 8)))
        address, one = tiles.data_ptr(), tiles[2]
        del tiles
        assert len(buffers) == 0  # a tile of the batch is still held
        other = torch.from_numpy(buffers.take((4, 3, 8, 8)))
        assert other.data_ptr() != address
        del one
        assert len(buffers) == 1
        again = torch.from_numpy(buffers.take((2, 2, 3, 8, 8)))  # as many bytes
        assert (again.data_ptr(), len(buffers)) == (address, 0)
    finally:
        gc.enable()


def test_a_view_in_numpy_keeps_memory_too() -> None:
    buffers = Buffers()
    tiles = buffers.take((4, 3, 8, 8))
    tiles[:] = 7
    one = tiles[2][:, ::2]
    del tiles
    gc.collect()
    assert len(buffers) == 0
    buffers.take((4, 3, 8, 8))[:] = 9
    assert (one == 7).all()
    del one
    gc.collect()
    assert len(buffers) == 2


def test_little_memory_is_kept() -> None:
    buffers = Buffers(kept=1000)
    held = [buffers.take((300,)) for _ in range(5)]
    held.clear()
    assert len(buffers) == 3
    assert buffers.take((200,)).shape == (200,)  # another size: what is kept goes
    big = buffers.take((1001,))
    del big
    assert all(memory.size != 1001 for memory in buffers._free)
    assert buffers.take((0, 3, 8, 8)).shape == (0, 3, 8, 8)
