"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dre_fast.train.config import Config


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
