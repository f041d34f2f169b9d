"""Feature files with the keys, attributes and folders that each producer writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

TRIDENT = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "name": "S1",
    "savetodir": "out/20x_256px_0px_overlap/patches",
    "level0_width": 20000,
    "level0_height": 10000,
}
STAMP = {
    "stamp_version": "2.3.0",
    "extractor": "uni2",
    "unit": "um",
    "tile_size_um": 256.0,
    "tile_size_px": 224,
    "code_hash": "e3b0c442",
    "feat_type": "tile",
}


def features_of(tiles: int, dim: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tiles, dim).to(dtype)


def coords_of(tiles: int, step: int = 512) -> Tensor:
    """Corners of a grid of 7 columns."""
    tile = torch.arange(tiles)
    return torch.stack([tile % 7, tile // 7], dim=1) * step + step


def write_h5(path: Path, arrays: dict[str, Any], attributes: dict[str, dict[str, Any]] | None = None) -> Path:
    """Datasets of a file, and attributes by data set, "" for those of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array.numpy() if isinstance(array, Tensor) else array
        for key, values in (attributes or {}).items():
            for name, value in values.items():
                (file[key] if key else file).attrs[name] = value
    return path


def write_pt(path: Path, held: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(held, path, **options)
    return path


def clam(folder: Path, x: Tensor, xy: Tensor, name: str = "S1") -> Path:
    """Both copies; the HDF5 one, appended to batch by batch and so chunked."""
    write_pt(folder / "pt_files" / f"{name}.pt", x)
    path = folder / "h5_files" / f"{name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in (("features", x), ("coords", xy)):
            width = value.shape[1]
            file.create_dataset(key, data=value.numpy(), maxshape=(None, width), chunks=(1, width))
    return path


def trident(folder: Path, x: Tensor, xy: Tensor, name: str = "S1", encoder: str = "uni_v1") -> Path:
    run = folder / "20x_256px_0px_overlap"
    write_h5(run / "patches" / f"{name}_patches.h5", {"coords": xy}, {"coords": {**TRIDENT, "name": name}})
    attributes = {
        "features": {"name": name, "savetodir": "out", "encoder": encoder},
        "coords": {**TRIDENT, "name": name},
    }
    return write_h5(run / f"features_{encoder}" / f"{name}.h5", {"features": x, "coords": xy}, attributes)


def stamp(folder: Path, x: Tensor, um: Tensor, name: str = "S1", **attributes: Any) -> Path:
    own = {**STAMP, **attributes}
    values = {"": {key: value for key, value in own.items() if value is not None}}
    return write_h5(folder / f"{name}.h5", {"coords": um.float(), "feats": x}, values)


def slideflow(folder: Path, x: Tensor, centres: Tensor, name: str = "S1", tile_um: Any = 128) -> Path:
    path = write_pt(folder / f"{name}.pt", x)
    np.savez(folder / f"{name}.index", centres.numpy())  # numpy adds .npz
    if tile_um is not None:
        config = {
            "extractor": {"class": "uni"},
            "num_features": x.shape[1],
            "tile_px": 256,
            "tile_um": tile_um,
        }
        (folder / "bags_config.json").write_text(json.dumps(config))
    return path


def torchmil(folder: Path, x: Tensor, xy: Tensor, name: str = "S1") -> Path:
    """The folders of its CAMELYON16: features/features_ENC/ID.npy and coords/ID.npy."""
    root = folder / "patches_512"
    for sub, array in (
        ("features/features_UNI", x),
        ("coords", xy),
        ("labels", torch.tensor([1])),
        ("patch_labels", torch.zeros(len(x))),
    ):
        (root / sub).mkdir(parents=True, exist_ok=True)
        np.save(root / sub / f"{name}.npy", array.numpy())
    return root / "features/features_UNI" / f"{name}.npy"
