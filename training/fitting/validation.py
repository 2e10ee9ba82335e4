"""Validation of a fitted network on the held-out photos of its split, for the report of `train`.

`faceprint evaluate`, which measures a finished bundle by a protocol, is `training.evaluation`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.images.photo_reader import PhotoReader
from retrieval.index import brute_force
from retrieval.models.network import Network
from training.data.dataset import Photographs, Sample, Split
from training.fitting.fit import outputs
from training.metrics import identification

# Number of closest training photos that are kept for each held-out photo; fewer if there are fewer.
NEIGHBOURS = 5


@dataclass(frozen=True)
class Evaluation:
    """The results on the held-out photos: their classification, and a search among the training photos.

    There are n held-out photos, in the order of `Split.validation`, and k = min(5, training photos).

    Attributes:
        validation_accuracy: share of the held-out photos that the classifier labels correctly.
        closest_image_agreement: share of the held-out photos with a nearest training photo, by Euclidean
            distance between embeddings, that shows the same person.
        predicted: (n,) predicted label of each held-out photo.
        probability: (n,) softmax probability of that label.
        actual: (n,) true label.
        closest: (n, k) index into `Split.train` of the closest training photos, nearest first.
        distances: (n, k) Euclidean distances between the embeddings of a photo and its closest ones.
    """

    validation_accuracy: float
    closest_image_agreement: float
    predicted: NDArray[np.int64]
    probability: NDArray[np.float32]
    actual: NDArray[np.int64]
    closest: NDArray[np.int64]
    distances: NDArray[np.float64]

    def confusions(self) -> list[tuple[int, int, int]]:
        """Returns (actual label, predicted label, photos) of wrong predictions, the most frequent first."""
        return identification.confusions(self.predicted.tolist(), self.actual.tolist())


def evaluate(network: Network, split: Split, reader: PhotoReader, *, workers: int) -> Evaluation:
    """Measures a network on its split; leaves the network in evaluation mode.

    Args:
        network: on the device where it computes.
        split: the photos that it was fitted to, and the held-out ones.
        reader: reads the photos as for the fit, without augmentation.
        workers: processes that read photos; 0 reads in this one.
    """
    train, _, train_labels = _all_outputs(network, split.train, reader, workers)
    held_out, logits, actual = _all_outputs(network, split.validation, reader, workers)
    distances, closest = brute_force.nearest(held_out, train, NEIGHBOURS)
    probabilities = torch.softmax(torch.from_numpy(logits), 1).numpy()
    predicted = probabilities.argmax(1)
    return Evaluation(
        validation_accuracy=identification.accuracy(predicted, actual),
        # The label of the closest training photo, taken as a prediction.
        closest_image_agreement=identification.accuracy(train_labels[closest[:, 0]], actual),
        predicted=predicted,
        probability=probabilities.max(1),
        actual=actual,
        closest=closest,
        distances=distances,
    )


def _all_outputs(
    network: Network, samples: tuple[Sample, ...], reader: PhotoReader, workers: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Returns embeddings (n, d), logits (n, c) and labels (n,) of samples."""
    batches = list(outputs(network, Photographs(samples, reader), workers=workers))
    embeddings, logits, labels = (torch.cat(parts).cpu().numpy() for parts in zip(*batches, strict=True))
    return embeddings, logits, labels
