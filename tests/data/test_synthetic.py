"""The synthetic cohort: real files, consistent labels, the same for the same seed, no colour short cut."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from dre_fast.data.cohort import Cohort
from dre_fast.data.synthetic import make_cohort, plan_cohort, read_truth, tumour_tiles, write_pyramid
from dre_fast.data.synthetic_tissue import TissueSpec, paint

SMALL = {"size": (768, 640), "train": 4, "val": 2, "test": 4}
PLAN = {
    "train": 48,
    "val": 12,
    "test": 40,
    "mpp": 1.0,
    "size": (1664, 1280),
    "normal_fraction": 0.25,
    "witness": (0.1, 0.2),
    "contrast": 1.0,
    "texture": 1.0,
    "stain_variation": 1.0,
    "missing_genes": 0.25,
    "two_slide_fraction": 0.1,
}


@pytest.fixture(scope="module")
def cohort_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("cohort"), seed=3, workers=2, **SMALL)


def digests(csv: Path) -> list[str]:
    files = [csv, csv.with_name("truth.json"), *sorted((csv.parent / "slides").iterdir())]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_cohort_table_is_complete_and_readable(cohort_csv: Path):
    cohort = Cohort.read(cohort_csv, must_exist=True)
    assert cohort.splits == {"train": 4, "val": 2, "test": 4}
    assert cohort.label_names == ("subtype", "tumour", "EGFR", "TP53")
    for record in cohort.records:
        assert record.report is not None
        assert record.report.startswith("Synthetic report.")
        tumour = record.labels["tumour"] == "tumour"
        assert (record.labels["subtype"] is not None) == tumour
        if not tumour:
            assert record.labels["EGFR"] is None
            assert record.labels["TP53"] is None


def test_same_seed_same_bytes_whatever_the_workers(cohort_csv: Path, tmp_path: Path):
    again = make_cohort(tmp_path / "again", seed=3, workers=1, **SMALL)
    assert digests(again) == digests(cohort_csv)
    other = make_cohort(tmp_path / "other", seed=4, workers=2, **SMALL)
    assert not set(digests(other)) & set(digests(cohort_csv))


@pytest.mark.parametrize("mpp", [0.5, 2.0])
def test_pyramid_opens_in_openslide_with_its_resolution(tmp_path: Path, mpp: float):
    openslide = pytest.importorskip("openslide")
    pixels = np.random.default_rng(0).integers(0, 255, (300, 420, 3), dtype=np.uint8)
    write_pyramid(tmp_path / "s.tif", pixels, mpp=mpp)
    with openslide.OpenSlide(tmp_path / "s.tif") as slide:
        assert slide.level_dimensions == ((420, 300), (210, 150), (105, 75))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(mpp)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(mpp)


def test_openslide_and_cucim_read_the_same_pixels(cohort_csv: Path):
    openslide = pytest.importorskip("openslide")
    cucim = pytest.importorskip("cucim", reason="needs cucim: pip install 'dre_fast[cucim]'")
    path = sorted((cohort_csv.parent / "slides").iterdir())[0]
    other = cucim.CuImage(str(path))
    with openslide.OpenSlide(path) as slide:
        assert [tuple(d) for d in other.resolutions["level_dimensions"]] == list(slide.level_dimensions)
        for level in range(3):
            a = np.asarray(slide.read_region((256, 200), level, (96, 96)))[..., :3].astype(int)
            b = np.asarray(other.read_region((256, 200), (96, 96), level=level)).astype(int)
            assert np.abs(a - b).max() <= 1


def test_pixels_survive_the_file(tmp_path: Path):
    openslide = pytest.importorskip("openslide")
    spec = TissueSpec(512, 448, 1.0, "glandular", 0.2)
    pixels, _ = paint(spec, np.random.default_rng(1))
    write_pyramid(tmp_path / "s.tif", pixels, mpp=1.0)
    with openslide.OpenSlide(tmp_path / "s.tif") as slide:
        read = np.asarray(slide.read_region((0, 0), 0, (512, 448)))[..., :3].astype(float)
        half = np.asarray(slide.read_region((0, 0), 1, (256, 224)))[..., :3].astype(float)
    assert np.abs(read - pixels).mean() < 4
    shrunk = pixels.reshape(224, 2, 256, 2, 3).mean((1, 3))
    assert np.abs(half - shrunk).mean() < 4


def test_truth_marks_tumour_slides_only_and_in_part(cohort_csv: Path):
    truth = read_truth(cohort_csv.parent)
    for record in Cohort.read(cohort_csv).records:
        structures = truth[record.slide_id]
        assert (len(structures) > 0) == (record.labels["tumour"] == "tumour")
        if len(structures):
            assert (structures[:, :2] >= 0).all()
            assert (structures[:, :2] < SMALL["size"]).all()


def test_tumour_tiles_by_coverage():
    structures = np.array([[100.0, 100.0, 20.0]])
    coords = np.array([[64, 64], [0, 0], [90, 90], [200, 200]])
    # a disc of radius 20 covers 1257 px: 31 % of a tile of 64 px that holds it all
    assert tumour_tiles(structures, coords, 64, 0.25).tolist() == [True, False, False, False]
    assert tumour_tiles(structures, coords, 64, 0.01).tolist() == [True, False, True, False]
    assert tumour_tiles(structures, coords, 64, 0.32).tolist() == [False] * 4
    assert tumour_tiles(np.zeros((0, 3)), coords, 64).tolist() == [False] * 4


def test_witness_fraction_of_tissue_tiles():
    for seed, subtype in enumerate(["glandular", "squamous"] * 3):
        pixels, structures = paint(TissueSpec(1664, 1280, 1.0, subtype, 0.15), np.random.default_rng(seed))
        tiles = pixels.reshape(20, 64, 26, 64, 3).swapaxes(1, 2).reshape(-1, 64, 64, 3)
        x, y = np.meshgrid(np.arange(26) * 64, np.arange(20) * 64)
        coords = np.stack([x.ravel(), y.ravel()], -1)
        glass = pixels[:8].reshape(-1, 3).mean(0)
        tissue = (tiles - glass).mean((1, 2, 3)) < -18
        witness = tumour_tiles(structures, coords[tissue], 64).mean()
        assert 0.08 < witness < 0.25
        assert 120 <= tissue.sum() <= 420


def test_plan_is_balanced_and_splits_by_case():
    plans = plan_cohort(seed=0, **PLAN)
    splits: dict[str, set[str]] = {}
    for plan in plans:
        splits.setdefault(plan.case_id, set()).add(plan.split)
    assert all(len(where) == 1 for where in splits.values())
    assert len(splits) < len(plans)  # some cases have two slides
    for split, count in (("train", 48), ("val", 12), ("test", 40)):
        here = [p.tissue.subtype for p in plans if p.split == split]
        assert len(here) == count
        assert here.count(None) == count // 4
        assert abs(here.count("glandular") - here.count("squamous")) <= 1
    pairs = [[p for p in plans if p.case_id == case] for case in splits]
    for pair in pairs:
        assert len({p.report for p in pair}) == 1
        assert len({p.tissue.subtype for p in pair}) == 1


def test_reports_tell_the_diagnosis_in_several_wordings():
    plans = plan_cohort(seed=1, **PLAN)
    words = {"glandular": ("adenocarcinoma", "gland"), "squamous": ("squamous",)}
    for plan in plans:
        text = plan.report.lower()
        for subtype, said in words.items():
            assert any(word in text for word in said) == (plan.tissue.subtype == subtype), plan.report
        assert "egfr" not in text
    assert len({plan.report for plan in plans}) > 80


def test_gene_labels_are_partly_missing_and_change_the_nuclei():
    plans = [p for p in plan_cohort(seed=2, **PLAN) if p.tissue.subtype]
    values = [p.genes["EGFR"] for p in plans]
    assert 0.1 < values.count("") / len(values) < 0.4
    scale = {v: np.mean([p.tissue.nuclear_scale for p in plans if p.genes["EGFR"] == v]) for v in "01"}
    assert scale["1"] > scale["0"] * 1.08
    uneven = {v: np.mean([p.tissue.pleomorphism for p in plans if p.genes["TP53"] == v]) for v in "01"}
    assert uneven["1"] > uneven["0"] * 1.5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train": -1}, "train"),
        ({"witness": (0.3, 0.2)}, "witness"),
        ({"contrast": 1.5}, "contrast"),
        ({"stain_variation": -1.0}, "stain_variation"),
        ({"mpp": 0.0}, "mpp"),
        ({"size": (200, 200)}, "size"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, change: dict, named: str):
    with pytest.raises(ValueError, match=named):
        make_cohort(tmp_path, **{**SMALL, **change})
    assert not (tmp_path / "cohort.csv").exists()


@pytest.mark.slow
def test_mean_colour_does_not_give_the_subtype_away():
    sklearn = pytest.importorskip("sklearn.linear_model")
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from dre_fast.eval import scores

    features, labels = [], []
    for seed in range(80):
        spec = TissueSpec(1024, 896, 1.0, ("glandular", "squamous")[seed % 2], 0.2)
        pixels, _ = paint(spec, np.random.default_rng([9, seed]))
        flat = pixels.reshape(-1, 3).astype(np.float32)
        features.append(np.concatenate([flat.mean(0), flat.std(0)]))
        labels.append(seed % 2)
    model = make_pipeline(StandardScaler(), sklearn.LogisticRegression())
    score = cross_val_predict(model, np.stack(features), labels, cv=8, method="predict_proba")[:, 1]
    value = scores.auc(score.astype(float), np.array(labels) == 1, np.ones((1, len(labels))))[0]
    assert value < 0.68
