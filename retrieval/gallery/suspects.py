"""Suspects: faces that a damaged model may have embedded, compared with new embeddings of their photos.

A repair notes them in the database before it mends the model, so that neither its end nor another copy of the
model makes them forgotten: they stay suspects until they are compared, or gone.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from retrieval.database.reader import Reader
from retrieval.database.records import Face, Generation
from retrieval.embedding.reread import embed_again
from retrieval.index.segments import Ids, Vectors
from retrieval.models.embedder import Embedder
from retrieval.sources.remote import NOTHING_FETCHED, Fetching
from retrieval.storage.vault import Vault

# Faces that are compared first. Where none of them differs the others are left alone, and said so.
SAMPLE: Final = 256
# Vectors of one photo differ by 1e-6 of their length between engines and by 1e-2 between precisions; those of
# two photos of one person, or of another network, by more than 1e-1.
TOLERANCE: Final = 5e-2


@dataclass(frozen=True)
class Compared:
    """Faces of a generation, embedded again.

    Attributes:
        suspects: how many faces there were to compare.
        looked_at: how many of them were embedded again.
        ids, vectors: (n,) and (n, d) float32, of the faces whose stored vector is another one: what their
            photos give now.
        lost: suspects whose photos are gone or have changed, among those that were to be looked at.
    """

    suspects: int
    looked_at: int
    ids: Ids
    vectors: Vectors
    lost: tuple[Face, ...]

    @property
    def all_looked_at(self) -> bool:
        """Whether none was left alone because the others agree."""
        return self.looked_at + len(self.lost) == self.suspects


def compare(
    vault: Vault,
    generation: Generation,
    embedder: Callable[[Generation], Embedder],
    suspects: Ids,
    fetching: Fetching = NOTHING_FETCHED,
) -> Compared:
    """Embeds suspects again: a sample, or all if any differs.

    Args:
        vault: the gallery's.
        generation: the model's.
        embedder: loads it; not called where there is nothing to compare.
        suspects: the faces, which have vectors.
        fetching: which photos at addresses may be fetched.

    Raises:
        BundleError: the model cannot be loaded.
    """
    suspects = np.sort(suspects)
    nothing = np.empty(0, np.int64), np.empty((0, generation.dimension), np.float32)
    if not len(suspects):
        return Compared(0, 0, *nothing, ())
    loaded = embedder(generation)
    # Evenly over the ids, first and last among them: damage that came and stayed has the newest.
    sample = suspects[np.unique(np.linspace(0, len(suspects) - 1, SAMPLE).astype(np.int64))]
    found = _compare(vault, generation, loaded, sample, fetching)
    rest = np.setdiff1d(suspects, sample)
    # A photo that is gone is no evidence of the others: another one is looked at in its place.
    while len(rest) and not len(found.ids) and found.looked_at < SAMPLE:
        some, rest = np.split(rest, [SAMPLE - found.looked_at])
        found = _both(found, _compare(vault, generation, loaded, some, fetching))
    if len(rest) and len(found.ids):
        found = _both(found, _compare(vault, generation, loaded, rest, fetching))
    return replace(found, suspects=len(suspects))


def _both(one: Compared, other: Compared) -> Compared:
    return Compared(
        0,
        one.looked_at + other.looked_at,
        np.concatenate([one.ids, other.ids]),
        np.concatenate([one.vectors, other.vectors]),
        (*one.lost, *other.lost),
    )


def _compare(
    vault: Vault, generation: Generation, embedder: Embedder, ids: Ids, fetching: Fetching
) -> Compared:
    with vault.store.read() as reader:
        faces = list(reader.faces(ids.tolist()).values())
        before = _vectors(vault, reader, generation, ids)
    apart_ids, apart, lost, looked_at = [], [], list[Face](), 0
    for part in embed_again(faces, embedder, fetching):
        lost += part.lost
        looked_at += len(part.ids)
        for number, vector in zip(part.ids.tolist(), part.vectors, strict=True):
            old = before[number].astype(np.float64)
            # A vector that is not finite differs from everything.
            if not np.linalg.norm(vector - old) <= TOLERANCE * np.linalg.norm(vector):
                apart_ids.append(number)
                apart.append(vector)
    vectors = np.stack(apart) if apart else np.empty((0, generation.dimension), np.float32)
    return Compared(0, looked_at, np.asarray(apart_ids, np.int64), vectors, tuple(lost))


def _vectors(vault: Vault, reader: Reader, generation: Generation, ids: Ids) -> dict[int, Vectors]:
    flat = vault.vectors(generation)
    found: dict[int, Vectors] = {}
    for segment in reader.segments(generation.id):
        here, matrix = flat.rows(segment.id)
        for place in np.flatnonzero(np.isin(here, ids)).tolist():
            found[int(here[place])] = matrix[place]
    return found


def replace_vectors(vault: Vault, generation: Generation, found: Compared) -> int:
    """Puts the vectors that photos give now in the place of those that differ; returns how many.

    Raises:
        StorageError, GalleryBusy: nothing was replaced.
    """
    with vault.writing() as writer:
        # Faces that were forgotten meanwhile stay forgotten.
        alive = np.isin(found.ids, np.fromiter(writer.faces(found.ids.tolist()), np.int64))
        ids, vectors = found.ids[alive], found.vectors[alive]
        if not len(ids):
            return 0
        flat = vault.vectors(generation)
        for segment in writer.segments(generation.id):
            kept = ~np.isin(flat.rows(segment.id)[0], ids)
            if not kept.all():
                left = flat.stored(segment.id, segment.rows, segment.sha256, kept=kept)
                vault.put(writer, generation, [segment.id], [left] if kept.any() else [])
        vault.append(writer, generation, ids, flat.checked(vectors))
        vault.log(writer, "mend", faces=len(ids), generation=generation.id)
    return len(ids)


def note(vault: Vault, folders: Collection[str]) -> None:
    """Notes whom models may have embedded while they were damaged: all that were enrolled since a comparison.

    Args:
        vault: the gallery's.
        folders: of the models.

    Raises:
        StorageError, GalleryBusy: nothing was noted.
    """
    if not folders:
        return
    # The model may be one that nothing can be written with: what is owed can wait, and nothing is tidied.
    with vault.noting() as writer:
        end = writer.gallery().next_face_id
        for one in writer.generations().values():
            if one.folder in folders:
                writer.set_suspects(one.id, [*writer.suspects(one.id), (one.checked_before or 0, end)])


def settle(vault: Vault, generation: Generation, found: Compared) -> None:
    """Notes the result of a comparison: only faces without their photos are suspects from now on.

    Raises:
        StorageError, GalleryBusy: all stay suspects.
    """
    with vault.writing() as writer:
        before = writer.suspects(generation.id)
        proven = generation.checked_before or 0
        # Of faces between ranges nothing is known.
        if found.all_looked_at and before and before[0][0] <= proven < before[0][1]:
            writer.set_checked_before(generation.id, before[0][1])
        writer.set_suspects(generation.id, ((face.id, face.id + 1) for face in found.lost))
