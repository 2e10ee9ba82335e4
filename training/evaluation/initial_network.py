"""The network of a model before it was fine-tuned, for comparison. Needs torch."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.errors import InputError
from retrieval.models.bundle import ModelBundle
from retrieval.system.files import temporary_folder
from retrieval.system.paths import readable
from training.fitting.export import export
from training.networks.initialize import build


@contextmanager
def before_fine_tuning(bundle: ModelBundle, weights: str, sample: NDArray[np.uint8]) -> Iterator[ModelBundle]:
    """Yields a bundle, in a temporary folder, with the network as it was before fine-tuning.

    Args:
        bundle: the fine-tuned model.
        weights: the initial weights: "imagenet" or a file, as in training. Layers that they lack are
            initialized from the recipe's seed.
        sample: uint8 (n, size, size, 3), photos on which the exported graph is checked.

    Raises:
        InputError: `weights` is "none": there is no earlier network to compare with.
        WeightsError, RunError: as `training.networks.initialize.build` and `training.fitting.export.export`.
    """
    if weights == "none":
        raise InputError("`weights='none'` is no network to compare with; give imagenet or a FILE.")
    torch.manual_seed(int(bundle.recipe.get("seed", 0)))
    network, start = build(
        len(bundle.labels),
        weights=weights,
        architecture=bundle.architecture,
        layout=_layout(bundle, weights),
    )
    # Embeds as the model does, without its projection: that one was learned from the trained network.
    network.embed_as(bundle.embedding.unprojected)
    with temporary_folder(Path(tempfile.gettempdir()), "faceprint-before-") as folder:
        yield export(
            network,
            folder,
            labels=bundle.labels,
            reader=bundle.load_photo_reader(),
            recipe={"weights": start.source, "started_fresh": list(start.fresh)},
            split={},
            figures={},
            sample=sample,
        )


def _layout(bundle: ModelBundle, weights: str) -> str:
    """Returns the layout by which training read the weights, if they are of the same name; or "auto"."""
    same = readable(os.path.basename(weights)) == bundle.recipe.get("weights")
    return (same and bundle.recipe.get("weights_layout")) or "auto"
