"""The model card in Markdown: what the model is, what was measured and what was not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from retrieval.models.bundle import ModelBundle
from retrieval.rates import Rate, wilson
from training.evaluation.intervals import TRIALS
from training.reports import templates

# The figures of a bundle that a card states, with their descriptions.
_FIGURES: Final[Mapping[str, str]] = {
    "validation_accuracy": "validation accuracy of the classifier",
    "closest_image_agreement": "closest image shows the same person",
}

# Entries of the recipe that a card states in other sections.
_NOT_RECIPE: Final = ("weights", "started_fresh", "derived_from")


@dataclass(frozen=True)
class Line:
    """A figure of a card: a share of the n held-out photos; the rate is None if there are too few of them."""

    name: str
    n: int
    rate: Rate | None


def describe(bundle: ModelBundle) -> str:
    """Returns the card of a bundle. It names no person, so it stays true after a rename or an erasure."""
    recipe, split = bundle.recipe, bundle.split
    return templates.text("modelcard.md.jinja").render(
        bundle=bundle,
        data=split.get("data"),
        train=len(split.get("train", ())),
        held_out=len(split.get("validation", ())),
        fraction=split.get("validation_fraction"),
        min_images=split.get("min_images"),
        left_out=bundle.figures.get("left_out"),
        device=bundle.figures.get("device"),
        lines=_lines(bundle.figures),
        settings={name: value for name, value in recipe.items() if name not in _NOT_RECIPE},
        weights=recipe.get("weights"),
        fresh=recipe.get("started_fresh", ()),
        parent=recipe.get("derived_from"),
        enough=TRIALS,
    )


def _lines(figures: Mapping[str, Any]) -> list[Line]:
    photos = figures.get("validation_images")
    if photos is None:
        return []
    return [
        Line(words, photos, wilson(round(share * photos), photos) if photos >= TRIALS else None)
        for name, words in _FIGURES.items()
        if (share := figures.get(name)) is not None and 0 <= share <= 1
    ]
