"""The bags of a folder or a table: which files they are, and which slide each belongs to."""

from __future__ import annotations

import os
from pathlib import Path

from dre_fast.data.bag_layouts import is_zarr
from dre_fast.data.bag_rows import BagError
from dre_fast.data.bag_tables import SUFFIXES, bags_of_table, is_table, slide_id_of

# Folders beside features that hold something else: TRIDENT's and CLAM's coordinates, torchmil's parts of a bag.
NOT_BAGS = ("patches", "coords", "labels", "inst_labels", "patch_labels")


def find_bags(folder: str | os.PathLike[str], *, recursive: bool = False) -> dict[str, Path]:
    """The bag of every slide of a folder, sorted by slide: the name of the file without its suffix.

    Bags are ``.h5``, ``.hdf5``, ``.pt`` and ``.npy`` files and zarr folders. A folder that holds none itself may be
    that of a run: CLAM's, with ``h5_files`` and ``pt_files`` (two copies of each slide: the HDF5 one is taken, it has
    coordinates), or TRIDENT's, with one ``features_ENC``. Indices of slideflow, hidden files, and folders of
    coordinates, labels or slide embeddings (``slide_features_ENC``) are passed over.

    Args:
        folder: or a CSV or TSV that names them by their paths, see :func:`dre_fast.data.bag_tables.bags_of_table`.
        recursive: look into all subfolders.

    Raises:
        BagError: no such folder, no bags in it (says what is), several encoders, or two bags of one slide (both named).
    """
    top = Path(folder)
    if is_table(top):
        return bags_of_table(top)
    if not top.is_dir():
        raise BagError(
            f"{top}: no such folder" if not top.exists() else f"{top}: not a folder; open_bag reads one bag"
        )
    if is_zarr(top):
        raise BagError(f"{top}: one zarr bag, not a folder of bags; open_bag reads it")
    found = _walk(top) if recursive else _of_run(top)
    if not found:
        raise BagError(_nothing(top, recursive))
    bags: dict[str, Path] = {}
    twice: list[tuple[str, Path, Path]] = []
    for path in found:
        slide_id = slide_id_of(path)
        if slide_id in bags:
            twice.append((slide_id, bags[slide_id], path))
        bags.setdefault(slide_id, path)
    if twice:
        slide_id, one, other = twice[0]
        rest = f", and {len(twice) - 1} more slides like it" if len(twice) > 1 else ""
        raise BagError(
            f"{top}: slide {slide_id!r} has two bags, {one.relative_to(top)} and {other.relative_to(top)}{rest}; a slide "
            "has one bag: name the subfolder of one encoder, or move the copies away"
        )
    return dict(sorted(bags.items()))


def _of_run(top: Path) -> list[Path]:
    here = _in_folder(top)
    if here:
        return here
    if (top / "h5_files").is_dir() or (top / "pt_files").is_dir():
        return _clam(top)
    encoders = [sub for sub in _subfolders(top) if sub.name.startswith("features_") and _in_folder(sub)]
    if len(encoders) > 1:
        names = ", ".join(sub.name for sub in encoders)
        raise BagError(f"{top}: features of several encoders, {names}; name the folder of one")
    return _in_folder(encoders[0]) if encoders else []


def _walk(top: Path, above: frozenset[Path] = frozenset()) -> list[Path]:
    real = top.resolve()
    if real in above:  # a link to a folder that it lies in
        return []
    above, found = above | {real}, _in_folder(top)
    if (top / "h5_files").is_dir() and (top / "pt_files").is_dir():
        found += _clam(top)
    for sub in _subfolders(top):
        clam = (
            sub.name in ("h5_files", "pt_files")
            and (top / "h5_files").is_dir()
            and (top / "pt_files").is_dir()
        )
        if not clam and sub.name not in NOT_BAGS and not sub.name.startswith("slide_features_"):
            found += _walk(sub, above)
    return found


def _clam(top: Path) -> list[Path]:
    with_coords = _in_folder(top / "h5_files") if (top / "h5_files").is_dir() else []
    have = {slide_id_of(path) for path in with_coords}
    copies = _in_folder(top / "pt_files") if (top / "pt_files").is_dir() else []
    return with_coords + [path for path in copies if slide_id_of(path) not in have]


def _in_folder(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if _is_bag(path)]


def _is_bag(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return is_zarr(path)
    suffix = path.suffix.lower()
    return suffix in SUFFIXES and not (suffix == ".npy" and path.stem.endswith(".index"))


def _subfolders(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".") and not is_zarr(path)
    ]


def _nothing(top: Path, recursive: bool) -> str:
    looked = ", ".join(f"*{suffix}" for suffix in (*SUFFIXES, ".zarr"))
    said = f"{top}: no bags in it, looked for {looked}"
    subs = [] if recursive else [sub.name for sub in _subfolders(top)]
    if not subs:
        return said
    deeper = list(dict.fromkeys(str(path.parent) for path in _walk(top)))
    if deeper:
        return (
            f"{said}; there are some in {_first(deeper)}: name that folder, or pass recursive=True in Python"
        )
    return f"{said}, also not in its subfolders {_first(subs)}"


def _first(names: list[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (" ..." if len(names) > shown else "")
