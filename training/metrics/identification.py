"""Pure functions on arrays: how good predictions and distances are."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from retrieval.index.brute_force import expanded, squared_lengths

# Distances that are in memory at a time.
_CELLS: Final = 2**22

# What a person is called: a number or a name.
Label = TypeVar("Label", int, str)


def accuracy(predicted: NDArray[np.int64], actual: NDArray[np.int64]) -> float:
    """Share of equal entries of two (n,) arrays of labels; NaN for none."""
    return float(np.mean(predicted == actual)) if len(actual) else float("nan")


def nearest(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k nearest rows of `gallery` to each query, by Euclidean distance in float64.

    Works in blocks of queries of at most 4 million distances: no (n, m) matrix is ever in memory.

    Args:
        queries: (n, d).
        gallery: (m, d), m >= 1.
        k: how many; at most m are given.

    Returns:
        Distances (n, k') ascending, and row numbers (n, k'), with k' = min(k, m); ties by row number.
    """
    k = min(k, len(gallery))
    stored = gallery.astype(np.float64)
    lengths = squared_lengths(stored)
    distances, rows = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    for some in blocks(len(queries), max(gallery.shape)):
        block = queries[some].astype(np.float64)
        squares, off = expanded(block, stored, lengths)
        # The expansion may tell equal rows apart: whoever is among the nearest but for its rounding is
        # measured again.
        limits = np.partition(squares, k - 1, axis=1)[:, k - 1] + 2 * off
        for index, vector in enumerate(block):
            candidates = np.flatnonzero(squares[index] <= limits[index])
            exact = np.linalg.norm(vector - stored[candidates], axis=1)
            order = np.argsort(exact, kind="stable")[:k]
            rows[some.start + index] = candidates[order]
            distances[some.start + index] = exact[order]
    return distances, rows


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
    stored = gallery.astype(np.float64)
    lengths = squared_lengths(stored)
    parts = [
        _ranked(queries[rows].astype(np.float64), labels[rows], stored, lengths, gallery_labels)
        for rows in blocks(len(queries), max(gallery.shape))
    ]
    place, precision, row, distance = (np.concatenate(some) for some in zip(*parts, strict=True))
    return Ranks(place, precision, row, distance)


def blocks(queries: int, columns: int) -> list[slice]:
    """Queries in runs, each of at most 4 million cells of so many columns, and one query at least."""
    size = max(1, _CELLS // max(columns, 1))
    return [slice(start, start + size) for start in range(0, max(queries, 1), size)]


def _ranked(
    block: NDArray[np.float64],
    labels: NDArray[np.int64],
    stored: NDArray[np.float64],
    lengths: NDArray[np.float64],
    gallery_labels: NDArray[np.int64],
) -> tuple[NDArray[Any], ...]:
    order = _ordered(block, stored, lengths)
    found = gallery_labels[order]
    relevant = found == labels[:, None]
    number = relevant.sum(1)
    positions = np.arange(1, len(stored) + 1)
    with np.errstate(invalid="ignore"):
        precision = (relevant * relevant.cumsum(1) / positions).sum(1) / number
    first = relevant.argmax(1)
    nearer = [len(np.unique(row[:end])) for row, end in zip(found, first, strict=True)]
    place = np.where(number > 0, np.array(nearer, np.int64) + 1, 0)
    distance = np.linalg.norm(block - stored[order[:, 0]], axis=1)
    return place, precision, order[:, 0], distance


def _ordered(
    block: NDArray[np.float64], stored: NDArray[np.float64], lengths: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Rows of `stored` (m, d) from near to far, for each vector of `block` (b, d): (b, m)."""
    squares, off = expanded(block, stored, lengths)
    order = np.argsort(squares, axis=1, kind="stable")
    # As in `nearest`: what the expansion's rounding may have put in another order is measured again.
    close = np.diff(np.take_along_axis(squares, order, axis=1), axis=1) <= 2 * off[:, None]
    for index in np.flatnonzero(close.any(1)):
        order[index] = _measured_again(block[index], stored, order[index], close[index])
    return order


def _measured_again(
    vector: NDArray[np.float64],
    stored: NDArray[np.float64],
    order: NDArray[np.int64],
    close: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """An order whose runs of neighbours that are too close to tell are sorted by their exact distances."""
    group = np.concatenate([[0], np.cumsum(~close)])
    exact = np.zeros(len(order))
    doubtful = np.concatenate([close, [False]]) | np.concatenate([[False], close])
    exact[doubtful] = np.linalg.norm(vector - stored[order[doubtful]], axis=1)
    return order[np.lexsort((order, exact, group))]
