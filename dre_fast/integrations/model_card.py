"""Model cards: what a published model was trained on, how well it does, and what it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dre_fast.data.optional import need
from dre_fast.eval.grids import Grid

INTENDED_USE = (
    "Research on whole-slide images. It is no medical device: not for diagnosis, nor for decisions on treatment. "
    "Expect other scores on slides of other laboratories, scanners, stains and groups of patients than it was trained "
    "on; judge it on slides of your own first."
)
_TAGS = ["pathology", "whole-slide-image", "multiple-instance-learning", "dre_fast"]
_UNSAID = "Not stated by the author of this model."


@dataclass
class Card:
    """What a model does not know of itself. Everything may be left out; the card then says that it is not stated.

    Args:
        title: headline of the card.
        data: which slides the model was trained on, where they come from, under which terms.
        features: of a model on stored features: which tile encoder made them, at which size and um/px.
        splits: name of a split -> what is counted in it -> number, such as {"train": {"slides": 96, "cases": 81}}.
        metrics: name of a score -> its value; say of which slides, such as "AUC, test slides".
        tables: further tables, headline -> table.
        intended_use: what the model is for, and what not.
        license: as the Hub names it: apache-2.0, cc-by-nc-4.0, ...
        notes: further paragraphs.
    """

    title: str = ""
    data: str = ""
    features: str = ""
    splits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Grid] = field(default_factory=dict)
    intended_use: str = INTENDED_USE
    license: str | None = None
    notes: Sequence[str] = ()


def render(card: Card, *, kind: str, facts: Mapping[str, Any], usage: str) -> str:
    """The card as Markdown with the Hub's metadata on top.

    Args:
        kind: what it is, in a sentence.
        facts: name -> value of the model itself.
        usage: Python that loads it.
    """
    data = need("huggingface_hub", "train").ModelCardData(
        library_name="dre_fast", tags=list(_TAGS), license=card.license
    )
    parts = ["---", data.to_yaml().strip(), "---", "", f"# {card.title or 'A slide model'}", "", kind, ""]

    def section(title: str, *texts: str) -> None:
        parts.extend([f"## {title}", ""])
        for text in [text for text in texts if text] or [_UNSAID]:
            parts.extend([text, ""])

    section("Intended use", card.intended_use)
    section("How to use it", f"```python\n{usage}\n```", card.features and f"Features: {card.features}")
    section("Data", card.data)
    section("Splits", _splits(card.splits))
    scores = Grid(["score", "value"], [[name, float(value)] for name, value in card.metrics.items()])
    tables = [f"**{title}**\n\n{_markdown(grid)}" for title, grid in card.tables.items() if grid.rows]
    section("Metrics", _markdown(scores) if scores.rows else "", *tables)
    section("Model", _markdown(Grid(["setting", "value"], [[k, str(v)] for k, v in facts.items()])))
    for note in card.notes:
        parts.extend([note, ""])
    return "\n".join(parts).rstrip() + "\n"


def _splits(splits: Mapping[str, Mapping[str, int]]) -> str:
    if not splits:
        return ""
    counted = list(dict.fromkeys(key for counts in splits.values() for key in counts))
    rows = [[name, *(counts.get(key) for key in counted)] for name, counts in splits.items()]
    return _markdown(Grid(["split", *(key.replace("_", " ") for key in counted)], rows))


def _markdown(grid: Grid) -> str:
    return grid.markdown().rstrip()
