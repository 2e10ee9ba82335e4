"""Label errors: photos that are nearer to another identity than to the rest of their own.

Each photo is left out and looked up among all the others: its nearest photo of its own person, its nearest of
anybody else, and how far the middles of the two people are, its own person's middle without it. Distances are
Euclidean and exact: a float32 product in blocks rules out what cannot be the nearest, float64 decides.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retrieval.index.brute_force import expanded, squared_lengths

_QUERIES: Final = 256
_ROWS: Final = 8192

Vectors: TypeAlias = NDArray[np.float32]
Labels: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Mislabel:
    """A photo whose label is in doubt. Rows are rows of the vectors, distances Euclidean.

    Attributes:
        row: the photo.
        own, own_distance: the nearest other photo of its person.
        other, other_distance: the nearest photo of anybody else, which is nearer.
        own_middle, other_middle: to the mean of its person's others, and of that other person's photos,
            which is nearer too.
    """

    row: int
    own: int
    own_distance: float
    other: int
    other_distance: float
    own_middle: float
    other_middle: float

    @property
    def strength(self) -> float:
        """From 0, no doubt, to 1: how much nearer the other person is, by nearest photo and by middle."""
        return (
            _margin(self.own_distance, self.other_distance) + _margin(self.own_middle, self.other_middle)
        ) / 2


def _margin(own: float, other: float) -> float:
    return (own - other) / (own + other) if own + other else 0.0


def mislabels(vectors: Vectors, labels: Labels) -> list[Mislabel]:
    """The photos whose label is in doubt, the strongest doubt first.

    Memory: 8 MB of distances and 8192 vectors at a time, besides `vectors`, which may be mapped from a file.

    Args:
        vectors: (n, d) float32.
        labels: (n,) int64, whose each is. People with one photo are others' others and never in doubt.
    """
    found = [_mislabel(vectors, labels, *nearest) for nearest in _nearest(vectors, labels)]
    return sorted((one for one in found if one is not None), key=lambda one: (-one.strength, one.row))


def _mislabel(
    vectors: Vectors, labels: Labels, row: int, own: tuple[float, int], other: tuple[float, int]
) -> Mislabel | None:
    (own_distance, own_row), (other_distance, other_row) = own, other
    if own_row < 0 or other_row < 0 or other_distance >= own_distance:
        return None
    mine = np.flatnonzero(labels == labels[row])
    theirs = np.flatnonzero(labels == labels[other_row])
    own_middle = _distance_to_middle(vectors, row, mine[mine != row])
    other_middle = _distance_to_middle(vectors, row, theirs)
    if other_middle >= own_middle:
        return None
    return Mislabel(row, own_row, own_distance, other_row, other_distance, own_middle, other_middle)


def _distance_to_middle(vectors: Vectors, row: int, rows: NDArray[np.int64]) -> float:
    middle = vectors[rows].mean(axis=0, dtype=np.float64)
    return float(np.linalg.norm(vectors[row] - middle))


_Found: TypeAlias = tuple[int, tuple[float, int], tuple[float, int]]


def _nearest(vectors: Vectors, labels: Labels) -> Iterator[_Found]:
    """For each photo that has others of its person: (row, nearest own, nearest other), distance and row."""
    middle = _mean(vectors)
    _, person, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(sizes[person] > 1)
    for start in range(0, len(rows), _QUERIES):
        yield from _nearest_of(vectors, labels, middle, rows[start : start + _QUERIES])


def _mean(vectors: Vectors) -> NDArray[np.float64]:
    total = np.zeros(vectors.shape[1])
    for start in range(0, len(vectors), _ROWS):
        total += vectors[start : start + _ROWS].sum(axis=0, dtype=np.float64)
    return total / max(1, len(vectors))


class _Best:
    """The nearest so far of each of some queries: squared distances (q,) float64, and rows (q,)."""

    def __init__(self, queries: NDArray[np.float64]) -> None:
        self.queries = queries
        self.squared = np.full(len(queries), np.inf)
        self.rows = np.full(len(queries), -1, np.int64)

    def look(self, vectors: Vectors, start: int, about: NDArray[np.float32], slack: Vectors) -> None:
        """Looks at rows from `start` on, by squared distances (q, r), off by `slack` (q,) at most."""
        lowest = about.min(axis=1)
        for query in np.flatnonzero(np.isfinite(lowest) & (lowest - slack <= self.squared)):
            limit = min(float(lowest[query]), self.squared[query]) + 2 * slack[query]
            rows = start + np.flatnonzero(about[query] <= limit)
            apart = vectors[rows].astype(np.float64) - self.queries[query]
            squared = squared_lengths(apart)
            best = int(squared.argmin())
            if squared[best] < self.squared[query]:
                self.squared[query], self.rows[query] = squared[best], rows[best]


def _nearest_of(
    vectors: Vectors, labels: Labels, middle: NDArray[np.float64], rows: NDArray[np.int64]
) -> Iterator[_Found]:
    exact = vectors[rows].astype(np.float64)
    # Around the mean vectors are short, and rounding is small.
    queries = (exact - middle).astype(np.float32)
    own, other = _Best(exact), _Best(exact)
    for start in range(0, len(vectors), _ROWS):
        block = (vectors[start : start + _ROWS] - middle).astype(np.float32)
        about, slack = expanded(queries, block, squared_lengths(block))
        same = labels[rows][:, None] == labels[start : start + _ROWS][None, :]
        other.look(vectors, start, np.where(same, np.inf, about), slack)
        itself = rows[:, None] == np.arange(start, start + len(block))[None, :]
        own.look(vectors, start, np.where(same & ~itself, about, np.inf), slack)
    for query, row in enumerate(rows.tolist()):
        yield row, _answer(own, query), _answer(other, query)


def _answer(best: _Best, query: int) -> tuple[float, int]:
    return float(np.sqrt(best.squared[query])), int(best.rows[query])
