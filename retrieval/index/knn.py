"""Exact k-nearest-neighbour search: the answers of a float64 brute force, by filter and refine.

Filter and refine (Faloutsos et al. 1994; Seidl and Kriegel, Optimal multi-step k-nearest neighbor search,
SIGMOD 1998): `filter` excludes rows by a lower bound on each distance; `refine` computes the others in
float64 from the whole vectors, lowest bound first, until the next bound exceeds the k-th distance. So the
result does not depend on codes, blocks, kernels, or the number of queries in a batch.
"""

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retrieval.index import direct
from retrieval.index.blocks import Block, Floats, Ids, Numbering, Selection, selections
from retrieval.index.candidates import Bounded, Candidates, Exclude, QueryBatch
from retrieval.index.explanation import Explanation
from retrieval.index.filter import Filter
from retrieval.index.kernels import FLOAT64_SLACK
from retrieval.index.refine import Refiner
from retrieval.index.threads import spread

__all__ = ["Block", "Explanation", "Ids", "Neighbours", "nearest", "within"]

# The distances (m,) of a query's neighbours, and their ids (m,).
Neighbours: TypeAlias = tuple[Floats, Ids]

# Finds the rows of a selection that a bound does not exclude.
_Work: TypeAlias = Callable[[Selection], Candidates | Bounded]

# Queries in a batch: their products with a block of 8192 rows are 8 MB.
QUERY_BATCH: Final = 256
RADIUS_QUERY_BATCH: Final = 64

# The most neighbours of all queries of a batch.
MAX_BATCH_ANSWERS: Final = 2**20

# An upper bound of all distances: no vector is longer than 1e18.
MAX_DISTANCE: Final = 1e19


def nearest(
    blocks: Sequence[Block],
    queries: NDArray[np.float32],
    k: int,
    *,
    allowed: Ids | None = None,
    exclude: Exclude = None,
    explanation: Explanation | None = None,
) -> list[Neighbours]:
    """Returns the k nearest rows to each query.

    Args:
        blocks: the rows to search; no id is in two blocks.
        queries: (n, d) float32, finite, of lengths up to 1e18.
        k: at least 1; with fewer rows, all are returned.
        allowed: the only ids that may be in the result, ascending.
        exclude: for each query the ids that may not be in its result, which are few.
        explanation: the costs are added to it.

    Returns:
        For each query: Euclidean distances ascending, float64, and ids; equal distances by id.
    """
    size = max(1, min(QUERY_BATCH, MAX_BATCH_ANSWERS // k))
    search = _Search(blocks, allowed, explanation, k=k, radius=np.inf)
    return search.in_batches(queries, exclude, size)


def within(
    blocks: Sequence[Block],
    queries: NDArray[np.float32],
    radius: float,
    *,
    allowed: Ids | None = None,
    exclude: Exclude = None,
    explanation: Explanation | None = None,
) -> list[Neighbours]:
    """Returns all rows at a distance of at most `radius` from each query; otherwise as `nearest`."""
    search = _Search(blocks, allowed, explanation, k=0, radius=min(radius, MAX_DISTANCE))
    return search.in_batches(queries, exclude, RADIUS_QUERY_BATCH)


class _Search:
    """A search of blocks, for the k nearest rows or, with k = 0, within a radius."""

    def __init__(
        self,
        blocks: Sequence[Block],
        allowed: Ids | None,
        explanation: Explanation | None,
        *,
        k: int,
        radius: float,
    ) -> None:
        self._numbering = Numbering(blocks)
        self._selections = list(selections(blocks, allowed))
        self._explanation = Explanation() if explanation is None else explanation
        self._k, self._radius = k, radius

    def in_batches(self, queries: NDArray[np.float32], exclude: Exclude, size: int) -> list[Neighbours]:
        """Returns the neighbours of queries (n, d), in batches of `size`."""
        self._explanation.queries += len(queries)
        self._explanation.rows = sum(map(len, self._selections))
        answers: list[Neighbours] = []
        for start in range(0, len(queries), size):
            some = slice(start, start + size)
            excluded = None if exclude is None else exclude[some]
            answers += self._answer(self._batch(queries[some], excluded))
        return answers

    def _batch(self, queries: NDArray[np.float32], exclude: Exclude) -> QueryBatch:
        return QueryBatch(queries, exclude, k=self._k, radius=self._radius, explanation=self._explanation)

    def _answer(self, batch: QueryBatch) -> list[Neighbours]:
        filtering, refiner = Filter(batch), Refiner(batch, self._numbering)
        coded = [one for one in self._selections if one.block.coded is not None]
        rest, work = self._selections, filtering.filtered
        if batch.k and coded:
            if filtering.is_cheaper_to_scan(batch.enough * len(batch), coded):
                work = filtering.scanned
            elif len(coded) == len(rest) and (answers := direct.answers(batch, coded, filtering)):
                return answers
            else:
                with self._explanation.timed("filter"):
                    found, ends = filtering.best(coded)
                refiner.add(found)
                refiner.tighten()
                if filtering.is_cheaper_to_scan(refiner.size, coded):
                    work, refiner = filtering.scanned, Refiner(batch, self._numbering)
                else:
                    refiner.refine_all()
                    if (ends > batch.limit * FLOAT64_SLACK).all():
                        rest = [one for one in self._selections if one.block.coded is None]
        self._filter(rest, work, refiner)
        refiner.refine_all()
        return refiner.answers()

    def _filter(self, rest: Sequence[Selection], work: _Work, refiner: Refiner) -> None:
        """Filters selections in parallel, while the limits fall."""
        seen, next_look = 0, 1
        with self._explanation.timed("filter"):
            for found in spread(work, rest):
                refiner.add(found)
                seen += 1
                if seen >= next_look or refiner.full:
                    refiner.tighten()
                    refiner.relieve()
                    next_look = 4 * seen
