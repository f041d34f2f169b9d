"""``dre-fast tile``: coordinates of the tissue tiles of every slide."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dre_fast.cli.common import counted

if TYPE_CHECKING:
    from dre_fast.data.cohort_tiling import NamedSlide, TileResult

EXAMPLES = """examples:
  dre-fast tile cohort.csv --out tiles
      256 px tiles at 0.5 um/px (20x) of every slide of the table
  dre-fast tile slides/ --out tiles --overview --skip-bad
      every slide of a folder; pictures of the tiles in tiles/overview; unreadable slides are listed
  dre-fast tile scan.svs --out tiles --mpp 0.25 --tile-size 224 --mpp-out 1.0
      a slide whose file does not state its pixel size, tiled at 10x
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "tile",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="find the tissue tiles of every slide, to HDF5",
        description=(
            "Find the tissue of every slide, lay a grid of tiles over it, and write the coordinates to\n"
            "OUT/<slide_id>.h5 (also readable by CLAM and TRIDENT) and a summary to OUT/tiles.csv.\n"
            "Run again, it reuses what is there and does the rest."
        ),
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "slides",
        nargs="+",
        metavar="COHORT.csv|SLIDE",
        help="a cohort table (columns slide_id, path), or slide files, folders of slides or of tile images",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the coordinate files")
    tiles = parser.add_argument_group("tiles")
    tiles.add_argument(
        "--tile-size", type=int, default=256, metavar="PX", help="side in pixels (default 256)"
    )
    tiles.add_argument(
        "--mpp-out",
        type=float,
        default=0.5,
        metavar="UM",
        help="microns per pixel of the tiles (default 0.5, i.e. 20x)",
    )
    tiles.add_argument(
        "--overlap", type=int, default=0, metavar="PX", help="pixels shared by neighbours (default 0)"
    )
    tiles.add_argument(
        "--tissue",
        choices=("otsu-saturation", "none"),
        default="otsu-saturation",
        help="how tissue is found; none keeps every tile (default otsu-saturation)",
    )
    tiles.add_argument(
        "--min-tissue",
        type=float,
        default=0.25,
        metavar="FRACTION",
        help="smallest part of a tile that must be tissue (default 0.25)",
    )
    tiles.add_argument(
        "--edge",
        choices=("drop", "pad"),
        default="drop",
        help="tiles that hang over the right and lower edge: left out, or filled with white (default drop)",
    )
    tiles.add_argument(
        "--allow-upsample", action="store_true", help="enlarge slides scanned coarser than --mpp-out"
    )
    slides = parser.add_argument_group("slides")
    slides.add_argument(
        "--mpp",
        type=float,
        metavar="UM",
        help="microns per pixel at full resolution, for slides whose file does not state it "
        "(usually 0.5 for 20x scans, 0.25 for 40x)",
    )
    slides.add_argument("--force-mpp", action="store_true", help="use --mpp for the other slides, too")
    slides.add_argument(
        "--backend",
        choices=("auto", "openslide", "cucim", "images", "array"),
        default="auto",
        help="reader (default auto: openslide for slide files, images for folders of tile images, array for "
        ".npy, PNG and JPEG)",
    )
    slides.add_argument(
        "--skip-bad",
        action="store_true",
        help="go on after slides that do not open, have no tissue or no pixel size, and list them at the end",
    )
    run_group = parser.add_argument_group("run")
    run_group.add_argument("--overwrite", action="store_true", help="tile again what is in OUT already")
    run_group.add_argument(
        "--overview", action="store_true", help="also write OUT/overview/<slide_id>.jpg, the tiles to look at"
    )
    run_group.add_argument("--workers", type=int, default=4, metavar="N", help="slides at a time (default 4)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tiles the slides; 0 when all, or with ``--skip-bad`` some, were tiled."""
    from dre_fast.data.cohort_tiling import SUMMARY, TileSettings, tile_cohort

    if args.mpp is not None and not 0 < args.mpp < math.inf:
        raise ValueError(f"--mpp {args.mpp}: must be a positive number of microns per pixel")
    if args.force_mpp and args.mpp is None:
        raise ValueError("--force-mpp needs --mpp")
    settings = TileSettings(
        tile_size=args.tile_size,
        mpp=args.mpp_out,
        overlap=args.overlap,
        tissue=args.tissue,
        min_tissue=args.min_tissue,
        edge=args.edge,
        allow_upsample=args.allow_upsample,
    )
    results = tile_cohort(
        _records([Path(s) for s in args.slides]),
        args.out,
        settings,
        backend=args.backend,
        slide_mpp=args.mpp,
        force_mpp=args.force_mpp,
        skip_bad=args.skip_bad,
        overwrite=args.overwrite,
        overview=args.overview,
        workers=args.workers,
    )
    _report(results, args.out, args.out / SUMMARY)
    return 0


@dataclass(frozen=True)
class _PathRecord:
    slide_id: str
    path: Path


def _records(paths: Sequence[Path]) -> Sequence[NamedSlide]:
    tables = [p for p in paths if p.suffix.lower() == ".csv"]
    if not tables:
        return [_PathRecord(_id_of(slide), slide) for path in paths for slide in _slides_in(path)]
    if len(paths) > 1:
        raise ValueError(f"give either one cohort table or slides, not {tables[0]} among other paths")
    from dre_fast.data.cohort import Cohort

    return Cohort.read(tables[0]).records


def _slides_in(path: Path) -> list[Path]:
    """The slides a path stands for: itself, the slide files of a folder, or folders of tile images."""
    from dre_fast.data.slides import IMAGE_SUFFIXES, SLIDE_SUFFIXES

    if not path.is_dir():
        return [path]
    inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    files = [p for p in inside if p.is_file() and p.suffix.lower() in SLIDE_SUFFIXES]
    if files:
        return files
    if any(p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES for p in inside):
        return [path]
    folders = [
        p for p in inside if p.is_dir() and any(f.suffix.lower() in IMAGE_SUFFIXES for f in p.iterdir())
    ]
    if not folders:
        raise ValueError(f"{path}: no slide files and no tile images in this folder")
    return folders


def _id_of(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _report(results: Sequence[TileResult], out: Path, summary: Path) -> None:
    done = [r for r in results if r.status in ("tiled", "reused")]
    reused = sum(r.status == "reused" for r in done)
    again = f" ({reused} from an earlier run)" if reused else ""
    tiles = sum(r.n_tiles for r in done)
    print(f"{counted(len(done), 'slide')}{again}, {counted(tiles, 'tile')} -> {out}, summary {summary}")
    skipped = [r for r in results if r.status == "skipped"]
    if skipped:
        print(f"skipped {len(skipped)} of {counted(len(results), 'slide')}:", file=sys.stderr)
        for result in skipped:
            print(f"  {result.slide_id}: {result.message}", file=sys.stderr)
