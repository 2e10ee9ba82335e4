"""What passes between filter and refine: queries with their limits, candidates, and bounded rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from retrieval.index.blocks import Floats, Ids
from retrieval.index.explanation import Explanation


class QueryBatch:
    """Some queries on their way to their answers.

    Attributes:
        queries: (n, d) float32.
        exact: the same in float64.
        lengths: (n,) float64, Euclidean.
        exclude: (n,) the id that is no answer to each query, -1 for none; None where there is none at all.
        k: how many are asked for; 0 for everything within a radius.
        limit: (n,) float64, an upper bound of each query's k-th distance, proven by k rows, or the radius.
            It only falls, while filter and refine share it.
        explanation: is added to.
    """

    def __init__(
        self,
        queries: NDArray[np.float32],
        exclude: Sequence[int | None] | None,
        *,
        k: int,
        radius: float,
        explanation: Explanation,
    ) -> None:
        self.queries = queries
        self.exact = queries.astype(np.float64)
        self.lengths: Floats = np.sqrt(np.einsum("ij,ij->i", self.exact, self.exact))
        self.exclude: Ids | None = None
        if exclude is not None and any(one is not None for one in exclude):
            # Ids are positive numbers.
            self.exclude = np.array([-1 if one is None else one for one in exclude], np.int64)
        self.k = k
        self.limit: Floats = np.full(len(queries), radius, np.float64)
        self.explanation = explanation

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def enough(self) -> int:
        """Among this many different rows there are k that may be answers: one of them may be left out."""
        return self.k + (self.exclude is not None)


@dataclass(frozen=True)
class Candidates:
    """Rows that no bound has ruled out yet, (n,) each.

    Attributes:
        query: which query of the batch.
        row: which row, by its number among all rows.
        bound: a lower bound of the distance.
    """

    query: NDArray[np.int64]
    row: Ids
    bound: Floats

    def __getitem__(self, some: Any) -> "Candidates":
        return Candidates(self.query[some], self.row[some], self.bound[some])


@dataclass(frozen=True)
class Bounded:
    """Rows whose vectors were compared in float32, (n,) each; `lower` and `upper` bound the distance."""

    query: NDArray[np.int64]
    row: Ids
    lower: Floats
    upper: Floats

    def __getitem__(self, some: Any) -> "Bounded":
        return Bounded(self.query[some], self.row[some], self.lower[some], self.upper[some])


def no_candidates() -> Candidates:
    """None at all."""
    return Candidates(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


def nothing_bounded() -> Bounded:
    """None at all."""
    return Bounded(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))


_Rows = TypeVar("_Rows", Candidates, Bounded)


def joined(parts: Sequence[_Rows], nothing: _Rows) -> _Rows:
    """All parts in one."""
    if len(parts) == 1:
        return parts[0]
    columns = [[getattr(one, column.name) for one in (nothing, *parts)] for column in fields(nothing)]
    return type(nothing)(*map(np.concatenate, columns))


def by_query(query: NDArray[np.int64]) -> Iterator[tuple[int, Ids]]:
    """Each query that is in (n,), with its places."""
    # numpy sorts numbers of 16 bits by counting them.
    order = np.argsort(query.astype(np.uint16), kind="stable")
    ordered = query[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    for start, end in pairwise([*starts.tolist(), len(order)]):
        yield int(ordered[start]), order[start:end]


def least(query: NDArray[np.int64], values: Floats, count: int) -> NDArray[np.bool_]:
    """Which values (n,) are among the `count` least of their query (n,)."""
    chosen = np.zeros(len(query), bool)
    for _, places in by_query(query):
        if len(places) > count:
            places = places[np.argpartition(values[places], count - 1)[:count]]
        chosen[places] = True
    return chosen


def rank(query: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each entry among those of the same query, from 0, of an array (n,) sorted by query."""
    if not len(query):
        return query
    starts = np.flatnonzero(np.concatenate([[True], query[1:] != query[:-1]]))
    return np.arange(len(query)) - np.repeat(starts, np.diff(np.append(starts, len(query))))
