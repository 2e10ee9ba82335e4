"""Filter: excludes rows by a lower bound on their distance.

The bound comes from codes (`quantization`) if a block has them and they exclude enough rows, else from a
float32 product with its vectors and a bound on the rounding of that product.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.index.blocks import Floats, Ids, Selection
from retrieval.index.candidates import (
    Bounded,
    Candidates,
    Near,
    QueryBatch,
    by_query,
    joined,
    no_candidates,
    nothing_near,
)
from retrieval.index.explanation import count
from retrieval.index.kernels import (
    DIRECT_QUERIES,
    FLOAT64_SLACK,
    at_least,
    at_most,
    pairwise_squares,
    relative_rounding,
    underflow,
)
from retrieval.index.products import products
from retrieval.index.quantization import CENTRE, Basis, Coded, centred
from retrieval.index.threads import in_this_thread, spread
from retrieval.system.cpu import usable_cores

# About so many rows with the lowest bounds are chosen first: for each neighbour, and for each query.
CHOSEN_PER_NEIGHBOUR: Final = 1.5
LEAST_CHOSEN: Final = 64

# Rows of a sample that tells how near these are: a share of all rows, and least and most. From this rank on,
# chance moves a sample's rows little.
_SAMPLE_SHARE: Final = 32
_SAMPLE_ROWS: Final = (512, 4096)
_SAMPLE_RANK: Final = 4

# Up to this number of queries FAISS scans codes, for at least so many rows of each block.
MAX_SCANNING_QUERIES: Final = 2
SCANNED_ROWS: Final = 24

# Up to so many bytes of codes are scanned in the calling thread: handing them over would take longer.
SCANNED_ALONE: Final = 2**21

# Up to so many products are computed in the calling thread, for the same reason.
_MULTIPLIED_ALONE: Final = 2**19

# The least number of rows of a block that are compared first, for an initial limit.
SEED_ROWS: Final = 1024

# If codes leave more than this share of rows, whole vectors are scanned instead: of several queries together,
# and of few, for which a scan costs more.
MAX_CANDIDATE_SHARE: Final = 1 / 16
MAX_CANDIDATE_SHARE_OF_FEW: Final = 1 / 4

# Up to this number of candidates is never replaced by a scan, however few rows the block has.
MIN_CANDIDATES: Final = 64

# Rows that may be held before those with the lowest bounds are chosen of them; or four times the wanted ones.
_MAX_HELD: Final = 1_000_000

# Products that are computed at a time: they stay in a core's cache.
_CACHED_PRODUCTS: Final = 2**18
_CHUNK_ROWS: Final = (256, 2**16)

# The largest limit of a squared distance, near the largest float32.
_MAX_SQUARE: Final = 3e38

# More than any squared distance between codes.
_NO_LIMIT: Final = 2**28


@dataclass(frozen=True)
class _Encoded:
    """Queries in a basis.

    The squared distance of a code x and a query's code y, both relative to the grid's centre, is
    |x|^2 + |y|^2 - 2xy. Products are of the bytes of x, so they exceed xy by 128 times the sum of y.

    Attributes:
        bytes: (n, m) float32, as FAISS takes them.
        codes: (m, n) int8, relative to the grid's centre.
        terms: (n,) int64, the part of the squared distance that depends on the query alone.
        errors: (n,) float64.
    """

    bytes: NDArray[np.float32]
    codes: NDArray[np.int8]
    terms: Ids
    errors: Floats


class Filter:
    """The filter for a batch of queries. `filtered` may be called by several threads at once."""

    def __init__(self, batch: QueryBatch) -> None:
        self._batch = batch
        self._encodings: dict[int, _Encoded] = {}
        # By selection, for each query: rows of codes up to this squared distance were returned by `best`.
        self._done: dict[int, Ids] = {}
        self._best: Candidates = no_candidates()

    # By codes

    def scans_alone(self, chosen: Sequence[Selection]) -> bool:
        """Returns whether FAISS is to scan the codes of selections in the calling thread."""
        return sum(len(one) * _coded(one).basis.coordinates for one in chosen) <= SCANNED_ALONE

    def rows_to_scan(self, chosen: Sequence[Selection]) -> list[int]:
        """Returns how many rows of each selection a scan returns: more of the larger ones."""
        sizes = list(map(len, chosen))
        every, enough = sum(sizes), 2 * self._batch.enough
        return [min(size, max(SCANNED_ROWS, -(-enough * size // every))) for size in sizes]

    def scan(self, selection: Selection, query: int, number: int) -> tuple[Ids, float]:
        """Returns so many rows of a whole block, with the least squared distances of codes to one query.

        With them comes a lower bound of the distances of all other rows.
        """
        coded = _coded(selection)
        encoded = self._encoded(coded.basis)
        squares, rows = np.empty(number, np.float32), np.empty(number, np.int64)
        coded.scan(encoded.bytes[query], squares, rows)
        self._count_codes(selection, 1)
        if number == len(selection):
            return rows, np.inf
        last, errors = squares[-1:].astype(np.float64), coded.error + encoded.errors[query]
        return rows, float(_lower_bound(coded.basis, last, errors)[0])

    def best(self, chosen: Sequence[Selection]) -> tuple[Candidates, Floats]:
        """Returns the rows with the lowest bounds of selections that have codes.

        With them, for each query (n,), comes a lower bound of the distances of all other rows.
        """
        wanted = self._number_to_choose(sum(map(len, chosen)))
        by_basis: dict[int, list[Selection]] = {}
        for selection in chosen:
            by_basis.setdefault(id(_coded(selection).basis), []).append(selection)
        found, ends = [nothing_near()], []
        for some in by_basis.values():
            few = len(self._batch) <= MAX_SCANNING_QUERIES
            whole = [one for one in some if few and one.rows is None]
            others = [one for one in some if not (few and one.rows is None)]
            found += [self._scanned(whole)] if whole else []
            found += [self._best_by_products(others, wanted)] if others else []
            ends.append(self._end(some))
        self._best = joined(found, nothing_near())
        return self._best, np.min(ends, axis=0)

    def _end(self, chosen: Sequence[Selection]) -> Floats:
        """Returns a lower bound (n,) of the distances of the rows that `best` left out, of one basis."""
        basis = _coded(chosen[0]).basis
        done = np.array([self._done[one.first] for one in chosen])
        errors = np.array([_coded(one).error for one in chosen])[:, None] + self._encoded(basis).errors
        ends = _lower_bound(basis, (done + 1).astype(np.float64), errors)
        return np.asarray(np.where(done >= _NO_LIMIT, np.inf, ends).min(axis=0))

    def _number_to_choose(self, rows: int) -> int:
        """Returns how many rows with the lowest bounds are chosen for each query, of so many."""
        enough, queries = self._batch.enough, len(self._batch)
        comparable = int(self._comparable(rows, queries)) // queries
        most = max(min(comparable, _MAX_HELD // queries), LEAST_CHOSEN) + enough
        return min(int(CHOSEN_PER_NEIGHBOUR * enough) + LEAST_CHOSEN, most)

    def _best_by_products(self, chosen: Sequence[Selection], wanted: int) -> Near:
        """Returns rows with the least squared distances of codes, of selections in one basis."""
        most = self._first_limits(chosen, wanted)
        held, size, limit = [nothing_near()], 0, max(_MAX_HELD, 4 * wanted * len(self._batch))
        work = partial(self._near, most=most)
        is_small = sum(map(len, chosen)) * len(self._batch) <= _MULTIPLIED_ALONE
        for found in map(work, chosen) if is_small else spread(work, chosen):
            held.append(found)
            size += len(found.row)
            if size > limit:
                held = [_least(joined(held, nothing_near()), most, wanted)]
                size = len(held[0].row)
        self._done |= {selection.first: most for selection in chosen}
        near = joined(held, nothing_near())
        return near[near.square <= most[near.query]]

    def _scanned(self, chosen: Sequence[Selection]) -> Near:
        """Returns rows with the least squared distances of codes of each of some whole blocks in one basis.

        FAISS scans codes for one query in half the time of a product.
        """
        wanted, codes = self.rows_to_scan(chosen), [_coded(one) for one in chosen]
        ends = np.cumsum(wanted)
        asked = self._encoded(codes[0].basis).bytes
        squares = np.empty((len(asked), ends[-1]), np.float32)
        rows = np.empty(squares.shape, np.int64)

        def scan(numbers: Sequence[int]) -> None:
            for number in numbers:
                part = slice(ends[number] - wanted[number], ends[number])
                for one in zip(asked, squares[:, part], rows[:, part], strict=True):
                    codes[number].scan(*one)

        numbers = np.arange(len(chosen))
        if self.scans_alone(chosen):
            with in_this_thread():
                scan(numbers.tolist())
        else:
            parts = [part.tolist() for part in np.array_split(numbers, 4 * usable_cores())]
            deque(spread(scan, parts), maxlen=0)
        # FAISS may have left out rows as near as the last one, unless it found all.
        done = squares[:, ends - 1].astype(np.int64) - 1
        done[:, [len(one) == rows for one, rows in zip(chosen, wanted, strict=True)]] = _NO_LIMIT
        firsts = [one.first for one in chosen]
        self._done |= zip(firsts, done.T, strict=True)
        scanned = sum(map(len, chosen))
        self._count(coded_rows=scanned * len(asked), bytes_read=scanned * codes[0].basis.coordinates)
        some = np.nonzero(squares <= np.repeat(done, wanted, axis=1))
        query, block = some[0], np.repeat(numbers, wanted)[some[1]]
        errors = np.array([one.error for one in codes])
        return self._bounded_near(
            codes[0].basis,
            errors[block],
            query,
            rows[some] + np.array(firsts)[block],
            squares[some].astype(np.int64),
        )

    def _first_limits(self, chosen: Sequence[Selection], wanted: int) -> Ids:
        """Returns for each query (n,) a squared distance of codes that about the wanted rows do not exceed.

        It is that of the nearest ones of a sample of all rows.
        """
        every, (least, most) = sum(map(len, chosen)), _SAMPLE_ROWS
        size = min(max(every // _SAMPLE_SHARE, least), most)
        rank = math.ceil(1.5 * wanted * size / every) + _SAMPLE_RANK
        if rank >= size:
            return np.full(len(self._batch), _NO_LIMIT, np.int64)
        ends = np.cumsum([len(selection) for selection in chosen])
        places = _sample(every, size)
        parts = zip(chosen, np.split(places, np.searchsorted(places, ends[:-1])), ends, strict=True)
        codes, lengths = [], []
        for selection, mine, end in parts:
            rows = mine - (end - len(selection))
            rows = rows if selection.rows is None else selection.rows[rows]
            codes.append(_coded(selection).codes[rows])
            lengths.append(_coded(selection).lengths[rows])
        encoded = self._encoded(_coded(chosen[0]).basis)
        squares = np.concatenate(lengths)[:, None] - 2 * products(np.concatenate(codes), encoded.codes)
        nearest = np.partition(np.ascontiguousarray(squares.T), rank - 1, axis=1)[:, rank - 1]
        return np.asarray(nearest + encoded.terms)

    def is_cheaper_to_scan(self, pairs: int, chosen: Sequence[Selection]) -> bool:
        """Returns whether scanning whole vectors of selections costs less than comparing so many pairs."""
        return pairs > self._comparable(sum(map(len, chosen)), len(self._batch))

    def _comparable(self, rows: int, queries: int) -> float:
        """Returns how many pairs are compared at most; where more are left, all vectors are scanned."""
        share = MAX_CANDIDATE_SHARE_OF_FEW if queries <= DIRECT_QUERIES else MAX_CANDIDATE_SHARE
        return max(share * rows * queries, MIN_CANDIDATES)

    def filtered(self, selection: Selection) -> Candidates | Bounded:
        """Returns the rows of a selection that the bound does not exclude, without those of `best`."""
        coded = selection.block.coded
        if coded is None:
            return self.scanned(selection)
        encoded = self._encoded(coded.basis)
        reach = (self._batch.limit * FLOAT64_SLACK + coded.error + encoded.errors) / coded.basis.step
        # Squared distances between codes are whole numbers, and the second value is their maximum.
        most = np.minimum(reach**2 * (1 + 1e-9) + 1, 256.0**2 * coded.basis.coordinates).astype(np.int64)
        done = self._done.get(selection.first, np.full(len(most), -1))
        queries = np.flatnonzero(most > done)
        if not len(queries):
            return no_candidates()
        parts, size = [nothing_near()], 0
        for found in self._chunks(selection, queries, most):
            parts.append(found[found.square > done[found.query]])
            size += len(parts[-1].row)
            if size > self._comparable(len(selection), len(queries)):
                scan = self._by_scan(selection, queries)
                known = _pairs(self._best.query, self._best.row)
                return scan[np.isin(_pairs(scan.query, scan.row), known, invert=True)]
        return joined(parts, nothing_near())

    def scanned(self, selection: Selection) -> Bounded:
        """Returns the rows of a selection that a comparison of whole vectors does not exclude."""
        return self._by_scan(selection, np.arange(len(self._batch)))

    def _near(self, selection: Selection, *, most: Ids) -> Near:
        """Returns the rows with squared distances of codes up to each query's limit (n,)."""
        every = np.arange(len(self._batch))
        return joined([nothing_near(), *self._chunks(selection, every, most)], nothing_near())

    def _chunks(self, selection: Selection, queries: Ids, most: Ids) -> Iterator[Near]:
        """Yields the rows of some queries with squared distances of codes up to a limit.

        Args:
            selection: rows that have codes.
            queries: the queries, ascending.
            most: (n,) the limit of each query of the batch; it may fall meanwhile.
        """
        coded = _coded(selection)
        encoded, lengths = self._encoded(coded.basis), coded.lengths
        columns = encoded.codes
        if len(queries) < len(self._batch):
            columns = np.ascontiguousarray(columns[:, queries])
        terms = encoded.terms[queries]
        least, largest = _CHUNK_ROWS
        step = min(max(_CACHED_PRODUCTS // len(queries), least), largest)
        self._count_codes(selection, len(queries))
        for start in range(0, len(selection), step):
            chunk = slice(start, start + step)
            rows: Any = chunk if selection.rows is None else selection.rows[chunk]
            found, squared = products(coded.codes[rows], columns), lengths[rows]
            halves, limits = squared >> 1, most[queries]
            # |x|^2 + term - 2 xy <= limit, up to the last bit of |x|^2, which is looked at below.
            found -= halves[:, None]
            row, column = at_least(found, (terms - limits + 1) >> 1)
            if not len(row):
                continue
            product = found[row, column].astype(np.int64) + halves[row]
            square = squared[row] + terms[column] - 2 * product
            stays = square <= limits[column]
            query, row, square = queries[column[stays]], row[stays] + start, square[stays]
            yield self._bounded_near(coded.basis, coded.error, query, selection.numbers(row), square)

    def _bounded_near(
        self, basis: Basis, errors: Floats | float, query: NDArray[np.int64], row: Ids, square: Ids
    ) -> Near:
        """Returns pairs (p,) with bounds, from their squared distances and the errors of the rows' codes."""
        both = errors + self._encoded(basis).errors[query]
        return Near(query, row, _lower_bound(basis, square.astype(np.float64), both), square)

    def _count_codes(self, selection: Selection, queries: int) -> None:
        coordinates = _coded(selection).basis.coordinates
        self._count(coded_rows=len(selection) * queries, bytes_read=len(selection) * coordinates)

    def _encoded(self, basis: Basis) -> _Encoded:
        found = self._encodings.get(id(basis))
        if found is None:
            codes, errors = basis.encode(self._batch.queries)
            moved = centred(codes)
            terms = np.einsum("ij,ij->i", moved, moved) + 2 * CENTRE * moved.sum(axis=1)
            columns = np.ascontiguousarray(moved.T.astype(np.int8))
            found = _Encoded(codes.astype(np.float32), columns, terms.astype(np.int64), errors)
            self._encodings[id(basis)] = found
        return found

    # By whole vectors

    def _by_scan(self, selection: Selection, queries: Ids) -> Bounded:
        batch, squares = self._batch, self._vector_squares(selection, queries)
        limit = batch.limit[queries]
        if batch.k and np.isinf(limit).any():
            some = squares[:, : max(SEED_ROWS, 4 * batch.enough)]
            limit = np.minimum(limit, self._kth_limit(some, queries))
        limit = limit * FLOAT64_SLACK
        # A row within the limit is no longer than the query and the limit together.
        slack = self._rounding(queries, batch.lengths[queries] + limit)
        most = np.minimum(limit**2 + slack, _MAX_SQUARE)
        query, row = at_most(squares, np.nextafter(most.astype(np.float32), np.float32(np.inf)))
        found = squares[query, row].astype(np.float64)
        lower = np.zeros(len(row))
        known = np.isfinite(slack[query])
        lower[known] = np.sqrt(np.maximum(found[known] - slack[query][known], 0))
        query, row = queries[query], selection.numbers(row)
        return Bounded(query, row, lower, self._upper_bound(found, query))

    def _vector_squares(self, selection: Selection, queries: Ids) -> NDArray[np.float32]:
        """Returns squared distances (queries, rows) in float32, with errors of at most `_rounding`."""
        block = selection.block
        matrix = block.matrix if selection.rows is None else block.matrix[selection.rows]
        self._count(scanned_rows=len(selection) * len(queries), bytes_read=matrix.nbytes)
        every = len(queries) == len(self._batch)
        return pairwise_squares(self._batch.queries if every else self._batch.queries[queries], matrix)

    def _kth_limit(self, squares: NDArray[np.float32], queries: Ids) -> Floats:
        """Returns a limit for each query from float32 squared distances (queries, rows) to different rows."""
        enough = self._batch.enough
        if squares.shape[1] < enough:
            return np.full(len(squares), np.inf)
        kth = np.partition(squares, enough - 1, axis=1)[:, enough - 1]
        return self._upper_bound(kth.astype(np.float64), queries)

    def _upper_bound(self, squares: Floats, query: NDArray[np.int64]) -> Floats:
        """Returns upper bounds of distances (n,) from the result of `_vector_squares`.

        With t the distance, D its float32 square and q the query's length, |x| <= q + t, and by `_rounding`
        t^2 <= D + g(2q + t)^2. So t <= sqrt(D) + sqrt(g)(2q + t), which bounds t by some T; and again,
        t^2 <= D + g(2q + T)^2.
        """
        dimension = self._batch.queries.shape[1]
        length, gamma = self._batch.lengths[query], relative_rounding(dimension)
        squares = np.maximum(squares, 0) + underflow(dimension)
        most = (np.sqrt(squares) + 2 * np.sqrt(gamma) * length) / (1 - np.sqrt(gamma))
        return np.asarray(np.sqrt(squares + gamma * (2 * length + most) ** 2) * FLOAT64_SLACK)

    def _rounding(self, queries: Ids, lengths: Floats) -> Floats:
        """Returns the error bound of FAISS's float32 square of a distance, for |x| up to `lengths` (n,).

        FAISS sums either (q - x)^2 or |q|^2 + |x|^2 - 2qx; the magnitudes of both are at most (|q| + |x|)^2.
        """
        dimension = self._batch.queries.shape[1]
        magnitude = (self._batch.lengths[queries] + lengths) ** 2
        return np.asarray(relative_rounding(dimension) * magnitude + underflow(dimension))

    def _count(self, **numbers: int) -> None:
        count(self._batch.explanation, **numbers)


@lru_cache(maxsize=16)
def _sample(rows: int, size: int) -> Ids:
    """Returns row numbers (size,) drawn from so many rows, ascending; always the same."""
    return np.sort(np.random.default_rng(0).integers(0, rows, size))


def _coded(selection: Selection) -> Coded:
    coded = selection.block.coded
    assert coded is not None
    return coded


def _least(found: Near, most: Ids, wanted: int) -> Near:
    """Returns the rows with the `wanted` least squares of each query, and lowers the limits to them.

    Of more rows with the square at the limit than are wanted, none is returned.
    """
    for query, places in by_query(found.query):
        if len(places) > wanted:
            squares = found.square[places]
            limit = int(np.partition(squares, wanted - 1)[wanted - 1])
            is_crowded = int(np.count_nonzero(squares == limit)) > wanted
            # Threads may have found rows by an earlier limit, which must not come back.
            most[query] = min(int(most[query]), limit - 1 if is_crowded else limit)
    return found[found.square <= most[found.query]]


def _pairs(query: NDArray[np.int64], row: Ids) -> Ids:
    """Returns one number for each pair (p,) of a query and a row."""
    return np.asarray((query << 48) + row)


def _lower_bound(basis: Basis, squares: Floats, errors: Floats | float) -> Floats:
    """Returns lower bounds of distances from squared distances between codes, and the errors of both."""
    # The factors cover the rounding of these few operations.
    reach = basis.step * np.sqrt(np.maximum(squares, 0)) * (1 - 1e-12)
    return np.maximum(reach - errors * (1 + 1e-12), 0)
