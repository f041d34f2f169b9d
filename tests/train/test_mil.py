"""ResidualMIL trained on bags: it learns, forgets nothing of itself on disk, and sees no test slide."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dre_fast.data.bag_cohort import bag_cohort
from dre_fast.data.cohort import Cohort, Task
from dre_fast.eval.metrics import auc, c_index
from dre_fast.train.bag_set import BagSet
from dre_fast.train.mil import _forward_of, train_mil
from dre_fast.train.mil_files import load_mil, save_mil
from dre_fast.train.mil_settings import MILSettings
from mil_study import DIM, write_bag, write_study

SETTINGS = MILSettings(
    codewords=6, width=32, depth=1, heads=2, head="light", epochs=15, lr=3e-3, batch_size=8
)
LABEL = Task("label", "multiclass", classes=("normal", "tumor"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mil")
    write_study(root, cases=72)
    return root


@pytest.fixture(scope="module")
def cohort(study: Path) -> Cohort:
    return bag_cohort(study / "features", study / "labels.csv")


@pytest.fixture(scope="module")
def bags(cohort: Cohort) -> BagSet:
    return BagSet(cohort, sample=1000)


def parts(cohort: Cohort) -> tuple[list[int], list[int], list[int]]:
    """Slides of training, validation and test, by case."""
    number = [int(record.case_id[1:]) for record in cohort.records]
    return (
        [i for i, n in enumerate(number) if n < 48],
        [i for i, n in enumerate(number) if 48 <= n < 58],
        [i for i, n in enumerate(number) if n >= 58],
    )


def test_few_tiles_decide_and_the_best_epoch_is_kept(cohort, bags):
    train, val, test = parts(cohort)
    targets = cohort.encode_labels([LABEL])
    found = train_mil(bags, targets, [LABEL], train, val, SETTINGS)
    said = found.predict(bags, test)
    assert said.slide_ids == [cohort.ids[i] for i in test]
    assert auc("multiclass", said.logits["label"], targets["label"][test]) > 0.85
    scores = [row["val_score"] for row in found.history]
    assert len(scores) == SETTINGS.epochs
    assert found.epoch == int(np.argmax(scores))
    unlike = train_mil(bags, targets, [LABEL], train, [], SETTINGS)
    assert unlike.epoch == SETTINGS.epochs - 1


def test_a_score_that_is_no_number_is_not_kept_for_good(cohort, bags, monkeypatch):
    train, val, _ = parts(cohort)
    scores = iter([float("nan"), 0.5, float("nan")])
    monkeypatch.setattr("dre_fast.train.mil._judge", lambda *_: ({}, next(scores)))
    targets = cohort.encode_labels([LABEL])
    assert train_mil(bags, targets, [LABEL], train, val, replace(SETTINGS, epochs=3)).epoch == 1


def test_labels_that_the_tiles_do_not_bear_are_not_learned(cohort, bags):
    train, val, test = parts(cohort)
    task = Task("chance", "binary")
    targets = cohort.encode_labels([task])
    found = train_mil(bags, targets, [task], train, val, SETTINGS)
    assert 0.1 < auc("binary", found.predict(bags, test).logits["chance"], targets["chance"][test]) < 0.9


@pytest.mark.parametrize("assignment", ["hard", "soft"])
def test_two_runs_are_equal_and_the_random_state_is_left_alone(cohort, bags, assignment):
    train, val, _ = parts(cohort)
    settings = replace(SETTINGS, assignment=assignment, epochs=2, dropout=0.3)
    targets = cohort.encode_labels([LABEL])
    before = torch.get_rng_state()
    first = train_mil(bags, targets, [LABEL], train, val, settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    again = train_mil(bags, targets, [LABEL], train, val, settings).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.model.state_dict().items())
    other = train_mil(bags, targets, [LABEL], train, val, settings, seed=1).model.state_dict()
    assert not torch.equal(other["encoding.codebook"], again["encoding.codebook"])


def test_nothing_of_the_test_slides_is_in_the_model(study, cohort, bags, tmp_path):
    train, val, test = parts(cohort)
    shutil.copytree(study / "features", tmp_path / "features")
    for slide in test:
        write_bag(tmp_path / "features", cohort.ids[slide], np.full((30, DIM), slide + 0.5, np.float32))
    others = BagSet(bag_cohort(tmp_path / "features", study / "labels.csv"), sample=1000)
    settings = replace(SETTINGS, epochs=2)
    targets = cohort.encode_labels([LABEL])
    one = train_mil(bags, targets, [LABEL], train, val, settings).model.state_dict()
    two = train_mil(others, targets, [LABEL], train, val, settings).model.state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_bags_read_again_are_the_bags_kept(cohort, bags):
    train, val, _ = parts(cohort)
    lean = BagSet(cohort, sample=1000, memory_gb=0)
    assert not lean._kept
    assert lean.marks == bags.marks
    targets = cohort.encode_labels([LABEL])
    settings = replace(SETTINGS, epochs=1)
    one, two = (train_mil(b, targets, [LABEL], train, val, settings).model.state_dict() for b in (bags, lean))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_encodings_kept_are_those_of_the_bags(cohort, bags):
    train, _, test = parts(cohort)
    found = train_mil(bags, cohort.encode_labels([LABEL]), [LABEL], train, [], replace(SETTINGS, epochs=1))
    forward = _forward_of(found.model, bags, [*train, *test])
    x, offsets = bags.ragged(test[:5])
    assert torch.allclose(forward(test[:5]), found.model(x, offsets), atol=1e-6)


def test_tasks_with_missing_labels_and_survival(cohort, bags):
    train, val, test = parts(cohort)
    tasks = [
        Task("genes", "multilabel", columns=("gene", "chance")),
        Task("cox", "survival", columns=("months", "dead")),
        Task("hazard", "survival", columns=("months", "dead"), method="hazard", bins=2),
    ]
    targets = cohort.encode_labels(tasks)
    settings = replace(SETTINGS, balance="inverse", epochs=25)
    found = train_mil(bags, targets, tasks, [*train, *val], [], settings)
    said = found.predict(bags, test)
    assert {name: tuple(x.shape) for name, x in said.logits.items()} == {
        "genes": (len(test), 2),
        "cox": (len(test), 1),
        "hazard": (len(test), 2),
    }
    assert len(said.tasks["hazard"]["edges"]) == 1
    assert auc("binary", said.logits["genes"][:, :1], targets["genes"][test][:, 0]) > 0.8
    for method in ("cox", "hazard"):
        assert c_index(method, said.logits[method], targets[method][test]) > 0.7


def test_a_column_without_a_training_label_is_refused(cohort, bags):
    train, _, _ = parts(cohort)
    targets = {"label": torch.full((len(cohort),), -1)}
    with pytest.raises(ValueError, match="task 'label', column 'label': no training slide has a label"):
        train_mil(bags, targets, [LABEL], train, [], SETTINGS)


@pytest.mark.parametrize("assignment", ["hard", "netvlad"])
def test_a_model_from_disk_says_the_same(cohort, bags, tmp_path, assignment):
    train, val, test = parts(cohort)
    settings = replace(SETTINGS, epochs=1, assignment=assignment, amp="bf16")
    found = train_mil(bags, cohort.encode_labels([LABEL]), [LABEL], train, val, settings)
    save_mil(found, tmp_path)
    back = load_mil(tmp_path)
    assert torch.equal(back.predict(bags, test).logits["label"], found.predict(bags, test).logits["label"])
    assert back.settings == settings
    assert back.tasks == [LABEL]
    assert json.loads((tmp_path / "model.json").read_text())["settings"]["assignment"] == assignment


def test_files_that_are_no_such_model(tmp_path):
    from dre_fast.train.state import save_model

    with pytest.raises(FileNotFoundError, match="no trained model"):
        load_mil(tmp_path)
    save_model(tmp_path / "model.safetensors", {"a": torch.zeros(1)}, {"config": {}})
    with pytest.raises(ValueError, match="not a model of `dre-fast mil`"):
        load_mil(tmp_path)
    for card in (
        {},
        {"settings": {"colour": 1}, "tasks": {}, "dim": 4},
        {"settings": {"lr": -1}, "tasks": {}},
    ):
        save_model(tmp_path / "model.safetensors", {"a": torch.zeros(1)}, {"kind": "mil", **card})
        with pytest.raises(ValueError, match=r"model\.safetensors: its card is not one that this version"):
            load_mil(tmp_path)


def test_bags_that_cannot_be_used_are_named(study, cohort, bags, tmp_path):
    def folder(change: np.ndarray) -> Cohort:
        shutil.rmtree(tmp_path / "features", ignore_errors=True)
        shutil.copytree(study / "features", tmp_path / "features")
        write_bag(tmp_path / "features", "P004-0", change)
        return bag_cohort(tmp_path / "features", study / "labels.csv")

    spoilt = np.ones((9, DIM), np.float32)
    spoilt[6, 2] = np.nan
    with pytest.raises(ValueError, match=r"P004-0.h5: slide P004-0.* tile 6"):
        BagSet(folder(spoilt))
    with pytest.raises(ValueError, match=r"D=16 in 95 slides, D=5 in 1 slide; .*\n  slide 'P004-0' .*D=5"):
        BagSet(folder(np.ones((9, 5), np.float32)))
    with h5py.File(study / "features" / "P005-0.h5") as file:
        copied = BagSet(folder(file["features"][:]))
    with pytest.raises(
        ValueError, match=r"'P004-0' \(case 'P004'\) and 'P005-0' \(case 'P005'\) hold the same"
    ):
        copied.refuse_copies()
    bags.refuse_copies()


def test_the_odd_one_is_blamed_not_the_others(study, tmp_path):
    shutil.copytree(study / "features", tmp_path / "features")
    write_bag(tmp_path / "features", "P000-0", np.ones((9, 5), np.float32))  # the first of the table
    with pytest.raises(ValueError, match="several sizes") as said:
        BagSet(bag_cohort(tmp_path / "features", study / "labels.csv"))
    assert "'P000-0'" in str(said.value)
    assert "P000-1" not in str(said.value)


def test_all_bad_bags_are_named_up_to_ten(study, tmp_path):
    shutil.copytree(study / "features", tmp_path / "features")
    spoilt = [f"P{number:03d}-0" for number in range(1, 13)]

    def refused() -> str:
        with pytest.raises(ValueError, match="12 of 96 slides have a bag that cannot be used") as error:
            BagSet(bag_cohort(tmp_path / "features", study / "labels.csv"))
        return str(error.value)

    nan = np.ones((9, DIM), np.float32)
    nan[6, 2] = np.nan
    for name in spoilt:
        write_bag(tmp_path / "features", name, nan)
    said = refused()
    assert all(name in said for name in spoilt[:10])
    assert said.endswith("\n  and 2 more")
    file = tmp_path / "features" / f"{spoilt[0]}.h5"
    whole = file.read_bytes()
    for name in spoilt:
        file = tmp_path / "features" / f"{name}.h5"
        file.write_bytes(whole[: len(whole) // 2])
    write_bag(tmp_path / "features", spoilt[1], np.ones((0, DIM), np.float32))
    with h5py.File(tmp_path / "features" / f"{spoilt[2]}.h5", "w") as other:
        other["embeddings"] = nan
    said = refused()
    assert "not a readable HDF5 file" in said
    assert "a bag without tiles" in said
    assert "found 'embeddings'" in said


def test_features_of_another_width_are_refused(cohort, bags, tmp_path):
    train, _, _ = parts(cohort)
    found = train_mil(bags, cohort.encode_labels([LABEL]), [LABEL], train, [], replace(SETTINGS, epochs=1))
    write_bag(tmp_path, "X", np.ones((9, 5), np.float32))
    from dre_fast.data.bag_cohort import cohort_of_bags

    with pytest.raises(ValueError, match=r"D=5, the model was trained on D=16"):
        found.predict(BagSet(cohort_of_bags(tmp_path)))


def test_settings_that_cannot_be():
    for wrong in ({"epochs": 0}, {"lr": 0.0}, {"amp": "fp16"}, {"balance": "both"}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MILSettings(**wrong)
