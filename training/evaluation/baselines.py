"""Baselines of an evaluation: other feature vectors of the same photos."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from retrieval.errors import InputError, RunError
from retrieval.models.bundle import ModelBundle
from retrieval.system.files import temporary_folder
from retrieval.system.paths import readable
from training.evaluation.observe import GREY, Observed
from training.fitting.export import export
from training.networks.initialize import build

# The largest number of principal components of eigenfaces; 150 is a usual choice.
COMPONENTS: Final = 150


@dataclass(frozen=True)
class Space:
    """A feature vector for each observed photo, compared by Euclidean distance.

    Attributes:
        name: "pixels", "eigenfaces" or "before".
        says: description, as text for people.
        features: (n, k) float32.
    """

    name: str
    says: str
    features: NDArray[np.float32]


def spaces(observed: Observed, fitted_on: NDArray[np.int64], before: Observed | None) -> Iterator[Space]:
    """Yields the baselines one at a time, so that the features of only one are in memory.

    Args:
        observed: n photos with their grey images.
        fitted_on: (m,) rows that eigenfaces are fitted on, m >= 2.
        before: the same photos, embedded by the network before fine-tuning; None leaves that baseline out.

    Raises:
        RunError: files changed between the two observations.
    """
    if observed.grey is None:
        raise ValueError("the photos were observed without their grey pictures")
    plain = observed.grey.astype(np.float32) / np.float32(255)
    yield Space("pixels", f"raw pixels: the model's crop in grey at {GREY} x {GREY}, nothing else", plain)
    yield _eigenfaces(plain, fitted_on)
    if before is not None:
        if before.paths != observed.paths:
            raise RunError("Photos changed while they were measured; run it again.")
        yield Space(
            "before", "the same network with its initial weights, before it was fine-tuned", before.vectors
        )


def _eigenfaces(plain: NDArray[np.float32], fitted_on: NDArray[np.int64]) -> Space:
    """Computes eigenfaces (Turk & Pentland, 1991): whitened principal components of the pixels."""
    number = min(COMPONENTS, len(fitted_on) - 1, plain.shape[1])
    analysis = PCA(number, whiten=True, svd_solver="full").fit(plain[fitted_on].astype(np.float64))
    says = (
        f"eigenfaces: {number} principal components of the {GREY} x {GREY} grey pixels of "
        f"{len(fitted_on):,} photos, whitened"
    )
    return Space("eigenfaces", says, analysis.transform(plain).astype(np.float32))


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
