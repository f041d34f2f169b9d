"""A model is applied to tiles of the size and resolution it was trained on, and to no others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from train_cohort import TILE, tiny_config

from dre_fast.cli import main
from dre_fast.data.cohort import Cohort
from dre_fast.data.coords import read_coords, write_coords
from dre_fast.data.slides import open_slide
from dre_fast.data.tiling import tile_slide
from dre_fast.train.build import slide_set
from dre_fast.train.loop import Trainer
from dre_fast.train.tile_scales import check_scales, scale_of

OTHERS = {"coarse": (TILE, 2.0), "large": (2 * TILE, 1.0)}


@pytest.fixture(scope="module")
def others(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of other tiles of the same slides."""
    root = tmp_path_factory.mktemp("others")
    for name, (size, mpp) in OTHERS.items():
        for file in sorted(tiny_cohort.glob("*.npy")):
            with open_slide(file, mpp=1.0) as slide:
                tiling = tile_slide(slide, tile_size=size, mpp=mpp, min_tissue=0.0)
            write_coords(root / name / f"{file.stem}.h5", tiling)
    return root


def test_a_model_is_not_applied_to_other_tiles(
    tiny_cohort: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = Trainer(tiny_config(tiny_cohort, "optim.epochs=1"), tmp_path / "run").fit()
    with safe_open(run / "best.safetensors", "pt") as file:
        assert json.loads(file.metadata()["dre_fast"])["tiles"] == [{"tile_size": TILE, "mpp": 1.0}]

    def apply(command: str, tiles: Path) -> tuple[int, str]:
        out = str(tmp_path / ("e.safetensors" if command == "encode" else "maps"))
        code = main(
            [
                *(command, str(run), "--cohort", str(tiny_cohort / "cohort.csv"), "--mpp", "1"),
                *("--tiles", str(tiles), "--out", out),
            ]
        )
        return code, capsys.readouterr().err

    for command in ("encode", "heatmap"):
        code, said = apply(command, others / "coarse")
        assert code
        assert (
            "slide s0: its tiles are 32 px of 2 um/px, and the model was trained on 32 px of 1 um/px" in said
        )
        code, said = apply(command, others / "large")
        assert code
        assert "64 px of 1 um/px" in said
    assert not (tmp_path / "e.safetensors").exists()
    assert apply("encode", tiny_cohort / "tiles")[0] == 0


def test_a_folder_of_two_resolutions_is_refused(tiny_cohort: Path, others: Path, tmp_path: Path) -> None:
    for i in range(10):
        of = others / "coarse" if i == 3 else tiny_cohort / "tiles"
        write_coords(tmp_path / f"s{i}.h5", read_coords(of / f"s{i}.h5"))
    with pytest.raises(
        ValueError, match=rf"slide s3: its tiles in {tmp_path} have 2 um/px, those of s0 1 um/px"
    ):
        Trainer(tiny_config(tiny_cohort, f"data.tiles={tmp_path}"), tmp_path / "run")
    cohort = Cohort.read(tiny_cohort / "cohort.csv")
    with pytest.raises(ValueError, match=r"different sizes: .*tiles 32 px, .*large 64 px"):
        slide_set(cohort, cohort.records, [tiny_cohort / "tiles", others / "large"], mpp=1.0)


def test_files_that_do_not_tell_their_resolution_pass(tiny_cohort: Path) -> None:
    tilings = [read_coords(tiny_cohort / "tiles" / f"s{i}.h5") for i in range(3)]
    silent = replace(tilings[0], mpp=None)
    assert scale_of([silent, *tilings], "tiles") == {"tile_size": TILE, "mpp": 1.0}
    assert scale_of([silent, silent], "tiles") == {"tile_size": TILE, "mpp": None}
    check_scales([silent], [{"tile_size": TILE, "mpp": 0.5}])
    check_scales(tilings, None)  # a model that does not tell
    check_scales([replace(tilings[0], mpp=0.52)], [{"tile_size": TILE, "mpp": 0.5}])
    with pytest.raises(ValueError, match=r"64 px, and the model was trained on 32 px of 0\.5 um/px"):
        check_scales([replace(silent, tile_size=64)], [{"tile_size": TILE, "mpp": 0.5}])
