"""Reading: hashes photos, looks them up and decodes them, each only as far as needed; writes nothing.

A file with the size, time and inode of its enrollment is known without being opened. Any other photo is read
and hashed, looked up by its bytes in a snapshot of the tables, and decoded only if it has to be embedded.
"""

import dataclasses
import os
import stat
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from retrieval.database import identity_names
from retrieval.database.metadata import decoded, encoded
from retrieval.database.reader import Reader
from retrieval.database.records import FaceRegion, KnownFile, NewFace, StoredPhoto
from retrieval.embedding.outcome import Deduplicator, Outcome, Status
from retrieval.errors import InputError, Reason, UnreadableImage
from retrieval.images import pixels
from retrieval.images.decoders import Content, Decode, Decoded
from retrieval.images.photo_reader import DetectionClock, FaceImage, FaceSelection, PhotoReader
from retrieval.images.picture import Pixels
from retrieval.models.embedder import Embedder
from retrieval.sources import photos
from retrieval.sources.photos import Photo
from retrieval.system.files import Stamp
from retrieval.system.paths import host_of, is_absolute, is_utf8, readable
from retrieval.system.pipeline import Meter

# The largest face of a photo with a name, and all faces of one without.
AUTO: Final = FaceSelection("auto")

# Bytes of files that one thread holds before they are looked up and decoded, except for the last file's.
_MAX_HELD_BYTES: Final = 16 * 2**20


@dataclass(frozen=True)
class Meters:
    """Times and counts of the steps of preparing, over all threads: of photos, and in `bytes` of bytes."""

    read: Meter = field(default_factory=lambda: Meter("read"))
    look_up: Meter = field(default_factory=lambda: Meter("look up"))
    decode: Meter = field(default_factory=lambda: Meter("decode"))
    faces: Meter = field(default_factory=lambda: Meter("find faces"))
    bytes: Meter = field(default_factory=lambda: Meter("bytes"))


@dataclass(frozen=True, slots=True)
class ReadPhoto:
    """A photo with its content in memory, and the face that would be stored."""

    photo: Photo
    content: Content
    face: NewFace

    @property
    def size(self) -> int:
        """Bytes of the file; 0 for images and arrays, which are decoded already."""
        return len(self.content) if isinstance(self.content, bytes) else 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """A photo that has been read and, where it may be embedded, decoded.

    Attributes:
        faces: the faces that would be stored, from left to right; one where the bytes are stored already.
        pixels: of each face, uint8 (size, size, 3); empty where the bytes of a file are stored already.
        generation: the id of the model generation that the pixels were made for.
        photo: the photo as it was offered, where it may have to be read again, in place of its content.
        selection: which faces are to be read then.
        spare: whether the bytes are stored already, and the pixels are kept in case that they are removed
            before the photo is added: a photo that is not a file, such as a member of an archive, may not be
            readable a second time.
    """

    faces: tuple[NewFace, ...]
    pixels: tuple[Pixels, ...]
    generation: int
    photo: Photo | None = None
    selection: FaceSelection = AUTO
    spare: bool = False

    @property
    def face(self) -> NewFace:
        """The first of the faces; all have the same path, identity and bytes."""
        return self.faces[0]

    @property
    def is_new(self) -> bool:
        """Whether the photo is to be embedded."""
        return bool(self.pixels) and not self.spare


@dataclass(frozen=True, slots=True)
class Ready:
    """An embedded batch, ready to be stored.

    Attributes:
        photos: without the pixels that were embedded.
        vectors: (m, d) float32, of the faces of the photos that were embedded.
        has_vector: for each of the `Prepared` photos, whether its faces were embedded.
    """

    photos: tuple[Prepared | Outcome, ...]
    vectors: NDArray[np.float32]
    has_vector: tuple[bool, ...]

    @classmethod
    def joined(cls, batches: Sequence["Ready"]) -> "Ready":
        """Returns one or more batches as one."""
        return cls(
            tuple(photo for batch in batches for photo in batch.photos),
            np.concatenate([batch.vectors for batch in batches]),
            tuple(has for batch in batches for has in batch.has_vector),
        )


def squares(photos: Iterable[Prepared | Outcome]) -> list[Pixels]:
    """Returns the pixels of the faces that are to be embedded, in their order."""
    return [square for one in photos if isinstance(one, Prepared) and one.is_new for square in one.pixels]


def embedded(photos: Iterable[Prepared | Outcome], embedder: Embedder) -> NDArray[np.float32]:
    """Returns the vectors, (m, d) float32, of the faces that are to be embedded, in their order.

    Raises:
        RunError: as `Embedder.embed`.
    """
    found = squares(photos)
    if not found:
        return np.empty((0, embedder.bundle.dimension), np.float32)
    return embedder.embed(np.stack(found)).vectors


def read_photo(photo: Photo) -> ReadPhoto | Outcome:
    """Reads and hashes a photo; returns an Outcome where it cannot be read.

    Raises:
        InputError: an array that is not a picture, or an identity, a path or metadata that cannot be stored.
        MissingDependency: for an address, fsspec is not installed.
    """
    rejected = _unreadable(photo)
    if rejected is not None:
        return rejected
    path, identity = photo.path, photo.identity
    if path is not None and not is_absolute(path):
        raise InputError(f"The path {path!a} cannot be stored: it must be absolute.")
    if identity is not None:
        identity_names.check_identity(identity)
    metadata = decoded(encoded(photo.metadata, path or "the picture"), path or "the picture")
    try:
        content, stamp, host = _content(photo)
        sha256 = pixels.content_sha256(content)
    except UnreadableImage as error:
        return Outcome(path, identity, Status.REJECTED, reason=error.reason, detail=error.detail)
    return ReadPhoto(photo, content, NewFace(identity, path, sha256, metadata, stamp, host))


def read_in_groups(photos: Sequence[Photo], meters: Meters) -> Iterator[list[ReadPhoto | Outcome]]:
    """Reads photos and yields them in groups; a group ends with the file that exceeds 16 MiB.

    Raises:
        InputError, MissingDependency: as `read_photo`.
    """
    group: list[ReadPhoto | Outcome] = []
    held = 0
    for photo in photos:
        with meters.read.working():
            read = read_photo(photo)
        group.append(read)
        size = read.size if isinstance(read, ReadPhoto) else 0
        meters.bytes.add(items=size)
        held += size
        if held > _MAX_HELD_BYTES:
            yield group
            group, held = [], 0
    yield group


def _unreadable(photo: Photo) -> Outcome | None:
    """Returns the outcome of a photo that is known to be unreadable without reading it; None for others."""
    problem = photo.problem
    if problem is None and photo.path is None and photo.content is None:
        problem = Reason.MISSING
    if problem is None and not is_utf8(photo.path or ""):
        problem = Reason.NAME_NOT_UTF8
    if problem is None:
        return None
    shown = None if photo.path is None else readable(photo.path)
    why = dataclasses.replace(photo, problem=problem).why
    return Outcome(shown, photo.identity, Status.REJECTED, reason=problem, detail=why)


def _content(photo: Photo) -> tuple[Content, Stamp | None, str | None]:
    """Returns a photo's content, the stamp of its file, and the host that it was fetched from."""
    content = photo.content
    if content is None or isinstance(content, str | os.PathLike):
        path = photo.path or "" if content is None else os.fspath(content)
        # A host is recorded only for an address that is stored as the path: no other can be fetched again.
        host = host_of(path) if path == photo.path else None
        return *photos.read_stamped(path), host
    return content, None, None


def settled(
    photo: ReadPhoto, stored: "Stored", generation: int, selection: FaceSelection
) -> Prepared | Outcome | None:
    """Returns the outcome of a photo, or the photo to be added without pixels; None where it must be decoded.

    Args:
        photo: as it was read.
        stored: the rows of a snapshot about it and the other photos of its batch.
        generation: the id of the model that serves in the snapshot.
        selection: which faces of the photo are to be read.
    """
    face = stored.under_todays_name(photo.face)
    deduplicator = stored.deduplicator_for(face)
    outcome = deduplicator.decide(0, face, has_vector=False)
    again = Prepared((photo.face,), (), generation, photo.photo, selection)
    if outcome is not None and outcome.status is Status.KNOWN and deduplicator.changes_nothing:
        return again if deduplicator.stamps or stored.is_news(face.host) else outcome
    if outcome is not None and outcome.reason is Reason.SEVERAL_FACES:
        return None  # the name is of the face that would be enrolled: it must be found
    # Any other outcome may change until the batch is added. A file can be read again then; content
    # without a file is decoded now, in case that the stored face with its bytes is gone by then.
    return again if outcome is not None and photo.photo.content is None else None


def decode_photos(
    photos: Sequence[ReadPhoto],
    generation: int,
    reader: PhotoReader,
    decode: Decode,
    meters: Meters,
    *,
    selection: FaceSelection = FaceSelection(),
    stored: Container[str] = (),
) -> list[Prepared | Outcome]:
    """Decodes photos for a model; returns an Outcome for each that cannot be decoded.

    Args:
        photos: as they were read.
        generation: the id of the model generation.
        reader: of that model.
        decode: decodes contents.
        meters: the time of decoding and of face detection is added to them.
        selection: which faces of the photos; a photo with a name must have one.
        stored: the SHA-256 of photos that are stored already: their pixels are `spare`.

    Raises:
        RunError: as `decode`.
    """
    clock = DetectionClock()
    decoded: dict[int, Decoded] = {}
    with meters.decode.working(len(photos)):
        rows_of: dict[FaceSelection, list[int]] = {}
        for row, photo in enumerate(photos):
            rows_of.setdefault(selection.beside(photo.face.identity), []).append(row)
        # Two calls at most: for photos with a name, and for those without.
        for some, rows in rows_of.items():
            found = decode([photos[row].content for row in rows], reader, some, clock=clock)
            decoded |= zip(rows, found, strict=True)
    if reader.detector is not None:
        meters.faces.add(items=len(photos), busy=clock.seconds)
        meters.decode.add(busy=-clock.seconds)
    return [
        _prepared(photo.face, decoded[row], generation, reader, spare=photo.face.sha256 in stored)
        for row, photo in enumerate(photos)
    ]


def _prepared(
    face: NewFace, decoded: Decoded, generation: int, reader: PhotoReader, *, spare: bool
) -> Prepared | Outcome:
    """Returns a decoded photo as it is to be embedded, or its rejection."""
    if isinstance(decoded, UnreadableImage):
        return _rejection(face, decoded)
    if face.identity is not None and len(decoded) > 1:
        shown = f"it shows {len(decoded)} faces, and {face.identity} can be one of them"
        return _rejection(face, UnreadableImage(Reason.SEVERAL_FACES, shown))
    faces = [dataclasses.replace(face, region=_region(image, reader)) for image in decoded]
    return Prepared(tuple(faces), tuple(image.pixels for image in decoded), generation, spare=spare)


def _region(image: FaceImage, reader: PhotoReader) -> FaceRegion | None:
    """Returns the region of a face to be stored; None for a model without a face detector."""
    if reader.detector is None:
        return None
    return FaceRegion() if image.face is None else FaceRegion(image.face, image.sharpness)


def _rejection(face: NewFace, error: UnreadableImage) -> Outcome:
    return Outcome(face.path, face.identity, Status.REJECTED, reason=error.reason, detail=error.detail)


@dataclass(frozen=True, slots=True)
class Stored:
    """The rows of a snapshot that concern some photos.

    Attributes:
        names: current names by former names.
        photos: by SHA-256.
        files: photo id and stamp by path.
        next_face_id: the id of the next new face.
        hosts: that photos were fetched from.
    """

    names: Mapping[str, str]
    photos: Mapping[str, StoredPhoto]
    files: Mapping[str, tuple[int, Stamp | None]]
    next_face_id: int
    hosts: frozenset[str]

    @classmethod
    def of(cls, reader: Reader, faces: Sequence[NewFace]) -> "Stored":
        """Looks up the identities, hashes, paths and hosts of some photos, with one query for each kind."""
        return cls(
            reader.current_names({face.identity for face in faces if face.identity is not None}),
            reader.photos_by_sha256({face.sha256 for face in faces}),
            reader.stamped_files({face.path for face in faces if face.path is not None}),
            reader.gallery().next_face_id,
            reader.hosts() if any(face.host is not None for face in faces) else frozenset(),
        )

    def is_news(self, host: str | None) -> bool:
        """Returns whether a host is given and no photo was enrolled from it before."""
        return host is not None and host not in self.hosts

    def under_todays_name(self, face: NewFace) -> NewFace:
        """Returns a face with the current name of its identity, where its name is an alias."""
        today = self.names.get(face.identity or "")
        return face if today is None else dataclasses.replace(face, identity=today)

    def deduplicator(
        self,
        contested: Set[int] = frozenset(),
        follow: Callable[[Iterable[str]], Iterable[int]] = lambda paths: (),
    ) -> Deduplicator:
        """Returns the deduplicator of all these photos; `contested` and `follow` are passed on to it."""
        owners = {path: number for path, (number, _) in self.files.items()}
        stamps = {path: stamp for path, (_, stamp) in self.files.items()}
        return Deduplicator(
            self.photos,
            owners,
            first_id=self.next_face_id,
            stamps=stamps,
            contested=contested,
            follow=follow,
        )

    def deduplicator_for(self, face: NewFace) -> Deduplicator:
        """Returns the deduplicator of one photo alone."""
        photos = {sha: self.photos[sha] for sha in [face.sha256] if sha in self.photos}
        files = {path: self.files[path] for path in [face.path or ""] if path in self.files}
        return dataclasses.replace(self, photos=photos, files=files).deduplicator()


def recognize(reader: Reader, offered: Sequence[Photo]) -> list[Outcome | None]:
    """Returns for each photo the outcome `KNOWN` if it is an unchanged file; None where it must be read."""
    paths = [_path_read_later(photo) for photo in offered]
    named = {one.identity for one in offered if one.identity is not None and is_utf8(one.identity)}
    files = reader.known_files({path for path in paths if path is not None})
    today = reader.current_names(named) if files else {}
    return [
        _unchanged_file(one, files[path], today) if path in files else None
        for one, path in zip(offered, paths, strict=True)
    ]


def _path_read_later(photo: Photo) -> str | None:
    """Returns the path of a photo that is read from its path; None for other photos."""
    readable_later = photo.problem is None and photo.content is None
    return photo.path if readable_later and is_utf8(photo.path or "") else None


def _unchanged_file(photo: Photo, known: KnownFile, today: Mapping[str, str]) -> Outcome | None:
    """Returns the outcome of a photo with an unchanged file and no new identity or metadata; else None."""
    identity = today.get(photo.identity or "", photo.identity)
    if known.stamp is None or identity not in (None, *known.identities):
        return None
    if any(photo.metadata.keys() - metadata.keys() for metadata in known.metadata):
        return None
    try:
        status = os.stat(photo.path or "")
    except OSError:
        return None  # reading the photo gives the reason
    if Stamp.of(status) != known.stamp or not stat.S_ISREG(status.st_mode):
        return None
    number, *further = known.face_ids
    return Outcome(photo.path, identity, Status.KNOWN, number, further_ids=tuple(further))
