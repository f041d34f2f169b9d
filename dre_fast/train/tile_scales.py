"""The size and resolution of the tiles a model learns from, so that it is not applied to other ones unnoticed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dre_fast.data.multiscale import JoinedTiling, scales_of
from dre_fast.data.tiling import Tiling

Scale = Mapping[str, float | None]
# A folder may hold 0.5 um/px beside the nominal 20x of another tool; the next magnification is twice as coarse.
TOLERANCE = 0.1


def scale_of(tilings: Sequence[Tiling], folder: str | Path) -> dict[str, float | None]:
    """What the tilings of a folder have in common: ``tile_size`` in pixels and ``mpp`` in um/px.

    Returns:
        ``mpp`` is None where no file tells.

    Raises:
        ValueError: two slides were tiled differently; names both and the folder.
    """
    first, told = tilings[0], _telling(tilings)
    for tiling in tilings:
        if tiling.tile_size != first.tile_size:
            raise ValueError(
                f"slide {tiling.slide_id}: its tiles in {folder} have {tiling.tile_size} px, those of "
                f"{first.slide_id} {first.tile_size} px; tile all slides alike"
            )
        if _differ(tiling.mpp, told.mpp):
            raise ValueError(
                f"slide {tiling.slide_id}: its tiles in {folder} have {tiling.mpp:g} um/px, those of "
                f"{told.slide_id} {told.mpp:g} um/px; tile all slides alike"
            )
    return {"tile_size": first.tile_size, "mpp": told.mpp}


def scales_seen(tilings: Sequence[Tiling | JoinedTiling]) -> list[dict[str, float | None]]:
    """Tile size and um/px of each folder that the tiles of a set of slides come from, in their order."""
    scales = zip(*map(scales_of, tilings))
    return [{"tile_size": scale[0].tile_size, "mpp": _telling(scale).mpp} for scale in scales]


def check_scales(tilings: Sequence[Tiling | JoinedTiling], trained: Sequence[Scale] | None) -> None:
    """Refuse to apply a model to tiles of another size or resolution than it was trained on.

    Args:
        tilings: of the slides it is to be applied to.
        trained: what :func:`scales_seen` gave in training; None for a model that does not tell.

    Raises:
        ValueError: names the first slide, and both sizes.
    """
    # several folders may be given in another order: most aggregators do not know of it
    pairs = zip(sorted(scales_seen(tilings), key=_coarseness), sorted(trained or (), key=_coarseness))
    for here, there in pairs:
        if here["tile_size"] != there["tile_size"] or _differ(here["mpp"], there["mpp"]):
            raise ValueError(
                f"slide {tilings[0].slide_id}: its tiles are {_shown(here)}, and the model was trained on "
                f"{_shown(there)}; tile the slides as for the training"
            )


def _coarseness(scale: Scale) -> float:
    return scale["mpp"] or 0.0


def _telling(tilings: Sequence[Tiling]) -> Tiling:
    """The first of which the um/px is known, else the first."""
    return next((tiling for tiling in tilings if tiling.mpp is not None), tilings[0])


def _differ(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and abs(one - other) > TOLERANCE * min(one, other)


def _shown(scale: Scale) -> str:
    size, mpp = scale["tile_size"], scale["mpp"]
    return f"{size:g} px" + ("" if mpp is None else f" of {mpp:g} um/px")
