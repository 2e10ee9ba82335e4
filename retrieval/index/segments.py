"""Segments: the immutable, memory-mapped FAISS files of a gallery; write, read, search exactly.

A segment is an IndexIDMap over an IndexFlatL2, written whole and never changed, opened memory-mapped.
(Older versions wrote IndexIDMap2, which builds a table of all ids in memory whenever it is opened.)
Which segments exist is not for this module to know: callers name them.
"""

import hashlib
import math
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

from retrieval.errors import GalleryDamaged, InputError, StorageError
from retrieval.index.knn import Block, Explanation, Neighbours, nearest, within
from retrieval.index.knn import Ids as Ids  # every user of vectors needs it
from retrieval.index.quantization import Basis, Coded, basis_of, machine_reason
from retrieval.index.quantization import read as read_codes
from retrieval.system.files import create, is_no_file, open_plain, path_in_utf8, sync, why

Vectors: TypeAlias = NDArray[np.float32]  # (n, d)

# Segments grow by merging up to about this many bytes of vectors: what a merge, or forgetting one face,
# writes at most for each segment that it concerns.
_CEILING_BYTES: Final = 64 * 2**20

# Above this length float32 squares come near overflow, and no proof about them would hold.
_MAX_NORM: Final = 1e18

# What every FAISS file begins with: its kind, the dimension, the number of rows.
_HEAD: Final = struct.Struct("<4siq")

# What stands in a FAISS file for an index: its kind, the dimension, the number of rows, two numbers that mean
# nothing any more, whether it is trained, and the metric, of which 1 is L2.
_INDEX: Final = struct.Struct("<4siqqqbi")
_NOTHING: Final = 1 << 20
_COUNT: Final = struct.Struct("<q")

# What a FAISS file of either kind has before its vectors, and beside its vectors and ids.
_BEFORE: Final = 2 * _INDEX.size + _COUNT.size
_FRAME_BYTES: Final = _BEFORE + _COUNT.size

# How much of a segment is in memory at a time while it is written anew.
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
    """Vectors of a segment's file that are to be written anew: they are read a block at a time.

    Attributes:
        segment: its id.
        path: its file.
        rows: how many vectors it has.
        dimension: d.
        sha256: what its file was when it was written.
        kept: which of the rows are meant, (rows,) bool; None is all.
    """

    segment: int
    path: Path
    rows: int
    dimension: int
    sha256: str
    kept: NDArray[np.bool_] | None = None

    def blocks(self) -> Iterator[Vectors]:
        """Some vectors at a time. What is written anew must not pass damage on: take all before any is used.

        Raises:
            GalleryDamaged: the file is not what was written; at the latest after the last block.
            StorageError: it cannot be read.
        """
        digest, step = hashlib.sha256(), _rows_in_block(self.dimension)
        try:
            with open_plain(self.path) as file:
                digest.update(file.read(_BEFORE))
                for start in range(0, self.rows, step):
                    count = min(step, self.rows - start)
                    data = file.read(4 * count * self.dimension)
                    if len(data) < 4 * count * self.dimension:
                        raise _not_what_was_written(self.path)
                    digest.update(data)
                    block = np.frombuffer(data, np.float32).reshape(count, self.dimension)
                    yield block if self.kept is None else block[self.kept[start : start + count]]
                # One byte more than there should be, or a longer file would pass.
                digest.update(file.read(_COUNT.size + 8 * self.rows + 1))
        except OSError as error:
            if is_no_file(error):
                raise _not_what_was_written(self.path) from error
            raise StorageError(f"{self.path} cannot be read: {why(error)}.") from error
        if digest.hexdigest() != self.sha256:
            raise _not_what_was_written(self.path)

    def prove(self) -> None:
        """Reads all of the file.

        Raises:
            GalleryDamaged, StorageError: as `blocks`.
        """
        for _ in self.blocks():
            pass


# Rows to be written: ids (n,) and vectors (n, d).
Part: TypeAlias = tuple[Ids, Vectors | Stored]


def in_blocks(vectors: Vectors | Stored) -> Iterator[Vectors]:
    """Vectors, about 1 MiB at a time.

    Raises:
        GalleryDamaged, StorageError: as `Stored.blocks`.
    """
    if isinstance(vectors, Stored):
        return vectors.blocks()
    step = _rows_in_block(vectors.shape[1])
    return (vectors[start : start + step] for start in range(0, len(vectors), step))


def _rows_in_block(dimension: int) -> int:
    return max(1, _BLOCK_BYTES // (4 * dimension))


def _not_what_was_written(path: Path) -> GalleryDamaged:
    gallery = path.parent.parent
    return GalleryDamaged(f"{path} is not what was written; see what `faceprint repair {gallery}` can mend.")


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


@dataclass(frozen=True, slots=True)
class CodesOf:
    """What has to be known to use a segment's codes: in which basis they are, and how far off."""

    basis: int
    error: float


def basis_name(number: int) -> str:
    """What a basis's file is called."""
    return f"{number:08d}.basis"


def codes_name(segment: int, basis: int) -> str:
    """What the file of a segment's codes in a basis is called."""
    return f"{segment:08d}-{basis:d}.codes"


class SegmentMissing(GalleryDamaged):
    """A named segment has no file: merged away by a writer meanwhile, or lost."""


class FlatVectors:
    """The segments of one folder. Safe to share between threads for reading."""

    def __init__(self, folder: Path, dimension: int) -> None:
        self.folder = folder
        self.dimension = dimension
        self.ceiling = max(1, _CEILING_BYTES // (4 * dimension))
        self._open: dict[int, _Open] = {}
        self._blocks: dict[int, tuple[CodesOf | None, Block]] = {}
        self._bases: dict[int, Basis] = {}

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

    def write(self, segment: int, parts: Sequence[Part]) -> Written:
        """Writes a segment durably: temporary file, fsync, rename, fsync of the folder.

        Args:
            segment: its id, never used before.
            parts: (ids (n,), vectors (n, d)) in the order of the rows.

        Raises:
            StorageError: the disk refused; no file is left.
            GalleryDamaged: stored vectors are not what was written; no file is left.
        """
        path, rows = self.path(segment), sum(len(ids) for ids, _ in parts)
        temporary = path.with_suffix(".part")
        try:
            size, digest = _write_pieces(temporary, _pieces(self.dimension, rows, parts))
            os.replace(temporary, path)
            sync(self.folder)
        except BaseException as error:
            # On a disk that is broken this fails too; the next writer removes what nothing names.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StorageError(f"Vectors cannot be written to {self.folder}: {why(error)}.") from error
            raise
        return Written(segment, rows, size, digest)

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

    def stored(
        self, segment: int, rows: int, sha256: str, *, kept: NDArray[np.bool_] | None = None
    ) -> tuple[Ids, Stored]:
        """Rows of a segment as `write` takes them: of their vectors no more than 1 MiB are ever in memory.

        Args:
            segment, rows, sha256: as they are written down.
            kept: which of the rows, (rows,) bool; None is all.

        Raises:
            GalleryDamaged: the file is missing or too short. Whether it is what was written shows when the
                vectors are read.
            StorageError: it cannot be read.
        """
        path = self.path(segment)
        try:
            with open_plain(path) as file:
                file.seek(_FRAME_BYTES + 4 * rows * self.dimension)
                ids = np.frombuffer(file.read(8 * rows), np.int64)
        except OSError as error:
            if is_no_file(error):
                raise _not_what_was_written(path) from error
            raise StorageError(f"{path} cannot be read: {why(error)}.") from error
        except ValueError as error:
            raise _not_what_was_written(path) from error
        if len(ids) != rows:
            raise _not_what_was_written(path)
        return ids if kept is None else ids[kept], Stored(segment, path, rows, self.dimension, sha256, kept)

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
        exclude: Sequence[int | None] | None = None,
        explanation: Explanation | None = None,
    ) -> list[Neighbours]:
        """The k nearest stored vectors to each query: exactly those of a float64 brute force.

        Args:
            segments: which segments to search; a missing file raises SegmentMissing.
            queries: (n, d).
            k: how many, at least 1; a gallery that has fewer gives them all.
            coded: what is known of the segments' codes, which make it quicker and change no answer.
            allowed, exclude, explanation: see `knn.nearest`.

        Returns:
            For each query: Euclidean distances ascending, and ids; equal distances by id.

        Raises:
            InputError: k below 1, or queries of another shape or not finite.
        """
        if k < 1:
            raise InputError(f"The number of neighbours must be at least 1, not {k}.")
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
        exclude: Sequence[int | None] | None = None,
        explanation: Explanation | None = None,
    ) -> list[Neighbours]:
        """Every stored vector at most `radius` away from a query; otherwise as `search`.

        Raises:
            InputError: the radius is negative or not finite, or queries of another shape or not finite.
        """
        if not 0 <= radius < math.inf:
            raise InputError(f"The distance must be a number of at least 0, not {radius}.")
        checked, blocks = self.checked(queries), self.blocks(segments, coded)
        return within(blocks, checked, radius, allowed=allowed, exclude=exclude, explanation=explanation)

    def blocks(self, segments: Sequence[int], coded: Mapping[int, CodesOf] | None = None) -> list[Block]:
        """Segments as they are searched, with their codes where these can be read."""
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
        """A segment's codes; None where a file cannot be read: reading the vectors gives the same answer."""
        if codes is None:
            return None
        with suppress(GalleryDamaged):
            path = self.codes_path(segment, codes.basis)
            return read_codes(path, self.basis(codes.basis), rows, codes.error)
        return None

    def basis(self, number: int) -> Basis:
        """A basis, read once.

        Raises:
            GalleryDamaged: its file is missing or is something else.
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
        """Where a basis's file is."""
        return self.folder / basis_name(number)

    def codes_path(self, segment: int, basis: int) -> Path:
        """Where the file of a segment's codes in a basis is."""
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
            if not _is_whole(path):
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


def _pieces(dimension: int, rows: int, parts: Sequence[Part]) -> Iterator[bytes | memoryview]:
    """What `faiss.write_index` writes of an IndexIDMap over an IndexFlatL2, without holding all of it."""
    for kind in (b"IxMp", b"IxF2"):
        yield _INDEX.pack(kind, dimension, rows, _NOTHING, _NOTHING, True, 1)
    yield _COUNT.pack(rows * dimension)
    for _, vectors in parts:
        for block in in_blocks(vectors):
            yield np.ascontiguousarray(block, "<f4").data
    yield _COUNT.pack(rows)
    for ids, _ in parts:
        yield np.ascontiguousarray(ids, "<i8").data


def _write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes a file and makes it durable; returns its size and its SHA-256, made on the way."""
    digest = hashlib.sha256()
    with create(path, inherit=True) as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _is_whole(path: Path) -> bool:
    """Whether a file is as long, and has as many ids, as its head says.

    FAISS itself reads past the end of a mapped file that was cut, and reserves memory for any number of ids.
    """
    with open_plain(path) as file:
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
