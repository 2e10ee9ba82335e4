"""Metrics of classification and identification: pure functions on arrays."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from retrieval.index import brute_force

# The label of an identity: a number or a name.
Label = TypeVar("Label", int, str)


def accuracy(predicted: NDArray[np.int64], actual: NDArray[np.int64]) -> float:
    """Returns the share of equal entries of two (n,) arrays of labels; NaN if n is 0."""
    return float(np.mean(predicted == actual)) if len(actual) else float("nan")


def confusions(predicted: Iterable[Label], actual: Iterable[Label]) -> list[tuple[Label, Label, int]]:
    """Returns (actual, predicted, count) of every wrong pair, the most frequent first, then by label."""
    pairs = zip(actual, predicted, strict=True)
    counts = Counter((true, answer) for true, answer in pairs if true != answer)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(true, answer, number) for (true, answer), number in ordered]


def top_k(probabilities: NDArray[np.float32], actual: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """Returns whether the true label is among the k most probable ones.

    Args:
        probabilities: (n, c).
        actual: (n,) true labels.
        k: at least 1; equal probabilities are ordered by label.

    Returns:
        (n,) bool.
    """
    own = np.take_along_axis(probabilities, actual[:, None], axis=1)
    earlier = (probabilities == own) & (np.arange(probabilities.shape[1]) < actual[:, None])
    return np.asarray(((probabilities > own) | earlier).sum(1) < k)


@dataclass(frozen=True)
class Ranks:
    """The rank of the right person in each of n searches.

    Attributes:
        place: (n,) int64, rank of the right person among the people, each at the distance of their nearest
            photo; 1 is the nearest, 0 means that the gallery has no photo with that label.
        precision: (n,) float64, average precision of the gallery's photos by distance; NaN if `place` is 0.
        row: (n,) int64, gallery row of the nearest photo.
        distance: (n,) float64, Euclidean, to the nearest photo.
    """

    place: NDArray[np.int64]
    precision: NDArray[np.float64]
    row: NDArray[np.int64]
    distance: NDArray[np.float64]


def ranks(
    queries: NDArray[np.float32],
    labels: NDArray[np.int64],
    gallery: NDArray[np.float32],
    gallery_labels: NDArray[np.int64],
) -> Ranks:
    """Ranks all gallery rows for each query, by Euclidean distance in float64; ties by row number.

    Works in blocks of queries with at most 4 million distances each, so that the whole (n, m) matrix is never
    in memory.

    Args:
        queries: (n, d).
        labels: (n,) labels of the queries.
        gallery: (m, d), m >= 1.
        gallery_labels: (m,).
    """
    parts = [
        _ranked(order, distance, labels[rows], gallery_labels)
        for rows, order, distance in brute_force.rankings(queries, gallery)
    ]
    place, precision, row, distance = (np.concatenate(some) for some in zip(*parts, strict=True))
    return Ranks(place, precision, row, distance)


def _ranked(
    order: NDArray[np.int64],
    distance: NDArray[np.float64],
    labels: NDArray[np.int64],
    gallery_labels: NDArray[np.int64],
) -> tuple[NDArray[Any], ...]:
    found = gallery_labels[order]
    relevant = found == labels[:, None]
    number = relevant.sum(1)
    positions = np.arange(1, order.shape[1] + 1)
    with np.errstate(invalid="ignore"):
        precision = (relevant * relevant.cumsum(1) / positions).sum(1) / number
    first = relevant.argmax(1)
    nearer = [len(np.unique(row[:end])) for row, end in zip(found, first, strict=True)]
    place = np.where(number > 0, np.array(nearer, np.int64) + 1, 0)
    return place, precision, order[:, 0], distance
