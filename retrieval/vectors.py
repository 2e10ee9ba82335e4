"""FlatVectors: the immutable FAISS segments of a gallery on disk; write, read, search exactly.

A segment is an IndexIDMap over an IndexFlatL2, written whole and never changed, opened memory-mapped.
(Older versions wrote IndexIDMap2, which builds a table of all ids in memory whenever it is opened.)
Which segments exist is not for this module to know: callers name them.
"""

import hashlib
import math
import os
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.errors import GalleryDamaged, InputError, StorageError
from retrieval.files import sync, why

Vectors: TypeAlias = NDArray[np.float32]  # (n, d)
Ids: TypeAlias = NDArray[np.int64]  # (n,)

# Segments grow by merging up to about this many bytes of vectors: what a merge, or forgetting one face,
# writes at most for each segment that it concerns.
_CEILING_BYTES: Final = 64 * 2**20

# Above this length float32 squares come near overflow, and no proof about them would hold.
_MAX_NORM: Final = 1e18

# How many candidates beyond k are fetched at first, so that rounding rarely asks for a second look.
_SPARE: Final = 16

# What every FAISS file begins with: its kind, the dimension, the number of rows.
_HEAD: Final = struct.Struct("<4siq")

# What a FAISS file of either kind has beside its vectors and ids.
_FRAME_BYTES: Final = 90


@dataclass(frozen=True, slots=True)
class Written:
    """A durable segment file: its id, rows, size in bytes and SHA-256 in hex."""

    id: int
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Open:
    """A memory-mapped segment; `matrix` and its views keep the file mapped."""

    flat: Any
    ids: Ids
    matrix: Vectors


class _Mapped:
    """What numpy asks for the rows of a mapped index; an array made of it keeps the index alive."""

    def __init__(self, index: Any, flat: Any) -> None:
        rows = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
        rows.flags.writeable = False
        self._index = index
        self.__array_interface__ = rows.__array_interface__


class SegmentMissing(GalleryDamaged):
    """A named segment has no file: merged away by a writer meanwhile, or lost."""


class FlatVectors:
    """The segments of one folder. Safe to share between threads for reading."""

    def __init__(self, folder: Path, dimension: int) -> None:
        self.folder = folder
        self.dimension = dimension
        self.ceiling = max(1, _CEILING_BYTES // (4 * dimension))
        self._open: dict[int, _Open] = {}

    def checked(self, vectors: NDArray[Any]) -> Vectors:
        """Vectors as float32 (n, d), C order.

        Raises:
            InputError: another shape, a NaN, an infinity, or a length above 1e18.
        """
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes an infinity, refused below
            array = np.ascontiguousarray(vectors, np.float32)
        if array.ndim != 2 or array.shape[1] != self.dimension:
            raise InputError(
                f"Vectors must have shape (n, {self.dimension}) as this gallery's model gives them, "
                f"not {np.shape(vectors)}."
            )
        norms = np.sqrt(np.einsum("ij,ij->i", array, array, dtype=np.float64))
        # A NaN fails every comparison, and so this one.
        if not (norms <= _MAX_NORM).all():
            raise InputError("Vectors must be finite numbers, with a length of at most 1e18.")
        return array

    def write(self, segment: int, parts: Sequence[tuple[Ids, Vectors]]) -> Written:
        """Writes a segment durably: temporary file, fsync, rename, fsync of the folder.

        Args:
            segment: its id, never used before.
            parts: (ids (n,), vectors (n, d)) in the order of the rows.

        Raises:
            StorageError: the disk refused; no file is left.
        """
        index = faiss.IndexIDMap(faiss.IndexFlatL2(self.dimension))
        for ids, vectors in parts:
            index.add_with_ids(np.ascontiguousarray(vectors), np.ascontiguousarray(ids))
        path = self.path(segment)
        temporary = path.with_suffix(".part")
        try:
            size, digest = _write_index(index, temporary)
            os.replace(temporary, path)
            sync(self.folder)
        except OSError as error:
            # On a disk that is broken this fails too; the next writer removes what nothing names.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            raise StorageError(f"Vectors cannot be written to {self.folder}: {why(error)}.") from error
        return Written(segment, index.ntotal, size, digest)

    def path(self, segment: int) -> Path:
        """Where a segment's file is."""
        return self.folder / f"{segment:08d}.faiss"

    def rows(self, segment: int) -> tuple[Ids, Vectors]:
        """The ids and the vectors of a segment, views of the mapped file.

        Raises:
            GalleryDamaged: the file is missing or is not a segment.
        """
        opened = self._opened(segment)
        return opened.ids, opened.matrix

    def proven_rows(self, segment: int, sha256: str) -> tuple[Ids, Vectors]:
        """As `rows`, of a file that is what was written: what is written anew must not pass damage on.

        Raises:
            GalleryDamaged: the file is missing, or has another SHA-256.
        """
        path = self.path(segment)
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            found = ""
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {why(error)}.") from error
        if found != sha256:
            raise GalleryDamaged(
                f"{path} is not what was written; see what `faceprint repair {self.folder.parent}` can mend."
            )
        return self.rows(segment)

    def rows_of_file(self, path: Path) -> tuple[Ids, Vectors]:
        """The ids and the vectors of a segment that lies elsewhere, views of the mapped file.

        Raises:
            GalleryDamaged: the file is missing or is not a segment.
        """
        opened = self._map(path)
        return opened.ids, opened.matrix

    def forget_all_but(self, segments: Iterable[int]) -> None:
        """Closes the mapped files of segments that are not named."""
        named = set(segments)
        # Other threads open segments meanwhile, so the loop goes over a copy.
        for segment in list(self._open):
            if segment not in named:
                self._open.pop(segment, None)

    def search(
        self, segments: Sequence[int], queries: NDArray[Any], k: int
    ) -> list[tuple[NDArray[np.float64], Ids]]:
        """The k nearest stored vectors to each query: exactly those of a float64 brute force.

        FAISS proposes candidates in float32; their true distances are computed in float64. A
        candidate list is accepted only when the rounding of FAISS's sums provably cannot hide a
        nearer vector (see `_error_bound`); otherwise it is made longer.

        Args:
            segments: which segments to search; a missing file raises SegmentMissing.
            queries: (n, d).
            k: how many, at least 1; a gallery that has fewer gives them all.

        Returns:
            For each query: Euclidean distances ascending, and ids; equal distances by id.

        Raises:
            InputError: k below 1, or queries of another shape or not finite.
        """
        if k < 1:
            raise InputError(f"The number of neighbours must be at least 1, not {k}.")
        checked = self.checked(queries)
        opened = [self._opened(segment) for segment in segments]
        proposals = [_propose(one, checked, min(k + _SPARE, len(one.ids))) for one in opened]
        return [
            _nearest(opened, [(f[row], p[row]) for f, p in proposals], query, k)
            for row, query in enumerate(checked)
        ]

    def _opened(self, segment: int) -> _Open:
        found = self._open.get(segment)
        if found is None:
            found = self._open[segment] = self._map(self.path(segment))
        return found

    def _map(self, path: Path) -> _Open:
        if not path.exists():
            raise SegmentMissing(f"The vector file {path} is missing; restore the gallery from a backup.")
        damaged = GalleryDamaged(f"The vector file {path} is damaged; restore it from a backup.")
        try:
            if not _is_whole(path):
                raise damaged
            index = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP_IFC)
            flat = faiss.downcast_index(index.index)
        except (OSError, RuntimeError, AttributeError, MemoryError) as error:
            # FAISS reports a file that vanished while it was opened as a RuntimeError too.
            if not path.exists():
                raise SegmentMissing(f"The vector file {path} is missing.") from error
            raise damaged from error
        if not isinstance(flat, faiss.IndexFlatL2):
            raise damaged
        if flat.d != self.dimension or flat.ntotal != index.ntotal:
            raise GalleryDamaged(f"The vector file {path} has other dimensions than the gallery.")
        return _Open(flat, faiss.vector_to_array(index.id_map), np.asarray(_Mapped(index, flat)))


def _write_index(index: Any, path: Path) -> tuple[int, str]:
    """Writes an index to a file and to the disk; returns its size and its SHA-256, made on the way."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write(block: bytes) -> None:
            digest.update(block)
            file.write(block)

        faiss.write_index(index, faiss.PyCallbackIOWriter(write))
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _is_whole(path: Path) -> bool:
    """Whether a file is as long, and has as many ids, as its head says.

    FAISS itself reads past the end of a mapped file that was cut, and reserves memory for any number of ids.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return False
        _, dimension, rows = _HEAD.unpack(head)
        size = _FRAME_BYTES + rows * (4 * dimension + 8)
        if rows < 0 or os.fstat(file.fileno()).st_size != size:
            return False
        # The file ends with the ids, their number before them.
        file.seek(size - 8 * (rows + 1))
        return bool(int.from_bytes(file.read(8), "little") == rows)


def _propose(opened: _Open, queries: Vectors, count: int) -> tuple[NDArray[np.float32], Ids]:
    """FAISS's nearest rows of one segment: squared distances (n, count) and row numbers (n, count)."""
    if count == 0:
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    squares, rows = opened.flat.search(queries, count)
    return squares, rows


def _nearest(
    opened: Sequence[_Open],
    proposals: Sequence[tuple[NDArray[np.float32], Ids]],
    query: NDArray[np.float32],
    k: int,
) -> tuple[NDArray[np.float64], Ids]:
    """The k nearest of all segments to one query, from each segment's proposals (squares, rows)."""
    exact = [_exact(one, query, rows) for one, (_, rows) in zip(opened, proposals, strict=True)]
    while True:
        squares = np.concatenate([part[0] for part in exact]) if exact else np.empty(0)
        ids = np.concatenate([part[1] for part in exact]) if exact else np.empty(0, np.int64)
        order = np.lexsort((ids, squares))[:k]
        worst = float(squares[order[-1]]) if len(order) == k else math.inf
        enough = worst + _error_bound(query, worst)
        unproven = [
            number
            for number, (one, (proposed, _)) in enumerate(zip(opened, proposals, strict=True))
            if len(proposed) < len(one.ids) and not float(proposed[-1]) > enough
        ]
        if not unproven:
            return np.sqrt(squares[order]), ids[order]
        proposals = list(proposals)
        for number in unproven:
            one = opened[number]
            count = min(4 * max(len(proposals[number][0]), 1), len(one.ids))
            found, rows = _propose(one, query[None], count)
            proposals[number] = (found[0], rows[0])
            exact[number] = _exact(one, query, rows[0])


def _exact(opened: _Open, query: NDArray[np.float32], rows: Ids) -> tuple[NDArray[np.float64], Ids]:
    """True squared distances, in float64, of some rows, and their ids."""
    differences = opened.matrix[rows].astype(np.float64) - query.astype(np.float64)
    return np.einsum("ij,ij->i", differences, differences), opened.ids[rows]


def _error_bound(query: NDArray[np.float32], square: float) -> float:
    """How much FAISS's float32 square of a distance may exceed the true one, where that is <= `square`.

    Higham, Accuracy and Stability of Numerical Algorithms, 3.1: a sum of d products in any order is
    off by at most g = (d + c)u / (1 - (d + c)u) of the sum of their magnitudes, u = 2^-24. FAISS sums
    either (x - y)^2 or, in batches, |x|^2 + |y|^2 - 2xy; the magnitudes of both are at most
    (|x| + |y|)^2. A vector y whose distance is at most D has |y| <= |x| + D. The last term covers
    squares too small for float32.
    """
    if math.isinf(square):
        return math.inf
    terms = len(query) + 8
    gamma = terms * 2.0**-24 / (1 - terms * 2.0**-24)
    length = float(np.linalg.norm(query.astype(np.float64)))
    return gamma * (2 * length + math.sqrt(square)) ** 2 + terms * 2.0**-126
