"""8-bit scalar quantization of vectors, which gives a lower bound on every distance, for `filter`.

A basis is a mean, m - 1 orthonormal axes and a grid. The place of a vector is its m - 1 coordinates along the
axes and, as the last coordinate, the length of the remainder. For any two vectors the Euclidean distance of
their places is at most their own distance (Faloutsos et al., GEMINI, SIGMOD 1994): along the axes it is a
projection, and by the triangle inequality lengths differ by at most the distance. Clipping places to a box
keeps the bound, since a projection onto a convex set increases no distance. A code is the clipped place on a
grid with one step for all coordinates; its error is measured when it is made. Hence

    |q - x|  >=  step * sqrt(D) - error(q) - error(x)

where D, the squared distance between two codes, is a whole number that FAISS (8-bit codes, summed as
integers) and a float32 matrix product (whole numbers below 2^24) both compute without any rounding.

The axes are the principal axes of a sample, after a random rotation: then the coordinates have similar
variance, and one step fits all (as in product quantisation, Jégou et al. 2010, and its rotations).
"""

import errno
import hashlib
import os
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from retrieval.errors import GalleryDamaged, StorageError
from retrieval.system.files import open_plain, path_in_utf8, why, write_durably

Codes: TypeAlias = NDArray[np.uint8]  # (n, m)

# The numbers of coordinates that a basis may have. With more, D would not be exact in float32.
CHOICES: Final = (64, 128, 256)

# Half the unit in the last place of float64.
_FLOAT64_ROUNDOFF: Final = 2.0**-53

# The offset of the number of rows in a FAISS file: after its kind and the dimension.
_ROW_COUNT_OFFSET: Final = 8

# The centre of the grid. Centred codes keep products small: 255 * 255 * 256 would not leave float32 exact.
CENTRE: Final = np.float32(128)

# Codes that are converted to float32 at a time.
_ROWS_AT_A_TIME: Final = 4096


@dataclass(frozen=True, eq=False)
class Basis:
    """A basis: the projection and the grid of the codes.

    Attributes:
        mean: (d,) float64.
        axes: (m - 1, d) float64, orthonormal rows.
        low: (m,) float64, the lowest corner of the grid.
        step: the step of the grid, the same along all coordinates.
    """

    mean: NDArray[np.float64]
    axes: NDArray[np.float64]
    low: NDArray[np.float64]
    step: float
    # A bound on the axes' defect from orthonormality, including the rounding of its own computation.
    _slack: float = field(init=False)
    # A bound on the rounding of a place's distance to its code.
    _grid_slack: float = field(init=False)
    _mean_length: float = field(init=False)

    def __post_init__(self) -> None:
        count, dimension = self.axes.shape
        defect = float(np.linalg.norm(self.axes @ self.axes.T - np.eye(count)))
        object.__setattr__(self, "_slack", defect + 2 * (count + 2) * (dimension + 8) * _FLOAT64_ROUNDOFF)
        grid = float(np.abs(self.low).max() + 255 * self.step)
        object.__setattr__(self, "_grid_slack", 64 * _FLOAT64_ROUNDOFF * grid * np.sqrt(self.coordinates))
        object.__setattr__(self, "_mean_length", float(np.linalg.norm(self.mean)))

    @property
    def coordinates(self) -> int:
        """The number of coordinates m, which is also the size of a code in bytes."""
        return len(self.low)

    def encode(self, vectors: NDArray[np.float32]) -> tuple[Codes, NDArray[np.float64]]:
        """Returns codes (n, m) of vectors (n, d), and the largest distances to their clipped places, (n,)."""
        places, noise = self._place(vectors)
        np.maximum(places, self.low, out=places)
        np.minimum(places, self.low + 255 * self.step, out=places)
        codes = np.rint((places - self.low) / self.step).clip(0, 255)
        places -= self.low + codes * self.step
        errors = np.sqrt(np.einsum("ij,ij->i", places, places))
        # The last terms cover the rounding of this arithmetic.
        errors += noise + self._grid_slack + 1e-12 * errors
        return codes.astype(np.uint8), errors

    def _place(self, vectors: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns places (n, m), and bounds (n,) on their errors from float64 rounding and inexact axes."""
        moved = vectors.astype(np.float64)
        lengths = np.sqrt(np.einsum("ij,ij->i", moved, moved)) + self._mean_length
        moved -= self.mean
        places = np.empty((len(vectors), self.coordinates))
        np.matmul(moved, self.axes.T, out=places[:, :-1])
        squares = np.einsum("ij,ij->i", moved, moved)
        squares -= np.einsum("ij,ij->i", places[:, :-1], places[:, :-1])
        rest = np.sqrt(np.maximum(squares, 0))
        places[:, -1] = rest
        # If a square has an error e, its root has an error of at most sqrt(e), and of at most e / root.
        off = 4 * self._slack * lengths**2
        with np.errstate(divide="ignore", invalid="ignore"):
            root = np.where(rest > 0, np.minimum(np.sqrt(off), off / rest), np.sqrt(off))
        return places, 2 * self._slack * lengths + root

    def data(self) -> bytes:
        """Returns the file content that `basis_of` reads: safetensors, no pickle."""
        step = np.array([self.step])
        return save({"mean": self.mean, "axes": self.axes, "low": self.low, "step": step})


def basis_of(data: bytes) -> Basis:
    """Returns the basis in the bytes of a file.

    Raises:
        ValueError: the bytes are not a basis.
    """
    try:
        parts = load(data)
        basis = Basis(parts["mean"], parts["axes"], parts["low"], float(parts["step"][0]))
        shapes_fit = basis.axes.shape == (len(basis.low) - 1, len(basis.mean))
    except Exception as error:
        # safetensors raises its own exceptions for damaged files.
        raise ValueError("not a basis") from error
    if not (shapes_fit and basis.coordinates in CHOICES and 0 < basis.step < np.inf):
        raise ValueError("not a basis")
    return basis


class Coded:
    """The codes of a segment's vectors, in the order of its rows, memory-mapped.

    Attributes:
        basis: the basis of the codes.
        error: the largest distance between a vector's place and its code.
        index: a FAISS index of the codes; it keeps the file mapped.
        codes: (n, m), a view of the mapped file.
    """

    def __init__(self, basis: Basis, index: Any, error: float) -> None:
        self.basis = basis
        self.error = error
        self.index = index
        size = index.ntotal * index.d
        self.codes: Codes = faiss.rev_swig_ptr(index.codes.data(), size).reshape(index.ntotal, index.d)

    def scan(self, code: NDArray[np.float32], squares: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
        """Fills in the rows (n,) with the least squared distances (n,) to a code (m,), nearest first."""
        asked, *found = map(faiss.swig_ptr, (code, squares, rows))
        self.index.search_c(1, asked, len(rows), *found)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """The squared lengths (n,) of the codes, relative to the centre of the grid."""
        found = np.empty(len(self.codes), np.int32)
        for start in range(0, len(found), _ROWS_AT_A_TIME):
            moved = centred(self.codes[start : start + _ROWS_AT_A_TIME])
            found[start : start + _ROWS_AT_A_TIME] = np.einsum("ij,ij->i", moved, moved)
        return found


def centred(codes: Codes) -> NDArray[np.float32]:
    """Returns codes (n, m) relative to the centre of the grid: sums of their products are exact in float32.

    All terms stay below 2^24 for 256 coordinates.
    """
    return np.subtract(codes, CENTRE, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class WrittenCodes:
    """A durable file of codes: bytes, SHA-256, and the largest error among its rows."""

    bytes: int
    sha256: str
    error: float


def tolerable(basis: Basis, errors: NDArray[np.float64]) -> bool:
    """Returns whether errors are those of the grid; they are larger for vectors too long for float64."""
    return bool((errors <= 0.6 * basis.step * np.sqrt(basis.coordinates)).all())


def write(path: Path, codes: Codes, errors: NDArray[np.float64]) -> WrittenCodes:
    """Writes codes durably.

    Raises:
        StorageError: the file system refused; no file is left.
    """
    head, tail = _frame(*codes.shape)
    data = b"".join((head, np.ascontiguousarray(codes).data, tail))
    write_file(path, data)
    return WrittenCodes(len(data), hashlib.sha256(data).hexdigest(), float(errors.max(initial=0.0)))


def write_file(path: Path, data: bytes) -> None:
    """Writes a file atomically; a failure is a StorageError."""
    try:
        write_durably(path, data, inherit=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {why(error)}.") from error


# Errors of the machine, which say nothing about the content of a file.
_MACHINE_ERRORS: Final = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOSPC,
    errno.EROFS,
    errno.ESTALE,
)


def machine_reason(error: BaseException) -> str | None:
    """Returns the operating system's message if an error is one of the machine; None for other errors.

    FAISS reports such an error as a RuntimeError that contains this message.
    """
    if isinstance(error, OSError):
        return why(error) if error.errno in _MACHINE_ERRORS else None
    text = str(error)
    return next((os.strerror(code).lower() for code in _MACHINE_ERRORS if os.strerror(code) in text), None)


def read(path: Path, basis: Basis, rows: int, error: float) -> Coded:
    """Opens the codes of a segment, memory-mapped.

    Raises:
        GalleryDamaged: the file is missing, or is not a file of `rows` codes.
        StorageError: the machine cannot read it.
    """
    try:
        if not _has_valid_frame(path, rows, basis.coordinates):
            raise GalleryDamaged(f"{path} is damaged.")
        with path_in_utf8(path) as name:
            index = faiss.read_index(name, faiss.IO_FLAG_MMAP_IFC)
    except (OSError, RuntimeError, MemoryError) as caught:
        if reason := machine_reason(caught):
            raise StorageError(f"{path} cannot be read: {reason}.") from caught
        raise GalleryDamaged(f"{path} cannot be read.") from caught
    if not isinstance(index, faiss.IndexScalarQuantizer) or (index.ntotal, index.d) != (
        rows,
        basis.coordinates,
    ):
        raise GalleryDamaged(f"{path} is damaged.")
    return Coded(basis, index, error)


def copy(path: Path, rows: int, coordinates: int, sha256: str) -> Codes | None:
    """Returns the codes (rows, m) of a file with this SHA-256; None for a damaged or unreadable one."""
    head, tail = _frame(rows, coordinates)
    try:
        with open_plain(path) as file:
            data = file.read()
    except OSError:
        return None  # the caller can compute them again
    if len(data) != len(head) + rows * coordinates + len(tail):
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        return None
    return np.frombuffer(data, np.uint8, rows * coordinates, len(head)).reshape(rows, coordinates)


def _has_valid_frame(path: Path, rows: int, coordinates: int) -> bool:
    """Returns whether a file has the frame of `rows` codes: FAISS allocates what a damaged header states."""
    head, tail = _frame(rows, coordinates)
    size = len(head) + rows * coordinates + len(tail)
    with open_plain(path) as file:
        if os.fstat(file.fileno()).st_size != size or file.read(len(head)) != head:
            return False
        if hasattr(os, "posix_fadvise"):
            # A search reads the whole file. Page faults alone would fetch a few pages at a time: 124 MB took
            # 1.3 s from a disk that reads them in 0.14 s.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        file.seek(size - len(tail))
        return file.read() == tail


def _frame(rows: int, coordinates: int) -> tuple[bytes, bytes]:
    """Returns the bytes of a file before and after the codes: those of one code, with `rows` as the count."""
    index = faiss.IndexScalarQuantizer(coordinates, faiss.ScalarQuantizer.QT_8bit_direct)
    code = (np.arange(coordinates)[None] * 37 % 251).astype(np.uint8)
    index.add(code.astype(np.float32))
    data = faiss.serialize_index(index).tobytes()
    start = data.index(code.tobytes())
    head = bytearray(data[:start])
    struct.pack_into("<q", head, _ROW_COUNT_OFFSET, rows)
    struct.pack_into("<Q", head, start - 8, rows * coordinates)
    return bytes(head), data[start + coordinates :]


# Learning


@dataclass(frozen=True, slots=True)
class Trial:
    """The cost of a number of coordinates, and the share of rows that its bound does not exclude."""

    coordinates: int
    left: float
    cost: float


@dataclass(frozen=True)
class Learned:
    """The result of learning from a sample.

    Attributes:
        basis: the cheapest; None where reading all vectors costs less.
        trials: one for each number of coordinates.
        scan_cost: the cost of reading all vectors, in the unit of the trials' costs.
    """

    basis: Basis | None
    trials: tuple[Trial, ...]
    scan_cost: float


# Costs in nanoseconds a row for one query on one core, as measured (docs/benchmarks.md); only ratios count.
_BYTE_OF_CODE: Final = 0.055
_BYTE_OF_VECTOR: Final = 0.045
_ROW_COMPARISON: Final = 8000.0

_TRIAL_QUERIES: Final = 64


def learn(sample: NDArray[np.float32], *, seed: int = 0) -> Learned:
    """Returns the basis of a sample (n, d) with the number of coordinates that makes searches cheapest.

    The cost of each number is measured by searches of sample rows for their nearest other row. In a gallery
    larger than its sample, nearest rows are nearer, so that the bound excludes more rows than measured.
    """
    rng = np.random.default_rng(seed)
    dimension = sample.shape[1]
    mean = sample.mean(axis=0, dtype=np.float64)
    moved = (sample - mean).astype(np.float32)
    # The squares of the longest allowed vectors would overflow float32 sums.
    scaled = moved / max(np.abs(moved).max(initial=0.0), np.finfo(np.float32).tiny)
    covariance = scaled.T @ scaled / np.float32(len(sample))
    principal = np.linalg.eigh(covariance)[1][:, ::-1].T
    asked = rng.choice(len(sample), min(_TRIAL_QUERIES, len(sample)), replace=False)
    nearest = _nearest_others(sample, asked)
    scan = dimension * 4 * _BYTE_OF_VECTOR
    found: list[tuple[Trial, Basis]] = []
    for coordinates in CHOICES:
        if coordinates - 1 > dimension:
            break
        basis = _basis(moved, mean, principal[: coordinates - 1], rng)
        if basis is None:
            break
        left = _candidate_share(basis, sample, asked, nearest)
        found.append((Trial(coordinates, left, coordinates * _BYTE_OF_CODE + left * _ROW_COMPARISON), basis))
    trials = tuple(trial for trial, _ in found)
    if not found:
        return Learned(None, trials, scan)
    best, basis = min(found, key=lambda one: one[0].cost)
    return Learned(basis if best.cost < 0.7 * scan else None, trials, scan)


def _basis(
    moved: NDArray[np.float32],
    mean: NDArray[np.float64],
    principal: NDArray[np.float64],
    rng: "np.random.Generator",  # in quotes: a first search does not load it
) -> Basis | None:
    """Returns the basis of some principal axes; None where the sample does not vary."""
    turn = np.linalg.qr(rng.standard_normal((len(principal), len(principal))))[0]
    axes = np.ascontiguousarray(np.linalg.qr((turn @ principal).T)[0].T)
    places = np.empty((len(moved), len(axes) + 1))
    places[:, :-1] = moved @ axes.T.astype(np.float32)
    squares = np.einsum("ij,ij->i", moved, moved, dtype=np.float64)
    squares -= np.einsum("ij,ij->i", places[:, :-1], places[:, :-1])
    places[:, -1] = np.sqrt(np.maximum(squares, 0))
    low, high = np.quantile(places, (0.0005, 0.9995), axis=0)
    step = float((high - low).max()) * 1.1 / 255
    if not step > 0:
        return None
    return Basis(mean, axes, (low + high) / 2 - 127.5 * step, step)


def _nearest_others(sample: NDArray[np.float32], asked: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the distance of each row in `asked` to its nearest other row."""
    stored = sample.astype(np.float64)
    lengths = np.einsum("ij,ij->i", stored, stored)
    squares = lengths[asked, None] + lengths - 2 * stored[asked] @ stored.T
    squares[np.arange(len(asked)), asked] = np.inf
    return np.asarray(np.sqrt(np.maximum(squares.min(axis=1), 0)))


def _candidate_share(
    basis: Basis, sample: NDArray[np.float32], asked: NDArray[np.int64], nearest: NDArray[np.float64]
) -> float:
    """Returns the mean share of rows that the bound does not exclude at the nearest distance."""
    codes, errors = basis.encode(sample)
    stored = centred(codes)
    squares = np.einsum("ij,ij->i", stored, stored)
    between = squares[asked, None] + squares - 2.0 * (stored[asked] @ stored.T)
    bound = basis.step * np.sqrt(np.maximum(between, 0)) - errors.max() - errors[asked, None]
    # The row itself is no candidate.
    return float(((bound <= nearest[:, None]).sum(axis=1) - 1).mean() / len(sample))
