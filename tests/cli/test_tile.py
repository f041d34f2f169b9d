from __future__ import annotations

import argparse
import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openslide")
pytest.importorskip("tifffile")
pytest.importorskip("h5py")

import tifffile
from PIL import Image

from dre_fast.cli import tile
from dre_fast.data.coords import read_coords


def run(*argv: str | Path) -> int:
    parser = argparse.ArgumentParser()
    tile.add_parser(parser.add_subparsers())
    args = parser.parse_args(["tile", *map(str, argv)])
    return args.run(args)


def write_slide(path: Path, mpp: float | None = 0.5, glass: bool = False) -> Path:
    image = np.full((512, 768, 3), 244, dtype=np.uint8)
    if not glass:
        image[:, 256:] = (200, 110, 160)
    resolution = {} if mpp is None else {"resolution": (1e4 / mpp,) * 2, "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(
        path, image, tile=(256, 256), photometric="rgb", compression="jpeg", metadata=None, **resolution
    )
    return path


@pytest.fixture
def slides(tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in ("a", "b"):
        write_slide(folder / f"{name}.tif")
    return folder


def summary(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "tiles.csv", newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def test_a_folder_of_slides(slides, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(slides, "--out", out) == 0
    tiling = read_coords(out / "a.h5")
    assert tiling.coords.tolist() == [[256, 0], [512, 0], [256, 256], [512, 256]]
    row = summary(out)["b"]
    assert (row["n_tiles"], row["level"], row["read_size"], row["mpp"], row["status"]) == (
        "4",
        "0",
        "256",
        "0.5",
        "tiled",
    )
    assert "2 slides, 8 tiles" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["a.h5", "b.h5", "tiles.csv"]


def test_a_cohort_table(slides, tmp_path):
    table = tmp_path / "cohort.csv"
    table.write_text("slide_id,case_id,path,grade\nfirst,p1,slides/a.tif,2\nsecond,p2,slides/b.tif,\n")
    assert run(table, "--out", tmp_path / "out", "--tile-size", "128", "--overlap", "64") == 0
    assert read_coords(tmp_path / "out/second.h5").overlap == 64
    with pytest.raises(ValueError, match="either one cohort table or slides"):
        run(table, slides, "--out", tmp_path / "out")


def test_a_second_run_reuses_and_refuses_other_settings(slides, tmp_path):
    out = tmp_path / "out"
    run(slides, "--out", out)
    before = (out / "a.h5").stat().st_mtime_ns
    write_slide(slides / "c.tif")
    assert run(slides, "--out", out, "--overview") == 0
    assert {k: v["status"] for k, v in summary(out).items()} == {"a": "reused", "b": "reused", "c": "tiled"}
    assert (out / "a.h5").stat().st_mtime_ns == before
    assert Image.open(out / "overview/a.jpg").size == (768, 512)
    with pytest.raises(
        ValueError, match=r"a\.h5: exists and was made with min_tissue=0\.25, now 0\.5.*--overwrite"
    ):
        run(slides, "--out", out, "--min-tissue", "0.5")
    with pytest.raises(ValueError, match=r"slide_mpp=0\.5, now 0\.25"):
        run(slides, "--out", out, "--mpp", "0.25", "--force-mpp")
    assert run(slides, "--out", out, "--min-tissue", "0.5", "--overwrite") == 0
    assert read_coords(out / "a.h5").min_tissue == 0.5


def test_the_first_bad_slide_stops_and_the_rest_stays(slides, tmp_path):
    out = tmp_path / "out"
    (slides / "b.tif").write_bytes(b"half a download")
    write_slide(slides / "c.tif")
    with pytest.raises(
        ValueError, match=r"b\.tif: OpenSlide cannot read it(.|\n)*slide 2 of 3(.|\n)*--skip-bad"
    ):
        run(slides, "--out", out, "--workers", "1")
    assert (out / "a.h5").exists()
    assert {k: v["status"] for k, v in summary(out).items()} == {"a": "tiled", "b": "failed"}


def test_skip_bad_names_counts_and_lists(slides, tmp_path, capsys):
    out = tmp_path / "out"
    (slides / "b.tif").write_bytes(b"half a download")
    write_slide(slides / "c.tif", mpp=None)
    write_slide(slides / "d.tif", glass=True)
    assert run(slides, "--out", out, "--skip-bad") == 0
    printed = capsys.readouterr()
    assert "1 slide, 4 tiles" in printed.out
    assert "skipped 3 of 4 slides" in printed.err
    for name, reason in (("b", "cannot read"), ("c", "--mpp"), ("d", "no tissue")):
        assert any(line.startswith(f"  {name}: ") and reason in line for line in printed.err.splitlines())
    rows = summary(out)
    assert [rows[k]["status"] for k in "abcd"] == ["tiled", "skipped", "skipped", "skipped"]
    assert "no tissue" in rows["d"]["message"]
    assert sorted(p.name for p in out.glob("*.h5")) == ["a.h5"]


def test_mpp_is_for_slides_without_and_force_mpp_for_all(slides, tmp_path):
    write_slide(slides / "c.tif", mpp=None)
    run(slides, "--out", tmp_path / "one", "--mpp", "0.25")
    assert [summary(tmp_path / "one")[k]["slide_mpp"] for k in "abc"] == ["0.5", "0.5", "0.25"]
    run(slides, "--out", tmp_path / "two", "--mpp", "0.25", "--force-mpp")
    assert [summary(tmp_path / "two")[k]["slide_mpp"] for k in "abc"] == ["0.25", "0.25", "0.25"]
    with pytest.raises(ValueError, match="--force-mpp needs --mpp"):
        run(slides, "--out", tmp_path / "three", "--force-mpp")


@pytest.mark.parametrize("mpp", ["-1", "0", "nan"])
def test_an_impossible_mpp_is_refused_even_where_it_is_not_needed(slides, tmp_path, mpp):
    with pytest.raises(ValueError, match=r"--mpp .*must be a positive"):
        run(slides, "--out", tmp_path / "out", "--mpp", mpp)


def test_nothing_left_is_an_error(tmp_path):
    write_slide(tmp_path / "glass.tif", glass=True)
    with pytest.raises(ValueError, match=r"none of 1 slides could be tiled.*glass\.tif"):
        run(tmp_path / "glass.tif", "--out", tmp_path / "out", "--skip-bad")


def test_folders_of_tile_images(tmp_path):
    for case in ("p1", "p2"):
        folder = tmp_path / "cases" / case
        folder.mkdir(parents=True)
        for x in (0, 256):
            Image.new("RGB", (256, 256), (200, 90, 160)).save(folder / f"{x}_0.png")
    assert run(tmp_path / "cases", "--out", tmp_path / "out", "--mpp", "0.5") == 0
    assert sorted(summary(tmp_path / "out")) == ["p1", "p2"]
    assert run(tmp_path / "cases/p1", "--out", tmp_path / "one", "--mpp", "0.5") == 0
    assert read_coords(tmp_path / "one/p1.h5").coords.tolist() == [[0, 0], [256, 0]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no slide files and no tile images"):
        run(tmp_path / "empty", "--out", tmp_path / "out")


def test_two_slides_of_one_name(slides, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(slides / "a.tif", other / "a.tif")
    with pytest.raises(
        ValueError, match=r"slide id a stands for two slides: .*slides/a\.tif and .*other/a\.tif"
    ):
        run(slides, other, "--out", tmp_path / "out")


def test_real_slides_behave_as_promised(test_data, tmp_path, capsys):
    folder = test_data / "slides"
    with pytest.raises(
        ValueError, match=r"TCGA-CR-7395-01A-01-TS1\.svs: unknown microns per pixel(.|\n)*--mpp"
    ):
        run(folder / "TCGA-CR-7395-01A-01-TS1.svs", "--out", tmp_path / "one")
    with pytest.raises(ValueError, match=r"broken\.svs"):
        run(folder, "--out", tmp_path / "two", "--mpp", "0.5")
    assert run(folder, "--out", tmp_path / "two", "--mpp", "0.5", "--skip-bad") == 0
    assert "skipped 1 of 3 slides:\n  broken: " in capsys.readouterr().err
    rows = summary(tmp_path / "two")
    assert rows["CMU-1-Small-Region"]["mpp"] == "0.499"
    assert int(rows["TCGA-CR-7395-01A-01-TS1"]["n_tiles"]) > 100


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    for option in ("--mpp", "--mpp-out", "--tile-size", "--skip-bad", "--overview", "--backend", "--workers"):
        assert option in text


def test_the_command_itself_imports_nothing_heavy():
    code = "import sys; import dre_fast.cli.tile; assert not {'h5py', 'openslide', 'PIL'} & set(sys.modules)"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
