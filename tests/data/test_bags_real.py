"""Bags of the TCGA as their makers published them."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("h5py", reason="needs h5py")

import h5py

import dre_fast
from dre_fast.data.bags import BagError, BagFolder, find_bags, open_bag, write_bag

COAD, CHOL = "TCGA-AD-6964-01Z-00-DX1", "TCGA-3X-AAVA-01Z-00-DX1"


def test_both_keys_are_read(test_data):
    folder = BagFolder(test_data / "bags")
    assert list(folder) == [CHOL, COAD]
    assert folder.dim == 512
    for name, key, tiles, layout in ((COAD, "feats", 777, "h5"), (CHOL, "features", 180, "torchmil")):
        bag = folder[name]
        assert (bag.tiles, bag.dtype, bag.layout) == (tiles, torch.float32, layout)
        with h5py.File(bag.path) as file:
            stored = torch.from_numpy(file[key][:])
            assert torch.equal(bag.features(), stored)
            assert torch.equal(bag.features(slice(10, 20)), stored[10:20])
            if name == COAD:
                assert torch.equal(bag.coords(), torch.from_numpy(file["coords"][:]))
    assert folder[CHOL].coords() is None
    assert folder[COAD].tile_size_level0 is None


def test_a_model_is_fitted_without_the_folder_in_memory(test_data):
    folder = BagFolder(test_data / "bags")
    model = dre_fast.ResidualMIL(folder.dim, classes=2)
    assert model.fit_codebook(folder, iterations=5) > 0
    logits = torch.cat([model(bag.features()) for bag in folder.values()])
    assert logits.shape == (2, 2)
    assert torch.isfinite(logits).all()


def test_converted_beside_the_original(test_data, tmp_path):
    bag = open_bag(test_data / "bags" / f"{COAD}.h5")
    path = write_bag(tmp_path / f"{COAD}.h5", bag.features(), bag.coords(), tile_size_level0=512)
    again = open_bag(path)
    assert torch.equal(again.features(), bag.features())
    assert torch.equal(again.coords(), bag.coords())
    assert again.tile_size_level0 == 512
    shutil.copy(bag.path, tmp_path / "other.h5")
    (tmp_path / "more").mkdir()
    shutil.copy(bag.path, tmp_path / "more")
    with pytest.raises(BagError, match=f"slide '{COAD}' has two bags"):
        find_bags(tmp_path, recursive=True)
