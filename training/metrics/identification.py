"""Pure functions on arrays: how good predictions and distances are."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from retrieval.index import brute_force

# What a person is called: a number or a name.
Label = TypeVar("Label", int, str)


def accuracy(predicted: NDArray[np.int64], actual: NDArray[np.int64]) -> float:
    """Share of equal entries of two (n,) arrays of labels; NaN for none."""
    return float(np.mean(predicted == actual)) if len(actual) else float("nan")


def confusions(predicted: Iterable[Label], actual: Iterable[Label]) -> list[tuple[Label, Label, int]]:
    """(actual, predicted, how often) of every wrong pair, the most frequent first, then by label."""
    pairs = zip(actual, predicted, strict=True)
    counts = Counter((true, said) for true, said in pairs if true != said)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(true, said, number) for (true, said), number in ordered]


def top_k(probabilities: NDArray[np.float32], actual: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """Whether the true label is among the k likeliest.

    Args:
        probabilities: (n, c).
        actual: (n,) true labels.
        k: at least 1; equal probabilities are ordered by label.

    Returns:
        (n,).
    """
    own = np.take_along_axis(probabilities, actual[:, None], axis=1)
    earlier = (probabilities == own) & (np.arange(probabilities.shape[1]) < actual[:, None])
    return np.asarray(((probabilities > own) | earlier).sum(1) < k)


@dataclass(frozen=True)
class Ranks:
    """Where the right person comes in each of n searches.

    Attributes:
        place: (n,) int64, of the right person among the people, each as near as their nearest photo; 1 is
            the nearest, 0 is nowhere: nobody of that label is in the gallery.
        precision: (n,) float64, average precision of the gallery's photos by distance; NaN for nowhere.
        row: (n,) int64, of the nearest photo.
        distance: (n,) float64, Euclidean, to it.
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
    """Ranks all of a gallery for each query, by Euclidean distance in float64; ties by row number.

    Works in blocks of queries of at most 4 million distances: no (n, m) matrix is ever in memory.

    Args:
        queries: (n, d).
        labels: (n,) who is on them.
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
