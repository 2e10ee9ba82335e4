"""`SearchedVectors`: what searches need of the vectors of one snapshot, and the checks of their arguments."""

import math
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import InputError
from retrieval.index.blocks import Block, Ids
from retrieval.index.candidates import Exclude
from retrieval.index.explanation import Explanation
from retrieval.index.knn import Neighbours

# The longest vector: above, float32 squares come near overflow, and the error bounds would not hold.
_MAX_NORM: Final = 1e18


class SearchedVectors(Protocol):
    """The vectors of all faces of a snapshot. Safe to share between threads."""

    def checked(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        """Returns queries as float32 (n, d), C order; see `checked_vectors`."""

    def nearest(
        self,
        queries: NDArray[Any],
        k: int,
        *,
        allowed: Ids | None = None,
        exclude: Exclude = None,
        explanation: Explanation | None = None,
    ) -> list[Neighbours]:
        """Returns the k nearest vectors to each query: exactly those of a float64 brute force.

        Args:
            queries: (n, d).
            k: the number of neighbours, at least 1; a smaller gallery gives all of its faces.
            allowed, exclude, explanation: see `knn.nearest`.

        Returns:
            For each query: Euclidean distances ascending, and ids; equal distances by id.

        Raises:
            InputError: k is below 1, or queries have another shape or are not finite.
        """

    def within(
        self,
        queries: NDArray[Any],
        radius: float,
        *,
        allowed: Ids | None = None,
        exclude: Exclude = None,
        explanation: Explanation | None = None,
    ) -> list[Neighbours]:
        """Returns all vectors within `radius` of each query; otherwise as `nearest`.

        Raises:
            InputError: the radius is negative or not finite, or queries have another shape or are not finite.
        """

    def blocks(self) -> list[Block]:
        """Returns all vectors, for what compares each with each: centroids, and audits."""

    def some(self, ids: Ids) -> tuple[Ids, NDArray[np.float32]]:
        """Returns the ids (n,) and the vectors (n, d) of some faces, in the order in which they are stored.

        Args:
            ids: of the faces; those without a vector are left out.
        """


def checked_vectors(vectors: NDArray[Any], dimension: int) -> NDArray[np.float32]:
    """Returns vectors as float32 (n, d), C order.

    Raises:
        InputError: the shape is wrong, or there is a NaN, an infinity, or a length above 1e18.
    """
    with np.errstate(over="ignore"):  # an overflow of float32 becomes an infinity, refused below
        array = np.ascontiguousarray(vectors, np.float32)
    if array.ndim != 2 or array.shape[1] != dimension:
        raise InputError(
            f"Vectors must have shape (n, {dimension}) as this gallery's model gives them, "
            f"not {np.shape(vectors)}."
        )
    norms = np.sqrt(np.einsum("ij,ij->i", array, array, dtype=np.float64))
    # A NaN fails every comparison, and so this one.
    if not (norms <= _MAX_NORM).all():
        raise InputError("Vectors must be finite numbers, with a length of at most 1e18.")
    return array


def check_count(k: int) -> None:
    """Checks a number of neighbours.

    Raises:
        InputError: it is below 1.
    """
    if k < 1:
        raise InputError(f"The number of neighbours must be at least 1, not {k}.")


def check_radius(radius: float) -> None:
    """Checks the greatest distance of neighbours.

    Raises:
        InputError: it is negative or not finite.
    """
    if not 0 <= radius < math.inf:
        raise InputError(f"The distance must be a number of at least 0, not {radius}.")
