"""Squared distances by FAISS and numpy on one core, and bounds on their float32 rounding.

numpy's own products use all cores, and its threads wait for each other if other threads compute too: the same
product was measured at 0.4 and at 12 ms. So these kernels run on the calling thread's core, and
`threads.spread` calls them on all cores.
"""

from typing import Final

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.index.blocks import Floats, Ids
from retrieval.index.threads import buffer

# Up to this many pairs numpy also computes in float32: FAISS would start its own threads outside the pool.
SMALL_BATCH_PAIRS: Final = 16

# Numbers of vectors whose float64 differences stay in a core's cache.
_CACHED_NUMBERS: Final = 2**15

# Up to this many queries are compared with the stored vectors one by one: a product passes over the vectors
# three times.
DIRECT_QUERIES: Final = 3

# Bytes of stored vectors that are compared with all queries at a time: they stay in a core's cache over the
# passes. A search of a million vectors of 192 numbers for 8 queries takes 0.6 of the time without this.
CACHED_BYTES: Final = 2**20

# One plus the relative rounding error of a float64 distance; sums of 2048 terms have an error of 2e-13.
FLOAT64_SLACK: Final = 1 + 1e-11


def pairwise_squares(queries: NDArray[np.float32], stored: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns squared distances (q, n) float32 of queries (q, d) to stored vectors (n, d), both float32.

    The result is the calling thread's buffer, which its next call overwrites.
    """
    squares = buffer("squares", (len(queries), len(stored)))
    (n, d), rows = queries.shape, len(stored)
    chunk = rows if n == 1 else max(1, CACHED_BYTES // (d * stored.itemsize))
    for start in range(0, rows, chunk):
        part = stored[start : start + chunk]
        if n <= DIRECT_QUERIES:
            for query, row in zip(queries, squares, strict=True):
                pointers = map(faiss.swig_ptr, (row[start : start + chunk], query, part))
                faiss.fvec_L2sqr_ny(*pointers, d, len(part))
        else:
            found, asked, compared = map(faiss.swig_ptr, (squares[0, start:], queries, part))
            faiss.pairwise_L2sqr(d, n, asked, len(part), compared, found, -1, -1, rows)
    return squares


def pair_squares_float32(
    queries: NDArray[np.float32], query: NDArray[np.int64], matrix: NDArray[np.float32], row: Ids
) -> NDArray[np.float32]:
    """Returns squared distances (p,) float32 of p pairs: of `queries[query]` to `matrix[row]`."""
    if len(row) <= SMALL_BATCH_PAIRS:
        differences = matrix[row]
        differences -= queries[query]
        return np.asarray(np.einsum("ij,ij->i", differences, differences))
    squares = np.empty(len(row), np.float32)
    pointers = map(faiss.swig_ptr, (queries, query, matrix, row, squares))
    faiss.pairwise_indexed_L2sqr(queries.shape[1], len(row), *pointers)
    return squares


def pair_squares_float64(
    queries: Floats, query: NDArray[np.int64] | int, matrix: NDArray[np.float32], row: Ids
) -> Floats:
    """Returns squared distances (p,) float64 of p pairs, of `queries` (q, d) float64; `query` may be one."""
    differences = matrix[row].astype(np.float64)
    differences -= queries.take(query, axis=0)
    return np.asarray(np.einsum("ij,ij->i", differences, differences))


def float64_pairs(dimension: int) -> int:
    """Returns how many pairs `pair_squares_float64` is best called with."""
    return max(SMALL_BATCH_PAIRS, _CACHED_NUMBERS // dimension)


def float32_pairs(dimension: int) -> int:
    """Returns how many pairs `pair_squares_float32` is best called with."""
    return 4 * float64_pairs(dimension)


def relative_rounding(dimension: int) -> float:
    """Returns the relative error bound of a float32 sum of products, in any order of summation.

    It is a share of the sum of the magnitudes. Higham, Accuracy and Stability of Numerical Algorithms, 3.1:
    (d + c)u / (1 - (d + c)u), u = 2^-24.
    """
    terms = dimension + 16
    return terms * 2.0**-24 / (1 - terms * 2.0**-24)


def underflow(dimension: int) -> float:
    """Returns the absolute error bound of such a sum from terms that underflow in float32."""
    return (dimension + 16) * 2.0**-126


def at_most(squares: NDArray[np.float32], most: NDArray[np.float32]) -> tuple[Ids, Ids]:
    """Returns rows and columns of the entries of (n, m) that are at most the limit of their row (n,)."""
    answers = buffer("answers", squares.shape, np.dtype(bool))
    np.less_equal(squares, most[:, None], out=answers)
    return np.divmod(np.flatnonzero(answers), squares.shape[1])


def at_least(values: NDArray[np.int32], least: Ids) -> tuple[Ids, Ids]:
    """Returns rows and columns of the entries of (n, m) that are at least the limit of their column (m,)."""
    answers = buffer("answers", values.shape, np.dtype(bool))
    limits = least.clip(-(2**31), 2**31 - 1).astype(np.int32)
    np.greater_equal(values, limits, out=answers)
    return np.divmod(np.flatnonzero(answers), values.shape[1])


def float32_bounds(squares: Floats, dimension: int) -> tuple[Floats, Floats]:
    """Returns lower and upper bounds (n,) of distances from float32 sums (n,) of squared differences.

    Each term has an error of a few units in its last place, so by Higham's bound the relative error of the
    sum is at most gamma.
    """
    gamma, tiny = relative_rounding(dimension), underflow(dimension)
    lower = np.sqrt(np.maximum(squares - tiny, 0) / (1 + gamma)) / FLOAT64_SLACK
    upper = np.sqrt((squares + tiny) / (1 - gamma)) * FLOAT64_SLACK
    return lower, upper
