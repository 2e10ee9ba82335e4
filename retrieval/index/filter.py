"""Filter: excludes rows by a lower bound on their distance.

The bound comes from codes (`quantization`) if a block has them and they exclude enough rows, else from a
float32 product with its vectors and a bound on the rounding of that product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from retrieval.index.blocks import Floats, Ids, Selection
from retrieval.index.candidates import Bounded, Candidates, QueryBatch
from retrieval.index.explanation import count
from retrieval.index.kernels import FLOAT64_SLACK, at_most, pairwise_squares, relative_rounding, underflow
from retrieval.index.quantization import Basis, Coded, centred
from retrieval.index.threads import buffer, spread

# The least number of rows that FAISS proposes for each block by their codes.
MIN_PROPOSALS: Final = 24

# The least number of rows of a block that are compared first, for an initial limit.
SEED_ROWS: Final = 1024

# If codes leave more than this share of a block's rows, its whole vectors are scanned instead.
MAX_CANDIDATE_SHARE: Final = 1 / 16

# Up to this number of candidates is never replaced by a scan, however few rows the block has.
MIN_CANDIDATES: Final = 64

# The largest limit of a squared distance, near the largest float32.
_MAX_SQUARE: Final = 3e38


@dataclass(frozen=True)
class _Encoded:
    """Queries in a basis: codes (n, m) as float32, the same codes centred, and errors (n,)."""

    codes: NDArray[np.float32]
    centred: NDArray[np.float32]
    errors: Floats


class Filter:
    """The filter for a batch of queries. `filtered` may be called by several threads at once."""

    def __init__(self, batch: QueryBatch) -> None:
        self._batch = batch
        self._encodings: dict[int, _Encoded] = {}

    def proposals(self, chosen: Sequence[Selection]) -> list[tuple[Candidates, Floats]]:
        """Returns for each whole coded block the rows with the lowest bounds, as FAISS finds them.

        With them, for each query (n,), comes a lower bound of all other rows of the block.
        """
        for selection in chosen:
            assert selection.block.coded is not None
            self._encoded(selection.block.coded)
        wanted = max(MIN_PROPOSALS, -(-2 * self._batch.k // len(chosen)))
        return list(spread(partial(self._proposals, wanted=wanted), chosen))

    def seeds(self, selection: Selection) -> tuple[NDArray[np.int64], Ids] | None:
        """Returns pairs of queries and near rows from the start of a block; None if it lacks codes."""
        enough = self._batch.enough
        beginning = selection.beginning(max(SEED_ROWS, 4 * enough))
        coded = beginning.block.coded
        if coded is None or len(beginning) < enough:
            return None
        squares = self._code_squares(beginning, coded)
        best = np.argpartition(squares, enough - 1, axis=1)[:, :enough]
        return np.repeat(np.arange(len(best)), enough), beginning.numbers(best.ravel())

    def filtered(self, selection: Selection) -> Candidates | Bounded:
        """Returns the rows of a selection that the bound does not exclude."""
        coded = selection.block.coded
        if coded is not None:
            found = self._by_codes(selection, coded)
            if len(found.row) <= max(MAX_CANDIDATE_SHARE * len(selection) * len(self._batch), MIN_CANDIDATES):
                return found
        return self._by_scan(selection)

    # By codes

    def _proposals(self, selection: Selection, *, wanted: int) -> tuple[Candidates, Floats]:
        coded = selection.block.coded
        assert coded is not None
        encoded = self._encoded(coded)
        wanted = min(wanted, len(selection))
        squares, rows = coded.index.search(encoded.codes, wanted)
        self._count(coded_rows=len(selection) * len(self._batch), bytes_read=coded.codes.nbytes)
        bounds = _lower_bound(coded, squares.astype(np.float64), encoded.errors[:, None])
        ends = bounds[:, -1].copy() if wanted < len(selection) else np.full(len(bounds), np.inf)
        query = np.repeat(np.arange(len(bounds)), wanted)
        return Candidates(query, selection.numbers(rows.ravel()), bounds.ravel()), ends

    def _by_codes(self, selection: Selection, coded: Coded) -> Candidates:
        encoded = self._encoded(coded)
        squares = self._code_squares(selection, coded)
        reach = (self._batch.limit * FLOAT64_SLACK + coded.error + encoded.errors) / coded.basis.step
        # Squared distances between codes are whole numbers, and the second value is their maximum.
        most = np.minimum(reach**2 * (1 + 1e-9) + 1, 256.0**2 * coded.basis.coordinates)
        query, row = at_most(squares, np.floor(most).astype(np.float32))
        bounds = _lower_bound(coded, squares[query, row].astype(np.float64), encoded.errors[query])
        return Candidates(query, selection.numbers(row), bounds)

    def _code_squares(self, selection: Selection, coded: Coded) -> NDArray[np.float32]:
        """Returns exact squared distances (queries, rows) between codes."""
        rows, coordinates = len(selection), coded.basis.coordinates
        stored = buffer("codes", (rows, coordinates))
        coded.centred(slice(None) if selection.rows is None else selection.rows, stored)
        self._count(coded_rows=rows * len(self._batch), bytes_read=rows * coordinates)
        return pairwise_squares(self._encoded(coded).centred, stored)

    def _encoded(self, coded: Coded) -> _Encoded:
        basis: Basis = coded.basis
        found = self._encodings.get(id(basis))
        if found is None:
            codes, errors = basis.encode(self._batch.queries)
            found = self._encodings[id(basis)] = _Encoded(codes.astype(np.float32), centred(codes), errors)
        return found

    # By whole vectors

    def _by_scan(self, selection: Selection) -> Bounded:
        batch, squares = self._batch, self._vector_squares(selection)
        limit = batch.limit
        if batch.k and np.isinf(limit).any():
            limit = np.minimum(limit, self._kth_limit(squares[:, : max(SEED_ROWS, 4 * batch.enough)]))
        limit = limit * FLOAT64_SLACK
        # A row within the limit is no longer than the query and the limit together.
        slack = self._rounding(batch.lengths + limit)
        most = np.minimum(limit**2 + slack, _MAX_SQUARE)
        query, row = at_most(squares, np.nextafter(most.astype(np.float32), np.float32(np.inf)))
        found = squares[query, row].astype(np.float64)
        lower = np.zeros(len(row))
        known = np.isfinite(slack[query])
        lower[known] = np.sqrt(np.maximum(found[known] - slack[query][known], 0))
        return Bounded(query, selection.numbers(row), lower, self._upper_bound(found, query))

    def _vector_squares(self, selection: Selection) -> NDArray[np.float32]:
        """Returns squared distances (queries, rows) in float32, with errors of at most `_rounding`."""
        block = selection.block
        matrix = block.matrix if selection.rows is None else block.matrix[selection.rows]
        self._count(scanned_rows=len(selection) * len(self._batch), bytes_read=matrix.nbytes)
        return pairwise_squares(self._batch.queries, matrix)

    def _kth_limit(self, squares: NDArray[np.float32]) -> Floats:
        """Returns a limit for each query from float32 squared distances (queries, rows) to different rows."""
        enough = self._batch.enough
        if squares.shape[1] < enough:
            return np.full(len(squares), np.inf)
        kth = np.partition(squares, enough - 1, axis=1)[:, enough - 1]
        return self._upper_bound(kth.astype(np.float64), np.arange(len(kth)))

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

    def _rounding(self, lengths: Floats) -> Floats:
        """Returns the error bound of FAISS's float32 square of a distance, for |x| up to `lengths`.

        FAISS sums either (q - x)^2 or |q|^2 + |x|^2 - 2qx; the magnitudes of both are at most (|q| + |x|)^2.
        """
        dimension = self._batch.queries.shape[1]
        magnitude = (self._batch.lengths + lengths) ** 2
        return np.asarray(relative_rounding(dimension) * magnitude + underflow(dimension))

    def _count(self, **numbers: int) -> None:
        count(self._batch.explanation, **numbers)


def _lower_bound(coded: Coded, squares: Floats, errors: Floats) -> Floats:
    """Returns lower bounds of distances from squared distances between codes."""
    # The factors cover the rounding of these few operations.
    reach = coded.basis.step * np.sqrt(np.maximum(squares, 0)) * (1 - 1e-12)
    return np.maximum(reach - (coded.error + errors) * (1 + 1e-12), 0)
