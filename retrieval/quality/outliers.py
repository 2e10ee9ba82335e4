"""Outliers: the spread of an identity's vectors, robust limits, and the widest gap among vectors."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

# Below how many values nothing can be said about what is usual.
MIN_VALUES: Final = 20

# A group of one is a doubtful photo, which has a score of its own.
MIN_GROUP: Final = 2


@dataclass(frozen=True, slots=True)
class RobustScale:
    """Median and robust standard deviation of some values; NaN of fewer than 20."""

    values: int
    median: float
    deviation: float

    @classmethod
    def of(cls, values: Floats) -> "RobustScale":
        """The deviation is 1.4826 times the median absolute one; where that is 0, 1.2533 times the mean."""
        if len(values) < MIN_VALUES:
            return cls(len(values), math.nan, math.nan)
        median = float(np.median(values))
        off = np.abs(values - median)
        return cls(len(values), median, float(1.4826 * np.median(off)) or float(1.2533 * off.mean()))

    def scores(self, values: Floats) -> Floats:
        """How many deviations above the median values are; 0 where nothing deviates or nothing is known."""
        if not self.deviation > 0:
            return np.zeros(len(values))
        return np.asarray((values - self.median) / self.deviation)

    def at(self, score: float) -> float:
        """The value of a score."""
        return self.median + score * self.deviation


def skewness(values: NDArray[Any]) -> float:
    """The third standardized moment; NaN where nothing varies."""
    if not len(values) or not values.std():
        return math.nan
    return float((((values - values.mean()) / values.std()) ** 3).mean())


@dataclass(frozen=True)
class Cluster:
    """How a person's vectors lie: how many, their centroid (d,), and the mean squared distance to it."""

    count: int
    centroid: Floats
    spread: float

    @classmethod
    def of(cls, parts: Iterable[Floats]) -> "Cluster":
        """Of vectors that come in parts. (Chan, Golub and LeVeque's update of mean and squares.)"""
        count, centroid, squares = 0, np.zeros(1), 0.0
        for part in parts:
            mean = part.mean(axis=0)
            new, step = count + len(part), mean - centroid
            squares += float(((part - mean) ** 2).sum()) + float((step**2).sum()) * count * len(part) / new
            centroid, count = centroid + step * (len(part) / new), new
        return cls(count, centroid, squares / count)

    def without(self, vector: Floats) -> tuple["Cluster", float]:
        """The shape without one of its vectors, and that one's squared distance to the others' centroid."""
        left, others = self.centroid - vector, self.count - 1
        squared = float((left**2).sum())
        spread = max(0.0, self.spread * self.count - squared * self.count / others) / others
        factor = (self.count / others) ** 2
        return Cluster(others, self.centroid + left / others, spread), squared * factor

    @property
    def within(self) -> float:
        """The mean squared distance between two different photos; NaN of one."""
        return 2 * self.spread * self.count / (self.count - 1) if self.count > 1 else math.nan

    def across(self, other: "Cluster") -> float:
        """The mean squared distance between a photo of one and a photo of the other."""
        return float(((self.centroid - other.centroid) ** 2).sum()) + self.spread + other.spread


def widest_gap(vectors: Floats) -> tuple[float, NDArray[np.bool_]] | None:
    """The widest gap between two groups of vectors, each of two or more.

    It is the longest edge of the minimum spanning tree (Prim's) that leaves two vectors or more on both
    sides: the distance between the nearest two of different groups, as single linkage has it.

    Args:
        vectors: (n, d) float64; n x n distances are held.

    Returns:
        The gap, Euclidean, and which vectors (n,) are in the smaller group; None below four vectors, and
        where every edge leaves a single one.
    """
    count = len(vectors)
    centred = vectors - vectors.mean(axis=0)
    lengths = (centred**2).sum(axis=1)
    squares = np.maximum(lengths[:, None] + lengths - 2 * centred @ centred.T, 0)
    order, parents, edges = _spanning_tree(squares)
    sizes = np.ones(count, int)
    for one in order[:0:-1]:
        sizes[parents[one]] += sizes[one]
    fits = (sizes >= MIN_GROUP) & (count - sizes >= MIN_GROUP)
    fits[order[0]] = False
    if not fits.any():
        return None
    top = int(np.where(fits, edges, -1).argmax())
    inside = np.zeros(count, bool)
    for one in order:
        inside[one] = one == top or (one != order[0] and inside[parents[one]])
    width = float(np.linalg.norm(vectors[top] - vectors[parents[top]]))
    return width, inside if 2 * inside.sum() <= count else ~inside


def _spanning_tree(squares: Floats) -> tuple[list[int], Rows, Floats]:
    """Vertices in the order in which they join, the parent of each, and the weight of the edge to it."""
    count = len(squares)
    edges, parents, out = squares[0].copy(), np.zeros(count, int), np.ones(count, bool)
    out[0], edges[0] = False, 0.0
    order = [0]
    for _ in range(count - 1):
        new = int(np.where(out, edges, np.inf).argmin())
        out[new] = False
        order.append(new)
        nearer = out & (squares[new] < edges)
        edges[nearer], parents[nearer] = squares[new][nearer], new
    return order, parents, edges
