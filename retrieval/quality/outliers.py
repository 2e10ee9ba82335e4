"""Outlier statistics for the audit: the spread of a cluster, a robust scale, the widest gap of vectors."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

# The least number of values from which a usual value is estimated.
MIN_VALUES: Final = 20

# The least size of a group in a gap: a single photo is a doubt of another kind, with its own score.
MIN_GROUP: Final = 2


@dataclass(frozen=True, slots=True)
class RobustScale:
    """The median and robust standard deviation of values; NaN for fewer than 20 values."""

    values: int
    median: float
    deviation: float

    @classmethod
    def of(cls, values: Floats) -> "RobustScale":
        """Returns the scale of values.

        The deviation is 1.4826 times the median absolute deviation; where that is 0, it is 1.2533 times the
        mean absolute deviation.
        """
        if len(values) < MIN_VALUES:
            return cls(len(values), math.nan, math.nan)
        median = float(np.median(values))
        off = np.abs(values - median)
        return cls(len(values), median, float(1.4826 * np.median(off)) or float(1.2533 * off.mean()))

    def scores(self, values: Floats) -> Floats:
        """Returns the deviations of values above the median; 0 where the deviation is 0 or unknown."""
        if not self.deviation > 0:
            return np.zeros(len(values))
        return np.asarray((values - self.median) / self.deviation)

    def at(self, score: float) -> float:
        """Returns the value that has a score."""
        return self.median + score * self.deviation


def skewness(values: NDArray[Any]) -> float:
    """Returns the third standardized moment; NaN where values do not vary or there are none."""
    if not len(values) or not values.std():
        return math.nan
    return float((((values - values.mean()) / values.std()) ** 3).mean())


@dataclass(frozen=True)
class Cluster:
    """The vectors of an identity in sum: their count, centroid (d,), and mean squared distance to it."""

    count: int
    centroid: Floats
    spread: float

    @classmethod
    def of(cls, parts: Iterable[Floats]) -> "Cluster":
        """Returns the cluster of vectors given in parts, by Chan, Golub and LeVeque's update of moments."""
        count, centroid, squares = 0, np.zeros(1), 0.0
        for part in parts:
            mean = part.mean(axis=0)
            new, step = count + len(part), mean - centroid
            squares += float(((part - mean) ** 2).sum()) + float((step**2).sum()) * count * len(part) / new
            centroid, count = centroid + step * (len(part) / new), new
        return cls(count, centroid, squares / count)

    def without(self, vector: Floats) -> tuple["Cluster", float]:
        """Returns the cluster without one of its vectors, and the squared distance between the two."""
        left, others = self.centroid - vector, self.count - 1
        squared = float((left**2).sum())
        spread = max(0.0, self.spread * self.count - squared * self.count / others) / others
        factor = (self.count / others) ** 2
        return Cluster(others, self.centroid + left / others, spread), squared * factor

    @property
    def within(self) -> float:
        """The mean squared distance between two different photos; NaN for a single photo."""
        return 2 * self.spread * self.count / (self.count - 1) if self.count > 1 else math.nan

    def across(self, other: "Cluster") -> float:
        """Returns the mean squared distance between a photo of this and a photo of the other cluster."""
        return float(((self.centroid - other.centroid) ** 2).sum()) + self.spread + other.spread


def widest_gap(vectors: Floats) -> tuple[float, NDArray[np.bool_]] | None:
    """Returns the widest gap between two groups of vectors, each of two or more.

    The gap is the longest edge of the minimum spanning tree (Prim's) that leaves two vectors or more on both
    sides: the distance between the nearest two vectors of different groups, as in single linkage.

    Args:
        vectors: (n, d) float64; the n x n distances are held in memory.

    Returns:
        The gap (Euclidean) and a mask (n,) of the smaller group; None below four vectors, and where every
        edge leaves a single vector on one side.
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
    """Returns the vertices in the order of joining, the parent of each, and the weight of the edge to it."""
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
