"""Embeddings in fewer dimensions: the principal components of the training photos' embeddings."""

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.errors import InputError
from retrieval.models.bundle import Embedding, Preprocessing
from retrieval.models.network import Network, Projection
from training.data.dataset import Photographs, Sample
from training.fitting.fit import outputs

# A component that varies less than this share of the first one (standard deviations) is rounding.
_NOTHING = 1e-6
_BLOCK = 4096


def check_projection(embedding: Embedding, network: Network, *, photos: int) -> None:
    """Whether a projection can be learned from so many photos; known before hours of training.

    Raises:
        InputError: the photos or the network's numbers are too few for it.
    """
    if embedding.dimensions is None:
        return
    features = network.features_of(embedding)
    # Around their mean, n points span n - 1 dimensions.
    most = min(features, photos - 1)
    if embedding.dimensions > most:
        raise InputError(
            f"{photos:,} training photos with {features:,} numbers each can be projected to at most {most:,} "
            f"dimensions, not to {embedding.dimensions:,}; choose fewer."
        )


def embed_as(
    network: Network,
    embedding: Embedding,
    samples: tuple[Sample, ...],
    preprocessing: Preprocessing,
    *,
    workers: int,
) -> None:
    """Makes a network embed in another way; learns a projection from the samples where there is one.

    Raises:
        InputError: the samples are too few for it, or too much alike.
    """
    if embedding.dimensions is None:
        network.embed_as(embedding)
        return
    check_projection(embedding, network, photos=len(samples))
    # A projection comes before the length.
    network.embed_as(Embedding(layers=embedding.layers, pooling=embedding.pooling))
    photographs = Photographs(samples, preprocessing)
    features = [part.cpu().numpy() for part, *_ in outputs(network, photographs, workers=workers)]
    learned = principal(np.concatenate(features), embedding.dimensions, whiten=embedding.whiten)
    network.embed_as(embedding, learned)


def principal(features: NDArray[np.float32], dimensions: int, *, whiten: bool) -> Projection:
    """The directions in which features vary most, computed in float64.

    Args:
        features: (n, f).
        dimensions: how many, at most f and less than n.
        whiten: divides each by its standard deviation.

    Raises:
        InputError: features do not vary in so many directions.
    """
    mean = features.mean(0, dtype=np.float64)
    deviations, matrix = (part[:dimensions] for part in _components(features, mean))
    varying = int((deviations > _NOTHING * deviations[0]).sum())
    if varying < dimensions:
        raise InputError(
            f"The training photos' embeddings vary in {varying:,} dimensions only, not in {dimensions:,}; "
            "choose fewer."
        )
    # A direction and its opposite are one component: the largest number is made positive.
    matrix = matrix * np.sign(matrix[np.arange(dimensions), np.abs(matrix).argmax(1)])[:, None]
    if whiten:
        matrix = matrix / deviations[:, None]
    return Projection(*(torch.from_numpy(part.astype(np.float32)) for part in (mean, matrix)))


def _components(
    features: NDArray[np.float32], mean: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Standard deviations and directions (r, f), the largest first, r at least min(n, f)."""
    rows, columns = features.shape
    if rows <= columns:
        _, values, directions = np.linalg.svd(features - mean, full_matrices=False)
        return values / np.sqrt(max(1, rows - 1)), directions
    variances, directions = np.linalg.eigh(_covariance(features, mean))
    return np.sqrt(variances[::-1].clip(min=0)), directions.T[::-1]


def _covariance(features: NDArray[np.float32], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """(f, f), block by block: a float64 copy of all rows would be twice as large as they are."""
    total = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), _BLOCK):
        block = features[start : start + _BLOCK] - mean
        total += block.T @ block
    return total / max(1, len(features) - 1)
