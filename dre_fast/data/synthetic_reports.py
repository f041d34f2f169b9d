"""Templated reports of the synthetic cohort; every one says that it is synthetic."""

from __future__ import annotations

import numpy as np

_SITES = ("right upper lobe", "right lower lobe", "left upper lobe", "left lower lobe", "middle lobe")
_PROCEDURES = ("wedge resection", "lobectomy", "core biopsy", "segmentectomy")
_GRADES = (
    ("well differentiated", "grade 1", "low grade"),
    ("moderately differentiated", "grade 2", "intermediate grade"),
    ("poorly differentiated", "grade 3", "high grade"),
)
_DIAGNOSES = {
    "glandular": (
        "Adenocarcinoma, acinar pattern, {grade}.",
        "Gland-forming carcinoma consistent with adenocarcinoma, {grade}.",
        "Infiltrating adenocarcinoma ({grade}) with round glands lined by columnar cells.",
        "Carcinoma with glandular differentiation and open lumina, {grade}.",
    ),
    "squamous": (
        "Squamous cell carcinoma, keratinising, {grade}.",
        "Carcinoma in solid nests with keratin whorls, consistent with squamous cell carcinoma, {grade}.",
        "Infiltrating squamous carcinoma ({grade}) with keratin pearls.",
        "Carcinoma with squamous differentiation growing in solid nests, {grade}.",
    ),
    None: (
        "No tumour identified; benign tissue with lymphoid aggregates.",
        "Benign fibrous tissue with vessels and chronic inflammation, negative for malignancy.",
        "Negative for carcinoma. Reactive lymphoid clusters are present.",
        "Unremarkable stroma and vessels without evidence of neoplasia.",
    ),
}
_NOISE = (
    "Margins are free.",
    "The specimen was received in formalin and measures {cm} cm.",
    "Clinical history: cough and weight loss.",
    "The patient has a {years} pack-year smoking history.",
    "Comparison with prior imaging was not possible.",
    "The findings were discussed with the clinical team.",
    "Block {block} was submitted for further studies.",
    "Pleura is uninvolved.",
    "No special stains were performed.",
    "The patient is {age} years old.",
)
_HEADERS = ("Final diagnosis: ", "Diagnosis: ", "Interpretation: ", "")


def write_report(subtype: str | None, rng: np.random.Generator) -> str:
    """A short report: procedure, site, diagnosis in one of several wordings, grade, unrelated remarks."""

    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    grade = pick(_GRADES[int(rng.integers(3))])
    opening = f"Lung, {pick(_SITES)}, {pick(_PROCEDURES)}. "
    diagnosis = pick(_HEADERS) + pick(_DIAGNOSES[subtype]).format(grade=grade)
    noise = [
        _NOISE[i].format(
            cm=f"{rng.uniform(0.5, 6):.1f}",
            years=int(rng.integers(5, 60)),
            block=f"A{int(rng.integers(1, 9))}",
            age=int(rng.integers(40, 86)),
        )
        for i in rng.permutation(len(_NOISE))[: int(rng.integers(2, 5))]
    ]
    before = int(rng.integers(0, len(noise)))
    return "Synthetic report. " + opening + " ".join([*noise[:before], diagnosis, *noise[before:]])
