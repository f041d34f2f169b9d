"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dre_fast.data.cohort import Cohort
    from dre_fast.train.build import SlideSet
    from dre_fast.train.config import Config
    from dre_fast.train.inference import LoadedRun


def add_model_and_slides(parser: argparse.ArgumentParser) -> None:
    """A trained model and the tiled cohort it is applied to."""
    parser.add_argument("model", help="run folder, or a .safetensors model file")
    parser.add_argument("--cohort", required=True, help="cohort CSV; labels and splits are not needed")
    parser.add_argument(
        "--tiles",
        required=True,
        action="append",
        help="folder that `dre-fast tile` wrote for this cohort; repeat it for a model of several magnifications",
    )
    parser.add_argument(
        "--backend", default="auto", help="slide reader: auto, openslide, cucim, images, array"
    )
    parser.add_argument("--mpp", type=float, help="um/px of slides that do not say")
    parser.add_argument(
        "--skip-untiled",
        action="store_true",
        help="leave out slides without tiles, e.g. those that `dre-fast tile --skip-bad` skipped",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--chunk", type=positive, default=256, help="tiles encoded at once")


def add_judging(parser: argparse.ArgumentParser) -> None:
    """How scores are judged."""
    parser.add_argument(
        "--level",
        choices=("slide", "patient"),
        default="slide",
        help="patient: average a case's slides first",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=1000, help="resamples by case; 0 for no intervals (default: 1000)"
    )


def check_magnifications(folders: Sequence[str], trained: Config) -> None:
    """Refuse other numbers of magnifications than a model was trained on.

    Raises:
        ValueError: names the folders of the training.
    """
    expected = trained.data.tile_folders
    if len(folders) != len(expected):
        raise ValueError(
            f"the model was trained on tiles of {len(expected)} folders ({', '.join(expected)}): give --tiles "
            f"{len(expected)} times, one folder for each magnification, not {len(folders)} times"
        )


def open_model_and_slides(args: argparse.Namespace, cohort: Cohort) -> tuple[LoadedRun, SlideSet]:
    """The model and the tiled slides that the arguments of :func:`add_model_and_slides` name, fit for each other.

    Args:
        cohort: the slides wanted of ``args.cohort``.

    Raises:
        ValueError: another number of magnifications, or tiles of another scale, than the model was trained on; and as of
            ``load_run`` and ``slide_set``.
    """
    from dre_fast.train.build import slide_set
    from dre_fast.train.checks import pick_device
    from dre_fast.train.inference import load_run

    loaded = load_run(args.model, pick_device(args.device))
    check_magnifications(args.tiles, loaded.config)
    slides = slide_set(
        cohort,
        cohort.records,
        args.tiles,
        backend=args.backend,
        mpp=args.mpp,
        skip_untiled=args.skip_untiled,
    )
    loaded.check_tiles(slides)
    return loaded, slides


def labelled_bags(args: argparse.Namespace) -> Cohort:
    """The cohort of the folder ``args.features`` and the table ``args.labels``, read as :func:`add_labels` says.

    Raises:
        ValueError: as of :func:`dre_fast.data.bag_cohort.bag_cohort`.
    """
    from dre_fast.data.bag_cohort import bag_cohort, yes_where_not

    cohort = bag_cohort(
        args.features,
        args.labels,
        slide_column=args.slide_column,
        case_column=args.case_column,
        missing=args.missing,
        skip_missing=args.skip_missing,
    )
    return yes_where_not(cohort, args.negative) if args.negative else cohort


def counted(number: int, noun: str) -> str:
    """``1 slide``, ``2,000 slides``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def add_labels(parser: argparse.ArgumentParser) -> None:
    """How a table of labels is read and joined to bags."""
    parser.add_argument("--slide-column", metavar="NAME", help="column of slides, where it is not slide_id")
    parser.add_argument("--case-column", metavar="NAME", help="column of patients, where it is not case_id")
    parser.add_argument(
        "--missing",
        nargs="+",
        default=(),
        metavar="VALUE",
        help="label cells that mean 'unknown', besides empty ones and NA; e.g. NS in cBioPortal tables",
    )
    parser.add_argument(
        "--negative",
        nargs="+",
        default=(),
        metavar="VALUE",
        help="label cells that mean no, such as WT; in the columns that have one, anything else is yes",
    )
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out slides (or cases) without a bag, and bags without a row",
    )


def validation(text: str) -> str | float:
    """Where validation slides come from: ``fold``, ``none`` or a share in (0, 1)."""
    if text in ("fold", "none"):
        return text
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be fold, none or a share between 0 and 1")
    return share
