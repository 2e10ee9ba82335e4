"""Brute force: the exact nearest rows of one array to those of another, in blocks, for evaluation and checks.

It works on plain arrays; `knn` searches segments with codes and ids. All pairs are compared by matrix
products in blocks, |a - b|² = |b|² - 2ab + |a|², which are fast but lose digits where two vectors are close.
A bound on the rounding selects the pairs that may be in a result; float64 distances of these decide.

Shapes: queries (n, d), stored (m, d), m at least 1. Any float dtype; either may be mapped from a file.
Results: distances float64, Euclidean, and row numbers int64. Equal distances are ordered by row number.
Memory: a product of 256 x 8192 numbers (8 MB in float32), one block of 8192 rows in float32, and the result;
never an (n, m) array. `rankings` holds `stored` in float64.
Exactness: as if all distances were computed in float64 by `np.linalg.norm(query - row)`.
"""

from collections.abc import Callable, Iterator
from typing import Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Float = TypeVar("Float", np.float32, np.float64)
Floats: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.int64]
# (slice of queries, slice of rows) -> a mask (q, r) of the pairs that may be in the result.
Allowed: TypeAlias = Callable[[slice, slice], NDArray[np.bool_]]

# The sides of a block: queries and stored rows that are multiplied at a time.
QUERY_BLOCK: Final = 256
ROW_BLOCK: Final = 8192

# Pairs that are subtracted at a time: 512 KB at 2048 numbers each, which fit into a core's cache.
PAIR_BLOCK: Final = 32

# Up to this number of pairs, all are computed in float64: starting numpy's threads would take longer than so
# small a product.
DIRECT_PAIRS: Final = 4096

# Distances that a ranking of all rows has in memory at a time, 8 bytes each.
RANKED_CELLS: Final = 2**22

# Relative rounding error of a squared float64 distance, plus one.
_FLOAT64_SLACK: Final = 1 + 1e-11


def nearest(
    queries: NDArray[np.float32], stored: NDArray[np.float32], k: int, *, allowed: Allowed | None = None
) -> tuple[Floats, Rows]:
    """Returns the k nearest rows of `stored` to each query.

    Args:
        queries: (n, d).
        stored: (m, d), m >= 1.
        k: the number of neighbours, at least 1; at most m are returned.
        allowed: selects the pairs that may be in the result; None is all.

    Returns:
        Distances (n, k') ascending and row numbers (n, k'), k' = min(k, m). Where fewer rows are allowed, the
        rest is infinity and -1.
    """
    k = min(k, len(stored))
    best = np.full((len(queries), k), np.inf), np.full((len(queries), k), -1, np.int64)
    if len(queries) * len(stored) <= DIRECT_PAIRS:
        _compare_all(best, queries, stored, allowed)
        return best
    # Relative to the mean, vectors are short and rounding errors are small.
    mean = _mean(stored)
    for rows in _slices(len(stored), ROW_BLOCK):
        block = (stored[rows] - mean).astype(np.float32)
        lengths = squared_lengths(block)
        for part in _slices(len(queries), QUERY_BLOCK):
            asked = np.asarray(queries[part], np.float64)
            squares, errors = expanded((asked - mean).astype(np.float32), block, lengths)
            if allowed is not None:
                squares[~allowed(part, rows)] = np.inf
            query, row = _possible(squares, errors, best[0][part])
            found = _pair_distances(asked, query, stored[rows], row)
            _keep_best((best[0][part], best[1][part]), query, found, row + rows.start)
    return best


def rankings(
    queries: NDArray[np.float32], stored: NDArray[np.float32]
) -> Iterator[tuple[slice, Rows, Floats]]:
    """Yields, for slices of the queries, all rows by distance, (q, m), and the nearest distances (q,)."""
    exact = stored.astype(np.float64)
    lengths = squared_lengths(exact)
    size = max(1, RANKED_CELLS // max(stored.shape))
    # There is one block even without queries, so that callers get arrays of the right shape.
    for part in [slice(start, start + size) for start in range(0, max(len(queries), 1), size)]:
        block = queries[part].astype(np.float64)
        order = _ranked(block, exact, lengths)
        yield part, order, np.linalg.norm(block - exact[order[:, 0]], axis=1)


def squared_lengths(vectors: NDArray[Float]) -> NDArray[Float]:
    """Returns the squared lengths (n,) of vectors (n, d)."""
    return np.asarray(np.einsum("nd,nd->n", vectors, vectors))


def expanded(
    queries: NDArray[Float], others: NDArray[Float], lengths: NDArray[Float]
) -> tuple[NDArray[Float], NDArray[Float]]:
    """Returns squared distances by one matrix product, and a bound on their error for each query.

    Two distances of a query that differ by more than twice its bound are in the true order.

    Args:
        queries: (q, d).
        others: (m, d) of the same type, m >= 1.
        lengths: (m,) the squared lengths of `others`.

    Returns:
        Squared distances (q, m), which may be below 0; and the largest error of each query's (q,), including
        the rounding of its vectors to this type.
    """
    own = squared_lengths(queries)
    squares = -2 * queries @ others.T
    squares += lengths
    squares += own[:, None]
    # Sums of d products have an error of at most d/2 eps of the squared lengths; the rounding before and
    # after them adds a few eps.
    bound = 4 * (queries.shape[1] + 1) * np.finfo(squares.dtype).eps
    return squares, np.asarray(bound * (own + lengths.max()), squares.dtype)


# The nearest


def _compare_all(
    best: tuple[Floats, Rows],
    queries: NDArray[np.float32],
    stored: NDArray[np.float32],
    allowed: Allowed | None,
) -> None:
    """Compares all allowed pairs in float64, and puts the nearest into `best`, (n, k) each."""
    pairs = np.ones((len(queries), len(stored)), bool)
    if allowed is not None:
        pairs = allowed(slice(0, len(queries)), slice(0, len(stored)))
    query, row = np.nonzero(pairs)
    _keep_best(best, query, _pair_distances(np.asarray(queries, np.float64), query, stored, row), row)


def _possible(squares: NDArray[np.float32], errors: NDArray[np.float32], best: Floats) -> tuple[Rows, Rows]:
    """Returns the pairs (query, row) that may be among the k nearest.

    `squares` (q, r) have errors of at most `errors` (q,); `best` (q, k) are the nearest distances so far.
    """
    k = best.shape[1]
    # A pair of the result is not farther than the k nearest so far, nor than k rows of this block. The second
    # limit is itself a product, so it has an error as well.
    limit = best[:, -1] ** 2 * _FLOAT64_SLACK + errors
    if k <= squares.shape[1]:
        kth = np.partition(squares, k - 1, axis=1)[:, k - 1].astype(np.float64)
        limit = np.minimum(limit, kth + 2 * errors)
    # The limit is rounded up to float32; infinity marks pairs that are not allowed.
    most = np.nextafter(limit.astype(np.float32), np.float32(np.inf))
    query, row = np.nonzero((squares <= most[:, None]) & (squares < np.inf))
    return query, row


def _pair_distances(queries: Floats, query: Rows, stored: NDArray[np.float32], row: Rows) -> Floats:
    """Returns the distances (p,) of p pairs, in float64."""
    found = np.empty(len(query))
    for part in _slices(len(query), PAIR_BLOCK):
        differences = stored[row[part]].astype(np.float64)
        differences -= queries[query[part]]
        # Same as np.linalg.norm, without its copies.
        differences *= differences
        found[part] = np.sqrt(differences.sum(axis=1))
    return found


def _keep_best(best: tuple[Floats, Rows], query: Rows, found: Floats, row: Rows) -> None:
    """Merges pairs (p,) into the nearest distances and rows so far, (q, k) each, ascending, ties by row."""
    distances, rows = best
    count, k = distances.shape
    query = np.concatenate([np.repeat(np.arange(count), k), query])
    found, row = np.concatenate([distances.ravel(), found]), np.concatenate([rows.ravel(), row])
    # Places without a row yet, at infinity, come after all rows.
    order = np.lexsort((row, found, query))
    firsts = np.searchsorted(query[order], np.arange(count))
    chosen = order[firsts[:, None] + np.arange(k)]
    distances[:], rows[:] = found[chosen], row[chosen]


def _mean(vectors: NDArray[np.float32]) -> Floats:
    total = np.zeros(vectors.shape[1])
    for part in _slices(len(vectors), ROW_BLOCK):
        total += vectors[part].sum(axis=0, dtype=np.float64)
    return total / max(1, len(vectors))


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


# Rankings of all rows


def _ranked(block: Floats, stored: Floats, lengths: Floats) -> Rows:
    """Returns the rows of `stored` (m, d) by distance to each vector of `block` (b, d): (b, m)."""
    squares, errors = expanded(block, stored, lengths)
    order = np.argsort(squares, axis=1, kind="stable")
    # Pairs that the rounding of the product may have exchanged are computed again.
    close = np.diff(np.take_along_axis(squares, order, axis=1), axis=1) <= 2 * errors[:, None]
    for index in np.flatnonzero(close.any(1)):
        order[index] = _reordered(block[index], stored, order[index], close[index])
    return order


def _reordered(vector: Floats, stored: Floats, order: Rows, close: NDArray[np.bool_]) -> Rows:
    """Returns the order with runs of indistinguishable neighbours sorted by their exact distances."""
    group = np.concatenate([[0], np.cumsum(~close)])
    exact = np.zeros(len(order))
    doubtful = np.concatenate([close, [False]]) | np.concatenate([[False], close])
    exact[doubtful] = np.linalg.norm(vector - stored[order[doubtful]], axis=1)
    return order[np.lexsort((order, exact, group))]
