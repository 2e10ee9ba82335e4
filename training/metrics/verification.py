"""Metrics of verification (1:1) by a threshold on distances of pairs: pure functions on arrays.

The protocol is LFW's (Huang et al., 2007): ten folds of pairs, with no identity in two folds. The threshold
is chosen on nine folds, the accuracy is measured on the tenth.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_curve


@dataclass(frozen=True)
class Folds:
    """The accuracy of each fold, ordered by fold number, at the threshold that is best on the other folds."""

    accuracies: NDArray[np.float64]
    thresholds: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """The mean of the folds' accuracies."""
        return float(self.accuracies.mean())

    @property
    def standard_error(self) -> float:
        """The standard error of the mean: sample standard deviation over the square root of their number."""
        return float(self.accuracies.std(ddof=1) / np.sqrt(len(self.accuracies)))


def best_threshold(distances: NDArray[np.float64], same: NDArray[np.bool_]) -> float:
    """Returns the threshold with the best accuracy; pairs at or below it count as the same person.

    Args:
        distances: (n,) of pairs, n >= 1.
        same: (n,) whether a pair shows the same person.

    Returns:
        The midpoint of two neighbouring distances, or 1 / 2 beyond the ends. Among equally good thresholds,
        the smallest.
    """
    values, place = np.unique(distances, return_inverse=True)
    # Accepting one more distance gains its pairs of one person and loses its pairs of two people.
    gains = np.bincount(place, np.where(same, 1, -1))
    best = int(np.argmax(np.concatenate([[0.0], np.cumsum(gains)])))
    around = np.concatenate([[values[0] - 1], values, [values[-1] + 1]])
    return float((around[best] + around[best + 1]) / 2)


def across_folds(
    distances: NDArray[np.float64], same: NDArray[np.bool_], folds: NDArray[np.int64]
) -> tuple[Folds, NDArray[np.bool_]]:
    """Returns each fold's accuracy at the threshold that is best on the other folds.

    Args:
        distances: (n,) of pairs.
        same: (n,) whether a pair shows the same person.
        folds: (n,) fold number of each pair; at least two folds.

    Returns:
        The folds, and for each pair (n,) whether it was classified correctly.
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
    """Returns the ROC curve: FAR (t,), TAR (t,) and thresholds (t,), in order of rising distance.

    Needs pairs of one person and pairs of two people.
    """
    false, true, scores = roc_curve(same, -distances)
    # scikit-learn starts with a threshold that no pair reaches.
    return false[1:], true[1:], -scores[1:]
