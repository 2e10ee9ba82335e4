"""Codes of segments: in which basis they are made, and how a segment gets its own.

Codes only make searches quick (see `retrieval.index.quantization`), so a segment that has none is complete.
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

# From how many rows on a segment has codes: fewer are read as quickly as they are.
CODES_FROM = 256


@dataclass(frozen=True)
class Coding:
    """In which basis new segments get their codes, and what is known of the codes in it that there are."""

    basis: BasisRow | None
    known: Mapping[int, CodesRow]

    @classmethod
    def of(cls, reader: Reader, generation: Generation) -> "Coding":
        basis = newest_basis(reader, generation)
        number = None if basis is None else basis.id
        return cls(basis, {one.segment_id: one for one in reader.codes().values() if one.basis_id == number})


def newest_basis(reader: Reader, generation: Generation) -> BasisRow | None:
    """The basis in which a generation's new segments get their codes."""
    bases = list(reader.bases(generation.id).values())
    return bases[-1] if bases else None


def encode(flat: FlatVectors, coding: Coding, segment: int, parts: Sequence[Part]) -> CodesRow | None:
    """Writes the codes of a segment, durably; None where it is too small, or the basis does not fit it."""
    basis = coding.basis
    if basis is None or not basis.coordinates or sum(len(ids) for ids, _ in parts) < CODES_FROM:
        return None
    try:
        learned: Basis = flat.basis(basis.id)
    except GalleryDamaged:
        return None  # what codes are for is speed; `verify` will tell, and `repair` mend it
    pieces = [piece for _, vectors in parts for piece in _coded(flat, learned, coding, vectors)]
    made, errors = (np.concatenate(some) for some in zip(*pieces, strict=True))
    if not quantization.tolerable(learned, errors):
        return None
    written = quantization.write(flat.codes_path(segment, basis.id), made, errors)
    return CodesRow(segment, basis.id, written.bytes, written.sha256, written.error)


def _coded(
    flat: FlatVectors, learned: Basis, coding: Coding, vectors: Vectors | Stored
) -> Iterator[tuple[Codes, NDArray[np.float64]]]:
    """Codes of a part's vectors, and bounds on how far off they are; those that a whole segment has already.

    A forgotten face must leave no trace, so of a segment without it even the bound is made anew.
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
