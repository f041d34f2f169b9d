"""What is wrong with a bag is said with its file, what was looked for and what to do."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

pytest.importorskip("h5py", reason="needs h5py")

import h5py
from bag_makers import clam, coords_of, features_of, slideflow, stamp, torchmil, write_h5, write_pt

from dre_fast.data.bags import BagError, BagFolder, open_bag


def test_missing_keys(tmp_path):
    looked = "looked for 'features', 'feats', 'patch_embeddings', 'tile_embeds', found"
    path = write_h5(tmp_path / "a.h5", {"embeddings": features_of(2), "coords": coords_of(2)})
    with pytest.raises(BagError, match=rf"a\.h5: no features: {looked} 'coords', 'embeddings'$"):
        open_bag(path)
    path = write_pt(tmp_path / "b.pt", {"x": features_of(2), "y": 1})
    with pytest.raises(BagError, match=rf"b\.pt: no features: {looked} 'x', 'y'$"):
        open_bag(path)
    path = write_h5(tmp_path / "c.h5", {})
    with pytest.raises(BagError, match=rf"c\.h5: no features: {looked} nothing"):
        open_bag(path)
    path = write_h5(tmp_path / "S1_patches.h5", {"coords": coords_of(2)})
    with pytest.raises(BagError, match=r"a file of tile coordinates: extract features first"):
        open_bag(path)
    path = write_h5(tmp_path / "d.h5", {"features": features_of(2), "feats": features_of(2)})
    with pytest.raises(BagError, match=r"d\.h5: holds 'features' and 'feats'"):
        open_bag(path)
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["features/layer3"] = np.zeros((2, 3), np.float32)
    with pytest.raises(BagError, match=r"e\.h5: 'features' is a group of \['layer3'\]"):
        open_bag(tmp_path / "e.h5")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(7, np.float32), r"one vector of 7 numbers: a slide embedding, not a bag"),
        (np.zeros((2, 3, 4), np.float32), r"must be \[n, D\], or \[1, n, D\], they are \[2, 3, 4\]"),
        (np.zeros((1, 2, 3, 4), np.float32), r"they are \[1, 2, 3, 4\]"),
        (np.float32(1), r"they are \[\]"),
        (np.zeros((3, 0), np.float32), r"have no columns"),
        (
            np.zeros((3, 4), np.int64),
            r"must be float16, bfloat16, float32 or float64, they are int64 \[3, 4\]",
        ),
        (np.zeros((3, 4), np.uint8), r"they are uint8"),
        (np.zeros((3, 4), np.complex64), r"they are complex64"),
        (np.zeros((3, 4), bool), r"they are bool"),
    ],
)
@pytest.mark.parametrize("form", ["h5", "npy", "pt"])
def test_ranks_and_dtypes(form, array, message, tmp_path):
    path = tmp_path / f"S1.{form}"
    if form == "h5":
        write_h5(path, {"features": array})
    elif form == "npy":
        np.save(path, array)
    else:
        write_pt(path, {"features": torch.from_numpy(np.asarray(array))})
    with pytest.raises(BagError, match=rf"S1\.{form}: features .*{message}"):
        open_bag(path)


def test_other_objects_in_a_pt_file(tmp_path):
    x = features_of(3)
    for held, message in (
        (3, "features must be a tensor \\[n, D\\], they are int"),
        ([], "they are list"),
        ({"features": "a.pt"}, "they are str"),
        ([x, x[:, :5]], "a list of tensors that are not all"),
        ([x, x.double()], "a list of tensors that are not all"),
        (x.to_sparse(), "features are a sparse tensor"),
    ):
        with pytest.raises(BagError, match=rf"a\.pt: .*{message}"):
            open_bag(write_pt(tmp_path / "a.pt", held))
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BagError, match=r"a\.npy: not a readable \.npy file of numbers"):
        open_bag(tmp_path / "a.npy")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_not_finite(value, dtype, tmp_path):
    x = features_of(9, dtype=dtype)
    x[6, 3] = x[8, 1] = value
    bag = open_bag(write_pt(tmp_path / "S1.pt", x))
    said = rf"S1\.pt: slide S1: tile 6 holds {value} in column 3 \(2 of the 9 tiles read"
    with pytest.raises(BagError, match=said):
        bag.features()
    with pytest.raises(BagError, match=r"tile 6 holds .* \(1 of the 3 tiles read"):
        bag.features(torch.tensor([2, 6, 1]))
    with pytest.raises(BagError, match=r"tile 8 holds .* column 1"):
        bag.features(slice(7, 9))
    assert torch.equal(bag.features(slice(0, 6)), x[:6])


def test_finite_rows_with_an_endless_sum(tmp_path):
    x = torch.full((4, 8), 3e38)
    assert torch.equal(open_bag(write_pt(tmp_path / "S1.pt", x)).features(), x)


@pytest.mark.parametrize("layout", ["clam", "clam pt", "stamp", "slideflow", "torchmil", "pt"])
def test_features_and_coordinates_of_different_runs(layout, tmp_path):
    x, xy = features_of(5), coords_of(4)
    where = {"slideflow": r"S1\.index\.npz", "torchmil": r"coords.S1\.npy", "clam pt": r"h5_files.S1\.h5"}
    if layout == "pt":
        path = write_pt(tmp_path / "S1.pt", {"features": x, "coords": xy})
    else:
        make = {"clam pt": clam, "clam": clam, "stamp": stamp, "slideflow": slideflow, "torchmil": torchmil}
        path = make[layout](tmp_path, x, xy)
    if layout == "clam pt":
        path = tmp_path / "pt_files" / "S1.pt"
    with pytest.raises(
        BagError, match=rf"{where.get(layout, 'S1')}.*: 5 tiles of features but 4 coordinates"
    ):
        open_bag(path)


def test_coordinates_that_are_none(tmp_path):
    x = features_of(2)
    for xy, message in (
        (np.zeros((2, 3)), r"'coords' must be \[n, 2\], they are \[2, 3\]"),
        (np.zeros(4), r"they are \[4\]"),
        (np.array([[0, 0.5], [1, 1]]), "'coords' has fractions, so it is not in level-0 pixels"),
        (np.array([[0, np.nan], [1, 1]]), "'coords' hold something that is not a finite number"),
    ):
        with pytest.raises(BagError, match=rf"a\.h5: .*{message}"):
            open_bag(write_h5(tmp_path / "a.h5", {"features": x, "coords": xy})).coords()
    with pytest.raises(BagError, match=r"S1\.h5: attribute 'unit' is 'cells'; coordinates may be in 'um'"):
        open_bag(stamp(tmp_path, x, coords_of(2), unit="cells"))
    with pytest.raises(BagError, match=r"S1\.h5: tile_size_um is -1\.0, it must be a number above 0"):
        open_bag(stamp(tmp_path, x, coords_of(2), tile_size_um=-1.0))
    with pytest.raises(BagError, match=r"S1\.h5: attribute 'slide_mpp' is 'x'"):
        open_bag(stamp(tmp_path, x, coords_of(2), slide_mpp="x"))
    with pytest.raises(BagError, match="attribute 'patch_size_level0' of 'coords' is 'x', not a number"):
        open_bag(
            write_h5(
                tmp_path / "a.h5",
                {"features": x, "coords": coords_of(2)},
                {"coords": {"patch_size_level0": "x"}},
            )
        )
    for mpp in (0, -0.5, float("nan"), "x"):
        with pytest.raises(BagError, match=r"mpp is .*, it must be a number above 0"):
            open_bag(stamp(tmp_path, x, coords_of(2)), mpp=mpp)


def test_embeddings_of_slides(tmp_path):
    for kind in ("slide", "patient"):
        with pytest.raises(BagError, match=f"'feat_type' is '{kind}': embeddings of slides or patients"):
            open_bag(write_h5(tmp_path / "a.h5", {"feats": features_of(1)}, {"": {"feat_type": kind}}))


def test_files_that_are_none(tmp_path):
    for name, content in (
        ("a.h5", b"half"),
        ("a.pt", b"half"),
        ("a.npy", b"half"),
        ("b.pt", b""),
        ("b.npy", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BagError, match=rf"{name}: not a readable"):
            open_bag(tmp_path / name)
    whole = write_pt(tmp_path / "c.pt", features_of(500))
    whole.write_bytes(whole.read_bytes()[:9000])  # a download that broke off
    with pytest.raises(BagError, match=r"c\.pt: not a readable"):
        open_bag(whole)
    np.save(tmp_path / "c.npy", np.zeros((500, 8), np.float32))
    (tmp_path / "c.npy").write_bytes((tmp_path / "c.npy").read_bytes()[:9000])
    with pytest.raises(BagError, match=r"c\.npy: not a readable"):
        open_bag(tmp_path / "c.npy")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_dataset("features", data=np.ones((500, 8)), chunks=(100, 8))
    (tmp_path / "c.h5").write_bytes((tmp_path / "c.h5").read_bytes()[:9000])
    with pytest.raises(BagError, match=r"c\.h5: not a readable"):
        open_bag(tmp_path / "c.h5")
    with pytest.raises(BagError, match=r"d\.h5: no such file"):
        open_bag(tmp_path / "d.h5")
    (tmp_path / "S1.csv").touch()
    with pytest.raises(
        BagError, match=r"S1\.csv: bags are \.h5, \.hdf5, \.pt or \.npy files, or \.zarr folders"
    ):
        open_bag(tmp_path / "S1.csv")
    with pytest.raises(BagError, match="a folder, not a bag; BagFolder reads"):
        open_bag(tmp_path)
    path = slideflow(tmp_path, features_of(2), coords_of(2))
    np.savez(tmp_path / "S1.index", xy=coords_of(2).numpy())
    with pytest.raises(BagError, match=r"S1\.index\.npz: no coordinates: looked for 'arr_0', found \['xy'\]"):
        open_bag(path)
    (tmp_path / "S1.index.npz").write_bytes(b"half")
    with pytest.raises(BagError, match=r"S1\.index\.npz: not a readable index"):
        open_bag(path)
    slideflow(tmp_path, features_of(2), coords_of(2))
    (tmp_path / "bags_config.json").write_text("[")
    with pytest.raises(BagError, match=r"bags_config\.json: not a readable JSON object"):
        open_bag(path)


def test_a_damaged_chunk(tmp_path):
    path = tmp_path / "S1.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset(
            "features", data=np.ones((64, 8), np.float32), chunks=(64, 8), fletcher32=True
        )
        where = data.id.get_chunk_info(0).byte_offset
    raw = bytearray(path.read_bytes())
    raw[where + 5] ^= 1
    path.write_bytes(raw)
    bag = open_bag(path)
    with pytest.raises(BagError, match=r"S1\.h5: 'features' cannot be read"):
        bag.features()


def test_h5py_is_missing(tmp_path, monkeypatch):
    clam(tmp_path, features_of(2), coords_of(2))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs h5py.*pip install 'dre_fast\[wsi\]'"):
        open_bag(tmp_path / "h5_files" / "S1.h5")
    (tmp_path / "S2.zarr").mkdir()
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs zarr.*pip install 'dre_fast\[zarr\]'"):
        BagFolder(tmp_path)["S2"]
