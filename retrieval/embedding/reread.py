"""Rereading: the photos that stored faces came from are embedded again if their bytes are unchanged."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from retrieval.database.records import Face
from retrieval.errors import Reason, UnreadableImage
from retrieval.images import pixels
from retrieval.index.segments import Ids, Vectors
from retrieval.models.bundle import Preprocessing
from retrieval.models.embedder import Embedder
from retrieval.sources import photos
from retrieval.sources.archives import Shelf
from retrieval.sources.remote import NOTHING_FETCHED, Fetching, NotFetched

_BATCH_PHOTOS = 64


@dataclass(frozen=True)
class Embedded:
    """Some faces embedded again, and those that could not be.

    Attributes:
        ids, vectors: (n,) the faces', and (n, d) theirs.
        lost: faces whose photos cannot be read, are gone or have changed.
        reasons: of each lost face by its id, in words.
        unfetched: ids of the lost faces that have an address which nobody allowed to be fetched.
    """

    ids: Ids
    vectors: Vectors
    lost: tuple[Face, ...]
    reasons: Mapping[int, str]
    unfetched: frozenset[int]


def embed_again(
    faces: Iterable[Face], embedder: Embedder, fetching: Fetching = NOTHING_FETCHED
) -> Iterator[Embedded]:
    """Embeds faces from their photos, batch by batch. Only bytes of the same SHA-256 will do.

    Photos at addresses are fetched only as `fetching` allows it.
    """
    preprocessing = embedder.bundle.preprocessing
    faces = iter(faces)
    with Shelf() as shelf:
        read = partial(photos.read_stored, shelf, fetching=fetching)
        yield from _in_batches(faces, embedder, partial(_square, read=read, preprocessing=preprocessing))


def _in_batches(
    faces: Iterator[Face],
    embedder: Embedder,
    square_of: Callable[[Face], pixels.Pixels | UnreadableImage],
) -> Iterator[Embedded]:
    while batch := list(islice(faces, _BATCH_PHOTOS)):
        squares: list[pixels.Pixels] = []
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
    face: Face, *, read: Callable[[str], bytes], preprocessing: Preprocessing
) -> pixels.Pixels | UnreadableImage:
    """The pixels of a face's photo, from the first of its files that still has its bytes, or why not.

    Of several reasons it is that an address was not fetched, which the caller can mend, or else the last.
    """
    problem = UnreadableImage(Reason.MISSING, "it was enrolled without a file")
    for path in face.paths:
        try:
            content = read(path)
            if pixels.content_sha256(content) == face.sha256:
                return pixels.read(content, **preprocessing.stated())
            found = UnreadableImage(Reason.MISSING, "the file has other bytes by now")
        except UnreadableImage as error:
            found = error
        if not isinstance(problem, NotFetched):
            problem = found
    return problem
