from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("h5py", reason="needs h5py")

import h5py
from bag_makers import (
    TRIDENT,
    clam,
    coords_of,
    features_of,
    slideflow,
    stamp,
    torchmil,
    trident,
    write_h5,
    write_pt,
)

from dre_fast.data.bag_rows import ArrayFile
from dre_fast.data.bags import BagError, open_bag

N, MPP = 23, 0.25


def made(layout, folder):
    """A bag of the layout, with its features, level-0 coordinates and tile size."""
    x, xy = features_of(N), coords_of(N)
    if layout == "clam":
        return clam(folder, x, xy), x, xy, None
    if layout == "clam pt":
        clam(folder, x, xy)
        return folder / "pt_files" / "S1.pt", x, xy, None
    if layout == "trident":
        return trident(folder, x, xy), x, xy, 512
    if layout == "stamp":  # 512 px of 0.25 um
        return stamp(folder, x.half(), xy * MPP, tile_size_um=128.0), x.half(), xy, 512
    if layout == "slideflow":
        return slideflow(folder, x, xy + 256), x, xy, 512
    if layout == "pt dict":
        held = {"feats": x, "coords": xy, "patch_size_level0": 512, "encoder": "uni"}
        return write_pt(folder / "S1.pt", held), x, xy, 512
    assert layout == "torchmil"
    return torchmil(folder, x, xy), x, xy, None


NAMES = {"clam pt": "clam", "pt dict": "pt"}
LAYOUTS = ["clam", "clam pt", "trident", "stamp", "slideflow", "pt dict", "torchmil"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, tmp_path):
    path, x, xy, size = made(layout, tmp_path)
    bag = open_bag(path, mpp=MPP)
    assert (bag.slide_id, bag.path, bag.tiles, len(bag), bag.dim) == ("S1", path, N, N, 8)
    assert bag.layout == NAMES.get(layout, layout)
    assert bag.dtype == bag.features().dtype == x.dtype
    assert torch.equal(bag.features(), x)
    found = bag.coords()
    assert found.dtype == torch.int64
    assert torch.equal(found, xy)
    assert bag.tile_size_level0 == size
    assert "S1" in repr(bag)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_every_layout(layout, tmp_path):
    path, x, _, _ = made(layout, tmp_path)
    bag = pickle.loads(pickle.dumps(open_bag(path)))  # as in the worker of a DataLoader
    for rows in (
        slice(3, 9),
        slice(None, None, 5),
        slice(20, 2, -4),
        slice(5, 5),
        torch.tensor([7, 0, 22, 7]),
        torch.arange(N) % 3 == 1,
        torch.tensor([], dtype=torch.int64),
        np.array([4, 1]),
        [N - 1],
    ):
        same = rows if isinstance(rows, torch.Tensor) else np.arange(N)[rows].copy()
        assert torch.equal(bag.features(rows), x[same]), rows
    assert [len(part) for part in bag.iter_rows(10)] == [10, 10, 3]
    for rows in (torch.tensor([0, N]), [-1]):
        with pytest.raises(IndexError, match=f"S1: no tile {int(rows[-1])}, it has {N}"):
            bag.features(rows)
    with pytest.raises(IndexError, match=f"a mask of 3 for {N} tiles"):
        bag.features(torch.ones(3, dtype=torch.bool))
    for rows in (3, torch.tensor([0.5]), torch.tensor([[1]])):
        with pytest.raises(TypeError, match="rows must be a slice"):
            bag.features(rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opening_reads_no_features(layout, tmp_path, monkeypatch):
    path, _, _, _ = made(layout, tmp_path)
    read, loaded = [], []
    plain_get, plain_load = h5py.Dataset.__getitem__, torch.load
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda d, k: read.append((d.name, k)) or plain_get(d, k))
    monkeypatch.setattr(torch, "load", lambda *a, **k: loaded.append(k) or plain_load(*a, **k))
    monkeypatch.setattr(np.memmap, "__getitem__", lambda *a: pytest.fail("read"))
    bag = open_bag(path)
    assert (bag.tiles, bag.dim) == (N, 8)
    assert not read
    assert all(options["weights_only"] and options["mmap"] for options in loaded)
    monkeypatch.undo()
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda d, k: read.append((d.name, k)) or plain_get(d, k))
    bag.features(slice(4, 6))
    assert read in ([], [("/features", slice(4, 6))], [("/feats", slice(4, 6))])


def test_scattered_rows_are_read_in_few_spans(tmp_path, monkeypatch):
    x = features_of(1000)
    path = write_h5(tmp_path / "S1.h5", {"features": x})
    spans, plain = [], ArrayFile._span
    monkeypatch.setattr(ArrayFile, "_span", lambda a, d, i, j: spans.append((i, j)) or plain(a, d, i, j))
    rows = torch.tensor([999, 0, 5, 500, 10, 5])
    assert torch.equal(open_bag(path).features(rows), x[rows])
    assert spans == [(0, 11), (500, 501), (999, 1000)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["h5", "npy", "pt"])
def test_dtypes(dtype, form, tmp_path):
    x = features_of(5, dtype=dtype)
    path = tmp_path / f"S1.{form}"
    if form == "pt":
        write_pt(path, x)
    elif dtype == torch.bfloat16:
        pytest.skip("numpy and HDF5 have no bfloat16")
    elif form == "npy":
        np.save(path, x.numpy())
    else:
        write_h5(path, {"features": x})
    bag = open_bag(path)
    wanted = torch.float32 if dtype == torch.float64 else dtype
    assert bag.dtype == wanted
    assert torch.equal(bag.features(), x.to(wanted))
    assert torch.equal(bag.features(torch.tensor([3, 1])), x[[3, 1]].to(wanted))


def test_big_endian_and_fortran_order(tmp_path):
    x = features_of(6)
    write_h5(tmp_path / "S1.h5", {"features": x.numpy().astype(">f4")})
    np.save(tmp_path / "S2.npy", np.asfortranarray(x.numpy()))
    assert torch.equal(open_bag(tmp_path / "S1.h5").features(slice(2, 4)), x[2:4])
    assert torch.equal(open_bag(tmp_path / "S2.npy").features(slice(2, 4)), x[2:4])


@pytest.mark.parametrize("form", ["h5", "npy", "pt"])
def test_rank_three_is_squeezed(form, tmp_path):
    x, xy = features_of(9), coords_of(9)
    path = tmp_path / f"S1.{form}"
    if form == "h5":
        write_h5(path, {"features": x[None], "coords": xy[None]})
    elif form == "npy":
        np.save(path, x[None].numpy())
    else:
        write_pt(path, {"features": x[None], "coords": xy[None]})
    bag = open_bag(path)
    assert (bag.tiles, bag.dim) == (9, 8)
    assert torch.equal(bag.features(slice(1, 3)), x[1:3])
    assert torch.equal(bag.features([8, 2]), x[[8, 2]])
    assert form == "npy" or torch.equal(bag.coords(), xy)


# ------------------------------------------------------------------------------------------------------ .pt files


@pytest.mark.parametrize("key", ["features", "feats", "patch_embeddings", "tile_embeds"])
def test_keys_of_a_dict(key, tmp_path):
    x = features_of(4)
    write_pt(tmp_path / "a.pt", {key: x.requires_grad_(), "label": 1})
    write_h5(tmp_path / "a.h5", {key: x.detach()})
    for path in (tmp_path / "a.pt", tmp_path / "a.h5"):
        found = open_bag(path).features()
        assert torch.equal(found, x)
        assert not found.requires_grad
    assert open_bag(tmp_path / "a.pt").attributes == {"label": 1}


def test_other_things_in_a_pt_file(tmp_path):
    x = features_of(6)
    for n, held in enumerate(
        (
            x.numpy(),  # TRIDENT before 2025
            {"features": x.numpy(), "coords": coords_of(6).numpy()},
            list(x),  # eva
            list(x.split(4)),
            [x],
            torch.cat([x, x])[:6],  # a view of more
            x.t().contiguous().t(),
        )
    ):
        assert torch.equal(open_bag(write_pt(tmp_path / f"{n}.pt", held)).features(), x), n
    assert torch.equal(open_bag(tmp_path / "1.pt").coords(), coords_of(6))
    old = write_pt(tmp_path / "old.pt", x, _use_new_zipfile_serialization=False)
    assert torch.equal(open_bag(old).features(slice(1, 3)), x[1:3])


def test_arrays_pickled_by_numpy_1(tmp_path):
    x = features_of(3)
    path = write_pt(tmp_path / "a.pt", x.numpy())
    raw = path.read_bytes()
    assert b"numpy._core.multiarray" in raw or b"numpy.core.multiarray" in raw
    other = tmp_path / "b.pt"
    torch.save(x.numpy(), other, _use_new_zipfile_serialization=False)
    legacy = other.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    other.write_bytes(legacy)
    assert torch.equal(open_bag(other).features(), x)


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_nothing_in_a_pt_file_is_run(tmp_path):
    trace = tmp_path / "trace"
    for n, options in enumerate(({}, {"_use_new_zipfile_serialization": False})):
        path = write_pt(tmp_path / f"{n}.pt", {"features": features_of(2), "more": _Runs(trace)}, **options)
        with pytest.raises(
            BagError, match=rf"{n}\.pt: holds Python objects .*\(\S+\), so .* write it again with torch.save"
        ) as said:
            open_bag(path)
        assert "weights_only" not in str(said.value)  # torch's advice to read it all the same
    assert not trace.exists()


# ---------------------------------------------------------------------------------------------------- coordinates


def test_stamp_needs_the_mpp_of_the_slide(tmp_path):
    x = features_of(4)
    um = coords_of(4, 256)
    bag = open_bag(stamp(tmp_path, x, um))
    assert bag.layout == "stamp"
    assert torch.equal(bag.features(), x)
    assert bag.tile_size_level0 is None
    with pytest.raises(BagError, match=r"S1\.h5: its coordinates are in micrometres.* pass mpp= of level 0"):
        bag.coords()
    with_mpp = open_bag(bag.path, mpp=0.5)  # not 256 / 224, the mpp of its tiles
    assert torch.equal(with_mpp.coords(), um * 2)
    assert with_mpp.tile_size_level0 == 512
    said = open_bag(stamp(tmp_path, x, um, slide_mpp=0.2528))
    assert said.mpp == 0.2528
    assert torch.equal(said.coords(), (um / 0.2528).round().long())
    assert said.tile_size_level0 == pytest.approx(256 / 0.2528)
    assert open_bag(said.path, mpp=0.5).mpp == 0.5


def test_units_of_older_stamp_files(tmp_path):
    x, um = features_of(4), coords_of(4, 256)
    bare = dict.fromkeys(("stamp_version", "tile_size_px", "code_hash", "feat_type"))
    second = stamp(tmp_path, x, um, **{**bare, "tile_size_um": None, "tile_size": 256})
    bag = open_bag(second, mpp=0.5)
    assert torch.equal(bag.coords(), um * 2)
    assert bag.tile_size_level0 == 512
    first = write_h5(
        tmp_path / "first.h5", {"feats": x, "coords": coords_of(4, 224)}, {"": {"extractor": "xiyuewang"}}
    )
    bag = open_bag(first, mpp=0.5)  # units of 256 um / 224
    assert bag.layout == "stamp"
    assert torch.equal(bag.coords(), um * 2)
    assert bag.tile_size_level0 == 512
    with h5py.File(first, "a") as file:
        file["coords"][1, 0] = 5
    with pytest.raises(BagError, match="not multiples of 224"):
        open_bag(first, mpp=0.5).coords()


def test_feats_without_attributes(tmp_path):
    x = features_of(4)
    bag = open_bag(write_h5(tmp_path / "a.h5", {"feats": x, "coords": coords_of(4, 512)}))
    assert bag.layout == "h5"
    assert torch.equal(bag.coords(), coords_of(4, 512))
    assert bag.tile_size_level0 is None
    doubtful = write_h5(tmp_path / "b.h5", {"feats": x, "coords": coords_of(4, 224)})
    with pytest.raises(
        BagError, match=r"b\.h5: 'coords' are multiples of 224 and no attribute tells their unit"
    ):
        open_bag(doubtful).coords()
    with h5py.File(doubtful, "a") as file:
        file.attrs["unit"] = "px"
    assert torch.equal(open_bag(doubtful).coords(), coords_of(4, 224))


def test_slideflow_stores_centres(tmp_path):
    x, xy = features_of(4), coords_of(4, 300)
    mpp = 0.3
    width = int(128 / mpp)  # 426
    path = slideflow(tmp_path, x, xy + width // 2)
    assert torch.equal(open_bag(path, mpp=mpp).coords(), xy)
    assert open_bag(path, mpp=mpp).tile_size_level0 == width
    assert open_bag(path).attributes["num_features"] == 8
    with pytest.raises(
        BagError, match=r"S1\.index\.npz: .*centres of tiles.*need .*microns per pixel: pass mpp="
    ):
        open_bag(path).coords()
    for tile_um in (None, "20x"):
        folder = tmp_path / str(tile_um)
        path = slideflow(folder, x, xy, tile_um=tile_um)
        with pytest.raises(BagError, match=r"a number 'tile_um' in .*bags_config\.json"):
            open_bag(path, mpp=mpp).coords()
        assert torch.equal(open_bag(path).features(), x)
    np.save(tmp_path / "S2.index.npy", (xy + width // 2).numpy())
    assert torch.equal(open_bag(write_pt(tmp_path / "S2.pt", x), mpp=mpp).coords(), xy)


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        (TRIDENT, 512),
        ({**TRIDENT, "patch_size": 224, "target_magnification": 30, "patch_size_level0": 298}, 299),
        ({"patch_size_level0": 640}, 640),
        ({"patch_size_level0": 640, "level0_magnification": -1, "target_magnification": -1}, 640),
        ({"patch_size": 256, "patch_level": 1, "downsample": [4.0, 4.0]}, 1024),
        ({"patch_size": 256, "patch_level": 0}, 256),
        ({"patch_size": 256, "patch_level": 1}, None),
        ({"patch_size_level0": "None"}, None),
    ],
)
def test_tile_size(attributes, size, tmp_path):
    arrays = {"features": features_of(3), "coords": coords_of(3)}
    assert open_bag(write_h5(tmp_path / "a.h5", arrays, {"coords": attributes})).tile_size_level0 == size


def test_bags_without_coordinates(tmp_path):
    x = features_of(3)
    np.save(tmp_path / "a.npy", x.numpy())
    for path in (
        tmp_path / "a.npy",
        write_pt(tmp_path / "a.pt", x),
        write_h5(tmp_path / "a.h5", {"features": x}),
    ):
        bag = open_bag(path)
        assert bag.coords() is None
        assert bag.tile_size_level0 is None
    beside = write_h5(tmp_path / "run" / "features" / "a.h5", {"features": x})
    write_h5(tmp_path / "run" / "coords" / "a.h5", {"coords": coords_of(3)})
    assert torch.equal(open_bag(beside).coords(), coords_of(3))


@pytest.mark.parametrize("form", ["h5", "npy", "pt", "trident without D"])
def test_bags_without_tiles(form, tmp_path):
    path = tmp_path / f"S1.{form.split()[0]}"
    none = np.zeros((0, 2), np.int64)
    if form == "npy":
        np.save(path, np.zeros((0, 8), np.float32))
    elif form == "pt":
        write_pt(path, torch.zeros(0, 8))
    elif form == "h5":
        write_h5(path, {"features": np.zeros((0, 8), np.float16), "coords": none})
    else:
        path = write_h5(tmp_path / "S1.h5", {"features": np.zeros(0, np.float32), "coords": none})
    bag = open_bag(path)
    assert (bag.tiles, bag.dim) == (0, 0 if "without" in form else 8)
    for rows in (None, slice(0, 3), torch.tensor([], dtype=torch.int64)):
        assert tuple(bag.features(rows).shape) == (0, bag.dim)
    assert list(bag.iter_rows()) == []
    coords = bag.coords()
    assert coords is None or tuple(coords.shape) == (0, 2)
