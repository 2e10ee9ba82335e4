"""Gallery: a bundle, a store and vectors under one folder; enroll, search, forget.

    my.gallery/
      gallery.db               SQLite: which faces exist, whose they are
      vectors/00000007.faiss   their vectors, immutable segments
      model/                   a copy of the bundle, so that the gallery is searched by itself
      writer.lock              who is writing

The order of every write: vectors durable in a new segment file, then one transaction that names it and
inserts its faces. A crash in between leaves a file that nothing names, and the next writer removes it.
"""

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from retrieval import lock, pixels
from retrieval.bundle import ModelBundle
from retrieval.embedder import Embedder
from retrieval.errors import (
    GalleryDamaged,
    GalleryError,
    InputError,
    ModelMismatch,
    Reason,
    StorageError,
    UnreadableImage,
)
from retrieval.files import sync, why
from retrieval.photos import is_utf8, readable
from retrieval.store import Face, NewFace, Reader, Segment, Store, Writer
from retrieval.vectors import FlatVectors, Ids, SegmentMissing, Vectors, Written

_T = TypeVar("_T")

_DATABASE: Final = "gallery.db"
_VECTORS: Final = "vectors"
_MODEL: Final = "model"
_LOCK: Final = "writer.lock"

# How long a writer waits for another one, in seconds.
LOCK_TIMEOUT: Final = 30.0

# How often a search starts over when a writer merges the files that it was about to open.
_ATTEMPTS: Final = 20

# How many pictures are embedded at a time by the calls of this module.
_BATCH: Final = 32


@dataclass(frozen=True, slots=True)
class Match:
    """A stored photo and its Euclidean distance (not squared) to the query."""

    face: Face
    distance: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The classifier's opinion: one of the identities it was trained on, and its softmax probability.

    The classifier knows nobody else: a stranger too is given one of its names.
    """

    identity: str
    probability: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The answer to a picture.

    Attributes:
        matches: the nearest stored photos, nearest first, equal distances by face id.
        prediction: from the same pass through the network.
    """

    matches: tuple[Match, ...]
    prediction: Prediction


class Status(StrEnum):
    """What became of a photo that was offered to a gallery."""

    ENROLLED = "enrolled"
    KNOWN = "already-known"
    DUPLICATE = "duplicate"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one photo.

    Attributes:
        path: its file; None for bytes, images and arrays.
        identity: who was said to be on it.
        status: the verdict.
        face_id: of the face that was enrolled, or that has the same bytes.
        reason: the stable code, for a rejected photo.
        detail: a few words for a person.
    """

    path: str | None
    identity: str | None
    status: Status
    face_id: int | None = None
    reason: Reason | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A photo ready to be embedded: pixels uint8 (size, size, 3), and the SHA-256 of its bytes in hex."""

    path: str | None
    identity: str | None
    sha256: str
    pixels: pixels.Pixels


@dataclass(frozen=True)
class GalleryInfo:
    """What a gallery holds; sizes in bytes."""

    folder: str
    created_at: str
    faces: int
    identities: int
    faces_without_identity: int
    largest: tuple[tuple[str, int], ...]
    segments: int
    vector_bytes: int
    database_bytes: int
    fingerprint: str
    dimension: int
    classifier_labels: int
    input_size: int


class Gallery:
    """Faces under one folder. Safe to share between threads; any number of processes may read."""

    def __init__(self, folder: Path, bundle: ModelBundle, store: Store, *, device: str, engine: str) -> None:
        self.folder = folder
        self.bundle = bundle
        self._store = store
        self._vectors = FlatVectors(folder / _VECTORS, bundle.dimension)
        self._device = device
        self._engine = engine
        self._embedder: Embedder | None = None
        self._loading = threading.Lock()

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        bundle: ModelBundle,
        *,
        device: str = "auto",
        engine: str = "auto",
    ) -> "Gallery":
        """Makes an empty gallery with a copy of the bundle, whole or not at all.

        Raises:
            GalleryError: `folder` exists and is not empty.
            BundleError: the bundle's files are not the ones that its card names.
            StorageError: the disk refused, or `folder` is a place that cannot be replaced, such as a mount
                point; name a folder below it.
        """
        target = Path(folder)
        taken = GalleryError(f"{target} exists already and is not empty; choose another folder.")
        if not is_free(target):
            raise taken
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
                _lay_out(Path(temporary) / "gallery", bundle)
                with suppress(FileNotFoundError):
                    # Renaming onto a folder takes an empty one; onto another gallery it fails.
                    target.rmdir()
                os.rename(Path(temporary) / "gallery", target)
            sync(target.parent)
        except OSError as error:
            if not is_free(target):
                raise taken from error
            raise StorageError(f"The gallery {target} cannot be made: {why(error)}.") from error
        return cls.open(target, device=device, engine=engine)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, device: str = "auto", engine: str = "auto") -> "Gallery":
        """Opens a gallery; the network is loaded when it is first needed.

        Raises:
            GalleryError: there is none, or a newer version made it.
            GalleryDamaged: its database is not what it was.
            BundleError, ModelMismatch: its model is missing, damaged or another one.
        """
        folder = Path(folder)
        if folder.is_file():
            raise GalleryError(f"{folder} is a file; a gallery is a folder.")
        if not folder.is_dir():
            raise GalleryError(f"There is no gallery {folder}; make one with `faceprint ingest`.")
        store = Store.open(folder / _DATABASE)
        try:
            bundle = ModelBundle.load(folder / _MODEL)
            with store.read() as reader:
                row = reader.gallery()
            if (row.fingerprint, row.dimension) != (bundle.fingerprint, bundle.dimension):
                raise ModelMismatch(
                    f"{folder / _MODEL} is not the model that the gallery was made with; put that one back."
                )
        except BaseException:
            store.close()
            raise
        return cls(folder, bundle, store, device=device, engine=engine)

    def close(self) -> None:
        """Closes the database and the mapped files."""
        self._vectors.forget_all_but(())
        self._store.close()

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def require(self, bundle: ModelBundle) -> None:
        """Checks that a bundle is the gallery's own.

        Raises:
            ModelMismatch: it has another fingerprint, so its embeddings cannot be compared.
        """
        if bundle.fingerprint != self.bundle.fingerprint:
            raise ModelMismatch(
                f"The gallery {self.folder} was made with another model (fingerprint "
                f"{self.bundle.fingerprint[:12]}, not {bundle.fingerprint[:12]}); "
                "leave --model out, or enroll into a new gallery."
            )

    @property
    def embedder(self) -> Embedder:
        """The model, loaded."""
        with self._loading:
            if self._embedder is None:
                self._embedder = Embedder.open(self.bundle, device=self._device, engine=self._engine)
            return self._embedder

    # Enrolling

    def enroll(self, photos: Iterable[tuple[pixels.ImageSource, str | None]]) -> list[Outcome]:
        """Enrolls photos, batch by batch, each batch durable before the next.

        Args:
            photos: pairs of a picture (a path, bytes, a PIL image or a uint8 array) and an identity, or
                None where nobody knows.

        Returns:
            One Outcome a photo, in order. A photo that cannot be read is a rejected one, not an error.

        Raises:
            StorageError, GalleryBusy: the batch in flight was not enrolled; those before it were.
        """
        outcomes: list[Outcome] = []
        photos = iter(photos)
        while batch := list(islice(photos, _BATCH)):
            outcomes += self.enroll_prepared([self.prepare(source, identity) for source, identity in batch])
        return outcomes

    def prepare(self, source: pixels.ImageSource, identity: str | None) -> Prepared | Outcome:
        """Reads a picture, unless its bytes are enrolled already; the part of enrolling that runs in threads.

        Returns:
            What `enroll_prepared` takes; an Outcome when there is nothing left to do.

        Raises:
            InputError: an array that is not a picture, or an identity that is not valid Unicode.
        """
        path = os.path.abspath(source) if isinstance(source, str | os.PathLike) else None
        if not is_utf8(path or ""):
            shown, detail = readable(path or ""), "its name is not UTF-8; rename it"
            return Outcome(shown, identity, Status.REJECTED, reason=Reason.NAME_NOT_UTF8, detail=detail)
        if not is_utf8(identity or ""):
            raise InputError(f"The identity {identity!a} cannot be stored: it is not valid Unicode.")
        try:
            content = pixels.read_bytes(source) if isinstance(source, str | os.PathLike) else source
            digest = pixels.content_sha256(content)
            with self._store.read() as reader:
                stored = reader.faces_by_sha256([digest]).get(digest)
            if stored is not None:
                return _same_bytes(stored, path, identity)
            size, crop = self.bundle.preprocessing.size, self.bundle.preprocessing.crop
            return Prepared(path, identity, digest, pixels.read(content, size=size, crop=crop))
        except UnreadableImage as error:
            return Outcome(path, identity, Status.REJECTED, reason=error.reason, detail=error.detail)

    def enroll_prepared(self, photos: Sequence[Prepared | Outcome]) -> list[Outcome]:
        """Embeds one batch and makes it durable in one step. Outcomes among the photos pass through.

        Raises:
            StorageError, GalleryBusy: nothing of the batch was enrolled.
        """
        ready = [photo for photo in photos if isinstance(photo, Prepared)]
        if not ready:
            return [photo for photo in photos if isinstance(photo, Outcome)]
        vectors = self.embedder.embed(np.stack([photo.pixels for photo in ready])).vectors
        added = iter(self._add([NewFace(p.identity, p.path, p.sha256) for p in ready], vectors))
        return [photo if isinstance(photo, Outcome) else next(added) for photo in photos]

    def _add(self, faces: Sequence[NewFace], vectors: NDArray[np.float32]) -> list[Outcome]:
        """Adds faces with their vectors (n, d); those whose bytes are stored already are not added again."""
        checked = self._vectors.checked(vectors)
        with self._writing() as writer:
            first = writer.gallery().next_face_id
            stored = writer.faces_by_sha256({face.sha256 for face in faces})
            outcomes: list[Outcome] = []
            new: list[int] = []
            for row, face in enumerate(faces):
                if face.sha256 in stored:
                    outcomes.append(_same_bytes(stored[face.sha256], face.path, face.identity))
                    continue
                number = first + len(new)
                new.append(row)
                stored[face.sha256] = Face(number, face.identity, face.path, face.sha256, "")
                outcomes.append(Outcome(face.path, face.identity, Status.ENROLLED, number))
            if new:
                ids = np.arange(first, first + len(new), dtype=np.int64)
                self._append(writer, ids, checked[new])
                writer.add_faces(first, [faces[row] for row in new])
        return outcomes

    def _append(self, writer: Writer, ids: Ids, vectors: Vectors) -> None:
        """Writes new vectors, together with the newest segments that are not twice as large, as one.

        Sizes then fall at least by half from one segment to the next, as the digits of a binary
        counter: a photo costs its own bytes and its share of the merges, never the whole gallery.
        """
        parts, absorbed, rows = [(ids, vectors)], [], len(ids)
        for segment in reversed(writer.segments()):
            if segment.rows >= 2 * rows or segment.rows + rows > self._vectors.ceiling:
                break
            parts.insert(0, self._vectors.rows(segment.id))
            absorbed.append(segment.id)
            rows += segment.rows
        written = self._vectors.write(writer.gallery().next_segment_id, parts)
        writer.replace_segments(absorbed, [_segment(written)])

    @contextmanager
    def _writing(self) -> Iterator[Writer]:
        """The only writer, in one transaction; files that no segment names are removed before and after."""
        with lock.exclusive(self.folder / _LOCK, timeout=LOCK_TIMEOUT):
            with self._store.write() as writer:
                self._vectors.remove_all_but(segment.id for segment in writer.segments())
                yield writer
            with self._store.read() as reader:
                self._vectors.remove_all_but(segment.id for segment in reader.segments())

    # Searching

    def search(self, image: pixels.ImageSource, k: int = 5) -> SearchResult:
        """The k nearest stored photos to a picture, and the classifier's prediction.

        Args:
            image: a path, bytes, a PIL image or a uint8 array.
            k: how many; a gallery that has fewer gives them all.

        Raises:
            UnreadableImage: the picture cannot be read.
            InputError: k below 1.
        """
        return self.search_many([image], k)[0]

    def search_many(self, images: Iterable[pixels.ImageSource], k: int = 5) -> list[SearchResult]:
        """As `search`, for many pictures; one result each, in order."""
        results: list[SearchResult] = []
        images = iter(images)
        size, crop = self.bundle.preprocessing.size, self.bundle.preprocessing.crop
        while batch := list(islice(images, _BATCH)):
            squares = np.stack([pixels.read(image, size=size, crop=crop) for image in batch])
            embedded = self.embedder.embed(squares)
            matches = self._nearest(embedded.vectors, k)
            predictions = map(self._prediction, embedded.probabilities)
            results += map(SearchResult, matches, predictions)
        return results

    def search_by_vector(self, vector: NDArray[Any], k: int = 5) -> tuple[Match, ...]:
        """The k nearest stored photos to an embedding (d,).

        Raises:
            InputError: another shape, not finite, or k below 1.
        """
        return self._nearest(np.asarray(vector)[None], k)[0]

    def search_by_face(self, face_id: int, k: int = 5) -> tuple[Match, ...]:
        """The k nearest stored photos to a stored one, itself left out.

        Raises:
            InputError: there is no such face, or k below 1.
        """
        if k < 1:
            raise InputError(f"The number of neighbours must be at least 1, not {k}.")
        matches = self.search_by_vector(self._vector(face_id), k + 1)
        return tuple(match for match in matches if match.face.id != face_id)[:k]

    def _nearest(self, vectors: NDArray[Any], k: int) -> list[tuple[Match, ...]]:
        """The matches of each vector (n, d), all from one snapshot."""

        def search(reader: Reader) -> list[tuple[Match, ...]]:
            segments = [segment.id for segment in reader.segments()]
            found = self._vectors.search(segments, vectors, k)
            self._vectors.forget_all_but(segments)
            return self._matches(reader, found)

        return self._on_a_snapshot(search)

    def _on_a_snapshot(self, work: Callable[[Reader], _T]) -> _T:
        """What `work` makes of a snapshot; of a later one where a writer merged its files away meanwhile."""
        for _ in range(_ATTEMPTS - 1):
            with suppress(SegmentMissing), self._store.read() as reader:
                return work(reader)
        with self._store.read() as reader:
            return work(reader)

    def _matches(
        self, reader: Reader, found: Sequence[tuple[NDArray[np.float64], Ids]]
    ) -> list[tuple[Match, ...]]:
        faces = reader.faces({int(number) for _, ids in found for number in ids})
        try:
            return [
                tuple(
                    Match(faces[number], distance)
                    for distance, number in zip(distances.tolist(), ids.tolist(), strict=True)
                )
                for distances, ids in found
            ]
        except KeyError as error:
            raise GalleryDamaged(
                f"{self.folder} has a vector {error} without a face; restore it from a backup."
            ) from error

    def _vector(self, face_id: int) -> NDArray[np.float32]:
        def find(reader: Reader) -> NDArray[np.float32]:
            for segment in reader.segments():
                ids, matrix = self._vectors.rows(segment.id)
                (rows,) = np.nonzero(ids == face_id)
                if len(rows):
                    return np.array(matrix[rows[0]])
            raise InputError(f"There is no face {face_id} in {self.folder}.")

        return self._on_a_snapshot(find)

    def _prediction(self, probabilities: NDArray[np.float32]) -> Prediction:
        best = int(probabilities.argmax())
        return Prediction(self.bundle.labels[best], float(probabilities[best]))

    # Forgetting

    def forget(self, identity: str) -> int:
        """Removes an identity's faces: their rows, and their vectors from every segment.

        Segments that hold one are rewritten without it and deleted; SQLite writes its file anew and
        empties its log. Copies that you made (backups, the photos themselves) are yours.

        Returns:
            How many faces were removed.

        Raises:
            InputError: there is no such identity.
        """
        with self._writing() as writer:
            ids = writer.face_ids_of(identity)
            if not ids:
                raise InputError(f"There is nobody called {identity} in {self.folder}.")
            gone = np.asarray(ids)
            next_id = writer.gallery().next_segment_id
            for segment in writer.segments():
                next_id = self._rewrite_without(writer, segment, gone, next_id)
            writer.remove_faces(ids)
        self._store.erase_traces()
        return len(ids)

    def _rewrite_without(self, writer: Writer, segment: Segment, gone: Ids, next_id: int) -> int:
        stored, matrix = self._vectors.rows(segment.id)
        kept = ~np.isin(stored, gone)
        if kept.all():
            return next_id
        new: list[Segment] = []
        if kept.any():
            new = [_segment(self._vectors.write(next_id, [(stored[kept], matrix[kept])]))]
        writer.replace_segments([segment.id], new)
        return next_id + len(new)

    # Looking at it

    def info(self) -> GalleryInfo:
        """What the gallery holds."""
        with self._store.read() as reader:
            row, segments, identities = reader.gallery(), reader.segments(), reader.identities()
        named = [(name, number) for name, number in identities if name is not None]
        return GalleryInfo(
            folder=os.fspath(self.folder),
            created_at=row.created_at,
            faces=sum(number for _, number in identities),
            identities=len(named),
            faces_without_identity=sum(number for name, number in identities if name is None),
            largest=tuple(named[:10]),
            segments=len(segments),
            vector_bytes=sum(segment.bytes for segment in segments),
            database_bytes=(self.folder / _DATABASE).stat().st_size,
            fingerprint=row.fingerprint,
            dimension=row.dimension,
            classifier_labels=len(self.bundle.labels),
            input_size=self.bundle.input_size,
        )


def is_free(folder: Path) -> bool:
    """Whether a gallery can be made there: nothing is there, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _lay_out(folder: Path, bundle: ModelBundle) -> None:
    """An empty gallery's files, durable."""
    folder.mkdir()
    (folder / _VECTORS).mkdir()
    bundle.save(folder / _MODEL)
    Store.create(folder / _DATABASE, fingerprint=bundle.fingerprint, dimension=bundle.dimension).close()
    sync(folder / _DATABASE)
    sync(folder)


def _segment(written: Written) -> Segment:
    return Segment(written.id, written.rows, written.bytes, written.sha256)


def _same_bytes(stored: Face, path: str | None, identity: str | None) -> Outcome:
    """The verdict on a photo whose bytes are stored already: never a second face, never another name."""
    if identity is not None and identity != stored.identity:
        name = stored.identity or "nobody in particular"
        detail = f"the same bytes are enrolled as {name}" + (f" from {stored.path}" if stored.path else "")
        return Outcome(path, identity, Status.REJECTED, stored.id, Reason.IDENTITY_CONFLICT, detail)
    if path == stored.path:
        return Outcome(path, identity, Status.KNOWN, stored.id)
    original = stored.path or f"face {stored.id}"
    return Outcome(path, identity, Status.DUPLICATE, stored.id, detail=f"the same bytes as {original}")
