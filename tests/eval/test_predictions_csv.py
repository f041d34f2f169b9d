"""Predictions as a table: every column has a name of its own."""

from __future__ import annotations

import csv

import pytest
import torch

from dre_fast.data.cohort import Cohort, SlideRecord, Task
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.eval.predictions_csv import write_predictions


def test_two_tasks_of_one_column(tmp_path):
    tasks = [
        Task("EGFR", "binary"),
        Task("genes", "multilabel", columns=("EGFR", "TP53")),
        Task("kind", "multiclass", classes=("a", "b")),
    ]
    logits = {
        "EGFR": torch.tensor([[0.0]]),
        "genes": torch.tensor([[2.0, -1.0]]),
        "kind": torch.tensor([[0.0, 0.0]]),
    }
    cohort = Cohort(
        [SlideRecord("s", "c", labels={"EGFR": "1", "TP53": "0", "kind": "a"})], ("EGFR", "TP53", "kind")
    )
    said = SlideEmbeddings(["s"], torch.zeros(1, 2), None, logits, {task.name: task.card() for task in tasks})
    with open(write_predictions(said, cohort, tmp_path / "p.csv"), newline="") as file:
        header, row = csv.reader(file)
    assert len(set(header)) == len(header)
    found = dict(zip(header, row))
    assert float(found["p_EGFR_EGFR"]) == 0.5
    assert float(found["p_genes_EGFR"]) == pytest.approx(0.880797)
    assert float(found["p_TP53"]) == pytest.approx(0.268941)
    assert (found["p_kind_a"], found["label_EGFR"]) == ("0.5", "1")
