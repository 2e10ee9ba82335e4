"""Direct search: a few queries in a small gallery, without the steps that pay off in a large one.

FAISS scans the codes of each block for the rows with the least squared distances of codes. All of these are
compared in float64. The others have codes no nearer than the last of them; if the lower bound of that exceeds
the k-th distance, the nearest are found.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from retrieval.index.blocks import Floats, Ids, Selection
from retrieval.index.candidates import QueryBatch
from retrieval.index.explanation import count
from retrieval.index.filter import Filter
from retrieval.index.kernels import FLOAT64_SLACK, pair_squares_float64
from retrieval.index.threads import in_this_thread

# With more queries a product costs less than a scan for each.
MAX_QUERIES: Final = 6

# Up to this many numbers are compared: more are worth a comparison in float32 first.
COMPARED_DIRECTLY: Final = 2**18


def answers(
    batch: QueryBatch, chosen: Sequence[Selection], filtering: Filter
) -> list[tuple[Floats, Ids]] | None:
    """Returns for each query its distances, ascending, and ids, ties by id; None where another search has to.

    Args:
        batch: queries for their nearest.
        chosen: all rows to search; they have codes.
        filtering: the filter of the batch.
    """
    numbers = filtering.rows_to_scan(chosen)
    compared, dimension = sum(numbers) * len(batch), batch.queries.shape[1]
    are_few = len(batch) <= MAX_QUERIES and compared * dimension <= COMPARED_DIRECTLY
    is_whole = all(one.rows is None for one in chosen)
    if not (are_few and is_whole and filtering.scans_alone(chosen)):
        return None
    count(batch.explanation, candidates=compared, bytes_read=compared * dimension * 4)
    found = []
    for query in range(len(batch)):
        answer = _answer(batch, query, chosen, numbers, filtering)
        if answer is None:
            return None
        found.append(answer)
    return found


def _answer(
    batch: QueryBatch, query: int, chosen: Sequence[Selection], numbers: Sequence[int], filtering: Filter
) -> tuple[Floats, Ids] | None:
    with batch.explanation.timed("filter"), in_this_thread():
        scans = [filtering.scan(one, query, rows) for one, rows in zip(chosen, numbers, strict=True)]
    with batch.explanation.timed("refine"):
        parts = [(one.block, rows) for one, (rows, _) in zip(chosen, scans, strict=True)]
        squares = np.concatenate(
            [pair_squares_float64(batch.exact, query, block.matrix, rows) for block, rows in parts]
        )
        ids = np.concatenate([block.ids[rows] for block, rows in parts])
        order = np.lexsort((ids, squares))
        if batch.exclude is not None:
            order = order[~np.isin(ids[order], batch.exclude[query])]
        order = order[: batch.k]
        distances = np.sqrt(squares[order])
    end = min(end for _, end in scans)
    if end < np.inf and (len(order) < batch.k or end <= distances[-1] * FLOAT64_SLACK):
        return None
    return distances, ids[order]
