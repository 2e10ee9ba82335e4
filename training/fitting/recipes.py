"""Recipes: how a network is trained. The paper's, and the best that we found on the same budget of epochs."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from retrieval.models.bundle import Embedding
from training.data.augmentation import Augmentation


@dataclass(frozen=True)
class FitConfig:
    """How a network is fitted. The defaults are the paper's.

    Attributes:
        recipe: the name of the recipe that it is, or was changed from; a key of RECIPES.
        epochs: passes over the training photos.
        batch_size: photos a step.
        learning_rate: of stochastic gradient descent.
        schedule: what becomes of the rate after warming up: it stays, or falls along half a cosine to
            nothing at the end of the run (Loshchilov and Hutter, 2017).
        momentum: share of the last step that is kept.
        weight_decay: L2 penalty.
        label_smoothing: share of each target that is spread over all identities (Szegedy et al., 2016).
        classifier: "linear", or "cosine" (`retrieval.models.network.CosineClassifier`).
        margin: by how much the cosine of a photo's own identity has to pass the others' while learning
            (Wang et al., 2018); 0 with a linear classifier.
        augmentation: how photos are changed while learning.
        warmup_epochs: over how many epochs the rate rises from nothing to `learning_rate`; needed where
            whole stages start fresh.
        seed: of the order and of the augmentation.
    """

    recipe: str = "paper"
    epochs: int = 6
    batch_size: int = 10
    learning_rate: float = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    classifier: Literal["linear", "cosine"] = "linear"
    margin: float = 0.0
    augmentation: Augmentation = field(default=Augmentation())
    warmup_epochs: float = 0.0
    seed: int = 0

    def starting(self, fresh: Collection[str]) -> "FitConfig":
        """The same for a network of which some modules start fresh: where any does, the rate warms up."""
        return replace(self, warmup_epochs=1.0) if fresh else self

    def plain(self) -> dict[str, Any]:
        """Every setting by its name, the augmentation's among the others."""
        settings = asdict(self)
        augmentation = settings.pop("augmentation")
        return {**settings, **augmentation}


@dataclass(frozen=True)
class Recipe:
    """How a network is fitted, and how it then embeds."""

    config: FitConfig
    embedding: Embedding


RECIPES: Final[Mapping[str, Recipe]] = {
    "paper": Recipe(FitConfig(), Embedding()),
    # What each part is worth: docs/recipes.md.
    "modern": Recipe(
        FitConfig(recipe="modern", schedule="cosine", classifier="cosine", margin=0.1),
        Embedding(length="unit"),
    ),
}
