"""k-NN: the nearest stored vectors to each query, exactly those of a float64 brute force, much sooner.

Filter and refine (Faloutsos et al. 1994; Seidl and Kriegel, Optimal multi-step k-nearest neighbor search,
SIGMOD 1998): a lower bound on each distance comes from codes (`retrieval.codes`), or, where a block has none,
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
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Final, TypeAlias, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.codes import Basis, Coded, centred

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

# How many distances are computed at a time: their differences stay in a core's cache.
_AT_A_TIME: Final = 64

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
        candidates: distances computed in float64.
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
    """Candidates: whose, which row among all, and the lower bound of their distance."""

    query: NDArray[np.int64]
    row: Ids
    bound: Floats


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
    """Some queries on their way to their answers."""

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
        self._waiting: list[_Found] = []
        self._exact = (np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))  # query, square, row

    def nearest(self, k: int) -> list[Answer]:
        self._k = k
        with self._explanation.timed("filter"):
            rest = self._propose() if len(self._queries) <= _FEW else list(self._parts)
        if rest and not np.isfinite(self._limit).any():
            self._seed(rest)
        self._go_through(rest)
        self._settle()
        return self._answers()

    def within(self, radius: float) -> list[Answer]:
        self._limit[:] = min(radius, _FARTHEST)
        self._go_through(self._parts)
        self._settle()
        return self._answers()

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
        last = {}
        for part, (found, ends) in zip(ready, proposals, strict=True):
            self._waiting.append(found)
            last[part.first] = ends
        self._tighten()
        limit = self._limit * _CLOSE
        done = {part.first for part in ready if (last[part.first] > limit).all()}
        return [part for part in self._parts if part.first not in done]

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

    def _seed(self, parts: Sequence[_Part]) -> None:
        """Finds some limit for every query from the first rows, so that few rows of the rest have to wait."""
        enough = 0
        rows: list[_Found] = []
        with self._explanation.timed("filter"):
            for whole in parts:
                part = whole.beginning(max(_SEED, 4 * self._k))
                coded = part.block.coded
                squares = self._vector_squares(part) if coded is None else self._code_squares(part, coded)
                count = min(self._k + (self._exclude is not None), len(part))
                best = np.argpartition(squares, count - 1, axis=1)[:, :count]
                query = np.repeat(np.arange(len(best)), count)
                rows.append(_Found(query, part.numbers(best.ravel()), np.zeros(best.size)))
                enough += count
                if enough >= self._k + (self._exclude is not None):
                    break
        with self._explanation.timed("refine"):
            for found in rows:
                self._look(found.query, found.row)
            self._keep_the_best()

    def _go_through(self, parts: Sequence[_Part]) -> None:
        """Filters parts side by side; the limits fall meanwhile."""
        seen, next_look, waiting = 0, 1, 0
        with self._explanation.timed("filter"):
            for found in _spread(self._filtered, parts):
                self._waiting.append(found)
                waiting += len(found.row)
                seen += 1
                if seen >= next_look or waiting > _WAITING:
                    self._tighten()
                    next_look = 4 * seen
                    waiting = sum(len(one.row) for one in self._waiting)
                    if waiting > _WAITING // 2:
                        self._settle()
                        waiting = 0

    def _filtered(self, part: _Part) -> _Found:
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

    def _by_scan(self, part: _Part) -> _Found:
        squares = self._vector_squares(part)
        limit = self._limit * _CLOSE
        # A row within the limit is no longer than the query and the limit together.
        slack = self._rounding(self._lengths + limit)
        most = np.minimum(limit**2 + slack, 3e38)  # above any square there can be
        query, row = _at_most(squares, np.nextafter(most.astype(np.float32), np.float32(np.inf)))
        bounds = np.zeros(len(row))
        known = np.isfinite(slack[query])
        bounds[known] = np.sqrt(np.maximum(squares[query, row][known] - slack[query][known], 0))
        return _Found(query, part.numbers(row), bounds)

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

        Higham, Accuracy and Stability of Numerical Algorithms, 3.1: a sum of d products in any order is off
        by at most g = (d + c)u / (1 - (d + c)u) of the sum of their magnitudes, u = 2^-24. FAISS sums either
        (q - x)^2 or |q|^2 + |x|^2 - 2qx; the magnitudes of both are at most (|q| + |x|)^2. The last term
        covers squares too small for float32.
        """
        terms = self._queries.shape[1] + 16
        gamma = terms * 2.0**-24 / (1 - terms * 2.0**-24)
        return np.asarray(gamma * (self._lengths + lengths) ** 2 + terms * 2.0**-126)

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
        """Looks at the candidates with the least bounds, which lowers the limits, and drops who is beyond."""
        found = self._candidates()
        if not self._k or not len(found.row):
            self._waiting = [found]
            return
        first = _rank(found.query) < self._k + _SPARE
        with self._explanation.timed("refine"):
            self._look(found.query[first], found.row[first])
            self._keep_the_best()
        rest = ~first
        self._waiting = [_Found(found.query[rest], found.row[rest], found.bound[rest])]
        self._waiting = [self._candidates()]

    def _settle(self) -> None:
        """Looks at every candidate that is left, nearest bounds first, until none is."""
        with self._explanation.timed("refine"):
            count = self._k + _SPARE if self._k else 4096
            while len((found := self._candidates()).row):
                first = _rank(found.query) < count
                self._look(found.query[first], found.row[first])
                self._keep_the_best()
                rest = ~first
                self._waiting = [_Found(found.query[rest], found.row[rest], found.bound[rest])]
                count *= 2
            self._waiting = []

    def _candidates(self) -> _Found:
        """What waits and is not beyond the limits: each row once, by query and bound."""
        query = np.concatenate([one.query for one in self._waiting] or [np.empty(0, np.int64)])
        row = np.concatenate([one.row for one in self._waiting] or [np.empty(0, np.int64)])
        bound = np.concatenate([one.bound for one in self._waiting] or [np.empty(0)])
        within_reach = bound <= self._limit[query] * _CLOSE
        query, row, bound = query[within_reach], row[within_reach], bound[within_reach]
        order = np.lexsort((bound, query))
        return _Found(query[order], row[order], bound[order])

    def _look(self, query: NDArray[np.int64], row: Ids) -> None:
        """Computes true squared distances."""
        if not len(row):
            return
        squares = self._squares(query, row)
        self._count(candidates=len(row), bytes_read=len(row) * self._queries.shape[1] * 4)
        known_query, known_squares, known_row = self._exact
        self._exact = (
            np.concatenate([known_query, query]),
            np.concatenate([known_squares, squares]),
            np.concatenate([known_row, row]),
        )

    def _keep_the_best(self) -> None:
        """Of the rows that were looked at, the k nearest to each query: each once, by distance and id."""
        query, square, row = self._exact
        ids = self._ids(row)
        if self._exclude is not None:
            stays = ids != self._exclude[query]
            query, square, row, ids = query[stays], square[stays], row[stays], ids[stays]
        order = np.lexsort((ids, square, query))
        query, square, row = query[order], square[order], row[order]
        # A row may have been found twice, by two kernels; its distance is the same.
        new = np.ones(len(row), bool)
        new[1:] = (row[1:] != row[:-1]) | (query[1:] != query[:-1])
        query, square, row = query[new], square[new], row[new]
        if self._k:
            rank = _rank(query)
            kth = rank == self._k - 1
            self._limit[query[kth]] = np.sqrt(square[kth])
            best = rank < self._k
            query, square, row = query[best], square[best], row[best]
        self._exact = query, square, row

    def _squares(self, query: NDArray[np.int64], row: Ids) -> Floats:
        squares = np.empty(len(row))
        order = np.argsort(row, kind="stable")
        cuts = np.searchsorted(row[order], self._firsts)
        jobs = [
            (self._blocks[number], order[start : min(start + _AT_A_TIME, after)], self._firsts[number])
            for number, (before, after) in enumerate(pairwise(cuts))
            for start in range(before, after, _AT_A_TIME)
        ]

        def compute(some: Sequence[tuple[Block, Ids, int]]) -> None:
            for block, places, first in some:
                wide = self._wide[0] if len(self._wide) == 1 else self._wide[query[places]]
                differences = block.matrix[row[places] - first] - wide
                squares[places] = np.einsum("ij,ij->i", differences, differences)

        if len(row) < 2 * _AT_A_TIME:
            compute(jobs)
        else:
            groups = np.array_split(np.arange(len(jobs)), min(len(jobs), 2 * _cores()))
            deque(_spread(compute, [[jobs[number] for number in group] for group in groups]), maxlen=0)
        return squares

    def _ids(self, row: Ids) -> Ids:
        number = np.searchsorted(self._firsts, row, side="right") - 1
        ids = np.empty(len(row), np.int64)
        for one in np.unique(number):
            mine = number == one
            ids[mine] = self._blocks[one].ids[row[mine] - self._firsts[one]]
        return ids

    def _answers(self) -> list[Answer]:
        query, square, row = self._exact
        distances, ids = np.sqrt(square), self._ids(row)
        if not self._k:
            # Roots of different squares may be equal, and the limit is one of distances.
            stays = distances <= self._limit[query]
            query, distances, ids = query[stays], distances[stays], ids[stays]
        cuts = np.searchsorted(query, np.arange(len(self._queries) + 1))
        return [(distances[a:b], ids[a:b]) for a, b in pairwise(cuts)]

    def _count(self, **numbers: int) -> None:
        with _COUNTING:
            for name, number in numbers.items():
                setattr(self._explanation, name, getattr(self._explanation, name) + number)


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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        # FAISS would start threads of its own in each of these.
        one = partial(faiss.omp_set_num_threads, 1)
        _pool = ThreadPoolExecutor(_cores(), thread_name_prefix="faceprint-search", initializer=one)
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
            if len(waiting) > 2 * _cores():
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
