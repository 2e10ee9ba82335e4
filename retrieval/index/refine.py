"""Refine: compares candidates by their whole vectors, lowest bounds first, until no other can be a result.

Comparisons in float32, with error bounds, lower the limits of the queries. Float64 distances of the remaining
rows decide the result.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retrieval.index.blocks import Floats, Ids, Numbering
from retrieval.index.candidates import (
    Bounded,
    Candidates,
    QueryBatch,
    joined,
    least,
    no_candidates,
    nothing_bounded,
    ordered,
    rank,
)
from retrieval.index.explanation import count
from retrieval.index.kernels import (
    FLOAT64_SLACK,
    float32_bounds,
    float32_pairs,
    float64_pairs,
    pair_squares_float32,
    pair_squares_float64,
)
from retrieval.index.threads import in_this_thread, spread
from retrieval.system.cpu import usable_cores

# Candidates beyond k that are compared before the bounds of the others are checked: so many, and k / 4.
OVERFETCH: Final = 8

# The most candidates and bounded rows that are held before they are refined: 24 or 32 bytes each.
MAX_PENDING_CANDIDATES: Final = 1_500_000

# Up to this many numbers of vectors are compared in the calling thread: handing them over would take longer.
COMPARED_ALONE: Final = 2**19

# Candidates of each query that a radius search compares first.
RADIUS_CANDIDATES: Final = 2**20

# Some pairs of queries and rows of a matrix -> squared distances.
_Kernel: TypeAlias = Callable[[NDArray[np.int64], NDArray[np.float32], Ids], NDArray[Any]]


class Refiner:
    """The candidates of a batch of queries; no row is held twice for a query."""

    def __init__(self, batch: QueryBatch, numbering: Numbering) -> None:
        self._batch = batch
        self._numbering = numbering
        self._pending: list[Candidates] = []
        self._bounded: list[Bounded] = []
        self._new = False  # whether rows were compared that have not lowered the limits yet
        self._size = 0

    def add(self, found: Candidates | Bounded) -> None:
        """Adds rows that the filter did not exclude."""
        if isinstance(found, Candidates):
            self._pending.append(found)
        else:
            self._add_bounded(found)
        self._size += len(found.row)

    @property
    def size(self) -> int:
        """The number of rows that are held."""
        return self._size

    @property
    def full(self) -> bool:
        """Whether so many rows are held that they should be refined now."""
        return self._size > MAX_PENDING_CANDIDATES

    def tighten(self) -> None:
        """Compares the candidates with the lowest bounds, lowers the limits, and drops rows beyond them."""
        with self._batch.explanation.timed("refine"):
            self._drop_beyond()
            found = self._in_reach()
            if self._batch.k and len(found.row):
                found = self._compare_least(found, self._wanted())
            self._pending = [found]
            self._pending = [self._in_reach()]
        self._size = sum(len(one.row) for one in self._pending)
        self._size += sum(len(one.row) for one in self._bounded)

    def relieve(self) -> None:
        """Compares all candidates if more than half of `MAX_PENDING_CANDIDATES` remain."""
        if self._size > MAX_PENDING_CANDIDATES // 2:
            self.refine_all()

    def refine_all(self) -> None:
        """Compares all remaining candidates, lowest bounds first."""
        with self._batch.explanation.timed("refine"):
            self._drop_beyond()
            wanted = self._wanted()
            while len((found := self._in_reach()).row):
                self._pending = [self._compare_least(found, wanted)]
                wanted *= 2
            self._pending = []
        self._size = 0

    def answers(self) -> list[tuple[Floats, Ids]]:
        """Returns for each query its distances, ascending, and ids, ties by id; call after `refine_all`."""
        batch = self._batch
        with batch.explanation.timed("refine"):
            found = self._all_bounded()
            query, row, ids = found.query, found.row, self._numbering.ids(found.row)
            squares = np.empty(len(row))
            kernel = partial(pair_squares_float64, batch.exact)
            self._per_block(kernel, query, row, float64_pairs(batch.queries.shape[1]), squares)
            order = ordered(query, squares)
            if (np.diff(squares[order]) == 0).any():
                order = np.lexsort((ids, squares, query))
            query, distances, ids = query[order], np.sqrt(squares[order]), ids[order]
            # Roots of different squares may be equal, and a radius limits distances, not squares.
            stays = rank(query) < batch.k if batch.k else distances <= batch.limit[query]
            query, distances, ids = query[stays], distances[stays], ids[stays]
        cuts = np.searchsorted(query, np.arange(len(batch) + 1))
        return [(distances[a:b], ids[a:b]) for a, b in pairwise(cuts)]

    # Limits

    def _in_reach(self) -> Candidates:
        """Returns the pending candidates that are within the limits."""
        limit = self._batch.limit
        near = [one[one.bound <= limit[one.query] * FLOAT64_SLACK] for one in self._pending]
        return joined(near, no_candidates())

    def _wanted(self) -> int:
        """Returns how many candidates of each query are compared first."""
        k = self._batch.k
        return k + k // 4 + OVERFETCH if k else RADIUS_CANDIDATES

    def _compare_least(self, found: Candidates, wanted: int) -> Candidates:
        """Compares the `wanted` candidates with the lowest bounds of each query; returns the others."""
        first = least(found.query, found.bound, wanted)
        self._add_bounded(self._compare(found.query[first], found.row[first]))
        self._drop_beyond()
        return found[~first]

    def _drop_beyond(self) -> None:
        """Lowers the limits by all compared rows, and drops rows beyond them."""
        if self._new:
            found = self._all_bounded()
            self._lower_limits(found)
            self._bounded = [found[found.lower <= self._batch.limit[found.query] * FLOAT64_SLACK]]
            self._new = False

    def _lower_limits(self, found: Bounded) -> None:
        k, limit = self._batch.k, self._batch.limit
        if not k:
            return
        order = ordered(found.query, found.upper)
        query, upper = found.query[order], found.upper[order]
        kth = np.flatnonzero(rank(query) == k - 1)
        limit[query[kth]] = np.minimum(limit[query[kth]], upper[kth])

    def _all_bounded(self) -> Bounded:
        if len(self._bounded) != 1:
            self._bounded = [joined(self._bounded, nothing_bounded())]
        return self._bounded[0]

    # Comparisons

    def _compare(self, query: NDArray[np.int64], row: Ids) -> Bounded:
        """Returns bounds of distances from float32 differences, which are tighter than those of a product."""
        queries = self._batch.queries
        squares = np.empty(len(row), np.float32)
        at_a_time = float32_pairs(queries.shape[1])
        self._per_block(partial(pair_squares_float32, queries), query, row, at_a_time, squares)
        count(self._batch.explanation, candidates=len(row), bytes_read=len(row) * queries.shape[1] * 4)
        lower, upper = float32_bounds(squares.astype(np.float64), queries.shape[1])
        return Bounded(query, row, lower, upper)

    def _add_bounded(self, found: Bounded) -> None:
        """Adds compared rows, without those that a query excludes."""
        if self._batch.exclude is not None:
            ids = self._numbering.ids(found.row)
            found = found[(ids[:, None] != self._batch.exclude[found.query]).all(1)]
        self._bounded.append(found)
        self._new = True

    def _per_block(
        self, kernel: _Kernel, query: NDArray[np.int64], row: Ids, at_a_time: int, results: NDArray[Any]
    ) -> None:
        """Fills `results` (n,) by a kernel over pairs (n,), on all cores where that is faster."""
        alone = len(row) * self._batch.queries.shape[1] <= COMPARED_ALONE
        if not alone:
            # Two jobs for each core: a single one would run in this thread, where FAISS starts its own.
            at_a_time = min(at_a_time, -(-len(row) // (2 * usable_cores())))
        firsts = self._numbering.firsts
        order = np.argsort(row)
        cuts = np.searchsorted(row[order], firsts)
        jobs = [
            (number, order[start : min(start + at_a_time, after)])
            for number, (before, after) in enumerate(pairwise(cuts))
            for start in range(before, after, at_a_time)
        ]

        def compute(some: Sequence[tuple[int, Ids]]) -> None:
            for number, places in some:
                matrix = self._numbering.blocks[number].matrix
                results[places] = kernel(query[places], matrix, row[places] - firsts[number])

        if alone:
            with in_this_thread():
                compute(jobs)
        else:
            groups = np.array_split(np.arange(len(jobs)), min(len(jobs), 2 * usable_cores()))
            deque(spread(compute, [[jobs[number] for number in group] for group in groups]), maxlen=0)
