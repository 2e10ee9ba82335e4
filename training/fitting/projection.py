"""Dimension reduction of embeddings, by principal components of the training photos' embeddings."""

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.errors import InputError
from retrieval.images.photo_reader import PhotoReader
from retrieval.models.bundle import Embedding
from retrieval.models.network import Network, Projection
from training.data.dataset import Photographs, Sample
from training.fitting.fit import outputs

# A component with a standard deviation below this share of the first one's is rounding error.
_MIN_RELATIVE_DEVIATION = 1e-6
_ROWS_PER_BLOCK = 4096


def check_projection(embedding: Embedding, network: Network, *, photos: int) -> None:
    """Checks that a projection can be learned from so many photos; called before hours of training.

    Raises:
        InputError: there are too few photos, or the network's features have too few dimensions.
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
    reader: PhotoReader,
    *,
    workers: int,
) -> None:
    """Changes how a network embeds; learns the projection from the samples if the embedding has one.

    Raises:
        InputError: the samples are too few for the projection, or vary in too few directions.
    """
    if embedding.dimensions is None:
        network.embed_as(embedding)
        return
    check_projection(embedding, network, photos=len(samples))
    # The projection is applied before the normalisation of length, so it is learned from raw features.
    network.embed_as(Embedding(layers=embedding.layers, pooling=embedding.pooling))
    photographs = Photographs(samples, reader)
    features = [part.cpu().numpy() for part, *_ in outputs(network, photographs, workers=workers)]
    learned = principal(np.concatenate(features), embedding.dimensions, whiten=embedding.whiten)
    network.embed_as(embedding, learned)


def principal(features: NDArray[np.float32], dimensions: int, *, whiten: bool) -> Projection:
    """Returns the projection on the principal components of features, computed in float64.

    Args:
        features: (n, f).
        dimensions: number of components, at most f and less than n.
        whiten: divides each component by its standard deviation.

    Raises:
        InputError: the features vary in fewer directions.
    """
    mean = features.mean(0, dtype=np.float64)
    deviations, matrix = (part[:dimensions] for part in _components(features, mean))
    varying = int((deviations > _MIN_RELATIVE_DEVIATION * deviations[0]).sum())
    if varying < dimensions:
        raise InputError(
            f"The training photos' embeddings vary in {varying:,} dimensions only, not in {dimensions:,}; "
            "choose fewer."
        )
    # The sign of a component is arbitrary: its coordinate of largest magnitude is made positive.
    matrix = matrix * np.sign(matrix[np.arange(dimensions), np.abs(matrix).argmax(1)])[:, None]
    if whiten:
        matrix = matrix / deviations[:, None]
    return Projection(*(torch.from_numpy(part.astype(np.float32)) for part in (mean, matrix)))


def _components(
    features: NDArray[np.float32], mean: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns standard deviations (r,) and directions (r, f), the largest first; r is at least min(n, f)."""
    rows, columns = features.shape
    if rows <= columns:
        _, values, directions = np.linalg.svd(features - mean, full_matrices=False)
        return values / np.sqrt(max(1, rows - 1)), directions
    variances, directions = np.linalg.eigh(_covariance(features, mean))
    return np.sqrt(variances[::-1].clip(min=0)), directions.T[::-1]


def _covariance(features: NDArray[np.float32], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the covariance (f, f), in blocks: a float64 copy of all rows would take twice their memory."""
    total = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), _ROWS_PER_BLOCK):
        block = features[start : start + _ROWS_PER_BLOCK] - mean
        total += block.T @ block
    return total / max(1, len(features) - 1)
