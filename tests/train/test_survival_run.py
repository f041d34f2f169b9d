"""Runs with a survival head and with weighted classes, from the config to the scores of the saved model."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from train_cohort import tiny_config

from dre_fast.cli import main
from dre_fast.data.cohort import Cohort, LabelError, Task
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.eval.metrics import c_index, evaluate_predictions
from dre_fast.train.config import ConfigError, load_config
from dre_fast.train.inference import load_run
from dre_fast.train.loop import Trainer
from dre_fast.train.state import read_metrics

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
COX = "{name: os, kind: survival, columns: [months, status]}"
HAZARD = "{name: os, kind: survival, columns: [months, status], method: hazard, bins: 3}"


def tie(loss: float) -> float:
    """What the loss takes from a score: it decides between equal ones."""
    return 1e-3 * loss / (1 + loss)


@pytest.fixture(scope="module")
def survival_cohort(tiny_cohort, tmp_path_factory) -> Path:
    """The tiny cohort, whose slides with stripes die early; one training slide without follow-up."""
    root = tmp_path_factory.mktemp("survival")
    shutil.copytree(tiny_cohort, root, dirs_exist_ok=True)
    lines = (root / "cohort.csv").read_text().splitlines()
    months = [30, 4, 28, 3, 25, 5, 26, 2, 33, 2]
    status = ["0:LIVING" if i in (0, 6, 8) else "1:DECEASED" for i in range(10)]
    rows = [f"{line},{m},{s}" for line, m, s in zip(lines[1:], months, status)]
    rows[4] = f"{lines[5]},,"
    (root / "cohort.csv").write_text("\n".join([lines[0] + ",months,status", *rows]) + "\n")
    return root


def settings(root: Path, task: str, *overrides: str):
    labels = ["data.reports=null", "loss.contrastive=null", f"loss.tasks=[{task}]", "optim.lr=3e-3"]
    return tiny_config(root, *labels, *overrides)


@pytest.mark.parametrize("task", [COX, HAZARD])
def test_a_survival_head_learns_and_is_saved_with_its_intervals(survival_cohort, tmp_path, capsys, task):
    config = settings(survival_cohort, task, "optim.epochs=8", "optim.batch_size=6")
    out = Trainer(config, tmp_path / "run").fit()
    said = capsys.readouterr().err
    assert "task os: 4 events among 5 slides" in said
    log = read_metrics(out / "metrics.jsonl")
    losses = [row["loss_os"] for row in log if row["kind"] == "step"]
    assert losses[-1] < losses[0]
    epochs = [row for row in log if row["kind"] == "epoch"]
    # stripes before dots; 1.0 in some epoch with seeds 0 to 3, in the last one not always
    assert max(row["val_c_index_os"] for row in epochs) == 1.0
    for row in epochs:
        assert row["val_score"] == pytest.approx(row["val_c_index_os"] - tie(row["val_loss"]))

    loaded = load_run(out)
    (kept,) = loaded.tasks
    if task == HAZARD:
        assert kept.method == "hazard"
        assert kept.bins == 3
        # of deaths at 3, 4, 5 and 28
        assert kept.edges == pytest.approx((4.0, 5.0))
        assert "intervals divided at 4, 5" in said
    else:
        assert (kept.method, kept.edges) == ("cox", ())
    common = ["--cohort", str(survival_cohort / "cohort.csv"), "--tiles", str(survival_cohort / "tiles")]
    common += ["--mpp", "1.0"]
    file = tmp_path / "e.safetensors"
    assert main(["encode", str(out), *common, "--out", str(file)]) == 0
    encoded = SlideEmbeddings.load(file)
    assert encoded.tasks["os"] == kept.card()
    cohort = Cohort.read(survival_cohort / "cohort.csv")
    (row,) = evaluate_predictions(encoded, cohort, split="val", bootstrap=20)
    chosen = encoded.select(cohort.subset("val").ids)
    assert row.metric == "c-index"
    assert row.value == c_index(kept.method, chosen.logits["os"], cohort.subset("val").encode(kept))
    assert row.value == 1.0
    assert main(["heatmap", str(out), *common, "--slide", "s3", "--out", str(tmp_path / "maps")]) == 0
    assert any("risk" in f.name or "hazard" in f.name for f in (tmp_path / "maps").glob("s3_os_*.png"))


def test_cox_and_other_tasks_together_in_small_batches(survival_cohort, tmp_path):
    tasks = f"[{COX}, {{name: kind, balance: inverse}}, {{name: EGFR, kind: binary, balance: effective}}]"
    config = tiny_config(survival_cohort, f"loss.tasks={tasks}", "optim.epochs=2", "run.probe_every=3")
    rows = [read_metrics(Trainer(config, tmp_path / name).fit() / "metrics.jsonl") for name in "ab"]
    steps = [row for row in rows[0] if row["kind"] == "step"]
    assert all(math.isfinite(row["loss"]) for row in steps)
    assert [r["loss"] for r in steps] == [r["loss"] for r in rows[1] if r["kind"] == "step"]
    last = rows[0][-1]
    known = [last[f"val_{name}"] for name in ("c_index_os", "auc_kind", "auc_EGFR")]
    assert last["val_score"] == pytest.approx(sum(known) / 3 - tie(last["val_loss"]))


def test_class_weights_come_from_the_training_slides_and_are_shown(survival_cohort, tmp_path, capsys):
    root = survival_cohort
    lines = (root / "cohort.csv").read_text().splitlines()
    # of the training slides s0 .. s5 one is dots; of the validation slides all are
    rows = [
        re.sub(r"stripes|dots", "dots" if i in (0, 6, 7, 8, 9) else "stripes", line)
        for i, line in enumerate(lines[1:])
    ]
    (root / "skewed.csv").write_text("\n".join([lines[0], *rows]) + "\n")
    task = "{name: kind, balance: inverse}, {name: EGFR, kind: binary, balance: inverse}"
    config = settings(root, task, f"data.cohort={root / 'skewed.csv'}", "optim.epochs=1")
    trainer = Trainer(config, tmp_path / "run")
    torch.testing.assert_close(
        trainer.objective.class_weights["kind"], torch.tensor([1.0, 0.2]) / 0.6, rtol=1e-6, atol=0
    )
    trainer.fit()
    said = capsys.readouterr().err
    assert "task kind: class weights dots 1.67, stripes 0.333" in said
    assert "task EGFR: weight of positive labels EGFR 1" in said


def test_times_taken_for_classes_are_noticed(survival_cohort, tmp_path, capsys):
    config = settings(survival_cohort, "{name: months}", "optim.epochs=1", "data.val_split=null")
    Trainer(config, tmp_path / "run").fit()
    said = capsys.readouterr().err
    assert re.search(
        r"task months: \d of its \d classes have a single training slide; is 'months' a column", said
    )


def test_a_hazard_run_goes_on_as_if_never_stopped(survival_cohort, tmp_path):
    config = settings(survival_cohort, HAZARD, "optim.epochs=2")
    whole = Trainer(config, tmp_path / "whole").fit()
    broken = Trainer(config, tmp_path / "broken")
    original = broken._finish_epoch

    def stop(epoch: int) -> None:
        original(epoch)
        if epoch == 0:
            raise KeyboardInterrupt

    broken._finish_epoch = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    again = Trainer(config, tmp_path / "broken", resume=True).fit()
    ends = [read_metrics(run / "metrics.jsonl")[-1] for run in (whole, again)]
    assert ends[0]["val_loss_os"] == ends[1]["val_loss_os"]
    assert load_run(whole).tasks == load_run(again).tasks


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("{name: os, kind: survival}", r"loss.tasks\[os\].columns=\[\].*\[time, event\]"),
        (COX[:-1] + ", method: weibull}", r"loss.tasks\[os\].method='weibull'"),
        (COX[:-1] + ", bins: 6}", r"loss.tasks\[os\].bins is of method: hazard"),
        (HAZARD[:-1].replace("bins: 3", "bins: 1") + "}", r"loss.tasks\[os\].bins=1: must be at least 2"),
        (COX[:-1] + ", balance: inverse}", r"loss.tasks\[os\].balance=inverse.*no classes"),
        ("{name: kind, balance: log}", r"loss.tasks\[kind\].balance='log'"),
        ("{name: kind, method: hazard}", r"loss.tasks\[kind\].method is of survival tasks"),
        ("{name: kind, bins: 3}", r"loss.tasks\[kind\].bins is of survival tasks"),
    ],
)
def test_settings_that_cannot_be_meant_name_their_key(tiny_cohort, task, words):
    with pytest.raises(ConfigError, match=words):
        settings(tiny_cohort, task).validate()


def test_cox_needs_slides_to_compare(tiny_cohort):
    with pytest.raises(ConfigError, match=r"\[os\]\.method=cox compares the slides.*optim\.batch_size=1"):
        settings(tiny_cohort, COX, "optim.batch_size=1").validate()
    settings(tiny_cohort, HAZARD, "optim.batch_size=1").validate()


@pytest.mark.parametrize(
    ("task", "change", "error", "words"),
    [
        (
            COX,
            ("1:DECEASED", "0:LIVING"),
            ValueError,
            "'os', column 'status': no training slide has an event",
        ),
        (
            HAZARD.replace("bins: 3", "bins: 5"),
            ("", ""),
            ValueError,
            "'os': 4 distinct event times .* 5 bins",
        ),
        (COX, (",28,", ",-28,"), LabelError, "slide 's2', column 'months', task 'os': '-28' is not a time"),
    ],
)
def test_labels_that_teach_nothing_are_refused(survival_cohort, tmp_path, task, change, error, words):
    text = (survival_cohort / "cohort.csv").read_text()
    (survival_cohort / "faulty.csv").write_text(text.replace(*change))
    config = settings(survival_cohort, task, f"data.cohort={survival_cohort / 'faulty.csv'}")
    with pytest.raises(error, match=words):
        Trainer(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_settings_of_the_page_are_settings(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        (tmp_path / "c.yaml").write_text(block)
        config = load_config(
            tmp_path / "c.yaml", ["data.cohort=c", "data.tiles=t", "loss.contrastive=null"]
        ).validate()
        for task in config.loss.tasks:
            Task(task.name, task.kind, tuple(task.classes), tuple(task.columns), task.method, task.bins)


def test_python_of_the_page_runs():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(block, str(PAGE), "exec"), names)
    assert names["edges"] == [6.0]
    assert names["score"].shape == (6,)
    assert names["risk"].grad.abs().sum() > 0
