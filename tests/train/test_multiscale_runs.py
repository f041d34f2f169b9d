"""Runs on tiles at two magnifications, a part of them drawn by the report: trained, resumed, applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cohort import TILE, tiny_config, write_cohort

from dre_fast.cli import main
from dre_fast.data.cohort import Cohort
from dre_fast.data.coords import read_coords, write_coords
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.data.multiscale import JoinedTiling
from dre_fast.data.slides import open_slide
from dre_fast.data.tiling import tile_slide
from dre_fast.train.build import SlideSet, slide_set
from dre_fast.train.config import Config
from dre_fast.train.guided import ReportGuide
from dre_fast.train.loop import Trainer
from dre_fast.train.state import load_checkpoint, read_metrics

# the encoder moves fast and the bank with it, so that what the report draws depends on when it is asked
SETTINGS = [
    "memory.live=6",
    "memory.guided=0.7",
    "memory.candidates=12",
    "memory.guide_temperature=0.3",
    "memory.refresh=40",
    "memory.drift_limit=0",
    "optim.epochs=2",
    "optim.lr=0.02",
    "optim.encoder_lr_scale=1",
    "optim.warmup_steps=1",
    "optim.head_warmup_epochs=0",
    "run.probe_every=2",
    "run.checkpoint_every=1",
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Up to 25 tiles of a slide in ``tiles``, 4 of twice the pixel size in ``coarse``."""
    root = tmp_path_factory.mktemp("multiscale")
    write_cohort(root, slides=9)
    for i in range(9):
        with open_slide(root / f"s{i}.npy", mpp=1.0) as slide:
            tiling = tile_slide(slide, tile_size=TILE, mpp=2.0, min_tissue=0.0)
        assert len(tiling) == 4
        write_coords(root / "coarse" / f"s{i}.h5", tiling)
    return root


def config_of(cohort: Path, *overrides: str) -> Config:
    return tiny_config(cohort, f"data.tiles=[{cohort / 'tiles'}, {cohort / 'coarse'}]", *SETTINGS, *overrides)


@pytest.fixture(scope="module")
def run(cohort: Path) -> Path:
    return Trainer(config_of(cohort), cohort / "run").fit()


def rows(out: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if not k.endswith("seconds")}
        for row in read_metrics(out / "metrics.jsonl")
    ]


def opened(cohort: Path, *folders: str, **more: Any) -> SlideSet:
    whole = Cohort.read(cohort / "cohort.csv")
    return slide_set(whole, whole.records, [cohort / folder for folder in folders], mpp=1.0, **more)


def test_tiles_of_a_slide_are_those_of_all_folders(cohort: Path, tmp_path: Path) -> None:
    fine, coarse = opened(cohort, "tiles").reader, opened(cohort, "coarse").reader
    both = opened(cohort, "tiles", "coarse")
    n = fine.tiles_per_slide[4]
    assert both.tiles == [count + 4 for count in fine.tiles_per_slide]
    ids = torch.tensor([n + 3, 0, -1, n - 1, n, 3])
    expected = torch.stack(
        [
            torch.zeros(3, TILE, TILE, dtype=torch.uint8) if tile < 0
            else fine.read(4, [tile])[0] if tile < n
            else coarse.read(4, [tile - n])[0]
            for tile in ids.tolist()
        ]
    )  # fmt: skip
    assert both.reader.read(4, ids).equal(expected)
    assert both.share(torch.tensor([7, 4])).reader.read(1, ids).equal(expected)
    cached = opened(cohort, "tiles", "coarse", cache=tmp_path / "cache.h5")
    assert cached.reader.read(4, ids).equal(expected)
    assert both.reader.read(0, []).shape == (0, 3, TILE, TILE)
    assert isinstance(both.reader.tilings[4], JoinedTiling)
    assert both.reader.tilings[4].coords.shape == (n + 4, 2)


def test_bad_tilings_are_named(cohort: Path, tmp_path: Path) -> None:
    both = opened(cohort, "tiles", "coarse").reader
    with pytest.raises(ValueError, match="slide s3: no tile 29, it has tiles 0 to 28"):
        both.read(3, [2, 29])
    with pytest.raises(ValueError, match="no slide 9"):
        both.read(9, [0])
    with pytest.raises(ValueError, match="slide s0: its tiles of scale 1 are those of scale 0 again"):
        opened(cohort, "coarse", "coarse")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        opened(cohort, "tiles", "nowhere")
    for i in range(9):
        if i != 5:
            write_coords(tmp_path / f"s{i}.h5", read_coords(cohort / "coarse" / f"s{i}.h5"))
    with pytest.raises(ValueError, match=rf"slide s5: no tile coordinates at {tmp_path}/s5.h5 \(1 of 9"):
        opened(cohort, "tiles", str(tmp_path))
    with pytest.warns(UserWarning, match="1 of 9 slides have no tiles .*: s5"):
        assert len(opened(cohort, "tiles", str(tmp_path), skip_untiled=True)) == 8


def test_a_damaged_slide_is_named_with_its_scale(cohort: Path, tmp_path: Path) -> None:
    whole = Cohort.read(cohort / "cohort.csv")
    both = slide_set(whole, whole.records, [cohort / "tiles", cohort / "coarse"], mpp=1.0)
    path = whole.records[0].path
    assert path is not None
    content = Path(path).read_bytes()
    try:
        Path(path).unlink()
        with pytest.raises(ValueError, match=r"s0.*scale 1 of 2, 2\.0 um/px"):
            both.reader.read(0, [26])
    finally:
        Path(path).write_bytes(content)


def test_a_guided_run_resumed_within_an_epoch_is_the_same(
    cohort: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    original = Trainer._train_step

    def stop_at_four(self: Trainer, *given: Any) -> Any:  # the second of three steps of the second epoch
        if self.step == 4 and not self._resumed:
            raise Stop
        return original(self, *given)

    monkeypatch.setattr(Trainer, "_train_step", stop_at_four)
    broken = Trainer(config_of(cohort), tmp_path / "b")
    with pytest.raises(Stop):
        broken.fit()
    (plan,) = load_checkpoint(tmp_path / "b" / "last.pt")["plans"]
    assert plan["epoch"] == 1

    # model and bank have moved on: the plan of this epoch could not be made again
    def never(*given: Any) -> Any:
        raise AssertionError("planned anew")

    monkeypatch.setattr(ReportGuide, "scores", never)
    Trainer(config_of(cohort), tmp_path / "b", resume=True).fit()
    assert json.dumps(rows(tmp_path / "b")) == json.dumps(rows(run))


def test_a_run_sees_both_scales_and_what_the_report_draws(cohort: Path, run: Path) -> None:
    state = load_checkpoint(run / "last.pt")
    (plan,) = state["plans"]
    unguided = Trainer(config_of(cohort, "memory.guided=0"), cohort / "unguided")
    sizes = unguided.planner.sizes[plan["slides"]]  # one process numbers its slides as the cohort does
    fine, coarse = sizes.T
    assert coarse.tolist() == [4] * 5
    assert (plan["tiles"] < fine[:, None]).sum(1).tolist() == [3] * 5
    assert (plan["tiles"] >= 0).all()
    other = unguided.planner.plan(1)
    assert other.slides.equal(plan["slides"])
    assert not other.tiles.equal(plan["tiles"])
    assert unguided.planner.state_dict() is None
    assert {row["kind"] for row in rows(run)} >= {"step", "fidelity", "epoch"}


def test_a_model_of_two_scales_is_applied_to_two(cohort: Path, run: Path, tmp_path: Path) -> None:
    def command(name: str, *folders: str) -> list[str]:
        tiles = [word for folder in folders for word in ("--tiles", str(cohort / folder))]
        return [name, str(run), "--cohort", str(cohort / "cohort.csv"), "--mpp", "1", *tiles]

    one, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert main([*command("encode", "tiles", "coarse"), "--out", str(one)]) == 0
    assert main([*command("encode", "coarse", "tiles"), "--out", str(other)]) == 0
    first, second = SlideEmbeddings.load(one), SlideEmbeddings.load(other)
    torch.testing.assert_close(first.embedding, second.embedding)  # a sum does not know the order of folders
    maps = tmp_path / "maps"
    assert main([*command("heatmap", "tiles", "coarse"), "--slide", "s1", "--task", "kind", "--class", "dots",
                 "--out", str(maps)]) == 0  # fmt: skip
    assert sorted(file.name for file in maps.iterdir()) == [
        f"s1_scale{scale}_{what}.png" for scale in (0, 1) for what in ("codewords", "kind_dots")
    ]


def test_a_model_of_two_scales_is_not_applied_to_one(
    cohort: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "--cohort",
        str(cohort / "cohort.csv"),
        "--tiles",
        str(cohort / "tiles"),
        "--out",
        str(cohort / "x.h5"),
    ]
    assert main(["encode", str(run), *given]) != 0
    assert "trained on tiles of 2 folders" in capsys.readouterr().err
