"""Rereading: embeds stored faces again from their photos, for `reembed` and `repair`.

A photo is used only if its bytes still have the stored SHA-256. A model with a face detector finds the faces
of the photo again, and the one at the stored place is embedded.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

import numpy as np

from retrieval.database.records import Face
from retrieval.errors import Reason, UnreadableImage
from retrieval.images import pixels
from retrieval.images.photo_reader import FaceSelection, PhotoReader
from retrieval.images.picture import Pixels
from retrieval.index.segments import Ids, Vectors
from retrieval.models.embedder import Embedder
from retrieval.sources import photos
from retrieval.sources.archives import Shelf
from retrieval.sources.remote import NOTHING_FETCHED, Fetching, NotFetched

_BATCH_PHOTOS = 64

# A face that was enrolled is taken whatever its size: the limit of its enrollment is not known.
_AS_ENROLLED: Final = FaceSelection(min_side=0)


@dataclass(frozen=True)
class Embedded:
    """A batch of faces embedded again, and the faces of the batch that could not be.

    Attributes:
        ids: (n,) int64, of the embedded faces.
        vectors: (n, d) float32, of the same faces.
        lost: faces with photos that cannot be read, are gone or have changed.
        reasons: a text for each lost face, by its id.
        unfetched: ids of the lost faces that have an address which the caller did not allow to be fetched.
    """

    ids: Ids
    vectors: Vectors
    lost: tuple[Face, ...]
    reasons: Mapping[int, str]
    unfetched: frozenset[int]


def embed_again(
    faces: Iterable[Face],
    embedder: Embedder,
    fetching: Fetching = NOTHING_FETCHED,
    *,
    shared: Container[int] = (),
) -> Iterator[Embedded]:
    """Yields faces embedded again from their photos, in batches of 64.

    A photo is used only if its bytes have the stored SHA-256.

    Args:
        faces: the faces.
        embedder: the model.
        fetching: which photos at addresses may be fetched.
        shared: ids of those that are not the only faces of their photos: a model without a face detector
            cannot tell them apart.
    """
    faces = iter(faces)
    with Shelf() as shelf:
        read = partial(photos.read_stored, shelf, fetching=fetching)
        square = partial(_square, shared=shared, read=read, reader=embedder.photo_reader)
        yield from _in_batches(faces, embedder, square)


def _in_batches(
    faces: Iterator[Face],
    embedder: Embedder,
    square_of: Callable[[Face], Pixels | UnreadableImage],
) -> Iterator[Embedded]:
    while batch := list(islice(faces, _BATCH_PHOTOS)):
        squares: list[Pixels] = []
        ids: list[int] = []
        lost: list[Face] = []
        reasons: dict[int, str] = {}
        unfetched: set[int] = set()
        for face in batch:
            square = square_of(face)
            if isinstance(square, UnreadableImage):
                lost.append(face)
                reasons[face.id] = square.detail
                if isinstance(square, NotFetched):
                    unfetched.add(face.id)
            else:
                squares.append(square)
                ids.append(face.id)
        vectors = np.empty((0, embedder.bundle.dimension), np.float32)
        if squares:
            vectors = embedder.embed(np.stack(squares)).vectors
        yield Embedded(np.asarray(ids, np.int64), vectors, tuple(lost), reasons, frozenset(unfetched))


def _square(
    face: Face, *, shared: Container[int], read: Callable[[str], bytes], reader: PhotoReader
) -> Pixels | UnreadableImage:
    """Returns the pixels of a face's photo, from the first of its paths that has its bytes, or an error.

    Of several errors, `NotFetched` is returned, since the caller can allow fetching, and otherwise the last.
    """
    problem = UnreadableImage(Reason.MISSING, "it was enrolled without a file")
    for path in face.paths:
        try:
            content = read(path)
            if pixels.content_sha256(content) == face.sha256:
                return _pixels(face, content, reader, shared=face.id in shared)
            found = UnreadableImage(Reason.MISSING, "the file has other bytes by now")
        except UnreadableImage as error:
            found = error
        if not isinstance(problem, NotFetched):
            problem = found
    return problem


def _pixels(face: Face, content: bytes, reader: PhotoReader, *, shared: bool) -> Pixels:
    """Returns the pixels of a face in its photo.

    Raises:
        UnreadableImage: the photo cannot be read, or the face is not found in it again.
    """
    if face.region is None:
        return reader.read(content, _AS_ENROLLED)[0].pixels
    if face.region.detected is None:
        return reader.read(content, FaceSelection("none"))[0].pixels
    if reader.detector is not None:
        return reader.read_again(content, face.region.detected).pixels
    if shared:
        detail = "it shows several faces, and this model takes the picture as a whole"
        raise UnreadableImage(Reason.SEVERAL_FACES, detail)
    return reader.read(content)[0].pixels
