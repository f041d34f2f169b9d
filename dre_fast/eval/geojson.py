"""Tiles of a slide as GeoJSON that QuPath opens: codewords as classes, contributions as measurements."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from dre_fast.data.files import write_text_atomic
from dre_fast.data.tiling import Tiling
from dre_fast.eval.heatmap import codeword_colours


def write_geojson(
    path: str | os.PathLike[str],
    tiling: Tiling,
    codes: Tensor,
    codewords: int,
    measurements: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a feature collection (RFC 7946, in level-0 pixels as QuPath wants them) of one square a tile.

    In QuPath drop the file on the open slide: every tile is a tile object, its class the codeword, in the colour it has
    in the codeword map; measurements are what "Measure > Show measurement maps" draws.

    Args:
        path: ends in .geojson.
        tiling: of the slide, N tiles.
        codes: int [N], codeword of each tile.
        codewords: K.
        measurements: name -> float [N].

    Raises:
        ValueError: another number of codes or values than tiles; a value that is not finite (names the tile).
    """
    values = {
        name: np.asarray(tensor.detach().cpu().double()) for name, tensor in (measurements or {}).items()
    }
    for name, column in {"codes": np.asarray(codes.cpu()), **values}.items():
        if len(column) != len(tiling):
            raise ValueError(f"{tiling.slide_id}: {len(column)} values of {name!r} for {len(tiling)} tiles")
        if not np.isfinite(column).all():
            tile = int(np.flatnonzero(~np.isfinite(column))[0])
            raise ValueError(f"{tiling.slide_id}: {name!r} of tile {tile} is not finite")
    colours = (codeword_colours(codewords) * 255).round().astype(int).tolist()
    side, features = tiling.tile_size_level0, []
    for i, ((x, y), code) in enumerate(zip(tiling.coords.tolist(), codes.tolist(), strict=True)):
        corners = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        properties = {
            "objectType": "tile",
            "name": f"tile {i}",
            "classification": {"name": f"codeword {code}", "color": colours[code]},
            "measurements": {name: float(f"{column[i]:.6g}") for name, column in values.items()},
        }
        geometry = {"type": "Polygon", "coordinates": [corners]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    write_text_atomic(Path(path), json.dumps({"type": "FeatureCollection", "features": features}) + "\n")
    return Path(path)
