"""Exact k-nearest-neighbour search: the answers of a float64 brute force, by filter and refine.

Filter and refine (Faloutsos et al. 1994; Seidl and Kriegel, Optimal multi-step k-nearest neighbor search,
SIGMOD 1998): a lower bound on each distance comes from codes (`quantization`), or, where a block has none,
from a float32 product with its vectors and a bound on that product's rounding. Whatever the bound does not
rule out is computed in float64 from the vectors themselves, nearest bound first, until the next bound exceeds
the k-th distance. So the answer does not depend on codes, blocks, kernels, or how many queries come together.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import pairwise
from typing import Any, Final, TypeAlias, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.index.quantization import Basis, Coded, centred
from retrieval.system.cpu import usable_cores

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Answer: TypeAlias = tuple[Floats, Ids]
_T = TypeVar("_T")

# How many queries are asked together: their products with a block of 8192 rows are 8 MB.
_TOGETHER: Final = 256

# Up to how many queries FAISS goes through the codes for each of them; from there on one product serves all.
_FEW: Final = 8

# How many rows beyond k are looked at before the bound is compared with what they gave.
_SPARE: Final = 8

# How many rows FAISS proposes of each block, at least.
_PROPOSED: Final = 24

# How many rows are looked at first, for some limit to begin with.
_SEED: Final = 1024

# How many candidates may wait before they are looked at, whatever their bounds.
_WAITING: Final = 1_500_000

# Below how many pairs of vectors one core computes what there is to compute.
_ALONE: Final = 128

# How many pairs are computed at a time in float64, whose differences should stay in a core's cache, and in
# float32; up to the first FAISS is not called, which would wake threads of its own outside ours.
_FEW_PAIRS: Final = 16
_PAIRS: Final = 64

# Above this share of a block's rows the codes have ruled out too little.
_TOO_MANY: Final = 1 / 16

# No distance is above this, as no vector is longer than 1e18.
_FARTHEST: Final = 1e19

# What the rounding of float64 distances may hide, relatively: 2048 sums are off by 2e-13.
_CLOSE: Final = 1 + 1e-11


@dataclass
class Explanation:
    """What answering took.

    Attributes:
        queries: how many were answered.
        rows: stored vectors that were allowed to be the answer.
        coded_rows: of them, ruled out or not by their codes, summed over queries.
        scanned_rows: compared by their whole vectors in float32, summed over queries.
        candidates: rows that codes did not rule out, compared by their whole vectors, summed over queries.
        bytes_read: of codes and vectors.
        seconds: by stage: "filter" and "refine" here; callers add theirs.
    """

    queries: int = 0
    rows: int = 0
    coded_rows: int = 0
    scanned_rows: int = 0
    candidates: int = 0
    bytes_read: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Whether the codes' bound answered, a scan of whole vectors, or some of each."""
        if not self.scanned_rows:
            return "bound" if self.coded_rows else "nothing to search"
        return "bound and scan" if self.coded_rows else "scan"

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time of a with statement to a stage, less that of stages within it."""
        began, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            within_it = sum(self.seconds.values()) - before
            spent = time.perf_counter() - began - within_it
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Rows that are searched together: a segment.

    Attributes:
        ids: (n,) int64.
        matrix: (n, d) float32, C order.
        coded: their codes; None where there are none.
    """

    ids: Ids
    matrix: NDArray[np.float32]
    coded: Coded | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Part:
    """A block, the rows of it that are allowed (None: all), and the number of its first row among all."""

    block: Block
    rows: Ids | None
    first: int

    def __len__(self) -> int:
        return len(self.block) if self.rows is None else len(self.rows)

    def beginning(self, count: int) -> "_Part":
        """The first rows of a part."""
        rows = np.arange(len(self.block)) if self.rows is None else self.rows
        return _Part(self.block, rows[:count], self.first)

    def numbers(self, rows: Ids) -> Ids:
        """The numbers, among all rows of all blocks, of rows of this part."""
        return (rows if self.rows is None else self.rows[rows]) + self.first


@dataclass(frozen=True)
class _Place:
    """Queries in a basis: their codes (n, m), the same about the centre of the grid, and errors (n,)."""

    plain: NDArray[np.float32]
    centred: NDArray[np.float32]
    errors: Floats


@dataclass(frozen=True)
class _Found:
    """Rows that codes did not rule out: whose, which among all rows, and a lower bound of the distance."""

    query: NDArray[np.int64]
    row: Ids
    bound: Floats

    def __getitem__(self, some: Any) -> "_Found":
        return _Found(self.query[some], self.row[some], self.bound[some])


@dataclass(frozen=True)
class _Compared:
    """Rows whose whole vectors were compared with a query's in float32, and bounds of their distances."""

    query: NDArray[np.int64]
    row: Ids
    lower: Floats
    upper: Floats

    def __getitem__(self, some: Any) -> "_Compared":
        return _Compared(self.query[some], self.row[some], self.lower[some], self.upper[some])


def nearest(
    blocks: Sequence[Block],
    queries: NDArray[np.float32],
    k: int,
    *,
    allowed: Ids | None = None,
    exclude: Sequence[int | None] | None = None,
    explanation: Explanation | None = None,
) -> list[Answer]:
    """The k nearest rows to each query.

    Args:
        blocks: what is searched; no id is in two of them.
        queries: (n, d) float32, finite, of lengths up to 1e18.
        k: at least 1; fewer rows give them all.
        allowed: the only ids that may be an answer, ascending.
        exclude: for each query an id that is none.
        explanation: is added to.

    Returns:
        For each query: Euclidean distances ascending, float64, and ids; equal distances by id.
    """
    together = max(1, min(_TOGETHER, 2**24 // k))
    return _in_turn(blocks, queries, together, allowed, exclude, explanation, lambda asked: asked.nearest(k))


def within(
    blocks: Sequence[Block],
    queries: NDArray[np.float32],
    radius: float,
    *,
    allowed: Ids | None = None,
    exclude: Sequence[int | None] | None = None,
    explanation: Explanation | None = None,
) -> list[Answer]:
    """Every row whose distance to a query is at most `radius`; otherwise as `nearest`."""
    return _in_turn(blocks, queries, 64, allowed, exclude, explanation, lambda asked: asked.within(radius))


def _in_turn(
    blocks: Sequence[Block],
    queries: NDArray[np.float32],
    together: int,
    allowed: Ids | None,
    exclude: Sequence[int | None] | None,
    explanation: Explanation | None,
    ask: Callable[["_Asked"], list[Answer]],
) -> list[Answer]:
    explanation = Explanation() if explanation is None else explanation
    parts = list(_parts(blocks, allowed))
    explanation.queries += len(queries)
    explanation.rows = sum(map(len, parts))
    answers: list[Answer] = []
    for start in range(0, len(queries), together):
        some = slice(start, start + together)
        left_out = None if exclude is None else exclude[some]
        answers += ask(_Asked(blocks, parts, queries[some], left_out, explanation))
    return answers


def _parts(blocks: Sequence[Block], allowed: Ids | None) -> Iterator[_Part]:
    """The rows of each block that are allowed; the largest part first."""
    first, parts = 0, []
    for block in blocks:
        rows = None
        if allowed is not None:
            place = np.searchsorted(allowed, block.ids)
            place[place == len(allowed)] = 0
            rows = np.flatnonzero(allowed[place] == block.ids) if len(allowed) else np.empty(0, np.int64)
        parts.append(_Part(block, rows, first))
        first += len(block)
    yield from sorted((part for part in parts if len(part)), key=len, reverse=True)


class _Asked:
    """Some queries on their way to their answers.

    Limits only fall: a query's is at any time an upper bound of its k-th distance, proven by k rows.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        parts: Sequence[_Part],
        queries: NDArray[np.float32],
        exclude: Sequence[int | None] | None,
        explanation: Explanation,
    ) -> None:
        self._blocks = blocks
        self._firsts = np.cumsum([0] + [len(block) for block in blocks])
        self._parts = parts
        self._queries = queries
        self._wide = queries.astype(np.float64)
        self._lengths = np.sqrt(np.einsum("ij,ij->i", self._wide, self._wide))
        self._exclude = None
        if exclude is not None and any(one is not None for one in exclude):
            # Ids are positive numbers.
            self._exclude = np.array([-1 if one is None else one for one in exclude], np.int64)
        self._explanation = explanation
        self._places: dict[int, _Place] = {}
        # No distance above this can be in an answer any more.
        self._limit = np.full(len(queries), np.inf)
        self._k = 0
        # No row is in these twice for one query.
        self._waiting: list[_Found] = []
        self._compared: list[_Compared] = []

    def nearest(self, k: int) -> list[Answer]:
        self._k = k
        with self._explanation.timed("filter"):
            rest = self._propose() if len(self._queries) <= _FEW else list(self._parts)
        self._go_through(rest)
        self._settle()
        return self._answers()

    def within(self, radius: float) -> list[Answer]:
        self._limit[:] = min(radius, _FARTHEST)
        self._go_through(self._parts)
        self._settle()
        return self._answers()

    @property
    def _enough(self) -> int:
        """Of how many different rows k are surely in question: one of them may be left out."""
        return self._k + (self._exclude is not None)

    # Filtering

    def _propose(self) -> list[_Part]:
        """Lets FAISS go through the codes of whole blocks; returns the parts that are not done by that."""
        ready = [part for part in self._parts if part.block.coded is not None and part.rows is None]
        if not ready:
            return list(self._parts)
        for part in ready:
            self._place(part.block.coded)
        count = max(_PROPOSED, -(-2 * self._k // len(ready)))
        proposals = list(_spread(partial(self._proposals, count=count), ready))
        self._waiting = [found for found, _ in proposals]
        self._tighten()
        limit = self._limit * _CLOSE
        done = {part.first for part, (_, ends) in zip(ready, proposals, strict=True) if (ends > limit).all()}
        rest = [part for part in self._parts if part.first not in done]
        # Those of the others will be found once more.
        self._waiting = [found[~self._is_in(rest, found.row)] for found in self._waiting]
        self._compared = [one[~self._is_in(rest, one.row)] for one in self._compared]
        return rest

    def _is_in(self, parts: Sequence[_Part], row: Ids) -> NDArray[np.bool_]:
        """Which rows are of these parts' blocks."""
        return np.isin(self._firsts[self._numbers(row)], [part.first for part in parts])

    def _proposals(self, part: _Part, *, count: int) -> tuple[_Found, Floats]:
        """The rows of a part with the least bounds, and the bound that no other row of it is below."""
        coded = part.block.coded
        assert coded is not None
        place = self._place(coded)
        count = min(count, len(part))
        squares, rows = coded.index.search(place.plain, count)
        self._count(coded_rows=len(part) * len(self._queries), bytes_read=coded.codes.nbytes)
        bounds = _bound(coded, squares.astype(np.float64), place.errors[:, None])
        ends = bounds[:, -1].copy() if count < len(part) else np.full(len(bounds), np.inf)
        query = np.repeat(np.arange(len(bounds)), count)
        return _Found(query, part.numbers(rows.ravel()), bounds.ravel()), ends

    def _seed(self, whole: _Part) -> None:
        """Finds some limit for every query from the first rows of a part that has codes."""
        part = whole.beginning(max(_SEED, 4 * self._enough))
        coded = part.block.coded
        if coded is None or len(part) < self._enough:
            return
        squares = self._code_squares(part, coded)
        best = np.argpartition(squares, self._enough - 1, axis=1)[:, : self._enough]
        query = np.repeat(np.arange(len(best)), self._enough)
        with self._explanation.timed("refine"):
            self._lower_limits(self._compare(query, part.numbers(best.ravel())))

    def _go_through(self, parts: Sequence[_Part]) -> None:
        """Filters parts side by side; the limits fall meanwhile."""
        seen, next_look, size = 0, 1, 0
        with self._explanation.timed("filter"):
            if parts and self._k and not np.isfinite(self._limit).any():
                self._seed(parts[0])
            for found in _spread(self._filtered, parts):
                if isinstance(found, _Found):
                    self._waiting.append(found)
                else:
                    self._compared.append(found)
                size += len(found.row)
                seen += 1
                if seen >= next_look or size > _WAITING:
                    self._tighten()
                    next_look = 4 * seen
                    size = sum(len(one.row) for one in self._waiting)
                    size += sum(len(one.row) for one in self._compared)
                    if size > _WAITING // 2:
                        self._settle()
                        size = 0

    def _filtered(self, part: _Part) -> _Found | _Compared:
        """Those rows of a part that its bound does not rule out."""
        coded = part.block.coded
        if coded is not None:
            found = self._by_codes(part, coded)
            if len(found.row) <= max(_TOO_MANY * len(part) * len(self._queries), 64):
                return found
        return self._by_scan(part)

    def _by_codes(self, part: _Part, coded: Coded) -> _Found:
        place = self._place(coded)
        squares = self._code_squares(part, coded)
        reach = (self._limit * _CLOSE + coded.error + place.errors) / coded.basis.step
        # Squared distances between codes are whole numbers, and none is above the second.
        most = np.minimum(reach**2 * (1 + 1e-9) + 1, 256.0**2 * coded.basis.coordinates)
        query, row = _at_most(squares, np.floor(most).astype(np.float32))
        bounds = _bound(coded, squares[query, row].astype(np.float64), place.errors[query])
        return _Found(query, part.numbers(row), bounds)

    def _by_scan(self, part: _Part) -> _Compared:
        squares = self._vector_squares(part)
        limit = self._limit
        if self._k and np.isinf(limit).any():
            limit = np.minimum(limit, self._limit_of(squares[:, : max(_SEED, 4 * self._enough)]))
        limit = limit * _CLOSE
        # A row within the limit is no longer than the query and the limit together.
        slack = self._rounding(self._lengths + limit)
        most = np.minimum(limit**2 + slack, 3e38)  # above any square there can be
        query, row = _at_most(squares, np.nextafter(most.astype(np.float32), np.float32(np.inf)))
        found = squares[query, row].astype(np.float64)
        lower = np.zeros(len(row))
        known = np.isfinite(slack[query])
        lower[known] = np.sqrt(np.maximum(found[known] - slack[query][known], 0))
        return self._kept(_Compared(query, part.numbers(row), lower, self._above(found, query)))

    def _limit_of(self, squares: NDArray[np.float32]) -> Floats:
        """A limit for each query from float32 squares (queries, rows) of distances to different rows."""
        if squares.shape[1] < self._enough:
            return np.full(len(squares), np.inf)
        kth = np.partition(squares, self._enough - 1, axis=1)[:, self._enough - 1]
        return self._above(kth.astype(np.float64), np.arange(len(kth)))

    def _above(self, squares: Floats, query: NDArray[np.int64]) -> Floats:
        """Upper bounds of distances from what `_vector_squares` gave.

        With t the distance, D its float32 square and q the query's length, |x| <= q + t, and `_rounding` says
        t^2 <= D + g(2q + t)^2. So t <= sqrt(D) + sqrt(g)(2q + t), from which t is at most some T; and once
        more, t^2 <= D + g(2q + T)^2.
        """
        length, gamma = self._lengths[query], _gamma(self._queries.shape[1])
        squares = np.maximum(squares, 0) + _tiny(self._queries.shape[1])
        most = (np.sqrt(squares) + 2 * np.sqrt(gamma) * length) / (1 - np.sqrt(gamma))
        return np.asarray(np.sqrt(squares + gamma * (2 * length + most) ** 2) * _CLOSE)

    def _code_squares(self, part: _Part, coded: Coded) -> NDArray[np.float32]:
        """Squared distances (queries, rows) between codes, exactly."""
        stored = _buffer("codes", (len(part), coded.basis.coordinates))
        coded.centred(slice(None) if part.rows is None else part.rows, stored)
        self._count(coded_rows=len(part) * len(self._queries), bytes_read=len(part) * coded.basis.coordinates)
        return _squared_distances(self._place(coded).centred, stored)

    def _vector_squares(self, part: _Part) -> NDArray[np.float32]:
        """Squared distances (queries, rows) in float32, off by at most what `_rounding` says."""
        matrix = part.block.matrix if part.rows is None else part.block.matrix[part.rows]
        self._count(scanned_rows=len(part) * len(self._queries), bytes_read=matrix.nbytes)
        return _squared_distances(self._queries, matrix)

    def _rounding(self, lengths: Floats) -> Floats:
        """How much FAISS's float32 square of a distance may differ from the true one, |x| up to `lengths`.

        FAISS sums either (q - x)^2 or |q|^2 + |x|^2 - 2qx; the magnitudes of both are at most (|q| + |x|)^2.
        """
        dimension = self._queries.shape[1]
        return np.asarray(_gamma(dimension) * (self._lengths + lengths) ** 2 + _tiny(dimension))

    def _place(self, coded: Coded | None) -> _Place:
        assert coded is not None
        basis: Basis = coded.basis
        found = self._places.get(id(basis))
        if found is None:
            codes, errors = basis.encode(self._queries)
            found = self._places[id(basis)] = _Place(codes.astype(np.float32), centred(codes), errors)
        return found

    # Refining

    def _tighten(self) -> None:
        """Compares the candidates with the least bounds, which lowers the limits, and drops who is beyond."""
        with self._explanation.timed("refine"):
            self._lower_limits()
            found = self._in_reach()
            if self._k and len(found.row):
                found = self._compare_least(found, self._k + _SPARE)
            self._waiting = [found]
            self._waiting = [self._in_reach()]

    def _settle(self) -> None:
        """Compares every candidate that is left, nearest bounds first, until none is."""
        with self._explanation.timed("refine"):
            self._lower_limits()
            count = self._k + _SPARE if self._k else 2**20
            while len((found := self._in_reach()).row):
                self._waiting = [self._compare_least(found, count)]
                count *= 2
            self._waiting = []

    def _compare_least(self, found: _Found, count: int) -> _Found:
        """Compares the candidates with the least bounds, `count` of each query; returns the others."""
        first = _least(found.query, found.bound, count)
        self._compared.append(self._compare(found.query[first], found.row[first]))
        self._lower_limits()
        return found[~first]

    def _in_reach(self) -> _Found:
        """What waits and is not beyond the limits."""
        nothing = _Found(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
        return _joined([one[one.bound <= self._limit[one.query] * _CLOSE] for one in self._waiting], nothing)

    def _lower_limits(self, beside: _Compared | None = None) -> None:
        """Lowers limits by what was compared, or by something that is not kept; drops what is beyond them."""
        found = self._all_compared() if beside is None else beside
        if self._k:
            for query, places in _by_query(found.query):
                if len(places) >= self._k:
                    kth = np.partition(found.upper[places], self._k - 1)[self._k - 1]
                    self._limit[query] = min(self._limit[query], kth)
        if beside is None:
            self._compared = [found[found.lower <= self._limit[found.query] * _CLOSE]]

    def _all_compared(self) -> _Compared:
        if len(self._compared) != 1:
            nothing = _Compared(*(np.empty(0, kind) for kind in (np.int64, np.int64, float, float)))
            self._compared = [_joined(self._compared, nothing)]
        return self._compared[0]

    def _compare(self, query: NDArray[np.int64], row: Ids) -> _Compared:
        """Bounds of distances from float32 differences of whole vectors: closer than those of a product.

        Every term of the sum is off by a few units in its last place, so the sum is, by Higham's bound, off
        by at most g of itself.
        """
        narrow = np.empty(len(row), np.float32)
        self._in_blocks(query, row, partial(_squares_32, self._queries), _PAIRS, narrow)
        squares = narrow.astype(np.float64)
        self._count(candidates=len(row), bytes_read=len(row) * self._queries.shape[1] * 4)
        gamma, tiny = _gamma(self._queries.shape[1]), _tiny(self._queries.shape[1])
        lower = np.sqrt(np.maximum(squares - tiny, 0) / (1 + gamma)) / _CLOSE
        upper = np.sqrt((squares + tiny) / (1 - gamma)) * _CLOSE
        return self._kept(_Compared(query, row, lower, upper))

    def _kept(self, found: _Compared) -> _Compared:
        """Without those that are to be left out."""
        if self._exclude is None:
            return found
        return found[self._ids(found.row) != self._exclude[found.query]]

    def _in_blocks(
        self, query: NDArray[np.int64], row: Ids, work: "_Work", at_a_time: int, results: NDArray[Any]
    ) -> None:
        """What `work` makes of pairs of queries and rows, block by block, on every core where that pays."""
        alone = len(row) < _ALONE
        at_a_time = min(at_a_time, _FEW_PAIRS) if alone else at_a_time
        order = np.argsort(row, kind="stable")
        cuts = np.searchsorted(row[order], self._firsts)
        jobs = [
            (number, order[start : min(start + at_a_time, after)])
            for number, (before, after) in enumerate(pairwise(cuts))
            for start in range(before, after, at_a_time)
        ]

        def compute(some: Sequence[tuple[int, Ids]]) -> None:
            for number, places in some:
                matrix, first = self._blocks[number].matrix, self._firsts[number]
                results[places] = work(query[places], matrix, row[places] - first)

        if alone:
            compute(jobs)
        else:
            groups = np.array_split(np.arange(len(jobs)), min(len(jobs), 2 * usable_cores()))
            deque(_spread(compute, [[jobs[number] for number in group] for group in groups]), maxlen=0)

    def _numbers(self, row: Ids) -> Ids:
        """In which blocks rows are."""
        return np.asarray(np.searchsorted(self._firsts, row, side="right") - 1)

    def _ids(self, row: Ids) -> Ids:
        number = self._numbers(row)
        ids = np.empty(len(row), np.int64)
        for one in np.unique(number):
            mine = number == one
            ids[mine] = self._blocks[one].ids[row[mine] - self._firsts[one]]
        return ids

    def _answers(self) -> list[Answer]:
        """Computes the true distances of whoever is left, and puts them in order."""
        with self._explanation.timed("refine"):
            found = self._all_compared()
            query, row, ids = found.query, found.row, self._ids(found.row)
            squares = np.empty(len(row))
            self._in_blocks(query, row, partial(_squares_64, self._wide), _FEW_PAIRS, squares)
            order = np.lexsort((ids, squares, query))
            query, distances, ids = query[order], np.sqrt(squares[order]), ids[order]
            # Roots of different squares may be equal, and a radius is one of distances.
            stays = _rank(query) < self._k if self._k else distances <= self._limit[query]
            query, distances, ids = query[stays], distances[stays], ids[stays]
        cuts = np.searchsorted(query, np.arange(len(self._queries) + 1))
        return [(distances[a:b], ids[a:b]) for a, b in pairwise(cuts)]

    def _count(self, **numbers: int) -> None:
        with _COUNTING:
            for name, number in numbers.items():
                setattr(self._explanation, name, getattr(self._explanation, name) + number)


# Some pairs of queries and rows of a matrix -> squared distances.
_Work: TypeAlias = Callable[[NDArray[np.int64], NDArray[np.float32], Ids], NDArray[Any]]


def _squares_32(
    queries: NDArray[np.float32], query: NDArray[np.int64], matrix: NDArray[np.float32], row: Ids
) -> NDArray[np.float32]:
    """Sums of squared differences in float32, on the calling thread's core alone."""
    if len(row) <= _FEW_PAIRS:
        differences = matrix[row]
        differences -= queries[query]
        return np.asarray(np.einsum("ij,ij->i", differences, differences))
    squares = np.empty(len(row), np.float32)
    pointers = map(faiss.swig_ptr, (queries, query, matrix, row, squares))
    faiss.pairwise_indexed_L2sqr(queries.shape[1], len(row), *pointers)
    return squares


def _squares_64(wide: Floats, query: NDArray[np.int64], matrix: NDArray[np.float32], row: Ids) -> Floats:
    """The same in float64."""
    differences = matrix[row].astype(np.float64)
    differences -= wide[query]
    return np.asarray(np.einsum("ij,ij->i", differences, differences))


def _gamma(dimension: int) -> float:
    """By which share of the sum of their magnitudes a float32 sum of products may be off, in any order.

    Higham, Accuracy and Stability of Numerical Algorithms, 3.1: (d + c)u / (1 - (d + c)u), u = 2^-24.
    """
    terms = dimension + 16
    return terms * 2.0**-24 / (1 - terms * 2.0**-24)


def _tiny(dimension: int) -> float:
    """How much such a sum may lose to terms that are too small for float32."""
    return (dimension + 16) * 2.0**-126


def _bound(coded: Coded, squares: Floats, errors: Floats) -> Floats:
    """Lower bounds of distances from squared distances between codes."""
    # The factor covers the rounding of these few operations.
    reach = coded.basis.step * np.sqrt(np.maximum(squares, 0)) * (1 - 1e-12)
    return np.maximum(reach - (coded.error + errors) * (1 + 1e-12), 0)


def _squared_distances(queries: NDArray[np.float32], stored: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared distances (queries, rows) in float32, by FAISS on the calling thread's core alone.

    numpy's products would spread over every core by themselves, and where others compute too its threads
    wait for each other: the same product was measured at 0.4 and at 12 ms.
    """
    found = _buffer("squares", (len(queries), len(stored)))
    (n, d), rows = queries.shape, len(stored)
    pointers = [faiss.swig_ptr(array) for array in (found, queries, stored)]
    if n == 1:
        faiss.fvec_L2sqr_ny(*pointers, d, rows)
    else:
        faiss.pairwise_L2sqr(d, n, pointers[1], rows, pointers[2], pointers[0], -1, -1, -1)
    return found


def _at_most(squares: NDArray[np.float32], most: NDArray[np.float32]) -> tuple[Ids, Ids]:
    """Where a row of (n, m) has numbers of at most its own limit: rows and columns.

    Hardly any has, so eight answers are looked at in one, which is quicker than numpy's own search.
    """
    rows, columns = squares.shape
    answers = _buffer("answers", (rows, columns + -columns % 8), np.dtype(bool))
    answers[:, columns:] = False
    np.less_equal(squares, most[:, None], out=answers[:, :columns])
    (some,) = np.nonzero(answers.reshape(-1).view(np.uint64))
    flat = (8 * some[:, None] + np.arange(8)).ravel()
    flat = flat[answers.reshape(-1)[flat]]
    return np.divmod(flat, answers.shape[1])


_Rows = TypeVar("_Rows", _Found, _Compared)


def _joined(parts: Sequence[_Rows], nothing: _Rows) -> _Rows:
    """All of them in one."""
    if len(parts) == 1:
        return parts[0]
    columns = [[getattr(one, column.name) for one in (nothing, *parts)] for column in fields(nothing)]
    return type(nothing)(*map(np.concatenate, columns))


def _by_query(query: NDArray[np.int64]) -> Iterator[tuple[int, Ids]]:
    """The places of each query that is there."""
    # numpy sorts numbers of 16 bits by counting them.
    order = np.argsort(query.astype(np.uint16), kind="stable")
    ordered = query[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    for start, end in pairwise([*starts.tolist(), len(order)]):
        yield int(ordered[start]), order[start:end]


def _least(query: NDArray[np.int64], values: Floats, count: int) -> NDArray[np.bool_]:
    """Which are among the `count` least of their query."""
    chosen = np.zeros(len(query), bool)
    for _, places in _by_query(query):
        if len(places) > count:
            places = places[np.argpartition(values[places], count - 1)[:count]]
        chosen[places] = True
    return chosen


def _rank(query: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each among those of the same query, of a list that is sorted by query."""
    if not len(query):
        return query
    starts = np.flatnonzero(np.concatenate([[True], query[1:] != query[:-1]]))
    return np.arange(len(query)) - np.repeat(starts, np.diff(np.append(starts, len(query))))


# Cores side by side


_COUNTING: Final = threading.Lock()
_LOCAL: Final = threading.local()
_pool: ThreadPoolExecutor | None = None


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        # FAISS would start threads of its own in each of these.
        one = partial(faiss.omp_set_num_threads, 1)
        _pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix="faceprint-search", initializer=one)
    return _pool


def _forget_threads() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _spread(work: Callable[[Any], _T], items: Iterable[Any]) -> Iterator[_T]:
    """What `work` makes of items, in their order, some ahead of what is taken."""
    items = list(items)
    if len(items) < 2 or threading.current_thread().name.startswith("faceprint-search"):
        yield from map(work, items)
        return
    threads, waiting = _threads(), deque[Future[_T]]()
    try:
        for item in items:
            waiting.append(threads.submit(work, item))
            if len(waiting) > 2 * usable_cores():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # After an error nothing of it goes on behind the caller's back.
        for future in waiting:
            future.cancel()


def _buffer(name: str, shape: tuple[int, int], dtype: Any = np.dtype(np.float32)) -> NDArray[Any]:
    """Memory of this thread's own, the same each time: new memory costs more than what is done with it."""
    size = shape[0] * shape[1]
    kept = getattr(_LOCAL, name, None)
    if kept is None or kept.size < size or kept.size > max(2 * size, 2**24):
        kept = np.empty(size, dtype)
        setattr(_LOCAL, name, kept)
    return kept[:size].reshape(shape)
