"""What users get wrong and what machines do to a run: said in one line, with nothing spoilt."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from train_cohort import tiny_config

from dre_fast.cli import main
from dre_fast.nn.tile_encoders import TileEncoder
from dre_fast.train import state as on_disk
from dre_fast.train.checks import pick_device
from dre_fast.train.config import ConfigError, load_config
from dre_fast.train.loop import Trainer
from dre_fast.train.objective import Objective


def table(root: Path, name: str, change) -> str:
    """A variant of the cohort's table beside it; ``change`` gets the header's and a row's cells as a dict."""
    lines = (root / "cohort.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [change(dict(zip(header, line.split(",")))) for line in lines[1:]]
    text = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (root / name).write_text("\n".join(text) + "\n")
    return f"data.cohort={root / name}"


def test_settings_may_stand_around_the_options(tiny_cohort, tmp_path, capsys):
    assert main(["train", "optim.lr=0.5", "--print-config", "optim.epochs=7"]) == 0
    printed = capsys.readouterr().out
    assert "lr: 0.5" in printed
    assert "epochs: 7" in printed
    for wrong in (["train", "--nonsense"], ["info", "a=b"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_settings_have_no_dashes(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--out", "a", "--optim.epochs=3"])
    assert "settings are written without dashes: section.key=value" in capsys.readouterr().err


def test_a_reader_that_closes_early_is_no_fault():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dre_fast.cli", "train", "--print-config"]
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="'gpu': must be auto, cpu, cuda"):
        pick_device("gpu")
    with pytest.raises(ValueError, match=r"'cuda:99'.*dre-fast info"):
        pick_device("cuda:99")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train_split=null"], "data.val_split=null"),
        (["data.train_split=val"], "would be trained on"),
        (["optim.lr=.nan"], r"optim\.lr"),
        (["optim.lr=.inf"], r"optim\.lr"),
        (["optim.grad_clip=-1"], r"optim\.grad_clip"),
        (["run.threads=-1"], r"run\.threads"),
        (["run.seed=-1"], r"run\.seed"),
        (["data.workers=-1"], r"data\.workers"),
        (["data.stain=.nan"], r"data\.stain"),
        (["memory.grad_scale=.inf"], r"memory\.grad_scale"),
        (["loss.contrastive_weight=-1"], r"loss\.contrastive_weight=-1\.0: must be a number >= 0"),
        (["loss.tasks=[{name: kind, weight: -0.5}]"], r"loss\.tasks\[kind\]\.weight=-0\.5: must be"),
        (["loss.tasks=[{name: kind, weight: .nan}]"], r"loss\.tasks\[kind\]\.weight=nan: must be"),
        (["loss.contrastive_weight=0", "loss.tasks=[{name: kind, weight: 0}]"], "are all 0"),
        (["loss.contrastive=null", "loss.tasks=[{name: kind, weight: 0}]"], "are all 0"),
        (["memory.mode=exact", "memory.grad_scale=unbiased"], r"memory\.grad_scale=unbiased scales"),
        (["memory.mode=none", "memory.grad_scale=unbiased"], r"memory\.grad_scale=unbiased has no use"),
        (["memory.grad_scale=0"], r"memory\.grad_scale=0 leaves the encoder nothing to learn"),
        (["loss.tasks=[{name: type, columns: [kind]}]"], r"'type' cannot name.*columns: \[type\]"),
        (["loss.tasks=[{name: p.53, columns: [kind]}]"], r"'p\.53' cannot name"),
    ],
)
def test_settings_that_cannot_be_meant(tiny_cohort, overrides, words):
    with pytest.raises(ConfigError, match=words):
        tiny_config(tiny_cohort, *overrides).validate()


def test_a_config_that_is_no_config(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match=r"list\.yaml: expected sections"):
        load_config(tmp_path / "list.yaml", ["optim.lr=1"])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.yaml: not readable"):
        load_config(tmp_path / "binary.yaml")
    assert main(["train", "--config", str(tmp_path), "--out", str(tmp_path / "run")]) == 2


def test_a_file_that_is_not_there_or_not_of_its_kind(tiny_cohort, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        load_config(tmp_path / "none.yaml")
    assert main(["train", "--out", str(tmp_path / "none"), "--resume"]) == 2
    assert "none holds no run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    config = tiny_config(tiny_cohort, f"data.reports={tiny_cohort / 'cohort.csv'}")
    with pytest.raises(
        ValueError, match=r"cohort\.csv: cannot read .*; write them with dre-fast embed-reports"
    ):
        Trainer(config, tmp_path / "run")


def test_splits_and_labels_that_cannot_work_are_refused_before_any_work(tiny_cohort, tmp_path):
    root = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, root)

    def refused(words: str, *overrides: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            Trainer(tiny_config(root, *overrides), tmp_path / "run")
        assert not (tmp_path / "run" / "config.yaml").exists()

    unsplit = table(root, "unsplit.csv", lambda row: {k: v for k, v in row.items() if k != "split"})
    refused(r"data\.train_split=null trains on every slide", unsplit)
    refused(
        r"data\.val_split=null does without",
        table(root, "noval.csv", lambda row: {**row, "split": "train"}),
    )
    refused(
        "task 'EGFR', column 'EGFR': no training slide has a label",
        table(root, "bare.csv", lambda row: {**row, "EGFR": "" if row["split"] == "train" else "1"}),
    )
    blank = table(
        root,
        "blank.csv",
        lambda row: row if row["split"] == "train" else {**row, "kind": "", "EGFR": ""},
    )
    refused("no validation slide has a label or a report", blank, "loss.contrastive=null")
    refused(r"model\.codewords=1000, but .* only 144 tiles", "model.codewords=1000")
    refused(r"none\.pt: no such file of encoder weights", f"model.encoder_weights={tmp_path / 'none.pt'}")
    with pytest.warns(UserWarning, match="no training slide is dots"):
        Trainer(
            tiny_config(
                root,
                table(root, "one.csv", lambda r: {**r, "kind": "stripes"} if r["split"] == "train" else r),
            ),
            tmp_path / "one",
        )
    with pytest.warns(UserWarning, match="column 'EGFR': every training slide with a label is positive"):
        Trainer(tiny_config(root, table(root, "yes.csv", lambda r: {**r, "EGFR": "1"})), tmp_path / "yes")
    refused(
        r"column 'path': slides 's0' \(train\) and 's9' \(val\) are the same file",
        table(root, "twice.csv", lambda r: {**r, "path": "./s0.npy"} if r["slide_id"] == "s9" else r),
    )
    told = {"s0": "Two  lymph nodes.", "s1": "Benign.", "s2": "Benign.", "s9": "Two lymph nodes."}
    said = table(root, "told.csv", lambda r: {**r, "report": told.get(r["slide_id"], "")})
    refused(
        r"slides 's0' \(case 'c0', split train\) and 's9' \(case 'c9', split val\) have the same report", said
    )
    Trainer(tiny_config(root, said, "data.train_split=null", "data.val_split=null"), tmp_path / "told")
    both = Trainer(
        tiny_config(root, unsplit, "data.train_split=null", "data.val_split=null"), tmp_path / "all"
    )
    assert len(both.train) == 10
    assert both.val is None


def test_slides_without_tiles_are_left_out_only_on_request(tiny_cohort, tmp_path):
    root = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, root)
    (root / "tiles" / "s1.h5").unlink()
    with pytest.raises(ValueError, match=r"slide s1: .*1 of 6 slides.*data\.skip_untiled=true"):
        Trainer(tiny_config(root), tmp_path / "run")
    with pytest.warns(UserWarning, match="1 of 6 slides have no tiles.*: s1"):
        trainer = Trainer(tiny_config(root, "data.skip_untiled=true"), tmp_path / "run")
    assert [record.slide_id for record in trainer.train.records] == ["s0", "s2", "s3", "s4", "s5"]
    assert len(trainer.train.targets["kind"]) == trainer.model.bank.num_slides == 5


def test_a_resumed_run_refuses_other_data_but_not_other_places(tiny_cohort, tmp_path):
    root = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, root)
    Trainer(tiny_config(root, "optim.epochs=1"), tmp_path / "run").fit()
    moved = tmp_path / "moved"
    root.rename(moved)
    config = tiny_config(moved, "optim.epochs=1", "data.workers=1", "run.threads=0")
    Trainer(config, tmp_path / "run", resume=True)

    lines = (moved / "cohort.csv").read_text().splitlines()
    (moved / "cohort.csv").write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n")
    with pytest.raises(
        ValueError, match="change in: training slides"
    ):  # the rows of the bank would be swapped
        Trainer(config, tmp_path / "run", resume=True)
    (moved / "cohort.csv").write_text("\n".join(lines).replace("s1.npy,stripes", "s1.npy,dots") + "\n")
    with pytest.raises(ValueError, match="change in: training labels;"):
        Trainer(config, tmp_path / "run", resume=True)


def test_paths_of_a_run_are_absolute(tiny_cohort, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_cohort)
    Trainer(tiny_config(Path(".")), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    Trainer(load_config(tmp_path / "run" / "config.yaml"), tmp_path / "run", resume=True)


def test_before_the_first_checkpoint_the_settings_may_still_change(tiny_cohort, tmp_path):
    root = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, root)
    (root / "s2.npy").rename(root / "away")
    with pytest.raises(ValueError, match="slide s2"):
        Trainer(tiny_config(root, "optim.epochs=1"), tmp_path / "run").fit()
    (root / "away").rename(root / "s2.npy")
    Trainer(tiny_config(root, "optim.epochs=2"), tmp_path / "run", resume=True).fit()
    assert load_config(tmp_path / "run" / "config.yaml").optim.epochs == 2


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path, monkeypatch):
    file = tmp_path / "last.pt"
    on_disk.save_checkpoint(file, {"step": 1})
    opened = builtins.open

    class Full:
        def __init__(self, inner):
            self.inner = inner

        def write(self, data):
            if self.inner.tell() < room:
                return self.inner.write(data)
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.inner.close()

    room = 5000
    monkeypatch.setattr(on_disk, "open", lambda *a: Full(opened(*a)), raising=False)
    with pytest.raises(OSError, match="No space left") as error:
        on_disk.save_checkpoint(file, {"x": torch.zeros(10_000)})
    assert error.value.filename == str(file)
    assert on_disk.load_checkpoint(file)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("what", ["gradient", "slide embedding"])
def test_divergence_never_reaches_a_checkpoint(tiny_cohort, tmp_path, monkeypatch, what):
    trainer = Trainer(tiny_config(tiny_cohort, "run.checkpoint_every=1"), tmp_path / "run")
    if what == "gradient":
        original = Objective.forward

        def poisoned(self, out, slides):
            total, parts = original(self, out, slides)
            if trainer.step == 1:
                total.register_hook(lambda gradient: gradient * float("nan"))  # the loss itself is fine
            return total, parts

        monkeypatch.setattr(Objective, "forward", poisoned)
    else:
        represent = trainer.model.represent

        def poisoned_embedding(residuals):
            return represent(residuals * float("nan") if trainer.step == 1 else residuals)

        trainer.model.represent = poisoned_embedding
    with pytest.raises(FloatingPointError, match=rf"{what} is not finite at step 1 \(slides s"):
        trainer.fit()
    state = on_disk.load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == 1
    assert all(torch.isfinite(v).all() for v in state["model"].values() if v.is_floating_point())


def test_half_precision_that_never_gives_a_finite_gradient_is_told(tiny_cohort, tmp_path, monkeypatch):
    """A scale that is too large leaves steps out; where none is small enough, the run would end without a step."""
    trainer = Trainer(tiny_config(tiny_cohort, "optim.amp=fp16"), tmp_path / "run")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-12)
    original = Objective.forward

    def poisoned(self, out, slides):
        total, parts = original(self, out, slides)
        total.register_hook(lambda gradient: gradient * float("nan"))
        return total, parts

    monkeypatch.setattr(Objective, "forward", poisoned)
    with pytest.raises(FloatingPointError, match="gradient is not finite at step 2"):
        trainer.fit()


def test_an_encoder_that_gives_nan_is_told_by_slide_and_tile(tiny_cohort, tmp_path):
    trainer = Trainer(tiny_config(tiny_cohort), tmp_path / "run")
    with torch.no_grad():
        next(trainer.model.tile_encoder.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"slide s0, tile 0: .*not finite; .*model\.encoder_weights"):
        trainer.fit()


def test_a_heatmap_of_a_class_with_a_slash_in_its_name(tiny_cohort, tmp_path):
    root = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, root)
    cohort = table(root, "slash.csv", lambda row: {**row, "kind": f"Stage {row['kind']}/II"})
    Trainer(tiny_config(root, cohort, "optim.epochs=1"), tmp_path / "run").fit()
    common = ["--cohort", str(root / "slash.csv"), "--tiles", str(root / "tiles"), "--slide", "s1"]
    wanted = ["--task", "kind", "--class", "Stage dots/II"]
    assert main(["heatmap", str(tmp_path / "run"), *common, *wanted, "--out", str(tmp_path / "maps")]) == 0
    assert (tmp_path / "maps" / "s1_kind_Stage-dots-II.png").exists()


def test_an_encoder_at_rest_keeps_its_batch_statistics(tiny_cohort, tmp_path, monkeypatch):
    def with_batch_norm(name, **_):
        encoder = TileEncoder(8)
        encoder.body = nn.Sequential(
            nn.Conv2d(3, 8, 8, stride=8), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        encoder.forward = lambda images: encoder.body(images.float() / 255)
        return encoder

    monkeypatch.setattr("dre_fast.train.build.build_tile_encoder", with_batch_norm)

    def moved(name: str, *overrides: str) -> float:
        trainer = Trainer(tiny_config(tiny_cohort, "optim.epochs=1", *overrides), tmp_path / name)
        before = trainer.model.tile_encoder.body[1].running_mean.clone()
        trainer.fit()
        return (trainer.model.tile_encoder.body[1].running_mean - before).abs().max().item()

    assert moved("frozen", "optim.freeze_encoder=true") == 0.0
    assert moved("warm-up", "optim.head_warmup_epochs=1") == 0.0
    assert moved("learning", "optim.head_warmup_epochs=0") > 0.0


def test_a_fault_in_a_reading_process_is_said_without_its_traceback(tiny_cohort, tmp_path):
    root = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, root)
    trainer = Trainer(tiny_config(root, "data.workers=1", "data.max_open=1"), tmp_path / "run")
    trainer._fit_codebook, fit = (
        (lambda warm: ((root / "s2.npy").unlink(), fit(warm=warm))),
        trainer._fit_codebook,
    )
    with pytest.raises(ValueError, match=r"^slide s2, tile") as error:
        trainer.fit()
    assert "Traceback" not in str(error.value)
