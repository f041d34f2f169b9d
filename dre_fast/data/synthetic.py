"""A synthetic cohort: H&E-like slides as tiled pyramidal TIFFs, labels, templated reports, ground truth.

It exists so that the whole path, from slide files to a trained slide model, can be run and checked on any
machine in minutes. The slides are drawn (see `synthetic_tissue`), the reports are filled from templates and
the gene columns are drawn numbers: nothing in the cohort says anything about real disease, and every report
says that it is synthetic.
"""

from __future__ import annotations

import csv
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dre_fast.data.files import atomic_path, write_text_atomic
from dre_fast.data.synthetic_reports import write_report
from dre_fast.data.synthetic_tissue import SUBTYPES, TissueSpec, paint
from dre_fast.progress import progress

COLUMNS = ("slide_id", "case_id", "path", "report", "subtype", "tumour", "EGFR", "TP53", "split")
TRUTH_FILE = "truth.json"


@dataclass(frozen=True)
class SlidePlan:
    """Everything about one slide but its pixels. `genes` holds "1", "0" or "" (missing)."""

    index: int
    slide_id: str
    case_id: str
    split: str
    report: str
    genes: dict[str, str]
    tissue: TissueSpec

    @property
    def file_name(self) -> str:
        return f"{self.slide_id}.tif"

    def row(self) -> dict[str, str]:
        """This slide's row of the cohort CSV; the path is relative to the CSV."""
        subtype = self.tissue.subtype
        return {
            "slide_id": self.slide_id,
            "case_id": self.case_id,
            "path": f"slides/{self.file_name}",
            "report": self.report,
            "subtype": subtype or "",
            "tumour": "normal" if subtype is None else "tumour",
            **self.genes,
            "split": self.split,
        }


def make_cohort(
    out_dir: str | os.PathLike[str],
    *,
    train: int = 48,
    val: int = 12,
    test: int = 40,
    seed: int = 0,
    mpp: float = 1.0,
    size: tuple[int, int] = (1664, 1280),
    normal_fraction: float = 0.25,
    witness: tuple[float, float] = (0.12, 0.22),
    contrast: float = 1.0,
    texture: float = 1.0,
    stain_variation: float = 1.0,
    missing_genes: float = 0.25,
    two_slide_fraction: float = 0.1,
    truth_tile: int = 64,
    workers: int | None = None,
) -> Path:
    """Writes a synthetic cohort: `cohort.csv`, `slides/*.tif` and `truth.json`.

    Args:
        out_dir: folder to write to; made if absent.
        train, val, test: number of slides of each split. Cases never cross splits.
        seed: the same seed (and the same other arguments) gives the same pixels, labels and reports, whatever
            `workers` is.
        mpp: micrometres per pixel of level 0. Structures keep their size in micrometres: 30-48 um across.
        size: level-0 width and height in pixels.
        normal_fraction: share of slides without tumour; their `subtype` and gene columns are empty (missing).
        witness: least and greatest fraction of the tissue area taken by tumour in a tumour slide.
        contrast: how clear the arrangement of nuclei is, in [0, 1]; lower is harder.
        texture: how much the nuclei of the two subtypes differ in shape and chromatin, in [0, 1]. Even an
            untrained encoder sees texture, so lower is harder for a frozen one above all.
        stain_variation: spread of colour between slides: 0 none, 1 one laboratory, 3 several; higher is
            harder.
        missing_genes: share of tumour slides whose gene status is left empty, drawn for each gene.
        two_slide_fraction: share of cases that have two slides (and one report).
        truth_tile: tile side in level-0 pixels for the tumour tile list of `truth.json`.
        workers: threads that paint; None takes one per processor, four at most.

    Returns:
        The path of `cohort.csv`, with columns slide_id, case_id, path (relative to the CSV), report (text),
        subtype ("glandular" | "squamous" | empty), tumour ("tumour" | "normal"), EGFR and TP53
        ("1" | "0" | empty), split.

    Raises:
        ValueError: a count, fraction, size or mpp is out of its range; the message names it.

    `truth.json` holds per slide the tumour structures in level-0 pixels and the tiles of a grid that starts
    at (0, 0) and show tumour; `read_truth` and `tumour_tiles` read it for any other grid.
    """
    plans = plan_cohort(
        train=train,
        val=val,
        test=test,
        seed=seed,
        mpp=mpp,
        size=size,
        normal_fraction=normal_fraction,
        witness=witness,
        contrast=contrast,
        texture=texture,
        stain_variation=stain_variation,
        missing_genes=missing_genes,
        two_slide_fraction=two_slide_fraction,
    )
    if truth_tile < 1:
        raise ValueError(f"truth_tile must be at least 1 pixel, got {truth_tile}")
    out = Path(out_dir)
    (out / "slides").mkdir(parents=True, exist_ok=True)

    def draw(plan: SlidePlan) -> tuple[str, dict[str, Any]]:
        pixels, structures = paint(plan.tissue, np.random.default_rng([seed, 1, plan.index]))
        write_pyramid(out / "slides" / plan.file_name, pixels, mpp=mpp)
        tiles = _truth_tiles(structures, size, truth_tile)
        return plan.slide_id, {
            "dimensions": list(size),
            "structures": np.round(structures, 1).tolist(),
            "tiles": tiles.tolist(),
        }

    threads = workers if workers is not None else min(4, os.cpu_count() or 1)
    # Threads, not processes: the time goes to numpy and the JPEG coder, which let go of the interpreter lock.
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        drawn = progress(pool.map(draw, plans), "painting slides", total=len(plans), unit="slide")
        truth = dict(drawn)

    write_text_atomic(
        out / TRUTH_FILE, json.dumps({"mpp": mpp, "tile_size": truth_tile, "slides": truth}, indent=None)
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plan.row() for plan in plans)
    # The CSV comes last: where it is, every slide it names is there too.
    write_text_atomic(out / "cohort.csv", text.getvalue())
    return out / "cohort.csv"


def plan_cohort(
    *,
    train: int,
    val: int,
    test: int,
    seed: int,
    mpp: float,
    size: tuple[int, int],
    normal_fraction: float,
    witness: tuple[float, float],
    contrast: float,
    texture: float,
    stain_variation: float,
    missing_genes: float,
    two_slide_fraction: float,
) -> list[SlidePlan]:
    """Draws cases, labels and reports of a cohort but no pixels. Arguments as in `make_cohort`."""
    counts = {"train": train, "val": val, "test": test}
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} must be 0 or more slides, got {count}")
    fractions = {
        "normal_fraction": normal_fraction,
        "missing_genes": missing_genes,
        "two_slide_fraction": two_slide_fraction,
        "witness[0]": witness[0],
        "witness[1]": witness[1],
        "contrast": contrast,
        "texture": texture,
    }
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    if stain_variation < 0:
        raise ValueError(f"stain_variation must be 0 or more, got {stain_variation}")
    if not 0 < witness[0] <= witness[1]:
        raise ValueError(f"witness must be (least, greatest) with 0 < least <= greatest, got {witness}")
    if mpp <= 0:
        raise ValueError(f"mpp must be positive, got {mpp}")
    if min(size) * mpp < 300:
        raise ValueError(
            f"size {size} at {mpp} um/px is too small for tissue: each side needs at least 300 um"
        )

    rng = np.random.default_rng([seed, 0])
    plans: list[SlidePlan] = []
    case_number = 0
    for split, count in counts.items():
        classes = _balanced_classes(count, normal_fraction, rng)
        while classes:
            subtype = classes.pop()
            slides = 1
            if subtype in classes and rng.random() < two_slide_fraction:
                classes.remove(subtype)
                slides = 2
            case_number += 1
            case_id = f"SYN-{case_number:04d}"
            mutated = {gene: bool(rng.random() < 0.45) for gene in ("EGFR", "TP53")}
            genes = {
                gene: "" if subtype is None or rng.random() < missing_genes else str(int(value))
                for gene, value in mutated.items()
            }
            report = write_report(subtype, rng)
            for number in range(slides):
                tissue = TissueSpec(
                    width=size[0],
                    height=size[1],
                    mpp=mpp,
                    subtype=subtype,
                    witness=float(rng.uniform(*witness)),
                    contrast=contrast,
                    texture=texture,
                    stain_variation=stain_variation,
                )
                if subtype is not None:
                    tissue = _with_mutations(tissue, mutated, rng)
                plans.append(
                    SlidePlan(
                        index=len(plans),
                        slide_id=f"{case_id}-{'AB'[number]}",
                        case_id=case_id,
                        split=split,
                        report=report,
                        genes=genes,
                        tissue=tissue,
                    )
                )
    return plans


def _balanced_classes(count: int, normal_fraction: float, rng: np.random.Generator) -> list[str | None]:
    """`count` classes in random order, as balanced as the count allows."""
    normal = round(count * normal_fraction)
    tumour = [SUBTYPES[i % 2] for i in range(count - normal)]
    classes: list[str | None] = [*tumour, *[None] * normal]
    return [classes[i] for i in rng.permutation(count)]


def _with_mutations(tissue: TissueSpec, mutated: dict[str, bool], rng: np.random.Generator) -> TissueSpec:
    """EGFR makes tumour nuclei larger, TP53 makes them uneven; both overlap with wild-type slides."""
    return replace(
        tissue,
        nuclear_scale=float((1.16 if mutated["EGFR"] else 1.0) * np.exp(rng.normal(0, 0.05))),
        pleomorphism=float((0.22 if mutated["TP53"] else 0.09) * np.exp(rng.normal(0, 0.25))),
    )


def write_pyramid(
    path: str | os.PathLike[str],
    pixels: NDArray[np.uint8],
    *,
    mpp: float,
    tile: int = 128,
    quality: int = 90,
    levels: int = 3,
) -> None:
    """Writes RGB pixels as a tiled pyramidal JPEG TIFF with its resolution; openslide and cuCIM read it.

    Args:
        path: file to write; it appears whole or not at all.
        pixels: uint8 [h, w, 3].
        mpp: micrometres per pixel of level 0, stored as pixels per centimetre.
        tile: side of the stored tiles in pixels, a multiple of 16.
        quality: JPEG quality, 1 to 100.
        levels: number of levels, each half the size of the one before.

    Raises:
        ValueError: pixels of another shape or dtype.
        ImportError: tifffile or imagecodecs is missing.
    """
    try:
        import imagecodecs  # noqa: F401  tifffile finds it by itself; without it JPEG fails late, unclearly
        import tifffile
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"writing slides needs {error.name}: pip install 'dre_fast[wsi]'") from error
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"{path}: pixels must be uint8 [h, w, 3], got {pixels.dtype} {list(pixels.shape)}")
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=False) as writer:
        for level in range(levels):
            scale = 2**level
            image = np.asarray(Image.fromarray(pixels).reduce(scale)) if level else pixels
            writer.write(
                image,
                photometric="rgb",
                tile=(tile, tile),
                compression="jpeg",
                compressionargs={"level": quality},
                # Readers take reduced-resolution pages of the main chain as the lower levels.
                subfiletype=1 if level else 0,
                resolution=(1e4 / (mpp * scale), 1e4 / (mpp * scale)),
                resolutionunit="CENTIMETER",
                metadata=None,
                software="dre_fast synthetic cohort",
            )


def read_truth(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float64]]:
    """Reads `truth.json`, or the one in a folder: slide_id -> structures float64 [n, 3] (x, y, radius)."""
    file = Path(path)
    if file.is_dir():
        file = file / TRUTH_FILE
    slides = json.loads(file.read_text(encoding="utf-8"))["slides"]
    return {
        name: np.asarray(slide["structures"], dtype=np.float64).reshape(-1, 3)
        for name, slide in slides.items()
    }


def tumour_tiles(
    structures: NDArray[np.float64], coords: NDArray[np.int64], tile_size: float, min_cover: float = 0.15
) -> NDArray[np.bool_]:
    """Which tiles show tumour.

    Args:
        structures: float64 [n, 3], (x, y, radius) in level-0 pixels, as `read_truth` gives them.
        coords: int64 [N, 2], top-left corners in level-0 pixels.
        tile_size: side of a tile in level-0 pixels.
        min_cover: least fraction of a tile that structures must cover.

    Returns:
        bool [N].
    """
    covered = np.zeros(len(coords))
    if len(structures) and len(coords):
        # Sampling each tile on a 12 x 12 grid is exact to about one per cent.
        offset = (np.arange(12) + 0.5) * tile_size / 12
        inside = np.zeros((len(coords), 12, 12), dtype=bool)
        for x, y, radius in structures:
            near = np.nonzero((np.abs(coords + tile_size / 2 - (x, y)) < radius + tile_size / 2).all(1))[0]
            dx = coords[near, 0, None] + offset - x
            dy = coords[near, 1, None] + offset - y
            inside[near] |= dy[:, :, None] ** 2 + dx[:, None, :] ** 2 <= radius**2
        covered = inside.mean((1, 2))
    return covered >= min_cover


def _truth_tiles(structures: NDArray[np.float64], size: tuple[int, int], tile: int) -> NDArray[np.int64]:
    """Tumour tiles of the grid that starts at (0, 0): int64 [n, 2]."""
    x, y = np.meshgrid(np.arange(0, size[0] - tile + 1, tile), np.arange(0, size[1] - tile + 1, tile))
    grid = np.stack([x.reshape(-1), y.reshape(-1)], -1)
    return grid[tumour_tiles(structures, grid, tile)]
