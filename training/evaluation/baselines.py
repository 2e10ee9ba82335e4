"""Baselines of an evaluation: other feature vectors of the same photos."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from retrieval.errors import RunError
from training.evaluation.observe import GREY, Observed

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
