"""The data that filter and refine exchange: queries with their limits, candidates, and bounded rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from retrieval.index.blocks import Floats, Ids
from retrieval.index.explanation import Explanation

# For each query, the ids that may not be in its result; None where no query has any.
Exclude: TypeAlias = Sequence[tuple[int, ...]] | None


class QueryBatch:
    """A batch of queries with their current limits.

    Attributes:
        queries: (n, d) float32.
        exact: the same in float64.
        lengths: (n,) float64, Euclidean.
        exclude: (n, m) the ids to exclude for each query, filled up with -1; None where there are none.
        k: the number of neighbours; 0 for a radius search.
        limit: (n,) float64, an upper bound of each query's k-th distance, proven by k rows, or the radius.
            It only falls, while filter and refine share it.
        explanation: the costs are added to it.
    """

    def __init__(
        self,
        queries: NDArray[np.float32],
        exclude: Exclude,
        *,
        k: int,
        radius: float,
        explanation: Explanation,
    ) -> None:
        self.queries = queries
        self.exact = queries.astype(np.float64)
        self.lengths: Floats = np.sqrt(np.einsum("ij,ij->i", self.exact, self.exact))
        self.exclude: Ids | None = None
        if exclude is not None and any(exclude):
            # Ids are positive numbers.
            self.exclude = np.full((len(exclude), max(map(len, exclude))), -1, np.int64)
            for row, ids in zip(self.exclude, exclude, strict=True):
                row[: len(ids)] = ids
        self.k = k
        self.limit: Floats = np.full(len(queries), radius, np.float64)
        self.explanation = explanation

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def enough(self) -> int:
        """The number of rows that surely contain k results: k, and as many as a query excludes."""
        return self.k + (0 if self.exclude is None else self.exclude.shape[1])


@dataclass(frozen=True)
class _Pairs:
    """Pairs (p,) of queries and rows, in arrays of one length.

    Attributes:
        query: the position of the query in the batch.
        row: the number of the row among all rows.
    """

    query: NDArray[np.int64]
    row: Ids

    def __getitem__(self, some: NDArray[np.bool_]) -> Self:
        places = np.flatnonzero(some)
        return type(self)(*[column.take(places) for column in vars(self).values()])


@dataclass(frozen=True)
class Candidates(_Pairs):
    """Rows that no bound has excluded yet; `bound` is a lower bound of the distance."""

    bound: Floats


@dataclass(frozen=True)
class Bounded(_Pairs):
    """Rows compared in float32 by their vectors; `lower` and `upper` bound the distance."""

    lower: Floats
    upper: Floats


@dataclass(frozen=True)
class Near(Candidates):
    """Candidates with the squared distances between their codes, whole numbers."""

    square: Ids


def no_candidates() -> Candidates:
    """Returns empty candidates."""
    return Candidates(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


def nothing_bounded() -> Bounded:
    """Returns empty bounded rows."""
    return Bounded(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))


def nothing_near() -> Near:
    """Returns no candidates near by."""
    return Near(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))


_Rows = TypeVar("_Rows", bound=_Pairs)


def joined(parts: Sequence[_Rows], nothing: _Rows) -> _Rows:
    """Returns the concatenation of all parts; `nothing` if they are empty."""
    parts = [one for one in parts if len(one.row)]
    if len(parts) < 2:
        return parts[0] if parts else nothing
    return type(nothing)(*[np.concatenate([vars(one)[name] for one in parts]) for name in vars(nothing)])


def by_query(query: NDArray[np.int64]) -> Iterator[tuple[int, Ids]]:
    """Yields each query in (n,) with its positions."""
    if len(query) and not (query != query[0]).any():  # usual for a single query
        yield int(query[0]), np.arange(len(query))
        return
    # numpy sorts numbers of 16 bits by counting them.
    order = np.argsort(query.astype(np.uint16), kind="stable")
    ordered = query[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(query) else order
    for start, end in pairwise([*starts.tolist(), len(order)]):
        yield int(ordered[start]), order[start:end]


def ordered(query: NDArray[np.int64], values: Floats) -> Ids:
    """Returns the order (n,) by query, and by value within a query; equal values in any order."""
    # numpy sorts numbers by instructions for vectors, unless the sort must be stable or has two keys.
    order = np.argsort(values)
    return order[np.argsort(query[order].astype(np.uint16), kind="stable")]


def least(query: NDArray[np.int64], values: Floats, count: int) -> NDArray[np.bool_]:
    """Returns a mask (n,) of the `count` least values of each query."""
    order = ordered(query, values)
    chosen = np.empty(len(query), bool)
    chosen[order] = rank(query[order]) < count
    return chosen


def rank(query: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the rank of each entry within its query, from 0, for an array (n,) sorted by query."""
    if not len(query):
        return query
    starts = np.flatnonzero(np.concatenate([[True], query[1:] != query[:-1]]))
    return np.arange(len(query)) - np.repeat(starts, np.diff(np.append(starts, len(query))))
