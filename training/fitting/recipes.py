"""Training recipes: the paper's, and the best one that we found with the same number of epochs."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from retrieval.models.bundle import Embedding
from training.data.augmentation import Augmentation


@dataclass(frozen=True)
class FitConfig:
    """Hyperparameters of a training run. The defaults are the paper's.

    Attributes:
        recipe: name of this recipe, or of the one that it was derived from; a key of RECIPES.
        epochs: number of passes over the training photos.
        batch_size: number of photos per step.
        learning_rate: of stochastic gradient descent.
        schedule: the learning rate after warm-up: "constant", or "cosine": it falls along half a cosine to 0
            at the end of the run (Loshchilov and Hutter, 2017).
        momentum: share of the previous step that is kept.
        weight_decay: L2 penalty.
        label_smoothing: share of each target that is spread over all identities (Szegedy et al., 2016).
        classifier: "linear", or "cosine" (`retrieval.models.network.CosineClassifier`).
        margin: by how much the cosine of a photo's own identity must exceed the others' while learning
            (Wang et al., 2018); 0 with a linear classifier.
        augmentation: random changes of photos while learning.
        warmup_epochs: number of epochs over which the rate rises from 0 to `learning_rate`; needed if whole
            stages start from random weights.
        seed: of the order of photos and of the augmentation.
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
        """Returns this configuration, with one warm-up epoch if any modules (`fresh`) start random."""
        return replace(self, warmup_epochs=1.0) if fresh else self

    def plain(self) -> dict[str, Any]:
        """Returns every setting by its name, with those of the augmentation on the same level."""
        settings = asdict(self)
        augmentation = settings.pop("augmentation")
        return {**settings, **augmentation}


@dataclass(frozen=True)
class Recipe:
    """A training configuration, and how the trained network embeds."""

    config: FitConfig
    embedding: Embedding


RECIPES: Final[Mapping[str, Recipe]] = {
    "paper": Recipe(FitConfig(), Embedding()),
    # docs/recipes.md has the effect of each part.
    "modern": Recipe(
        FitConfig(recipe="modern", schedule="cosine", classifier="cosine", margin=0.1),
        Embedding(length="unit"),
    ),
}
