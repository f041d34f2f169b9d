"""Bags named by a table of their paths: MIL_BASELINE's columns, eva's, one's own; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dre_fast.cli import main
from dre_fast.data.bag_cohort import bag_cohort
from dre_fast.data.bags import BagError, BagFolder, find_bags


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(("b/S1", "a/S2", "a/S.3")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(torch.full((number + 1, 4), float(number)), tmp_path / f"{name}.pt")
    return tmp_path


def table(root: Path, text: str) -> Path:
    (root / "bags.csv").write_text(text)
    return root / "bags.csv"


@pytest.mark.parametrize(
    "text",
    [
        "slide_path,label\n{root}/b/S1.pt,0\na/S2.pt,1\na/S.3.pt,1\n",
        "train_slide_path,train_label,val_slide_path,val_label,test_slide_path,test_label\n"
        "b/S1.pt,0,a/S2.pt,1,a/S.3.pt,1\n,,,,,\n",
        "train_slide_path,train_label,test_slide_path,test_label\nb/S1.pt,0,a/S.3.pt,1\na/S2.pt,1,,\n",
        ",origin,embeddings,target,split\n0,x.tiff,b/S1.pt,0,train\n1,y.tiff,a/S2.pt,1,val\n2,z.tiff,a/S.3.pt,0,val\n",
    ],
)
def test_paths_of_every_layout(root, text):
    file = table(root, text.replace("{root}", str(root)))
    assert find_bags(file) == {"S.3": root / "a/S.3.pt", "S1": root / "b/S1.pt", "S2": root / "a/S2.pt"}
    assert {name: len(bag) for name, bag in BagFolder(file).items()} == {"S.3": 3, "S1": 1, "S2": 2}


def test_slides_under_names_of_their_own(root):
    file = table(root, "slide_id,path,case_id,label\nx,b/S1.pt,P,a\ny,a/S2.pt,P,a\nz,a/S.3.pt,Q,b\n")
    assert list(find_bags(file)) == ["x", "y", "z"]
    cohort = bag_cohort(file, file)  # the same table says the labels
    assert [(r.slide_id, r.case_id, r.path) for r in cohort.records][2] == ("z", "Q", root / "a/S.3.pt")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "slide,label\nS1,0\n",
            r"row 1: no column of paths: looked for one of path, slide_path.*found slide, label",
        ),
        ("path,embeddings\nb/S1.pt,a/S2.pt\n", "several columns of paths, path and embeddings"),
        ("path\nb/S1.pt\nb/S9.pt\n", r"row 3, column 'path': no such file: \S*S9\.pt"),
        ("path\nbags.csv\n", r"bags\.csv is no bag of features"),
        ("path\nb/S1.pt\n./b/S1.pt\n", r"row 3, column 'path': slide 'S1' has two bags, .*\(row 2\)"),
        ("path,label\n,1\n", "names no bag"),
        ("path\n\n", "names no bag"),
    ],
)
def test_what_is_refused(root, text, said):
    with pytest.raises(BagError, match=said):
        find_bags(table(root, text))


def test_a_number_behind_a_dot_is_another_slide(root, capsys):
    """P1 is not P1.2 whatever the table leaves out."""
    (root / "labels.csv").write_text("slide_id,case_id,label\nS,A,a\nS1,B,b\n")
    command = ["mil", str(root / "a"), str(root / "labels.csv"), "--out", str(root / "cv"), "--skip-missing"]
    assert main(command) == 2  # S.3 would be the bag of S
    assert "none of its 2 rows has a bag" in capsys.readouterr().err
