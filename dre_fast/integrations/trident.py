"""ResidualMIL as a slide encoder of TRIDENT, and its slide features in TRIDENT's files. TRIDENT is not imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dre_fast.data.files import atomic_path
from dre_fast.data.optional import need
from dre_fast.nn.residual_mil import ResidualMIL


class ResidualSlideEncoder(nn.Module):
    """Called as TRIDENT calls its slide encoders, with the attributes of its CustomSlideEncoder.

    Its Processor calls ``(batch, device)``, while CustomSlideEncoder takes the batch alone and passes it on to its model.
    Both work: give this module to the Processor, or to CustomSlideEncoder as its ``model``. The result is the embedding
    before the classifier; neither coordinates nor attributes enter it.

    Args:
        model: fitted, and trained or not: :class:`~dre_fast.ResidualMIL`.
        enc_name: TRIDENT's name for it; features go to ``slide_features_{enc_name}``.
        precision: float32, or the dtype TRIDENT's autocast is switched on for.
    """

    def __init__(
        self, model: ResidualMIL, enc_name: str = "residual_mil", precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.model, self.enc_name, self.precision = model, enc_name, precision
        self.embedding_dim = model.width

    def forward(self, batch: Mapping[str, Any], device: torch.device | str | None = None) -> Tensor:
        """``batch["features"]`` [N, D] or [1, N, D] -> embedding [width].

        Args:
            device: where the features go; default: where the model is.

        Raises:
            ValueError: features of several slides, or another shape.
        """
        features = batch["features"]
        if features.dim() == 3 and len(features) == 1:
            features = features[0]
        if features.dim() != 2:
            raise ValueError(
                "ResidualSlideEncoder: features must be those of one slide, [N, D] or [1, N, D], "
                f"got {tuple(features.shape)}"
            )
        if device is None:
            device = self.model.encoding.codebook.device
        return self.model.embed(features.to(device))[0]


def export_slide_features(
    encoder: ResidualSlideEncoder, patch_features: str | os.PathLike[str], saveto: str | os.PathLike[str]
) -> list[Path]:
    """Slide features of a whole folder, in the files that TRIDENT itself would write.

    Reads each ``ID.h5`` of ``patch_features`` (``features_ENC``) and writes ``saveto/ID.h5`` (``slide_features_NAME``):
    ``features`` fp32 [width] with name and savetodir as attributes, and ``coords`` with its attributes as they were. Each
    file appears whole or not at all; no gradient, no dropout, on the device where the model is.

    Returns:
        The files written, in the order of their names.

    Raises:
        FileNotFoundError: no ``*.h5`` in the folder.
        ValueError: a file without ``features`` or ``coords``, or features that the model cannot take; the file is named.
            Or ``saveto`` is the folder of the tile features, which would be lost.
        ImportError: h5py is missing; says how to get it.
    """
    h5py = need("h5py", "wsi")
    sources = sorted(Path(patch_features).glob("*.h5"))
    if not sources:
        raise FileNotFoundError(
            f"{os.fspath(patch_features)}: no .h5 file; name TRIDENT's folder features_ENCODER"
        )
    if Path(saveto).resolve() == Path(patch_features).resolve():
        raise ValueError(
            f"{os.fspath(saveto)}: holds the tile features, whose files would be overwritten; save slide features to "
            f"another folder, slide_features_{encoder.enc_name}"
        )
    encoder.eval()
    written = []
    for source in sources:
        with h5py.File(source, "r") as file:
            missing = [key for key in ("features", "coords") if key not in file]
            if missing:
                raise ValueError(f"{source}: no dataset {missing[0]!r}, only {sorted(file.keys())}")
            coords, attributes = file["coords"][:], dict(file["coords"].attrs)
            features = torch.from_numpy(file["features"][:].astype(np.float32))
        try:
            with torch.inference_mode():
                embedding = encoder({"features": features, "coords": coords, "attributes": attributes})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        target = Path(saveto) / source.name
        with atomic_path(target) as temporary, h5py.File(temporary, "w") as file:
            file["features"] = embedding.float().cpu().numpy()
            file["coords"] = coords
            file["features"].attrs.update(name=source.stem, savetodir=os.fspath(saveto))
            file["coords"].attrs.update(attributes)
        written.append(target)
    return written
