"""Vectors for benchmarks: real embeddings grown to any number of rows, and isotropic vectors.

A grown vector is `a + u (b - a) + s (c - d)`: a real embedding, moved by a share u (uniform in 0..1) towards
one of its five nearest neighbours, as between two photos of one person (the idea of SMOTE, Chawla et al.
2002), plus noise that is a difference of two real embeddings, so that it is in their span and varies as they
do. s is measured: with it, as many grown vectors as there are real ones have the same median distance to the
nearest neighbour as the real ones. Without the noise, a million grown vectors would be far closer together
than photos.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.sources import photos

Vectors = NDArray[np.float32]

_NEIGHBOURS = 5
_BLOCK = 8192
# Number of grown vectors that are searched with while the noise is measured.
_NOISE_QUERIES = 2048


def embeddings(model: Path, folder: Path, cache: Path | None = None) -> Vectors:
    """Returns the embeddings (n, d) of every photo in a folder, ordered by path; or from `cache`."""
    if cache is not None and cache.exists():
        return np.asarray(np.load(cache), np.float32)
    bundle = ModelBundle.load(model)
    embedder = Embedder.open(bundle)
    found = [photo.path for photo in photos.scan([folder]) if photo.problem is None]
    parts = []
    for start in range(0, len(found), 64):
        batch = [bundle.load_photo_reader().square(path) for path in found[start : start + 64]]
        parts.append(embedder.embed(np.stack(batch)).vectors)
        if start % 1024 == 0:
            print(f"embedded {start:,} of {len(found):,} photos", file=sys.stderr)
    vectors = np.concatenate(parts)
    if cache is not None:
        np.save(cache.with_suffix(".part.npy"), vectors)
        os.replace(cache.with_suffix(".part.npy"), cache)
    return vectors


@dataclass(frozen=True)
class Growth:
    """The parameters for growing real vectors (n, d).

    Attributes:
        real: the embeddings.
        neighbours: (n, 5) rows of the nearest neighbours of each.
        noise: the factor s.
    """

    real: Vectors
    neighbours: NDArray[np.int64]
    noise: float

    @classmethod
    def of(cls, real: Vectors) -> "Growth":
        """Measures the noise factor, on as many grown vectors as there are real ones."""
        distances, neighbours = _nearest(real, len(real), _NEIGHBOURS)
        wanted = float(np.median(distances[:, 0]))
        low, high = 0.0, 1.0
        for _ in range(8):
            middle = (low + high) / 2
            grown = np.concatenate(list(cls(real, neighbours, middle).blocks(len(real), seed=1)))
            found = float(np.median(_nearest(grown, _NOISE_QUERIES, 1)[0]))
            low, high = (middle, high) if found < wanted else (low, middle)
        return cls(real, neighbours, (low + high) / 2)

    def blocks(self, rows: int, *, seed: int) -> Iterator[Vectors]:
        """Yields grown vectors in blocks of at most 8192; the same seed gives the same vectors."""
        rng = np.random.default_rng(seed)
        for start in range(0, rows, _BLOCK):
            count = min(_BLOCK, rows - start)
            a, c, d = rng.integers(0, len(self.real), (3, count))
            b = self.neighbours[a, rng.integers(0, self.neighbours.shape[1], count)]
            u = rng.random((count, 1), np.float32)
            grown = self.real[a] + u * (self.real[b] - self.real[a])
            grown += np.float32(self.noise) * (self.real[c] - self.real[d])
            yield grown


def isotropic(rows: int, dimension: int, *, seed: int) -> Iterator[Vectors]:
    """Yields vectors of independent standard normal numbers: no direction has more variance than another."""
    rng = np.random.default_rng(seed)
    for start in range(0, rows, _BLOCK):
        yield rng.standard_normal((min(_BLOCK, rows - start), dimension), np.float32)


def _nearest(vectors: Vectors, asked: int, count: int) -> tuple[Vectors, NDArray[np.int64]]:
    """Returns distances to, and rows of, the nearest neighbours of each of the first `asked` vectors."""
    asked = min(asked, len(vectors))
    lengths = np.einsum("ij,ij->i", vectors, vectors)
    distances = np.empty((asked, count), np.float32)
    rows = np.empty((asked, count), np.int64)
    for start in range(0, asked, 1024):
        part = slice(start, min(start + 1024, asked))
        squares = lengths[part, None] + lengths - 2 * vectors[part] @ vectors.T
        squares[np.arange(part.stop - start), np.arange(start, part.stop)] = np.inf
        nearest = np.argpartition(squares, count, axis=1)[:, :count]
        found = np.take_along_axis(squares, nearest, axis=1)
        order = np.argsort(found, axis=1)
        rows[part] = np.take_along_axis(nearest, order, axis=1)
        distances[part] = np.sqrt(np.maximum(np.take_along_axis(found, order, axis=1), 0))
    return distances, rows
