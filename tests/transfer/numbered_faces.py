"""Numbered faces with vectors and names that a lossy conversion would change, and readers of a gallery."""

import hashlib
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.database.records import NewFace
from retrieval.embedding.outcome import Outcome
from retrieval.gallery.gallery import Gallery

Row = tuple[str, str | None, tuple[str, ...], bytes]  # SHA-256, identity, paths, vector

D = 2048
NAMES = ("Zoë", "Зоя Иванова", "山田 太郎", 'O\'Brien, "Pat"', "🙂", None)


def digest_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def vector_of(number: int) -> NDArray[np.float32]:
    """Returns a different vector for each face, with values that a lossy conversion would change."""
    vector = np.random.default_rng(number).standard_normal(D).astype(np.float32)
    vector[:4] = -0.0, 1e-45, np.float32(1) + np.finfo(np.float32).eps, 1e15
    return vector


def face(number: int) -> NewFace:
    return NewFace(NAMES[number % len(NAMES)], f"/photos/ünïcode {number}.jpg", digest_of(number))


def add(gallery: Gallery, first: int, count: int) -> list[Outcome]:
    """Enrolls the faces with these numbers, in one transaction."""
    numbers = range(first, first + count)
    return gallery.enroll_vectors([face(n) for n in numbers], np.stack([vector_of(n) for n in numbers]))


def contents(gallery: Gallery) -> set[Row]:
    """Returns everything that an import must restore, except metadata."""
    with gallery.vault.store.read() as reader:
        state = gallery.vault.state(reader)
        stored = {face.id: face for page in reader.all_faces() for face in page}
        vectors = {
            int(number): row.tobytes()
            for block in state.vectors.blocks()
            for number, row in zip(block.ids, block.matrix, strict=True)
        }
    assert vectors.keys() == stored.keys()
    return {(f.sha256, f.identity, f.paths, vectors[f.id]) for f in stored.values()}


def said(gallery: Gallery) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the metadata of faces, by SHA-256, and of people, by name; without empty ones."""
    with gallery.vault.store.read() as reader:
        stored = [face for page in reader.all_faces() for face in page if face.metadata]
        people = reader.identity_metadata([name for name in NAMES if name is not None])
    return (
        {face.sha256: face.metadata for face in stored},
        {name: metadata for name, metadata in people.items() if metadata},
    )


@contextmanager
def disk_that_takes(size: int) -> Iterator[None]:
    """Limits the size of files to `size` bytes, for the length of a with statement."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
