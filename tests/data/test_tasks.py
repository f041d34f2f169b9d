"""Survival tasks: how time and event are read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dre_fast.data.cohort import Cohort, CohortError, LabelError, Task
from dre_fast.data.tasks import event_value

OS = Task("os", "survival", columns=("OS_MONTHS", "OS_STATUS"))


def cohort(folder: Path, *rows: str) -> Cohort:
    file = folder / "cohort.csv"
    file.write_text("slide_id,path,OS_MONTHS,OS_STATUS\n" + "\n".join(rows) + "\n")
    return Cohort.read(file)


def test_time_and_event_of_a_cbioportal_table(tmp_path):
    rows = ["a,x,12.5,1:DECEASED", "b,x,0,0:LIVING", "c,x,NA,", "d,x,1e2,dead", "e,x,7,0"]
    target = cohort(tmp_path, *rows).encode(OS)
    assert target.dtype == torch.float32
    nan = float("nan")
    expected = torch.tensor([[12.5, 1], [0, 0], [nan, nan], [100, 1], [7, 0]])
    torch.testing.assert_close(target, expected, equal_nan=True, rtol=0, atol=0)
    assert cohort(tmp_path, *rows).encode(OS, []).shape == (0, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("s,x,-3,1", r"slide 's', column 'OS_MONTHS', task 'os': '-3' is not a time"),
        ("s,x,a year,1", r"column 'OS_MONTHS'.*'a year' is not a time: a number >= 0"),
        ("s,x,inf,1", r"column 'OS_MONTHS'.*'inf' is not a time"),
        ("s,x,nan,1", r"column 'OS_MONTHS'.*'nan' is not a time"),
        ("s,x,3,", r"slide 's', column 'OS_STATUS'.*missing, but column 'OS_MONTHS' is '3'"),
        ("s,x,,dead", r"slide 's', column 'OS_MONTHS'.*missing, but column 'OS_STATUS' is 'dead'"),
        (
            "s,x,3,lost",
            r"column 'OS_STATUS'.*'lost' is neither an event nor its absence.*\[censored, event\]",
        ),
        ("s,x,3,G12C", r"'G12C' is neither an event"),
        ("s,x,3,2:OTHER", r"'2:OTHER' is neither an event"),
    ],
)
def test_faulty_cells_are_named(tmp_path, row, message):
    with pytest.raises(LabelError, match=message):
        cohort(tmp_path, row).encode(OS)


def test_other_words_for_the_event(tmp_path):
    task = Task("os", "survival", ("AW", "TOD"), OS.columns)
    assert cohort(tmp_path, "a,x,1,TOD", "b,x,2,AW").encode(task)[:, 1].tolist() == [1, 0]
    with pytest.raises(LabelError, match="'dead' is neither 'AW' nor 'TOD'"):
        cohort(tmp_path, "a,x,1,dead").encode(task)
    with pytest.raises(CohortError, match=r"no label column 'PFS' \(task 'pfs'\)"):
        cohort(tmp_path, "a,x,1,dead").encode(Task("pfs", "survival", columns=("OS_MONTHS", "PFS")))


@pytest.mark.parametrize(
    "text", ["1", "1.0", "True", "Dead", "DECEASED", "1:DECEASED", "1:Recurred/Progressed"]
)
def test_words_for_an_event(text):
    assert event_value(text) == 1.0


@pytest.mark.parametrize(
    "text", ["0", "no", "alive", "Living", "censored", "0:LIVING", "0:DiseaseFree", "0 : x"]
)
def test_words_for_none(text):
    assert event_value(text) == 0.0


@pytest.mark.parametrize("text", ["", "10:x", "2", "L858R", "unknown"])
def test_words_for_neither(text):
    assert event_value(text) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"two columns, \[time, event\], got \['t'\]"),
        ({"columns": ["a", "b", "c"]}, "two columns"),
        ({"columns": ["a", "a"]}, "repeated names"),
        ({"columns": ["a", "b"], "method": "weibull"}, "method must be one of cox, hazard"),
        ({"columns": ["a", "b"], "method": "hazard", "bins": 1}, "bins must be at least 2"),
        ({"columns": ["a", "b"], "bins": 3, "edges": [2, 1]}, "2 ascending edges"),
        ({"columns": ["a", "b"], "bins": 3, "edges": [0, 1]}, "2 ascending edges > 0"),
        ({"columns": ["a", "b"], "bins": 3, "edges": [1]}, "2 ascending edges"),
        ({"columns": ["a", "b"], "classes": ["x"]}, r"\[censored, event\]"),
    ],
)
def test_faulty_survival_tasks(options, message):
    with pytest.raises(ValueError, match=f"task 't'.*{message}"):
        Task("t", "survival", **options)


def test_outputs_and_cards():
    assert OS.outputs == 1
    assert OS.output_names == ("risk",)
    hazard = Task("os", "survival", columns=OS.columns, method="hazard", bins=3).with_edges([0.1, 2])
    assert hazard.outputs == 3
    assert hazard.output_names == ("hazard 1", "hazard 2", "hazard 3")
    plain = Task("subtype", classes=("a", "b"))
    assert set(plain.card()) == {"kind", "classes", "columns"}
    for task in (OS, hazard, plain, Task("g", "multilabel", columns=("a", "b"))):
        assert Task.from_card(task.name, json.loads(json.dumps(task.card()))) == task
