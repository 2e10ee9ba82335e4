"""Near duplicates: copies of one photograph, found by their content, in any size or file format.

The print of a picture is a perceptual hash of 64 bits, from its lowest frequencies (the "pHash" of C. Zauner,
Implementation and Benchmarking of Perceptual Image Hash Functions, 2010). Prints exclude nearly every pair;
the others are compared by the correlation of the two pictures at 32 x 32 pixels. docs/check.md says how the
limits were chosen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

SIDE: Final = 32

# The largest Hamming distance of two prints, in bits, and the least correlation of two copies.
MAX_PRINT_DISTANCE: Final = 8
MIN_CORRELATION: Final = 0.97

# Below this standard deviation, in levels, a picture is flat: it has no content to compare.
FLAT: Final = 10.0

_FREQUENCIES: Final = 8
# The number of pictures that are compared with all others at a time.
QUERY_BLOCK: Final = 128

Grey: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """A pair of near duplicates: rows, first < second, and their correlation."""

    first: int
    second: int
    correlation: float


def _frequencies() -> NDArray[np.float64]:
    """Returns the lowest 8 rows of the discrete cosine transform of 32 values, (8, 32) float64."""
    steps = np.arange(SIDE)
    return np.asarray(np.cos(np.pi * (2 * steps[None, :] + 1) * steps[:_FREQUENCIES, None] / (2 * SIDE)))


def prints(grey: Grey) -> NDArray[np.uint8]:
    """Returns the prints of pictures (n, 32, 32): 64 bits each, (n, 8) uint8."""
    low = _frequencies()
    found = np.empty((len(grey), 8), np.uint8)
    for start in range(0, len(grey), 4096):
        some = grey[start : start + 4096].astype(np.float64)
        values = (low @ some @ low.T).reshape(len(some), -1)
        # The first coefficient is the mean brightness, which must not change the median.
        middle = np.median(values[:, 1:], axis=1, keepdims=True)
        found[start : start + 4096] = np.packbits(values > middle, axis=1)
    return found


def correlations(one: Grey, others: Grey) -> NDArray[np.float64]:
    """Returns the correlations, (n,), of a picture (32, 32) with others (n, 32, 32); none may be flat."""
    first = _standard(one[None])[0]
    return np.asarray(_standard(others) @ first)


def _standard(grey: Grey) -> NDArray[np.float64]:
    flat = grey.reshape(len(grey), -1).astype(np.float64)
    centred = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(centred / np.linalg.norm(centred, axis=1, keepdims=True))


def copies(grey: Grey) -> Iterator[NearDuplicate]:
    """Yields all pairs of near duplicates, ordered by the first and then by the second row.

    Memory: 8 bytes a picture besides `grey`, and the neighbours of one block of 128 pictures.

    Args:
        grey: uint8 (n, 32, 32). Flat pictures are never copies.
    """
    rows = np.flatnonzero([picture.std() >= FLAT for picture in grey])
    if len(rows) < 2:
        return
    hashes = prints(grey[rows])
    index = faiss.IndexBinaryFlat(64)
    index.add(hashes)
    for start in range(0, len(rows), QUERY_BLOCK):
        # FAISS returns distances strictly below the radius.
        ends, _, near = index.range_search(hashes[start : start + QUERY_BLOCK], MAX_PRINT_DISTANCE + 1)
        for row in range(len(ends) - 1):
            behind = np.sort(near[int(ends[row]) : int(ends[row + 1])])
            behind = behind[behind > start + row]
            if len(behind):
                yield from _confirmed(grey, int(rows[start + row]), rows[behind])


def _confirmed(grey: Grey, first: int, seconds: NDArray[np.int64]) -> Iterator[NearDuplicate]:
    found = correlations(grey[first], grey[seconds])
    for second, correlation in zip(seconds.tolist(), found.tolist(), strict=True):
        if correlation >= MIN_CORRELATION:
            yield NearDuplicate(first, second, min(correlation, 1.0))
