"""HistGen's annotation.json as a cohort."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dre_fast.cli import main
from dre_fast.data.annotation import read_annotation
from dre_fast.data.cohort import CohortError
from dre_fast.data.reports import ReportEmbeddings


def entry(slide: str, split: str, **more: object) -> dict[str, object]:
    report = f"Report of {slide[:12]}: carcinoma of the lung, grade {len(slide)}."
    return {"id": slide, "report": report, "image_path": [f"{slide}.svs"], "split": split, **more}


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


SLIDES = [f"TCGA-05-{number}-01Z-00-DX1.AAAA" for number in range(4244, 4252)]


def test_slides_reports_and_splits(tmp_path):
    groups = {"train": [entry(s, "train") for s in SLIDES[:5]], "val": [entry(SLIDES[5], "val")]}
    groups["test"] = [entry(s, "test", image_path=f"{s}.svs") for s in SLIDES[6:]]
    cohort = read_annotation(written(tmp_path / "annotation.json", groups))
    assert cohort.ids == SLIDES
    assert cohort.splits == {"train": 5, "val": 1, "test": 2}
    assert cohort[0].case_id == "TCGA-05-4244"
    assert cohort[0].path == cohort.records[0].path == tmp_path / f"{SLIDES[0]}.svs"
    assert cohort.reports()["TCGA-05-4245"].startswith("Report of TCGA-05-4245")


def test_embed_reports_takes_it_as_the_cohort(tmp_path):
    groups = {
        "train": [entry(s, "train") for s in SLIDES[:6]],
        "test": [entry(s, "test") for s in SLIDES[6:]],
    }
    file = written(tmp_path / "annotation.json", groups)
    assert main(["embed-reports", str(file), "--out", str(tmp_path / "r.safetensors"), "--dim", "3"]) == 0
    found = ReportEmbeddings.load(tmp_path / "r.safetensors")
    assert found.case_ids == [slide[:12] for slide in SLIDES]
    assert found.details["fitted_on"] == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], r"expected \{split"),
        ({}, "no entries"),
        ({"train": [{"id": "a"}]}, r"'train', entry 0: needs texts"),
        ({"fold1": [entry("a", "train")]}, "group 'fold1' must be"),
        ({"train": [entry("a", "test")]}, "slide 'a' says split 'test', but is listed under 'train'"),
        ({"train": [entry("a", "train", image_path=["x", "y"])]}, "must be one path"),
        ({"train": [entry("a", "train")], "test": [entry("a", "test")]}, "'a' is listed twice"),
        (
            {"train": [entry(SLIDES[0], "train")], "test": [entry(SLIDES[0] + "2", "test")]},
            "case 'TCGA-05-4244' is in two splits",
        ),
    ],
)
def test_what_is_refused(tmp_path, content, message):
    with pytest.raises(CohortError, match=message):
        read_annotation(written(tmp_path / "annotation.json", content))
