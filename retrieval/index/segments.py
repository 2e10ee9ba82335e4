"""Segments: the immutable, memory-mapped FAISS files of a gallery; writes, reads and searches them exactly.

A segment is an IndexIDMap over an IndexFlatL2, written once, never changed, and opened memory-mapped. (Older
versions wrote IndexIDMap2, which builds a table of all ids in memory when it is opened.) This module does not
track which segments exist: callers pass their ids.
"""

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.errors import GalleryDamaged, StorageError
from retrieval.index.candidates import Exclude as Exclude  # so does every user of searches
from retrieval.index.knn import Block, Explanation, Neighbours, nearest, within
from retrieval.index.knn import Ids as Ids  # every user of vectors needs it
from retrieval.index.quantization import Basis, Coded, basis_of, machine_reason
from retrieval.index.quantization import read as read_codes
from retrieval.index.searched import check_count, check_radius, checked_vectors
from retrieval.system.files import create, is_no_file, open_plain, path_in_utf8, sync, why

Vectors: TypeAlias = NDArray[np.float32]  # (n, d)

# Segments grow by merging up to about this many bytes of vectors. So this is the most that a merge, or the
# removal of a face, rewrites for each affected segment.
_CEILING_BYTES: Final = 64 * 2**20

# The start of every FAISS file: its kind, the dimension, the number of rows.
_HEAD: Final = struct.Struct("<4siq")

# The header of an index in a FAISS file: its kind, the dimension, the number of rows, two unused numbers,
# whether it is trained, and the metric (1 is L2).
_INDEX: Final = struct.Struct("<4siqqqbi")
_UNUSED: Final = 1 << 20
_COUNT: Final = struct.Struct("<q")

# The bytes of a FAISS file of either kind before its vectors, and in total without its vectors and ids.
_HEADER_BYTES: Final = 2 * _INDEX.size + _COUNT.size
_FRAME_BYTES: Final = _HEADER_BYTES + _COUNT.size

# Bytes of a segment in memory at a time while it is rewritten.
_BLOCK_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class Written:
    """A durable segment file: its id, rows, size in bytes and SHA-256 in hex."""

    id: int
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Stored:
    """The vectors of a segment file that are to be rewritten, read one block at a time.

    Attributes:
        segment: the id of the segment.
        path: its file.
        rows: the number of its vectors.
        dimension: d.
        sha256: the SHA-256 of the file when it was written.
        kept: the rows to keep, (rows,) bool; None is all.
    """

    segment: int
    path: Path
    rows: int
    dimension: int
    sha256: str
    kept: NDArray[np.bool_] | None = None

    def blocks(self) -> Iterator[Vectors]:
        """Yields the kept vectors in blocks. Damage shows at the end: use no block before all are read.

        Raises:
            GalleryDamaged: the file is damaged; raised after the last block at the latest.
            StorageError: it cannot be read.
        """
        digest, step = hashlib.sha256(), _rows_in_block(self.dimension)
        try:
            with open_plain(self.path) as file:
                digest.update(file.read(_HEADER_BYTES))
                for start in range(0, self.rows, step):
                    count = min(step, self.rows - start)
                    data = file.read(4 * count * self.dimension)
                    if len(data) < 4 * count * self.dimension:
                        raise _damaged_segment(self.path)
                    digest.update(data)
                    block = np.frombuffer(data, np.float32).reshape(count, self.dimension)
                    yield block if self.kept is None else block[self.kept[start : start + count]]
                # One byte more than expected, so that a longer file fails.
                digest.update(file.read(_COUNT.size + 8 * self.rows + 1))
        except OSError as error:
            if is_no_file(error):
                raise _damaged_segment(self.path) from error
            raise StorageError(f"{self.path} cannot be read: {why(error)}.") from error
        if digest.hexdigest() != self.sha256:
            raise _damaged_segment(self.path)

    def prove(self) -> None:
        """Reads the whole file to check it.

        Raises:
            GalleryDamaged, StorageError: as in `blocks`.
        """
        for _ in self.blocks():
            pass


# Rows to be written: ids (n,) and vectors (n, d).
Part: TypeAlias = tuple[Ids, Vectors | Stored]


def in_blocks(vectors: Vectors | Stored) -> Iterator[Vectors]:
    """Yields vectors in blocks of about 1 MiB.

    Raises:
        GalleryDamaged, StorageError: as in `Stored.blocks`.
    """
    if isinstance(vectors, Stored):
        return vectors.blocks()
    step = _rows_in_block(vectors.shape[1])
    return (vectors[start : start + step] for start in range(0, len(vectors), step))


def _rows_in_block(dimension: int) -> int:
    return max(1, _BLOCK_BYTES // (4 * dimension))


def _damaged_segment(path: Path) -> GalleryDamaged:
    gallery = path.parent.parent
    return GalleryDamaged(f"{path} is not what was written; see what `faceprint repair {gallery}` can mend.")


@dataclass(frozen=True)
class _Open:
    """A memory-mapped segment; `matrix` and its views keep the file mapped."""

    flat: Any
    ids: Ids
    matrix: Vectors


class _Mapped:
    """The array interface of the rows of a mapped index; an array made from it keeps the index alive."""

    def __init__(self, index: Any, flat: Any) -> None:
        rows = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
        rows.flags.writeable = False
        self._index = index
        self.__array_interface__ = rows.__array_interface__


@dataclass(frozen=True, slots=True)
class CodesOf:
    """The basis of a segment's codes, and the largest error of a code."""

    basis: int
    error: float


def rows_at_a_time(dimension: int) -> int:
    """Returns the most rows of a segment, and so of a transaction that adds rows."""
    return max(1, _CEILING_BYTES // (4 * dimension))


def basis_name(number: int) -> str:
    """Returns the file name of a basis."""
    return f"{number:08d}.basis"


def codes_name(segment: int, basis: int) -> str:
    """Returns the file name of a segment's codes in a basis."""
    return f"{segment:08d}-{basis:d}.codes"


class SegmentMissing(GalleryDamaged):
    """The file of a segment is missing: a writer merged it away meanwhile, or it is lost."""


class FlatVectors:
    """The segments of one folder. Safe to share between threads for reading."""

    def __init__(self, folder: Path, dimension: int) -> None:
        self.folder = folder
        self.dimension = dimension
        self.ceiling = rows_at_a_time(dimension)
        self._open: dict[int, _Open] = {}
        self._blocks: dict[int, tuple[CodesOf | None, Block]] = {}
        self._bases: dict[int, Basis] = {}

    def checked(self, vectors: NDArray[Any]) -> Vectors:
        """Returns the vectors as float32 (n, d), C order; see `checked_vectors`."""
        return checked_vectors(vectors, self.dimension)

    def write(self, segment: int, parts: Sequence[Part]) -> Written:
        """Writes a segment durably: temporary file, fsync, rename, fsync of the folder.

        Args:
            segment: its id, which was never used before.
            parts: (ids (n,), vectors (n, d)) in the order of the rows.

        Raises:
            StorageError: the file system refused; no file is left.
            GalleryDamaged: a source segment is damaged; no file is left.
        """
        path, rows = self.path(segment), sum(len(ids) for ids, _ in parts)
        temporary = path.with_suffix(".part")
        try:
            size, digest = _write_pieces(temporary, _pieces(self.dimension, rows, parts))
            os.replace(temporary, path)
            sync(self.folder)
        except BaseException as error:
            # On a failing disk this fails too; the next writer removes unreferenced files.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StorageError(f"Vectors cannot be written to {self.folder}: {why(error)}.") from error
            raise
        return Written(segment, rows, size, digest)

    def path(self, segment: int) -> Path:
        """Returns the path of a segment's file."""
        return self.folder / f"{segment:08d}.faiss"

    def rows(self, segment: int) -> tuple[Ids, Vectors]:
        """Returns the ids and the vectors of a segment, as views of the mapped file.

        Raises:
            GalleryDamaged: the file is missing or is not a segment.
        """
        opened = self._opened(segment)
        return opened.ids, opened.matrix

    def stored(
        self, segment: int, rows: int, sha256: str, *, kept: NDArray[np.bool_] | None = None
    ) -> tuple[Ids, Stored]:
        """Returns rows of a segment as input of `write`, with at most 1 MiB of vectors in memory at a time.

        Args:
            segment, rows, sha256: as in the row of the segment.
            kept: the rows to keep, (rows,) bool; None is all.

        Raises:
            GalleryDamaged: the file is missing or too short. The SHA-256 is checked when the vectors are
                read.
            StorageError: it cannot be read.
        """
        path = self.path(segment)
        try:
            with open_plain(path) as file:
                file.seek(_FRAME_BYTES + 4 * rows * self.dimension)
                ids = np.frombuffer(file.read(8 * rows), np.int64)
        except OSError as error:
            if is_no_file(error):
                raise _damaged_segment(path) from error
            raise StorageError(f"{path} cannot be read: {why(error)}.") from error
        except ValueError as error:
            raise _damaged_segment(path) from error
        if len(ids) != rows:
            raise _damaged_segment(path)
        return ids if kept is None else ids[kept], Stored(segment, path, rows, self.dimension, sha256, kept)

    def rows_of_file(self, path: Path) -> tuple[Ids, Vectors]:
        """Returns the ids and the vectors of a segment at any path, as views of the mapped file.

        Raises:
            GalleryDamaged: the file is missing or is not a segment.
        """
        opened = self._map(path)
        return opened.ids, opened.matrix

    def forget_all_but(self, segments: Iterable[int]) -> None:
        """Closes the mapped files of all other segments."""
        named = set(segments)
        # Other threads may open segments meanwhile, so the loop iterates over a copy.
        for segment in {*self._open, *self._blocks}:
            if segment not in named:
                self._open.pop(segment, None)
                self._blocks.pop(segment, None)

    def search(
        self,
        segments: Sequence[int],
        queries: NDArray[Any],
        k: int,
        *,
        coded: Mapping[int, CodesOf] | None = None,
        allowed: Ids | None = None,
        exclude: Exclude = None,
        explanation: Explanation | None = None,
    ) -> list[Neighbours]:
        """Returns the k nearest stored vectors to each query: exactly those of a float64 brute force.

        Args:
            segments: the segments to search; a missing file raises SegmentMissing.
            queries: (n, d).
            k: the number of neighbours, at least 1; a smaller gallery gives all of its faces.
            coded: the segments' codes, which make the search faster and do not change its result.
            allowed, exclude, explanation: see `knn.nearest`.

        Returns:
            For each query: Euclidean distances ascending, and ids; equal distances by id.

        Raises:
            InputError: k is below 1, or queries have another shape or are not finite.
        """
        check_count(k)
        checked, blocks = self.checked(queries), self.blocks(segments, coded)
        return nearest(blocks, checked, k, allowed=allowed, exclude=exclude, explanation=explanation)

    def search_within(
        self,
        segments: Sequence[int],
        queries: NDArray[Any],
        radius: float,
        *,
        coded: Mapping[int, CodesOf] | None = None,
        allowed: Ids | None = None,
        exclude: Exclude = None,
        explanation: Explanation | None = None,
    ) -> list[Neighbours]:
        """Returns all stored vectors within `radius` of each query; otherwise as `search`.

        Raises:
            InputError: the radius is negative or not finite, or queries have another shape or are not finite.
        """
        check_radius(radius)
        checked, blocks = self.checked(queries), self.blocks(segments, coded)
        return within(blocks, checked, radius, allowed=allowed, exclude=exclude, explanation=explanation)

    def snapshot(self, segments: Sequence[int], coded: Mapping[int, CodesOf]) -> "SearchedSegments":
        """Returns the segments of a snapshot, with their codes, for searches."""
        return SearchedSegments(self, tuple(segments), coded)

    def blocks(self, segments: Sequence[int], coded: Mapping[int, CodesOf] | None = None) -> list[Block]:
        """Returns segments as blocks for a search, with their codes where these can be read."""
        coded = {} if coded is None else coded
        return [self._block(segment, coded.get(segment)) for segment in segments]

    def _block(self, segment: int, codes: CodesOf | None) -> Block:
        known = self._blocks.get(segment)
        if known is not None and known[0] == codes:
            return known[1]
        opened = self._opened(segment)
        block = Block(opened.ids, opened.matrix, self._coded(segment, codes, len(opened.ids)))
        self._blocks[segment] = codes, block
        return block

    def _coded(self, segment: int, codes: CodesOf | None, rows: int) -> Coded | None:
        """Returns a segment's codes; None where a file is damaged: a scan gives the same result."""
        if codes is None:
            return None
        with suppress(GalleryDamaged):
            path = self.codes_path(segment, codes.basis)
            return read_codes(path, self.basis(codes.basis), rows, codes.error)
        return None

    def basis(self, number: int) -> Basis:
        """Returns a basis; its file is read once.

        Raises:
            GalleryDamaged: its file is missing or damaged.
            StorageError: the machine cannot read it.
        """
        found = self._bases.get(number)
        if found is None:
            path = self.basis_path(number)
            try:
                with open_plain(path) as file:
                    found = self._bases[number] = basis_of(file.read())
            except ValueError as error:
                raise GalleryDamaged(f"The basis {path} cannot be read.") from error
            except OSError as error:
                if is_no_file(error):
                    raise GalleryDamaged(f"The basis {path} cannot be read ({why(error)}).") from error
                raise StorageError(f"{path} cannot be read: {why(error)}.") from error
            if len(found.mean) != self.dimension:
                raise GalleryDamaged(f"The basis {path} has other dimensions than the gallery.")
        return found

    def basis_path(self, number: int) -> Path:
        """Returns the path of a basis."""
        return self.folder / basis_name(number)

    def codes_path(self, segment: int, basis: int) -> Path:
        """Returns the path of a segment's codes in a basis."""
        return self.folder / codes_name(segment, basis)

    def _opened(self, segment: int) -> _Open:
        found = self._open.get(segment)
        if found is None:
            found = self._open[segment] = self._map(self.path(segment))
        return found

    def _map(self, path: Path) -> _Open:
        if not path.exists():
            raise SegmentMissing(
                f"The vector file {path} is missing; bring it back with `faceprint repair`, or restore the "
                "gallery from a backup. (A gallery in use is copied with `faceprint backup`: other copies "
                "may lack files.)"
            )
        damaged = GalleryDamaged(
            f"The vector file {path} is damaged; `faceprint repair` may mend it, or restore it from a backup."
        )
        try:
            if not _has_valid_size(path):
                raise damaged
            with path_in_utf8(path) as name:
                index = faiss.read_index(name, faiss.IO_FLAG_MMAP_IFC)
            flat = faiss.downcast_index(index.index)
        except (OSError, RuntimeError, AttributeError, MemoryError) as error:
            # FAISS reports a file that vanished while it was opened as a RuntimeError too.
            if not path.exists():
                raise SegmentMissing(f"The vector file {path} is missing.") from error
            if reason := machine_reason(error):
                raise StorageError(f"{path} cannot be read: {reason}.") from error
            raise damaged from error
        if not isinstance(flat, faiss.IndexFlatL2):
            raise damaged
        if flat.d != self.dimension or flat.ntotal != index.ntotal:
            raise GalleryDamaged(f"The vector file {path} has other dimensions than the gallery.")
        return _Open(flat, faiss.vector_to_array(index.id_map), np.asarray(_Mapped(index, flat)))


@dataclass(frozen=True, eq=False)
class SearchedSegments:
    """The segments of one snapshot, as `SearchedVectors`; a missing file raises SegmentMissing."""

    flat: FlatVectors
    segments: tuple[int, ...]
    coded: Mapping[int, CodesOf]

    def checked(self, vectors: NDArray[Any]) -> Vectors:
        """See `SearchedVectors`."""
        return self.flat.checked(vectors)

    def nearest(
        self,
        queries: NDArray[Any],
        k: int,
        *,
        allowed: Ids | None = None,
        exclude: Exclude = None,
        explanation: Explanation | None = None,
    ) -> list[Neighbours]:
        """See `SearchedVectors`."""
        return self.flat.search(
            self.segments,
            queries,
            k,
            coded=self.coded,
            allowed=allowed,
            exclude=exclude,
            explanation=explanation,
        )

    def within(
        self,
        queries: NDArray[Any],
        radius: float,
        *,
        allowed: Ids | None = None,
        exclude: Exclude = None,
        explanation: Explanation | None = None,
    ) -> list[Neighbours]:
        """See `SearchedVectors`."""
        return self.flat.search_within(
            self.segments,
            queries,
            radius,
            coded=self.coded,
            allowed=allowed,
            exclude=exclude,
            explanation=explanation,
        )

    def blocks(self) -> list[Block]:
        """See `SearchedVectors`."""
        return self.flat.blocks(self.segments, self.coded)

    def some(self, ids: Ids) -> tuple[Ids, Vectors]:
        """See `SearchedVectors`."""
        found, vectors = [np.empty(0, np.int64)], [np.empty((0, self.flat.dimension), np.float32)]
        for segment in self.segments:
            stored, matrix = self.flat.rows(segment)
            rows = np.flatnonzero(np.isin(stored, ids))
            found.append(stored[rows])
            vectors.append(matrix[rows])
        return np.concatenate(found), np.concatenate(vectors)


def _pieces(dimension: int, rows: int, parts: Sequence[Part]) -> Iterator[bytes | memoryview]:
    """Yields the bytes that `faiss.write_index` writes for an IndexIDMap over an IndexFlatL2, in pieces."""
    for kind in (b"IxMp", b"IxF2"):
        yield _INDEX.pack(kind, dimension, rows, _UNUSED, _UNUSED, True, 1)
    yield _COUNT.pack(rows * dimension)
    for _, vectors in parts:
        for block in in_blocks(vectors):
            yield np.ascontiguousarray(block, "<f4").data
    yield _COUNT.pack(rows)
    for ids, _ in parts:
        yield np.ascontiguousarray(ids, "<i8").data


def _write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes a file durably; returns its size in bytes and its SHA-256."""
    digest = hashlib.sha256()
    with create(path, inherit=True) as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _has_valid_size(path: Path) -> bool:
    """Returns whether a file has the size and the number of ids that its header states.

    FAISS itself reads past the end of a truncated mapped file, and allocates memory for any number of ids.
    """
    with open_plain(path) as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return False
        _, dimension, rows = _HEAD.unpack(head)
        size = _FRAME_BYTES + rows * (4 * dimension + 8)
        if rows < 0 or os.fstat(file.fileno()).st_size != size:
            return False
        # The file ends with the number of ids, then the ids.
        file.seek(size - 8 * (rows + 1))
        return bool(int.from_bytes(file.read(8), "little") == rows)
