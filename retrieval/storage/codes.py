"""Codes of segments for the vault: chooses their basis, and writes the codes of a new segment.

Codes only speed up searches (see `retrieval.index.quantization`), so a segment without codes is complete.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.database.reader import Reader
from retrieval.database.records import BasisRow, CodesRow, Generation
from retrieval.errors import GalleryDamaged
from retrieval.index import quantization
from retrieval.index.quantization import Basis, Codes
from retrieval.index.segments import FlatVectors, Part, Stored, Vectors, in_blocks

# The least rows of a segment with codes: a smaller one is scanned as fast without.
CODES_FROM = 256


@dataclass(frozen=True)
class Coding:
    """The basis in which new segments are encoded, and the existing codes in it by segment id."""

    basis: BasisRow | None
    known: Mapping[int, CodesRow]

    @classmethod
    def of(cls, reader: Reader, generation: Generation) -> "Coding":
        basis = newest_basis(reader, generation)
        number = None if basis is None else basis.id
        return cls(basis, {one.segment_id: one for one in reader.codes().values() if one.basis_id == number})


def newest_basis(reader: Reader, generation: Generation) -> BasisRow | None:
    """Returns the basis in which new segments of a generation are encoded; None without one."""
    bases = list(reader.bases(generation.id).values())
    return bases[-1] if bases else None


def encode(flat: FlatVectors, coding: Coding, segment: int, parts: Sequence[Part]) -> CodesRow | None:
    """Writes the codes of a segment durably, and returns their row.

    Returns None where the segment is too small, or there is no basis that fits it and can be read.
    """
    basis = coding.basis
    if basis is None or not basis.coordinates or sum(len(ids) for ids, _ in parts) < CODES_FROM:
        return None
    try:
        learned: Basis = flat.basis(basis.id)
    except GalleryDamaged:
        return None  # codes are only for speed; `verify` reports a damaged basis, and `repair` mends it
    pieces = [piece for _, vectors in parts for piece in _coded(flat, learned, coding, vectors)]
    made, errors = (np.concatenate(some) for some in zip(*pieces, strict=True))
    if not quantization.tolerable(learned, errors):
        return None
    written = quantization.write(flat.codes_path(segment, basis.id), made, errors)
    return CodesRow(segment, basis.id, written.bytes, written.sha256, written.error)


def _coded(
    flat: FlatVectors, learned: Basis, coding: Coding, vectors: Vectors | Stored
) -> Iterator[tuple[Codes, NDArray[np.float64]]]:
    """Yields the codes of a part's vectors, and bounds of their errors; copies those of an unchanged segment.

    An erased face must leave no trace, so a segment that lost one is encoded anew, including the bound.
    """
    if isinstance(vectors, Stored) and vectors.kept is None and vectors.segment in coding.known:
        row = coding.known[vectors.segment]
        path = flat.codes_path(row.segment_id, row.basis_id)
        copied = quantization.copy(path, vectors.rows, learned.coordinates, row.sha256)
        if copied is not None:
            yield copied, np.array([row.error])
            return
    for block in in_blocks(vectors):
        yield learned.encode(block)
