"""dre-fast probe: out-of-fold scores of a linear probe that never sees the labels it is judged by."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dre_fast.cli import main
from dre_fast.data.cohort import Cohort, SlideRecord, Task
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.eval.probe_folds import probe_folds

CASES = 36


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cohort.csv, signal.safetensors (embeddings that know subtype and EGFR) and noise.safetensors (they do not).

    Both have a direction that names the case, the same for its two slides.
    """
    root = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    subtype, gene, tp53 = (
        rng.integers(3, size=CASES),
        rng.integers(2, size=CASES),
        rng.integers(2, size=CASES),
    )
    names = [f"S{i:03d}" for i in range(2 * CASES)]
    with open(root / "cohort.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "case_id", "subtype", "EGFR", "TP53", "split"])
        for i, name in enumerate(names):
            label = "" if i == 5 else "xyz"[subtype[i // 2]]
            writer.writerow(
                [name, f"C{i // 2}", label, gene[i // 2], tp53[i // 2], "train" if i % 4 < 2 else "test"]
            )
    case = np.repeat(rng.normal(size=(CASES, 30)), 2, axis=0) + 0.05 * rng.normal(size=(2 * CASES, 30))
    for file_name, size in (("signal", 4.0), ("noise", 0.0)):
        x = case[:, :8].copy() if size else case.copy()
        x[:, :3] += size * np.eye(3)[np.repeat(subtype, 2)]
        x[:, 3] += size * np.repeat(gene, 2)
        SlideEmbeddings(names, torch.tensor(x).float()).save(root / f"{file_name}.safetensors")
    return root


def scores(file: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with open(file, newline="") as opened:
        return {(row["task"], row["column"], row["metric"]): row for row in csv.DictReader(opened)}


def test_scores_folds_and_files(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = [
        "probe",
        str(study / "signal.safetensors"),
        "--cohort",
        str(study / "cohort.csv"),
        "--folds",
        "3",
    ]
    command += ["--task", "subtype", "genes=EGFR,TP53", "--bootstrap", "100"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert "pooled" in capsys.readouterr().out
    found = scores(tmp_path / "a" / "scores.csv")
    subtype = found["subtype", "", "auc"]
    assert float(subtype["pooled"]) > 0.85
    assert subtype["samples"] == "71"
    assert float(found["genes", "EGFR", "auc"]["pooled"]) > 0.8
    chance = found["genes", "TP53", "auc"]
    assert float(chance["low"]) < float(chance["pooled"]) < float(chance["high"])
    assert float(chance["pooled"]) < 0.75
    assert {"fold 0", "fold 1", "fold 2", "mean", "sd"} <= set(subtype)
    fold = {r.slide_id: r.fold for r in Cohort.read(tmp_path / "a" / "folds.csv", require_path=False).records}
    assert all(fold[f"S{2 * i:03d}"] == fold[f"S{2 * i + 1:03d}"] for i in range(CASES))
    assert main([*command, "--out", str(tmp_path / "b")]) == 0
    for name in ("scores.csv", "scores.md", "folds.csv", "strengths.csv"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


def test_slides_of_one_case_do_not_give_their_label_away(study: Path):
    """The embeddings of noise name the case: a probe that saw one of its slides would know the other's label."""
    embeddings = SlideEmbeddings.load(study / "noise.safetensors")
    cohort = Cohort.read(study / "cohort.csv", require_path=False)

    def right(cohort: Cohort) -> float:
        logits = probe_folds(embeddings, cohort, [task], folds=3).predictions.logits["EGFR"][:, 0]
        return float(((logits > 0) == (cohort.encode(task) == 1)).double().mean())

    task = Task("EGFR", "binary")
    assert right(cohort) < 0.7
    by_slide = [replace(record, case_id=record.slide_id) for record in cohort.records]
    assert right(Cohort(by_slide, cohort.label_names)) > 0.8  # what it would look like


def test_inner_folds_pick_a_strong_penalty_where_there_is_nothing_to_learn():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (80, 2), generator=generator)
    x = torch.randn(80, 20, generator=generator)
    x[:, 0] += 4 * labels[:, 0]
    records = [
        SlideRecord(f"s{i}", f"c{i}", labels={"clear": str(a), "chance": str(b)})
        for i, (a, b) in enumerate(labels.tolist())
    ]
    cohort = Cohort(records, ["clear", "chance"])
    tasks = [Task("clear", "binary"), Task("chance", "binary")]
    found = probe_folds(SlideEmbeddings(cohort.ids, x), cohort, tasks, folds=3).strengths
    assert min(found["clear", "clear"].values()) > max(found["chance", "chance"].values())


def test_labels_of_a_fold_do_not_change_its_own_predictions(study: Path):
    embeddings = SlideEmbeddings.load(study / "signal.safetensors")
    cohort = Cohort.read(study / "cohort.csv", require_path=False)
    task = Task("EGFR", "binary")
    before = probe_folds(embeddings, cohort, [task], folds=3)
    flipped = Cohort(
        [r if r.fold else replace(r, labels={**r.labels, "EGFR": "1"}) for r in before.cohort.records],
        cohort.label_names,
    )
    after = probe_folds(embeddings, flipped, [task])
    same = torch.isclose(before.predictions.logits["EGFR"][:, 0], after.predictions.logits["EGFR"][:, 0])
    held = torch.tensor([r.fold == 0 for r in before.cohort.records])
    assert same[held].all()
    assert not same[~held].any()


def test_faults_are_named(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def fault(*words: str) -> str:
        assert main(["probe", str(study / "signal.safetensors"), *words]) == 2
        return capsys.readouterr().err

    cohort = str(study / "cohort.csv")
    assert "'grade'" in fault("--cohort", cohort, "--tasks", "grade")
    lines = (study / "cohort.csv").read_text().splitlines()
    (tmp_path / "more.csv").write_text("\n".join([*lines, "unseen,C99,x,0,0,test"]) + "\n")
    assert "'unseen'" in fault("--cohort", str(tmp_path / "more.csv"), "--tasks", "EGFR")
    rare = [line.replace(",z,", ",x,") for line in lines]
    rare[-1] = rare[-1].replace(",x,", ",z,").replace(",y,", ",z,")
    (tmp_path / "rare.csv").write_text("\n".join(rare) + "\n")
    assert "hold no 'z'" in fault(
        "--cohort", str(tmp_path / "rare.csv"), "--tasks", "subtype", "--folds", "3"
    )
