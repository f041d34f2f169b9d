"""The file of slide embeddings: what goes in comes out, and faults are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dre_fast.data.embeddings import SlideEmbeddings

TASKS = {
    "subtype": {"kind": "multiclass", "classes": ["a", "b", "c"], "columns": ["subtype"]},
    "genes": {"kind": "multilabel", "classes": [], "columns": ["EGFR", "TP53"]},
}


def example(slides: int = 4, reports: bool = True) -> SlideEmbeddings:
    g = torch.Generator().manual_seed(0)
    return SlideEmbeddings(
        [f"S{i} ä/b" for i in range(slides)],
        torch.randn(slides, 6, generator=g),
        torch.randn(slides, 5, generator=g) if reports else None,
        {"subtype": torch.randn(slides, 3, generator=g), "genes": torch.randn(slides, 2, generator=g)},
        TASKS,
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".h5", ".hdf5"])
@pytest.mark.parametrize("reports", [True, False])
@pytest.mark.parametrize("slides", [0, 4])
def test_round_trip(tmp_path: Path, suffix: str, reports: bool, slides: int):
    before = example(slides, reports)
    before.save(tmp_path / f"e{suffix}")
    after = SlideEmbeddings.load(tmp_path / f"e{suffix}")
    assert after.slide_ids == before.slide_ids
    assert after.tasks == before.tasks
    assert torch.equal(after.embedding, before.embedding)
    assert set(after.logits) == {"subtype", "genes"}
    for name in after.logits:
        assert torch.equal(after.logits[name], before.logits[name])
    if reports:
        assert after.report_embedding is not None
        assert torch.equal(after.report_embedding, before.report_embedding)
    else:
        assert after.report_embedding is None
    assert [p.name for p in tmp_path.iterdir()] == [f"e{suffix}"]


def test_non_contiguous_tensors_are_saved(tmp_path: Path):
    wide = torch.arange(12.0).reshape(3, 4)
    SlideEmbeddings(["a", "b"], wide[:, :2].T[:, :3]).save(tmp_path / "e.safetensors")
    assert torch.equal(SlideEmbeddings.load(tmp_path / "e.safetensors").embedding, wide[:, :2].T)


def test_without_logits(tmp_path: Path):
    SlideEmbeddings(["a"], torch.ones(1, 2)).save(tmp_path / "e.h5")
    assert SlideEmbeddings.load(tmp_path / "e.h5").logits == {}


def test_select_reorders_and_names_what_is_absent():
    e = example()
    part = e.select([e.slide_ids[2], e.slide_ids[0]])
    assert torch.equal(part.embedding, e.embedding[[2, 0]])
    assert torch.equal(part.logits["genes"], e.logits["genes"][[2, 0]])
    with pytest.raises(ValueError, match="'nobody'"):
        e.select(["nobody"])


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: SlideEmbeddings(["a", "a"], torch.ones(2, 3)), "'a' appears twice"),
        (lambda: SlideEmbeddings(["a"], torch.ones(2, 3)), "embedding must be"),
        (lambda: SlideEmbeddings(["a"], torch.ones(1, 3).half()), "float32"),
        (lambda: SlideEmbeddings(["a"], torch.ones(1, 3), None, {"t": torch.ones(1, 2)}), "without an entry"),
        (
            lambda: SlideEmbeddings(
                ["a"], torch.ones(1, 3), None, {"subtype": torch.ones(1, 2)}, {"subtype": TASKS["subtype"]}
            ),
            "needs 3 logits",
        ),
        (
            lambda: SlideEmbeddings(
                ["a"], torch.ones(1, 3), None, {"t": torch.ones(1, 1)}, {"t": {"kind": "regression"}}
            ),
            "regression",
        ),
    ],
)
def test_what_does_not_fit_is_named(build, match: str):
    with pytest.raises(ValueError, match=match):
        build()


def test_files_that_are_not_embeddings(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"gone\.h5"):
        SlideEmbeddings.load(tmp_path / "gone.h5")
    with pytest.raises(ValueError, match=r"\.pt"):
        example().save(tmp_path / "e.pt")
    for suffix in (".h5", ".safetensors"):
        (tmp_path / f"bad{suffix}").write_bytes(b"not a file of any kind")
        with pytest.raises(ValueError, match="bad"):
            SlideEmbeddings.load(tmp_path / f"bad{suffix}")
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="weight"):
        SlideEmbeddings.load(tmp_path / "model.safetensors")


def test_a_cut_file_is_refused(tmp_path: Path):
    example().save(tmp_path / "e.safetensors")
    data = (tmp_path / "e.safetensors").read_bytes()
    (tmp_path / "e.safetensors").write_bytes(data[:-16])
    with pytest.raises(ValueError, match=r"e\.safetensors"):
        SlideEmbeddings.load(tmp_path / "e.safetensors")
