"""Brute force: the exact nearest rows of one array to those of another, in blocks, for evaluation and checks.

Of arrays without codes, segments or ids, which `knn` searches. Every pair is compared by a matrix product in
blocks, |a - b|² = |b|² - 2ab + |a|², which is quick and loses digits where two vectors are close. A bound on
its rounding says which pairs may be in an answer; those are computed in float64, which alone decides.

Shapes: queries (n, d), stored (m, d), m at least 1. Any float dtype; either may be mapped from a file.
Results: distances float64, Euclidean, and row numbers int64. Equal distances are ordered by row number.
Memory: a product of 256 x 8192 numbers (8 MB in float32), one block of 8192 rows in float32, and what comes
back; never an (n, m) array. `rankings` holds `stored` in float64.
Exactness: as if all distances were computed in float64 by `np.linalg.norm(query - row)`.
"""

from collections.abc import Callable, Iterator
from typing import Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Float = TypeVar("Float", np.float32, np.float64)
Floats: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.int64]
# Some queries, some rows -> which of the rows may be an answer to which query, (q, r).
Allowed: TypeAlias = Callable[[slice, slice], NDArray[np.bool_]]

# Queries and stored rows whose product is in memory at a time.
QUERY_BLOCK: Final = 256
ROW_BLOCK: Final = 8192

# Pairs whose differences are computed at a time: 512 KB of 2048 numbers each, for a core's cache.
PAIR_BLOCK: Final = 32

# Up to this number of pairs all are computed in float64: a product so small waits longer for the threads of
# numpy than it takes.
DIRECT_PAIRS: Final = 4096

# Distances that a ranking of all rows has in memory at a time, 8 bytes each.
RANKED_CELLS: Final = 2**22

# Relative rounding error of a squared float64 distance, plus one.
_FLOAT64_SLACK: Final = 1 + 1e-11


def nearest(
    queries: NDArray[np.float32], stored: NDArray[np.float32], k: int, *, allowed: Allowed | None = None
) -> tuple[Floats, Rows]:
    """The k nearest rows of `stored` to each query.

    Args:
        queries: (n, d).
        stored: (m, d), m >= 1.
        k: how many, at least 1; at most m are given.
        allowed: which pairs may be an answer; None is all.

    Returns:
        Distances (n, k') ascending and row numbers (n, k'), k' = min(k, m); where fewer rows are allowed,
        infinity and -1 fill up.
    """
    k = min(k, len(stored))
    best = np.full((len(queries), k), np.inf), np.full((len(queries), k), -1, np.int64)
    if len(queries) * len(stored) <= DIRECT_PAIRS:
        _compare_all(best, queries, stored, allowed)
        return best
    # Around the mean vectors are short, and rounding is small.
    middle = _mean(stored)
    for rows in _slices(len(stored), ROW_BLOCK):
        block = (stored[rows] - middle).astype(np.float32)
        lengths = squared_lengths(block)
        for some in _slices(len(queries), QUERY_BLOCK):
            asked = np.asarray(queries[some], np.float64)
            squares, off = expanded((asked - middle).astype(np.float32), block, lengths)
            if allowed is not None:
                squares[~allowed(some, rows)] = np.inf
            query, row = _possible(squares, off, best[0][some])
            far = _pair_distances(asked, query, stored[rows], row)
            _keep_best((best[0][some], best[1][some]), query, far, row + rows.start)
    return best


def rankings(
    queries: NDArray[np.float32], stored: NDArray[np.float32]
) -> Iterator[tuple[slice, Rows, Floats]]:
    """For some queries at a time: all rows from near to far, (q, m), and the distances (q,) of the first."""
    exact = stored.astype(np.float64)
    lengths = squared_lengths(exact)
    size = max(1, RANKED_CELLS // max(stored.shape))
    # Even of no queries there is one block.
    for some in [slice(start, start + size) for start in range(0, max(len(queries), 1), size)]:
        block = queries[some].astype(np.float64)
        order = _ranked(block, exact, lengths)
        yield some, order, np.linalg.norm(block - exact[order[:, 0]], axis=1)


def squared_lengths(vectors: NDArray[Float]) -> NDArray[Float]:
    """Squared lengths (n,) of vectors (n, d)."""
    return np.asarray(np.einsum("nd,nd->n", vectors, vectors))


def expanded(
    queries: NDArray[Float], others: NDArray[Float], lengths: NDArray[Float]
) -> tuple[NDArray[Float], NDArray[Float]]:
    """Squared distances by one product. What differs by more than twice a query's bound is in the true order.

    Args:
        queries: (q, d).
        others: (m, d) of the same type, m >= 1.
        lengths: (m,) the squared lengths of `others`.

    Returns:
        Squared distances (q, m), which may be below 0; and by how much a query's may be off (q,), even where
        its vectors had more digits before they were of this type.
    """
    own = squared_lengths(queries)
    squares = -2 * queries @ others.T
    squares += lengths
    squares += own[:, None]
    # Sums of d products are off by d/2 eps of the squared lengths at most; what is rounded before and after
    # them adds a few eps.
    bound = 4 * (queries.shape[1] + 1) * np.finfo(squares.dtype).eps
    return squares, np.asarray(bound * (own + lengths.max()), squares.dtype)


# The nearest


def _compare_all(
    best: tuple[Floats, Rows],
    queries: NDArray[np.float32],
    stored: NDArray[np.float32],
    allowed: Allowed | None,
) -> None:
    """Puts the nearest of all pairs into distances and rows (n, k)."""
    pairs = np.ones((len(queries), len(stored)), bool)
    if allowed is not None:
        pairs = allowed(slice(0, len(queries)), slice(0, len(stored)))
    query, row = np.nonzero(pairs)
    _keep_best(best, query, _pair_distances(np.asarray(queries, np.float64), query, stored, row), row)


def _possible(squares: NDArray[np.float32], off: NDArray[np.float32], best: Floats) -> tuple[Rows, Rows]:
    """The pairs (query, row) that may be among the k nearest, by squares (q, r) that are off by `off` (q,).

    `best` (q, k) are the distances of the nearest so far.
    """
    k = best.shape[1]
    limit = best[:, -1] ** 2 * _FLOAT64_SLACK + off
    if k <= squares.shape[1]:
        kth = np.partition(squares, k - 1, axis=1)[:, k - 1].astype(np.float64)
        limit = np.minimum(limit, kth + 2 * off)
    # What float32 cannot say is rounded up; infinity stands for what is not allowed.
    most = np.nextafter(limit.astype(np.float32), np.float32(np.inf))
    query, row = np.nonzero((squares <= most[:, None]) & (squares < np.inf))
    return query, row


def _pair_distances(queries: Floats, query: Rows, stored: NDArray[np.float32], row: Rows) -> Floats:
    """The distances (p,) of p pairs, in float64."""
    far = np.empty(len(query))
    for some in _slices(len(query), PAIR_BLOCK):
        apart = stored[row[some]].astype(np.float64)
        apart -= queries[query[some]]
        # As np.linalg.norm, without its copies.
        apart *= apart
        far[some] = np.sqrt(apart.sum(axis=1))
    return far


def _keep_best(best: tuple[Floats, Rows], query: Rows, far: Floats, row: Rows) -> None:
    """Puts pairs (p,) into the distances and rows (q, k) of the nearest so far, ascending, ties by row."""
    distances, rows = best
    count, k = distances.shape
    query = np.concatenate([np.repeat(np.arange(count), k), query])
    far, row = np.concatenate([distances.ravel(), far]), np.concatenate([rows.ravel(), row])
    # Rows that fill up, at infinity, are behind all others.
    order = np.lexsort((row, far, query))
    firsts = np.searchsorted(query[order], np.arange(count))
    chosen = order[firsts[:, None] + np.arange(k)]
    distances[:], rows[:] = far[chosen], row[chosen]


def _mean(vectors: NDArray[np.float32]) -> Floats:
    total = np.zeros(vectors.shape[1])
    for some in _slices(len(vectors), ROW_BLOCK):
        total += vectors[some].sum(axis=0, dtype=np.float64)
    return total / max(1, len(vectors))


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


# Rankings of all rows


def _ranked(block: Floats, stored: Floats, lengths: Floats) -> Rows:
    """Rows of `stored` (m, d) from near to far, for each vector of `block` (b, d): (b, m)."""
    squares, off = expanded(block, stored, lengths)
    order = np.argsort(squares, axis=1, kind="stable")
    # What the product's rounding may have put in another order is computed again.
    close = np.diff(np.take_along_axis(squares, order, axis=1), axis=1) <= 2 * off[:, None]
    for index in np.flatnonzero(close.any(1)):
        order[index] = _reordered(block[index], stored, order[index], close[index])
    return order


def _reordered(vector: Floats, stored: Floats, order: Rows, close: NDArray[np.bool_]) -> Rows:
    """An order whose runs of neighbours that are too close to tell are sorted by their exact distances."""
    group = np.concatenate([[0], np.cumsum(~close)])
    exact = np.zeros(len(order))
    doubtful = np.concatenate([close, [False]]) | np.concatenate([[False], close])
    exact[doubtful] = np.linalg.norm(vector - stored[order[doubtful]], axis=1)
    return order[np.lexsort((order, exact, group))]
