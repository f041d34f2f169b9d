"""Tiling all slides of a cohort into a folder of coordinate files, and a table of what became of each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

from dre_fast.data.coords import CoordsError, read_coords, write_coords
from dre_fast.data.files import atomic_path, write_text_atomic
from dre_fast.data.optional import need
from dre_fast.data.overview import draw_overview
from dre_fast.data.slides import Slide, SlideError, open_slide
from dre_fast.data.tiling import Tiling, fit_to_slide, tile_slide
from dre_fast.progress import progress

SUMMARY = "tiles.csv"


class NamedSlide(Protocol):
    """What is needed of a cohort record."""

    @property
    def slide_id(self) -> str: ...

    @property
    def path(self) -> Path | None: ...


@dataclass(frozen=True)
class TileSettings:
    """How every slide of a cohort is tiled; the arguments of ``tile_slide``."""

    tile_size: int = 256
    mpp: float = 0.5
    overlap: int = 0
    tissue: str = "otsu-saturation"
    min_tissue: float = 0.25
    edge: str = "drop"
    allow_upsample: bool = False


@dataclass(frozen=True)
class TileResult:
    """One row of ``tiles.csv``.

    Attributes:
        status: ``"tiled"``, ``"reused"`` (an up-to-date file was there), ``"skipped"`` or ``"failed"``.
        mpp: microns per pixel of the tiles as they come out.
        message: why a slide was skipped or failed, else empty.
    """

    slide_id: str
    status: str
    n_tiles: int = 0
    level: int | None = None
    read_size: int | None = None
    mpp: float | None = None
    slide_mpp: float | None = None
    path: str = ""
    message: str = ""


def tile_cohort(
    records: Iterable[NamedSlide],
    out_dir: str | Path,
    settings: TileSettings | None = None,
    *,
    backend: str = "auto",
    slide_mpp: float | None = None,
    force_mpp: bool = False,
    skip_bad: bool = False,
    overwrite: bool = False,
    overview: bool = False,
    workers: int = 1,
) -> list[TileResult]:
    """Tiles every slide and writes ``out_dir/<slide_id>.h5`` and ``out_dir/tiles.csv``.

    A file of an earlier run is reused when it was made with the same settings for a slide of the same size
    and pixel size; otherwise it is an error, so that no run mixes two tilings.

    Args:
        records: anything with ``slide_id`` and ``path``, e.g. a ``Cohort``.
        out_dir: folder for the coordinate files.
        settings: how to tile.
        backend: as for ``open_slide``.
        slide_mpp: microns per pixel of level 0 of the slides that do not state it.
        force_mpp: use ``slide_mpp`` also for slides that state something else.
        skip_bad: go on after a slide that does not open, has no tissue or no pixel size.
        overwrite: tile again what is there already.
        overview: also write ``out_dir/overview/<slide_id>.jpg``, the slide with its tiles, to look at.
        workers: slides tiled at a time (threads).

    Returns:
        One result a slide, in the order of ``records``.

    Raises:
        SlideError: a bad slide without ``skip_bad`` (files of other slides stay), or no slide left.
        CoordsError: an existing file differs in its settings; names the file and the setting.
        ValueError: a slide without path, or a slide id that is repeated or no file name.
    """
    settings = settings or TileSettings()
    out_dir = Path(out_dir)
    slides = _checked(records)
    job = _Job(settings, out_dir, backend, slide_mpp, force_mpp, overwrite, overview)
    results: list[TileResult] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(job.run, slide_id, path) for slide_id, path in slides]
        try:
            pairs = zip(slides, futures, strict=True)
            for (slide_id, path), future in progress(pairs, "tiling", len(slides), "slide"):
                results.append(_result(future, slide_id, path, skip_bad))
                if results[-1].status == "failed":
                    break
        finally:
            for future in futures:
                future.cancel()
            if results:
                _write_summary(out_dir / SUMMARY, results)
    bad = [r for r in results if r.status in ("failed", "skipped")]
    if bad and bad[-1].status == "failed":
        raise SlideError(
            f"{bad[-1].message}\nStopped at slide {len(results)} of {len(slides)}; what is written in "
            f"{out_dir} stays and is reused. To leave such slides out: --skip-bad"
        )
    if len(bad) == len(results):
        raise SlideError(f"none of {len(results)} slides could be tiled, the first: {bad[0].message}")
    return results


@dataclass(frozen=True)
class _Job:
    settings: TileSettings
    out_dir: Path
    backend: str
    slide_mpp: float | None
    force_mpp: bool
    overwrite: bool
    overview: bool

    def run(self, slide_id: str, path: Path) -> tuple[Tiling, str]:
        """Tiles one slide; returns the tiling and the status."""
        file = self.out_dir / f"{slide_id}.h5"
        with open_slide(path, self.backend, self.slide_mpp if self.force_mpp else None) as slide:
            if slide.mpp is None:
                slide.mpp = self.slide_mpp
            if file.exists() and not self.overwrite:
                tiling, status = self._reuse(file, slide), "reused"
            else:
                tiling, status = tile_slide(slide, slide_id=slide_id, **asdict(self.settings)), "tiled"
                write_coords(file, tiling)
            picture = self.out_dir / "overview" / f"{slide_id}.jpg"
            if self.overview and (status == "tiled" or not picture.exists()):
                _write_picture(picture, slide, tiling)
        return tiling, status

    def _reuse(self, file: Path, slide: Slide) -> Tiling:
        """The tiling of an earlier run, or an error that names what differs."""
        tiling = read_coords(file)
        asked = {f.name: getattr(self.settings, f.name) for f in fields(self.settings)}
        asked.pop("allow_upsample")
        asked["slide_mpp"] = slide.require_mpp()
        if asked["tissue"] == "none":
            asked.pop("min_tissue")
        for name, value in asked.items():
            stored = getattr(tiling, name)
            if stored != value:
                raise CoordsError(
                    f"{file}: exists and was made with {name}={stored}, now {value} is asked for; choose "
                    "another --out, or tile again with --overwrite"
                )
        return fit_to_slide(tiling, slide)


def _checked(records: Iterable[NamedSlide]) -> list[tuple[str, Path]]:
    slides: dict[str, Path] = {}
    for record in records:
        name, path = record.slide_id, record.path
        if path is None:
            raise ValueError(f"slide {name}: the cohort gives no path for it")
        if not name or name in (".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"slide {name!r}: its id cannot be used as a file name")
        if name in slides:
            raise ValueError(f"slide id {name} stands for two slides: {slides[name]} and {path}")
        slides[name] = Path(path)
    if not slides:
        raise ValueError("no slides to tile")
    return list(slides.items())


def _result(future: Future[tuple[Tiling, str]], slide_id: str, path: Path, skip_bad: bool) -> TileResult:
    try:
        tiling, status = future.result()
    except SlideError as error:
        return TileResult(slide_id, "skipped" if skip_bad else "failed", path=str(path), message=str(error))
    return TileResult(
        slide_id,
        status,
        len(tiling),
        tiling.level,
        tiling.read_size,
        tiling.true_mpp,
        tiling.slide_mpp,
        str(path),
    )


def _write_summary(path: Path, results: Sequence[TileResult]) -> None:
    text = io.StringIO()
    names = [f.name for f in fields(TileResult)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for result in results:
        row = {k: "" if v is None else v for k, v in asdict(result).items()}
        row.update({k: f"{row[k]:.6g}" for k in ("mpp", "slide_mpp") if row[k] != ""})
        writer.writerow(row)
    write_text_atomic(path, text.getvalue())


def _write_picture(path: Path, slide: Slide, tiling: Tiling) -> None:
    picture = need("PIL.Image", "wsi").fromarray(draw_overview(slide, tiling))
    with atomic_path(path) as temporary:
        picture.save(temporary, quality=85)
