"""The call sequence of TRIDENT's extraction of slide features."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mil_bags import DIM, LENGTHS, fitted, some_bags
from torch import Tensor, nn

from dre_fast.integrations.trident import ResidualSlideEncoder, export_slide_features


def batch(bag: Tensor) -> dict[str, object]:
    coords = torch.zeros(1, len(bag), 2, dtype=torch.int64)
    return {"features": bag[None], "coords": coords, "attributes": {"patch_size_level0": 512}}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_slide_features_as_they_are_extracted(precision: torch.dtype) -> None:
    mil = fitted()
    encoder = ResidualSlideEncoder(mil, "residual_mil", precision).to("cpu")
    encoder.eval()
    assert (encoder.enc_name, encoder.precision, encoder.embedding_dim) == ("residual_mil", precision, 32)
    for bag in some_bags():
        with torch.inference_mode():
            expected = mil.embed(bag)[0]
            with torch.autocast("cpu", enabled=encoder.precision != torch.float32):
                features = encoder(batch(bag), "cpu")
        assert features.shape == (32,)
        if precision == torch.float32:
            assert torch.equal(features, expected)
            with torch.inference_mode():
                torch.testing.assert_close(mil.classifier(features[None]), mil(bag))
        assert features.float().cpu().numpy().squeeze().shape == (32,)
        torch.testing.assert_close(features.float(), expected, atol=0.1, rtol=0.1)


def test_several_slides_are_refused() -> None:
    encoder = ResidualSlideEncoder(fitted())
    assert torch.equal(
        encoder({"features": some_bags()[0]}, "cpu"), encoder(batch(some_bags()[0]), torch.device("cpu"))
    )
    with pytest.raises(ValueError, match="one slide"):
        encoder({"features": torch.randn(2, 4, DIM)}, "cpu")


class CustomSlideEncoder(nn.Module):
    """Stands for TRIDENT's class of this name: holds a model and passes the batch on to it, without the device."""

    def __init__(self, enc_name: str, model: nn.Module, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.enc_name, self.model, self.precision = enc_name, model, precision
        self.embedding_dim = getattr(model, "embedding_dim", None)

    def forward(self, batch: dict[str, object]) -> Tensor:
        return self.model(batch)  # type: ignore[no-any-return]


def test_as_the_model_of_a_custom_slide_encoder() -> None:
    mil = fitted()
    encoder = CustomSlideEncoder("residual_mil", ResidualSlideEncoder(mil))
    assert encoder.embedding_dim == 32
    for bag in some_bags():
        assert torch.equal(encoder(batch(bag)), mil.embed(bag)[0])


def write_patch_features(folder: Path) -> None:
    folder.mkdir()
    for number, bag in enumerate(some_bags()):
        with h5py.File(folder / f"S{number}.h5", "w") as file:
            file["features"] = bag.numpy()
            file["coords"] = np.arange(2 * len(bag)).reshape(-1, 2)
            file["coords"].attrs.update(patch_size=256, patch_size_level0=512, level0_magnification=40)


def test_tile_features_are_not_overwritten(tmp_path: Path) -> None:
    write_patch_features(tmp_path / "features_uni")
    before = {file.name: file.read_bytes() for file in (tmp_path / "features_uni").iterdir()}
    (tmp_path / "link").symlink_to(tmp_path / "features_uni")
    for saveto in (tmp_path / "features_uni", tmp_path / "link"):
        with pytest.raises(ValueError, match=r"holds the tile features.*slide_features_residual_mil"):
            export_slide_features(ResidualSlideEncoder(fitted()), tmp_path / "features_uni", saveto)
    assert {file.name: file.read_bytes() for file in (tmp_path / "features_uni").iterdir()} == before


def test_export(tmp_path: Path) -> None:
    write_patch_features(tmp_path / "features_uni_v1")
    mil = fitted(dropout=0.5).train()
    target = tmp_path / "slide_features_residual_mil"
    written = export_slide_features(ResidualSlideEncoder(mil), tmp_path / "features_uni_v1", target)
    assert [path.name for path in written] == [f"S{number}.h5" for number in range(5)]
    for path, bag, length in zip(written, some_bags(), LENGTHS):
        with h5py.File(path, "r") as file:
            assert set(file) == {"features", "coords"}
            assert file["features"].dtype == np.float32
            expected = mil.embed(bag)[0].detach().numpy()
            np.testing.assert_allclose(file["features"][:], expected, atol=1e-5)
            assert file["features"].attrs["name"] == path.stem
            assert file["coords"].shape == (length, 2)
            assert file["coords"].dtype == np.int64
            assert file["coords"].attrs["patch_size_level0"] == 512


def test_export_names_the_file(tmp_path: Path) -> None:
    encoder = ResidualSlideEncoder(fitted())
    with pytest.raises(FileNotFoundError, match=r"nothing: no \.h5 file"):
        export_slide_features(encoder, tmp_path / "nothing", tmp_path / "out")
    write_patch_features(tmp_path / "a")
    with h5py.File(tmp_path / "a" / "S1.h5", "a") as file:
        del file["coords"]
    with pytest.raises(ValueError, match=r"S1\.h5: no dataset 'coords', only \['features'\]"):
        export_slide_features(encoder, tmp_path / "a", tmp_path / "out")
    write_patch_features(tmp_path / "b")
    with h5py.File(tmp_path / "b" / "S2.h5", "a") as file:
        del file["features"]
        file["features"] = np.zeros((1, DIM + 1), np.float32)
    with pytest.raises(ValueError, match=r"S2\.h5: "):
        export_slide_features(encoder, tmp_path / "b", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["S0.h5", "S1.h5"]
