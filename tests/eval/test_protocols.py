"""Cross-validation end to end on a tiny cohort: trained once, resumed, judged, applied to another cohort."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from train_cohort import tiny_config, write_cohort

from dre_fast.cli import main
from dre_fast.data.cohort import Cohort
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.eval.fold_scores import average_predictions, fold_scores, pool_predictions, score_grid
from dre_fast.eval.protocols import CrossValidation, Judging
from dre_fast.eval.tables import MetricRow
from dre_fast.train.config import Config, save_config
from dre_fast.train.inference import load_run
from dre_fast.train.loop import Trainer

QUICK = ("loss.contrastive=null", "data.reports=null", "optim.epochs=1", "run.threads=0")


def settings(root: Path, *overrides: str) -> Config:
    return tiny_config(root, *QUICK, *overrides)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cohort, other (another cohort, other cases), config.yaml and cv: three folds, trained."""
    root = tmp_path_factory.mktemp("study")
    (root / "cohort").mkdir()
    write_cohort(root / "cohort", slides=9, side=64, reports=False)
    (root / "other").mkdir()
    table = write_cohort(root / "other", slides=4, side=64, reports=False)
    for file in [*(root / "other").glob("*.npy"), *(root / "other" / "tiles").glob("*.h5")]:
        shutil.copy(file, file.with_name(f"x{file.name}"))
    text = table.read_text().replace("\ns", "\nxs").replace(",c", ",xc").replace(",s", ",xs")
    table.write_text(text.replace("xstripes", "stripes"))
    for file in (root / "other" / "tiles").glob("x*.h5"):
        import h5py

        with h5py.File(file, "r+") as opened:
            opened.attrs["slide_id"] = file.stem
    save_config(settings(root / "cohort"), root / "config.yaml")
    assert main(["cross-validate", str(root / "config.yaml"), "--out", str(root / "cv"), "--folds", "3"]) == 0
    return root


def test_every_slide_is_predicted_by_a_model_that_never_saw_its_case(study: Path):
    cohort = Cohort.read(study / "cohort" / "cohort.csv")
    pooled = SlideEmbeddings.load(study / "cv" / "out_of_fold.safetensors")
    assert sorted(pooled.slide_ids) == sorted(cohort.ids)
    for fold in range(3):
        trained = Cohort.read(study / "cv" / f"fold-{fold}" / "cohort.csv")
        part = SlideEmbeddings.load(study / "cv" / f"fold-{fold}" / "predictions.safetensors")
        assert part.slide_ids == trained.subset("test").ids
        assert not set(trained.subset(("train", "val")).cases) & {cohort[s].case_id for s in part.slide_ids}
        assert load_run(study / "cv" / f"fold-{fold}").config.data.cohort == str(
            study / "cv" / f"fold-{fold}" / "cohort.csv"
        )
        torch.testing.assert_close(pooled.select(part.slide_ids).logits["kind"], part.logits["kind"])


def test_the_table_holds_folds_mean_and_interval(study: Path):
    with open(study / "cv" / "scores.csv", newline="") as file:
        rows = {(row["task"], row["metric"]): row for row in csv.DictReader(file)}
    row = rows["kind", "accuracy"]
    folds = [float(row[f"fold {fold}"]) for fold in range(3)]
    assert float(row["mean"]) == pytest.approx(np.mean(folds), abs=1e-5)
    assert float(row["sd"]) == pytest.approx(np.std(folds, ddof=1), abs=1e-5)
    assert float(row["low"]) <= float(row["pooled"]) <= float(row["high"])
    assert int(row["samples"]) == 9
    assert (study / "cv" / "scores.md").read_text().startswith("| task | metric | fold 0 |")


def test_resume_trains_only_what_is_not_finished(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "cv"
    shutil.copytree(study / "cv", out)
    with pytest.raises(ValueError, match="already holds a cross-validation"):
        CrossValidation(settings(study / "cohort"), out)
    shutil.rmtree(out / "fold-1")  # it had not come so far
    (out / "fold-2" / "predictions.safetensors").unlink()  # stopped between training and prediction
    finished = (out / "fold-0" / "last.pt").stat().st_mtime_ns
    assert main(["cross-validate", "--out", str(out), "--resume"]) == 0
    said = capsys.readouterr().err
    assert "fold 1: 3 train, 3 val, 3 test slides" in said
    assert "fold 2:" in said
    assert "fold 0:" not in said
    assert (out / "fold-0" / "last.pt").stat().st_mtime_ns == finished
    for name in ("scores.csv", "folds.csv"):
        assert (out / name).read_text() == (study / "cv" / name).read_text()


def test_an_interrupted_one_says_how_to_go_on(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def stop(_: Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", stop)
    command = [
        "cross-validate",
        "optim.lr=0.002",
        str(study / "config.yaml"),
        "--out",
        str(tmp_path),
        "--folds",
        "3",
    ]
    assert main(command) == 130
    assert f"--out {tmp_path} --resume" in capsys.readouterr().err
    assert "lr: 0.002" in (tmp_path / "config.yaml").read_text()


def test_resume_refuses_what_has_changed(study: Path):
    def again(**options: object) -> CrossValidation:
        return CrossValidation(settings(study / "cohort"), study / "cv", resume=True, **options)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"optim\.lr was"):
        CrossValidation(settings(study / "cohort", "optim.lr=0.5"), study / "cv", resume=True)
    with pytest.raises(ValueError, match="3 folds, not the 4"):
        again(folds=4)
    with pytest.raises(ValueError, match="validation was 'fold'"):
        again(validation=0.2)
    table = study / "cohort" / "cohort.csv"
    text = table.read_text()
    try:
        table.write_text(text.replace("s0,c0,s0.npy,dots", "s0,c0,s0.npy,stripes"))
        with pytest.raises(ValueError, match="slide 's0', column 'kind': 'stripes' now"):
            again()
    finally:
        table.write_text(text)


def test_external_cohort_is_judged_by_every_fold(study: Path, capsys: pytest.CaptureFixture[str]):
    there = [
        "--external",
        str(study / "other" / "cohort.csv"),
        "--external-tiles",
        str(study / "other" / "tiles"),
    ]
    assert main(["cross-validate", "--out", str(study / "cv"), "--resume", *there]) == 0
    assert "averaged" in capsys.readouterr().out
    parts = [
        SlideEmbeddings.load(study / "cv" / "external" / f"fold-{fold}.safetensors") for fold in range(3)
    ]
    averaged = SlideEmbeddings.load(study / "cv" / "external" / "averaged.safetensors")
    assert averaged.slide_ids == ["xs0", "xs1", "xs2", "xs3"]
    mean = torch.stack([part.logits["kind"].softmax(-1) for part in parts]).mean(0)
    torch.testing.assert_close(averaged.logits["kind"].softmax(-1), mean)
    with open(study / "cv" / "external" / "scores.csv", newline="") as file:
        assert {row["samples"] for row in csv.DictReader(file) if row["task"] == "kind"} == {"4"}
    own = [
        "--external",
        str(study / "cohort" / "cohort.csv"),
        "--external-tiles",
        str(study / "cohort" / "tiles"),
    ]
    assert main(["cross-validate", "--out", str(study / "cv"), "--resume", *own]) == 2
    assert "case 'c0' is in" in capsys.readouterr().err


def test_faults_are_named_before_anything_is_written(study: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"loss\.tasks is empty"):
        CrossValidation(
            tiny_config(study / "cohort", "loss.tasks=[]", f"data.reports={tmp_path / 'r'}"), tmp_path / "cv"
        )
    with (
        pytest.warns(UserWarning, match="'split' is not used"),
        pytest.raises(ValueError, match="9 cases cannot be dealt to 12"),
    ):
        CrossValidation(settings(study / "cohort"), tmp_path / "cv", folds=12)
    with pytest.raises(ValueError, match="holds a run"):
        CrossValidation(settings(study / "cohort"), study / "cv" / "fold-0")
    table = study / "cohort" / "cohort.csv"
    lines = [
        f"{line},{'report' if not i else 'Benign.'}" for i, line in enumerate(table.read_text().splitlines())
    ]
    (study / "cohort" / "told.csv").write_text("\n".join(lines) + "\n")
    told = settings(study / "cohort", f"data.cohort={study / 'cohort' / 'told.csv'}")
    with (
        pytest.warns(UserWarning, match="'split' is not used"),
        pytest.raises(ValueError, match=r"\(case 'c0', fold \d\) and .* have the same report"),
    ):
        CrossValidation(told, tmp_path / "cv", folds=3)
    assert not (tmp_path / "cv").exists()


def test_external_labels_are_checked_before_training(study: Path):
    rounds = CrossValidation(settings(study / "cohort"), study / "cv", resume=True)
    text = (study / "other" / "cohort.csv").read_text()
    table, tiles = study / "other" / "changed.csv", study / "other" / "tiles"
    table.write_text(text.replace("stripes", "waves"))
    with pytest.raises(ValueError, match="'waves' is not a class"):
        rounds.open_external(table, tiles)
    table.write_text(text.replace("kind,EGFR", "sort,EGFR"))
    with pytest.warns(UserWarning, match="no label columns for kind"):
        assert rounds.open_external(table, tiles).tasks == ["EGFR"]
    table.write_text(text.replace("kind,EGFR", "sort,TP53"))
    with pytest.raises(ValueError, match="columns of no task"):
        rounds.open_external(table, tiles)
    with pytest.raises(ValueError, match="bootstrap >= 0"):
        Judging(bootstrap=-1)


def test_averages_are_of_probabilities_and_stay_finite():
    cards = {
        "a": {"kind": "multiclass", "classes": ["x", "y"], "columns": ["a"]},
        "b": {"kind": "binary", "columns": ["b"]},
    }
    a = [torch.tensor([[2.0, -1.0], [300.0, -300.0]]), torch.tensor([[-1.0, 0.5], [200.0, -400.0]])]
    b = [torch.tensor([[1.5], [-400.0]]), torch.tensor([[-0.5], [-300.0]])]
    parts = [
        SlideEmbeddings(["s", "t"], torch.zeros(2, 3), None, {"a": a[i], "b": b[i]}, cards) for i in (0, 1)
    ]
    found = average_predictions(parts)
    torch.testing.assert_close(
        found.logits["a"].softmax(-1)[0], (a[0].softmax(-1)[0] + a[1].softmax(-1)[0]) / 2
    )
    torch.testing.assert_close(found.logits["b"].sigmoid()[0], (b[0].sigmoid()[0] + b[1].sigmoid()[0]) / 2)
    assert all(torch.isfinite(logits).all() for logits in found.logits.values())
    with pytest.raises(ValueError, match="same slides"):
        average_predictions([parts[0], parts[1].select(["t", "s"])])
    other = SlideEmbeddings(["u"], torch.zeros(1, 3), None, {"b": torch.zeros(1, 1)}, cards)
    with pytest.raises(ValueError, match="different tasks"):
        pool_predictions([parts[0], other])


def test_survival_over_folds_compares_slides_of_one_model(tmp_path: Path):
    table = write_cohort(tmp_path, slides=12, side=64, reports=False)
    lines = table.read_text().splitlines()
    later = [f",{7 * i % 11 + 1},{'1:DECEASED' if i % 4 else '0:LIVING'}" for i in range(12)]
    rows = [line + more for line, more in zip(lines, [",months,status", *later], strict=True)]
    table.write_text("\n".join(rows) + "\n")
    columns = "kind: survival, columns: [months, status]"
    heads = f"{{name: cox, {columns}}}, {{name: hazard, {columns}, method: hazard, bins: 3}}"
    config = settings(tmp_path, f"loss.tasks=[{heads}]", "optim.batch_size=4")
    rounds = CrossValidation(config, tmp_path / "cv", folds=3, validation="none")
    rounds.train()
    how = Judging(bootstrap=20, level="patient")
    found = rounds.judge(how)
    assert [(score.task, score.metric) for score in found] == [("cox", "c-index"), ("hazard", "c-index")]
    for score in found:
        assert score.joint.value is not None
        defined = [value for value in score.folds.values() if value is not None]
        assert min(defined) <= score.joint.value <= max(defined)  # the mean, weighted by pairs
    edges = [load_run(rounds.folder(fold)).tasks[1].edges for fold in rounds.folds]
    assert len(set(edges)) > 1
    card = SlideEmbeddings.load(tmp_path / "cv" / "out_of_fold.safetensors").tasks["hazard"]
    assert (card["bins"], card["edges"]) == (3, [])  # no time is common to the folds' models
    file = rounds.folder(rounds.folds[0]) / "predictions.safetensors"
    part = SlideEmbeddings.load(file)
    part.logits["cox"] += 100.0  # the same order of its slides: the partial likelihood leaves this free
    part.save(file)
    assert rounds.judge(how) == found


def test_a_fold_without_a_score_is_left_out_of_the_mean_and_said():
    def row(value: float | None) -> MetricRow:
        return MetricRow("t", None, "auc", value, None, None, "slide", 4, 4, "")

    (score,) = fold_scores({1: [row(0.5)], 2: [row(None)], 3: [row(0.9)]}, [row(0.6)])
    assert score.mean == pytest.approx(0.7)
    assert score.sd == pytest.approx(0.4 / 2**0.5)
    grid = score_grid([score], "pooled")
    assert "defined in 2 of 3 folds" in grid.text()
    assert list(grid.rows[0][3:6]) == [0.5, None, 0.9]
