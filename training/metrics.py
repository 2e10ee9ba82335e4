"""Pure functions on arrays: how good predictions and distances are."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1024


def accuracy(predicted: NDArray[np.int64], actual: NDArray[np.int64]) -> float:
    """Share of equal entries of two (n,) arrays of labels; NaN for none."""
    return float(np.mean(predicted == actual)) if len(actual) else float("nan")


def nearest(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k nearest rows of `gallery` to each query, by Euclidean distance in float64.

    Works in blocks of queries: no (n, m) matrix of distances is ever in memory.

    Args:
        queries: (n, d).
        gallery: (m, d), m >= 1.
        k: how many; at most m are given.

    Returns:
        Distances (n, k') ascending, and row numbers (n, k'), with k' = min(k, m); ties by row number.
    """
    k = min(k, len(gallery))
    stored = gallery.astype(np.float64)
    stored_squares = np.einsum("ij,ij->i", stored, stored)
    distances, rows = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK].astype(np.float64)
        block_squares = np.einsum("ij,ij->i", block, block)
        squares = stored_squares - 2 * block @ stored.T + block_squares[:, None]
        # The expansion loses digits where two vectors are close, and may tell equal rows apart: whoever
        # is among the nearest but for its rounding is measured again.
        rounding = 4 * stored.shape[1] * np.finfo(np.float64).eps * (block_squares + stored_squares.max())
        limits = np.partition(squares, k - 1, axis=1)[:, k - 1] + 2 * rounding
        for index, vector in enumerate(block):
            candidates = np.flatnonzero(squares[index] <= limits[index])
            exact = np.linalg.norm(vector - stored[candidates], axis=1)
            order = np.argsort(exact, kind="stable")[:k]
            rows[start + index] = candidates[order]
            distances[start + index] = exact[order]
    return distances, rows


def confusions(predicted: NDArray[np.int64], actual: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(actual, predicted, how often) of every wrong pair, the most frequent first, then by label."""
    wrong = predicted != actual
    counts = Counter(zip(actual[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    return sorted(
        ((true, said, number) for (true, said), number in counts.items()),
        key=lambda row: (-row[2], row[0], row[1]),
    )
