"""Label errors: photos that are nearer to another identity than to the rest of their own.

Each photo is searched among all others (leave-one-out): its nearest photo of its own identity, its nearest of
another one, and its distances to the means of both identities, where the mean of its own excludes the photo.
Distances are Euclidean and exact, as `index.brute_force` computes them.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from retrieval.index import brute_force

Vectors: TypeAlias = NDArray[np.float32]
Labels: TypeAlias = NDArray[np.int64]
Rows: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LabelIssue:
    """A photo with a label in doubt. Rows are rows of the vectors; distances are Euclidean.

    Attributes:
        row: the photo.
        own, own_distance: the nearest other photo of its identity.
        other, other_distance: the nearest photo of another identity, which is nearer.
        own_centroid_distance: the distance to the mean of the other photos of its identity.
        other_centroid_distance: the distance to the mean of that other identity, which is nearer too.
    """

    row: int
    own: int
    own_distance: float
    other: int
    other_distance: float
    own_centroid_distance: float
    other_centroid_distance: float

    @property
    def strength(self) -> float:
        """How much nearer the other identity is, by nearest photo and by mean: from 0, no doubt, to 1."""
        by_photo = _margin(self.own_distance, self.other_distance)
        by_centroid = _margin(self.own_centroid_distance, self.other_centroid_distance)
        return (by_photo + by_centroid) / 2


def _margin(own: float, other: float) -> float:
    return (own - other) / (own + other) if own + other else 0.0


def find_label_issues(vectors: Vectors, labels: Labels) -> list[LabelIssue]:
    """Returns the photos with a label in doubt, the strongest doubt first.

    Memory: that of `brute_force.nearest`, and the vectors of one identity, besides `vectors`, which may be
    mapped from a file.

    Args:
        vectors: (n, d) float32, n >= 1.
        labels: (n,) int64, the identity of each photo. The only photo of an identity is a neighbour of
            others, but never in doubt.
    """
    own, own_row = _nearest_own(vectors, labels)
    other, other_row = _nearest_of_others(vectors, labels)
    doubted = np.flatnonzero((own_row >= 0) & (other_row >= 0) & (other < own))
    found = [
        _label_issue(
            vectors,
            labels,
            row,
            (float(own[row]), int(own_row[row])),
            (float(other[row]), int(other_row[row])),
        )
        for row in doubted.tolist()
    ]
    return sorted((one for one in found if one is not None), key=lambda one: (-one.strength, one.row))


def _label_issue(
    vectors: Vectors, labels: Labels, row: int, own: tuple[float, int], other: tuple[float, int]
) -> LabelIssue | None:
    """Returns the label issue of a photo; None where the mean of its own identity is not farther."""
    (own_distance, own_row), (other_distance, other_row) = own, other
    mine = np.flatnonzero(labels == labels[row])
    theirs = np.flatnonzero(labels == labels[other_row])
    own_centroid = _distance_to_centroid(vectors, row, mine[mine != row])
    other_centroid = _distance_to_centroid(vectors, row, theirs)
    if other_centroid >= own_centroid:
        return None
    return LabelIssue(row, own_row, own_distance, other_row, other_distance, own_centroid, other_centroid)


def _distance_to_centroid(vectors: Vectors, row: int, rows: NDArray[np.int64]) -> float:
    centroid = vectors[rows].mean(axis=0, dtype=np.float64)
    return float(np.linalg.norm(vectors[row] - centroid))


_Nearest: TypeAlias = tuple[NDArray[np.float64], Rows]


def _nearest_own(vectors: Vectors, labels: Labels) -> _Nearest:
    """Returns the nearest other photo of the same identity: distances (n,), rows (n,); -1 for none."""
    distances, found = np.full(len(labels), np.inf), np.full(len(labels), -1, np.int64)
    for rows in _by_label(labels):
        if len(rows) > 1:
            theirs = vectors[rows]
            far, near = brute_force.nearest(theirs, theirs, 2)
            # At least one of the two nearest is another photo: take the first that is not the photo itself.
            other = (near[:, 0] == np.arange(len(rows))).astype(np.int64)[:, None]
            distances[rows] = np.take_along_axis(far, other, axis=1)[:, 0]
            found[rows] = rows[np.take_along_axis(near, other, axis=1)[:, 0]]
    return distances, found


def _nearest_of_others(vectors: Vectors, labels: Labels) -> _Nearest:
    """Returns the nearest photo of another identity: distances (n,), rows (n,); -1 for none."""

    def of_others(queries: slice, rows: slice) -> NDArray[np.bool_]:
        return np.not_equal.outer(labels[queries], labels[rows])

    distances, found = brute_force.nearest(vectors, vectors, 1, allowed=of_others)
    return distances[:, 0], found[:, 0]


def _by_label(labels: Labels) -> list[Rows]:
    """Returns the rows of each label, ascending by label."""
    _, starts = np.unique(labels[order := np.argsort(labels, kind="stable")], return_index=True)
    return np.split(order, starts[1:])
