from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("h5py", reason="needs h5py")

from bag_makers import clam, coords_of, features_of, slideflow, stamp, torchmil, trident, write_h5, write_pt

import dre_fast
from dre_fast.codebook import bag_weights
from dre_fast.data import bags as bags_module
from dre_fast.data.bags import BagError, BagFolder, find_bags, open_bag


def put(folder, *names, tiles=4, dim=8):
    for name in names:
        write_pt(folder / name, features_of(tiles, dim))


def test_names_and_order(tmp_path):
    put(tmp_path, "S2.pt", "S10.pt", "TCGA-3X-AAVA-01Z-00-DX1.1F2C.pt")
    write_h5(tmp_path / "S1.h5", {"features": features_of(3)})
    write_h5(tmp_path / "S3.HDF5", {"features": features_of(3)})
    np.save(tmp_path / "S4.npy", np.zeros((3, 8), np.float32))
    put(tmp_path, ".S1.123-abcd.pt")
    for name in ("notes.txt", "labels.csv", "S1.h5.lock", "model.pth"):
        (tmp_path / name).touch()
    found = find_bags(tmp_path)
    assert list(found) == ["S1", "S10", "S2", "S3", "S4", "TCGA-3X-AAVA-01Z-00-DX1.1F2C"]
    assert found["S3"] == tmp_path / "S3.HDF5"
    assert all(BagFolder(tmp_path)[name].slide_id == name for name in found)


def test_folders_of_a_run(tmp_path):
    x, xy = features_of(4), coords_of(4)
    for name in ("S1", "S2"):
        clam(tmp_path / "clam", x, xy, name)
        trident(tmp_path / "trident", x, xy, name)
        slideflow(tmp_path / "slideflow", x, xy, name)
        torchmil(tmp_path / "torchmil", x, xy, name)
    put(tmp_path / "clam" / "pt_files", "S3.pt")
    h5, pt = tmp_path / "clam" / "h5_files", tmp_path / "clam" / "pt_files"
    assert find_bags(tmp_path / "clam") == {"S1": h5 / "S1.h5", "S2": h5 / "S2.h5", "S3": pt / "S3.pt"}
    assert find_bags(tmp_path / "clam", recursive=True) == find_bags(tmp_path / "clam")
    assert find_bags(pt) == {f"S{n}": pt / f"S{n}.pt" for n in (1, 2, 3)}
    run = tmp_path / "trident" / "20x_256px_0px_overlap"
    write_h5(run / "slide_features_titan" / "S1.h5", {"features": np.zeros(8, np.float32)})
    wanted = {name: run / "features_uni_v1" / f"{name}.h5" for name in ("S1", "S2")}
    assert find_bags(run) == find_bags(tmp_path / "trident", recursive=True) == wanted
    assert list(find_bags(tmp_path / "slideflow")) == ["S1", "S2"]
    np.save(tmp_path / "slideflow" / "S1.index.npy", xy.numpy())
    assert list(find_bags(tmp_path / "slideflow")) == ["S1", "S2"]
    features = tmp_path / "torchmil" / "patches_512" / "features" / "features_UNI"
    assert find_bags(tmp_path / "torchmil", recursive=True) == {
        f"S{n}": features / f"S{n}.npy" for n in (1, 2)
    }
    for name in ("clam", "slideflow", "torchmil"):
        folder = BagFolder(tmp_path / name, recursive=True, mpp=0.25)
        assert folder["S1"].layout == name
        assert folder["S1"].coords() is not None
    trident(tmp_path / "trident", x, xy, "S1", "conch_v15")
    with pytest.raises(
        BagError, match=r"several encoders, features_conch_v15, features_uni_v1; name the folder"
    ):
        find_bags(run)


def test_two_bags_of_one_slide(tmp_path):
    put(tmp_path, "S1.pt", "S2.pt", "S3.pt")
    write_h5(tmp_path / "S1.h5", {"features": features_of(2)})
    with pytest.raises(BagError, match=r"slide 'S1' has two bags, S1\.h5 and S1\.pt; a slide has one bag"):
        find_bags(tmp_path)
    (tmp_path / "S1.h5").unlink()
    put(tmp_path, "a/S2.pt", "b/c/S3.pt")
    assert list(find_bags(tmp_path)) == ["S1", "S2", "S3"]
    with pytest.raises(BagError, match=r"slide 'S2' has two bags, S2\.pt and a.S2\.pt, and 1 more slides"):
        BagFolder(tmp_path, recursive=True)


def test_links_in_a_ring_end(tmp_path):
    put(tmp_path, "a/S1.pt", "a/b/S2.pt")
    for link in ("a/up", "a/b/up", "a/b/top"):
        (tmp_path / link).symlink_to(tmp_path if link.endswith("top") else tmp_path / "a")
    assert list(find_bags(tmp_path, recursive=True)) == ["S1", "S2"]


def test_nothing_to_find(tmp_path):
    with pytest.raises(BagError, match="no such folder"):
        find_bags(tmp_path / "none")
    put(tmp_path, "some/S1.pt")
    with pytest.raises(BagError, match=r"S1\.pt: not a folder; open_bag reads one bag"):
        find_bags(tmp_path / "some" / "S1.pt")
    said = r"no bags in it, looked for \*\.h5, .*\*\.zarr; there are some in \S*some: name that folder, or .*recursive"
    with pytest.raises(BagError, match=said):
        find_bags(tmp_path)
    put(tmp_path / "job", "20x/features_uni/S1.pt", "20x/patches/S1.h5")
    with pytest.raises(BagError, match=r"there are some in \S*20x.features_uni: name that folder"):
        find_bags(tmp_path / "job")
    (tmp_path / "bare" / "sub").mkdir(parents=True)
    with pytest.raises(
        BagError, match=r"no bags in it, looked for .*\*\.zarr, also not in its subfolders sub$"
    ):
        find_bags(tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BagError, match=r"no bags in it, looked for .*\*\.zarr$"):
        find_bags(tmp_path / "empty")


def test_mapping_of_chosen_slides(tmp_path):
    put(tmp_path, "S1.pt", "S2.pt", "S3.pt", "S4.pt")
    folder = BagFolder(tmp_path, ids=["S3", "S1"])
    assert list(folder) == ["S3", "S1"]
    assert len(folder) == 2
    assert "S1" in folder
    assert "S2" not in folder
    assert [bag.slide_id for bag in folder.values()] == ["S3", "S1"]
    assert folder["S1"] is folder["S1"]
    with pytest.raises(KeyError, match="no bag of slide 'S2' among 2"):
        folder["S2"]
    with pytest.raises(
        BagError, match=r"no bag of slide 'S8' \(2 of 3 absent\); it has bags of 4 slides: S1, S2, S3"
    ):
        BagFolder(tmp_path, ids=["S8", "S1", "S9"])
    with pytest.raises(BagError, match="slide 'S1' is given twice"):
        BagFolder(tmp_path, ids=["S1", "S2", "S1"])
    with pytest.raises(BagError, match="ids must be a list of slides, got the text 'S1'"):
        BagFolder(tmp_path, ids="S1")
    assert list(BagFolder(tmp_path, ids=[])) == []


def test_bags_open_when_asked_for(tmp_path, monkeypatch):
    put(tmp_path, "S1.pt", "S2.pt")
    opened = []
    monkeypatch.setattr(
        bags_module, "open_bag", lambda path, **k: opened.append(path.name) or open_bag(path, **k)
    )
    folder = BagFolder(tmp_path)
    assert "S2" in folder
    assert repr(folder).endswith("2 bags)")
    assert opened == []
    assert folder["S2"].tiles == 4
    assert folder.dim == 8
    assert opened == ["S2.pt"]
    again = pickle.loads(pickle.dumps(folder))
    assert torch.equal(again["S1"].features(), folder["S1"].features())


def test_another_d_names_both_bags(tmp_path):
    put(tmp_path, "S1.pt", "S2.pt")
    put(tmp_path, "S3.pt", dim=6)
    folder = BagFolder(tmp_path)
    assert folder["S2"].dim == folder.dim == 8
    with pytest.raises(BagError, match=r"S3\.pt: slide S3 has D=6, but slide S2 \(.*S2\.pt\) has D=8"):
        folder["S3"]
    with pytest.raises(BagError, match="D=6"):
        list(folder.values())


def test_bags_without_tiles_take_the_d_of_the_others(tmp_path):
    none = {"features": np.zeros(0, np.float32), "coords": np.zeros((0, 2), np.int64)}
    write_h5(tmp_path / "S1.h5", none)
    write_h5(tmp_path / "S2.h5", none)
    assert BagFolder(tmp_path).dim == 0
    put(tmp_path, "S3.pt")
    write_pt(tmp_path / "S4.pt", torch.zeros(0, 8))
    folder = BagFolder(tmp_path)
    assert folder["S1"].dim == 8
    assert tuple(folder["S2"].features().shape) == (0, 8)
    assert folder.cu_seqlens().tolist() == [0, 0, 0, 4, 4]
    assert torch.cat(list(folder.iter_rows())).shape == (4, 8)
    write_pt(tmp_path / "S5.pt", torch.zeros(0, 5))
    with pytest.raises(BagError, match="S5 has D=5"):
        list(BagFolder(tmp_path).values())


def test_mpp_by_slide(tmp_path):
    for name in ("S1", "S2", "S3"):
        stamp(tmp_path, features_of(4), coords_of(4, 256), name)
    folder = BagFolder(tmp_path, mpp={"S1": 0.25, "S2": 0.5})
    assert torch.equal(folder["S1"].coords(), 4 * coords_of(4, 256))
    assert torch.equal(folder["S2"].coords(), 2 * coords_of(4, 256))
    with pytest.raises(BagError, match=r"S3\.h5: its coordinates are in micrometres"):
        folder["S3"].coords()
    assert torch.equal(BagFolder(tmp_path, mpp=0.25)["S3"].coords(), 4 * coords_of(4, 256))


# -------------------------------------------------------------------------------------------- a source of rows


def cohort(folder, dtype=torch.float32):
    """Bags of three producers, one of them empty; their features in the order of the slides."""
    parts = [features_of(n, dtype=dtype) + 3 * (n % 3) for n in (40, 0, 7, 90)]
    write_h5(folder / "S1.h5", {"features": parts[0], "coords": coords_of(40)})
    write_pt(folder / "S2.pt", parts[1])
    np.save(folder / "S3.npy", parts[2].numpy())
    stamp(folder, parts[3], coords_of(90), "S4")
    return BagFolder(folder), torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("init", ["k-means++", "k-means||"])
def test_a_folder_is_a_source_of_rows(dtype, init, tmp_path):
    folder, rows = cohort(tmp_path, dtype)
    codebook, inertia = dre_fast.fit_codebook(folder, 5, init=init)
    expected, known = dre_fast.fit_codebook(rows, 5, init=init)
    torch.testing.assert_close(codebook, expected, rtol=1e-4, atol=1e-4)
    assert inertia == pytest.approx(known, rel=1e-4)
    weights = bag_weights(folder.cu_seqlens())
    expected = dre_fast.fit_codebook(rows, 5, weights=weights)[0]
    torch.testing.assert_close(
        dre_fast.fit_codebook(folder, 5, weights=weights)[0], expected, rtol=1e-4, atol=1e-4
    )


def test_a_bag_is_a_source_of_rows(tmp_path):
    folder, _ = cohort(tmp_path)
    bag = folder["S4"]
    torch.testing.assert_close(dre_fast.fit_codebook(bag, 3)[0], dre_fast.fit_codebook(bag.features(), 3)[0])


@pytest.mark.parametrize("assignment", ["hard", "soft"])
def test_models_are_fitted_to_a_folder(assignment, tmp_path):
    folder, rows = cohort(tmp_path)
    models = [dre_fast.ResidualMIL(8, 2, codewords=4, assignment=assignment, head="light") for _ in range(2)]
    inertia = [model.fit_codebook(source) for model, source in zip(models, (folder, rows))]
    assert inertia[0] == pytest.approx(inertia[1], rel=1e-4)
    torch.testing.assert_close(models[0].encoding.codebook, models[1].encoding.codebook, rtol=1e-4, atol=1e-4)
    assert models[0](folder["S1"].features()).shape == (1, 2)


def test_one_piece_of_one_bag_is_in_memory(tmp_path, monkeypatch):
    folder, rows = cohort(tmp_path)
    sizes = []
    plain = bags_module.Bag.features
    monkeypatch.setattr(
        bags_module.Bag, "features", lambda bag, r=None: sizes.append(len(plain(bag, r))) or plain(bag, r)
    )
    monkeypatch.setattr("dre_fast.codebook_rows.CHUNK", 16)
    dre_fast.fit_codebook(folder, 5, iterations=2)
    assert max(sizes) == 16
    assert sum(sizes) % len(rows) == 0


def test_rows_that_are_not_finite_are_named(tmp_path):
    folder, _ = cohort(tmp_path)
    write_pt(tmp_path / "S5.pt", torch.tensor([[1.0] * 8, [torch.nan] * 8]))
    with pytest.raises(BagError, match=r"S5\.pt: slide S5: tile 1 holds nan in column 0"):
        dre_fast.fit_codebook(BagFolder(tmp_path), 5)
    assert len(folder) == 4
    put(tmp_path, "S6.pt", dim=5)
    with pytest.raises(BagError, match=r"slide S6 has D=5"):
        dre_fast.fit_codebook(BagFolder(tmp_path, ids=["S1", "S6"]), 5)
