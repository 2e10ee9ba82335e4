"""Pairs of photos, the same person or not, told apart by their distance: pure functions on arrays.

The protocol is LFW's (Huang et al., 2007): ten folds of pairs whose people do not overlap; the threshold
comes from nine of them, the accuracy from the tenth.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_curve


@dataclass(frozen=True)
class Folds:
    """Accuracy of each fold, in the order of their numbers, at the threshold that is best on the others."""

    accuracies: NDArray[np.float64]
    thresholds: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Of the folds' accuracies."""
        return float(self.accuracies.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean: the folds' sample standard deviation over the root of their number."""
        return float(self.accuracies.std(ddof=1) / np.sqrt(len(self.accuracies)))


def best_threshold(distances: NDArray[np.float64], same: NDArray[np.bool_]) -> float:
    """The distance at most which pairs had best be called the same.

    Args:
        distances: (n,) of pairs, n >= 1.
        same: (n,) whether they are.

    Returns:
        The middle between two neighbouring distances, or a step beyond the ends; the least of the best.
    """
    values, place = np.unique(distances, return_inverse=True)
    # Calling one more distance "the same" gains its pairs that are, and loses those that are not.
    gains = np.bincount(place, np.where(same, 1, -1))
    best = int(np.argmax(np.concatenate([[0.0], np.cumsum(gains)])))
    around = np.concatenate([[values[0] - 1], values, [values[-1] + 1]])
    return float((around[best] + around[best + 1]) / 2)


def across_folds(
    distances: NDArray[np.float64], same: NDArray[np.bool_], folds: NDArray[np.int64]
) -> tuple[Folds, NDArray[np.bool_]]:
    """Each fold's accuracy at the best threshold of the others.

    Args:
        distances: (n,) of pairs.
        same: (n,) whether they are the same person.
        folds: (n,) the number of the fold of each; two folds at least.

    Returns:
        The folds, and for each pair (n,) whether it was told rightly.
    """
    right = np.zeros(len(distances), bool)
    accuracies, thresholds = [], []
    for fold in np.unique(folds):
        own = folds == fold
        limit = best_threshold(distances[~own], same[~own])
        right[own] = (distances[own] <= limit) == same[own]
        accuracies.append(right[own].mean())
        thresholds.append(limit)
    return Folds(np.array(accuracies), np.array(thresholds)), right


def roc(
    distances: NDArray[np.float64], same: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The ROC curve: FAR (t,), TAR (t,) and thresholds (t,), rising distances; takes pairs of both kinds."""
    false, true, scores = roc_curve(same, -distances)
    # scikit-learn begins with a threshold that no pair reaches.
    return false[1:], true[1:], -scores[1:]
