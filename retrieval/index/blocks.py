"""Blocks: the rows of a search, and their numbering across all blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from retrieval.index.quantization import Coded

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Rows that are searched together: a segment.

    Attributes:
        ids: (n,) int64.
        matrix: (n, d) float32, C order.
        coded: their codes; None without codes.
    """

    ids: Ids
    matrix: NDArray[np.float32]
    coded: Coded | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Selection:
    """A block, its allowed rows (None is all), and the number of its first row among all rows."""

    __slots__ = ("_size", "block", "first", "rows")

    def __init__(self, block: Block, rows: Ids | None, first: int) -> None:
        self.block, self.rows, self.first = block, rows, first
        self._size = len(block.ids) if rows is None else len(rows)

    def __len__(self) -> int:
        return self._size

    def numbers(self, rows: Ids) -> Ids:
        """Returns the numbers, among all rows of all blocks, of rows of this selection."""
        return (rows if self.rows is None else self.rows[rows]) + self.first


def selections(blocks: Sequence[Block], allowed: Ids | None) -> Iterator[Selection]:
    """Yields the allowed rows of each block, the largest selection first, without empty ones."""
    first, found = 0, []
    for block in blocks:
        rows = None
        if allowed is not None:
            place = np.searchsorted(allowed, block.ids)
            place[place == len(allowed)] = 0
            rows = np.flatnonzero(allowed[place] == block.ids) if len(allowed) else np.empty(0, np.int64)
        found.append(Selection(block, rows, first))
        first += len(block.ids)
    yield from sorted((one for one in found if len(one)), key=len, reverse=True)


class Numbering:
    """The numbers of all rows of the blocks: block i begins at `firsts[i]`; the last entry is the total."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self.firsts: Ids = np.cumsum([0] + [len(block) for block in blocks])

    def ids(self, row: Ids) -> Ids:
        """Returns the ids of rows (n,)."""
        number = np.searchsorted(self.firsts, row, side="right") - 1
        ids = np.empty(len(row), np.int64)
        # Not numpy's `unique`: its first call imports masked arrays, which take some 20 ms.
        for one in np.flatnonzero(np.bincount(number)).tolist():
            mine = number == one
            ids[mine] = self.blocks[one].ids[row[mine] - self.firsts[one]]
        return ids
