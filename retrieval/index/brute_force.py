"""Squared Euclidean distances by one matrix product, with a bound on their rounding error.

|a - b|² = |b|² - 2ab + |a|² is the quick way, and loses digits where two vectors are close. Whoever has to
know which is nearer measures again what the bound leaves in doubt.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Float = TypeVar("Float", np.float32, np.float64)


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
