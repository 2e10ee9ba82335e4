"""Sources: the photos that faces came from, embedded again where they still are what they were."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from retrieval import photos, pixels
from retrieval.archives import Shelf
from retrieval.bundle import Preprocessing
from retrieval.embedder import Embedder
from retrieval.errors import UnreadableImage
from retrieval.store import Face
from retrieval.vectors import Ids, Vectors

_BATCH = 64


@dataclass(frozen=True)
class Embedded:
    """Some faces' vectors (n, d) by their ids (n,), and the faces whose photos are gone or have changed."""

    ids: Ids
    vectors: Vectors
    lost: tuple[Face, ...]


def embed_again(faces: Iterable[Face], embedder: Embedder) -> Iterator[Embedded]:
    """Embeds faces from their photos, batch by batch. Only bytes of the same SHA-256 will do."""
    preprocessing = embedder.bundle.preprocessing
    faces = iter(faces)
    with Shelf() as shelf:
        yield from _in_batches(faces, embedder, partial(_square, shelf=shelf, preprocessing=preprocessing))


def _in_batches(
    faces: Iterator[Face], embedder: Embedder, square_of: Callable[[Face], pixels.Pixels | None]
) -> Iterator[Embedded]:
    while batch := list(islice(faces, _BATCH)):
        squares: list[pixels.Pixels] = []
        ids: list[int] = []
        lost: list[Face] = []
        for face in batch:
            square = square_of(face)
            if square is None:
                lost.append(face)
            else:
                squares.append(square)
                ids.append(face.id)
        vectors = np.empty((0, embedder.bundle.dimension), np.float32)
        if squares:
            vectors = embedder.embed(np.stack(squares)).vectors
        yield Embedded(np.asarray(ids, np.int64), vectors, tuple(lost))


def _square(face: Face, *, shelf: Shelf, preprocessing: Preprocessing) -> pixels.Pixels | None:
    """The pixels of a face's photo, from the first of its files that still has its bytes."""
    for path in face.paths:
        try:
            content, _ = photos.read_from(shelf, path)
            if pixels.content_sha256(content) == face.sha256:
                return pixels.read(content, **preprocessing.stated())
        except UnreadableImage:
            continue
    return None
