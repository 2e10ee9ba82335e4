"""Suspects, for repairs: faces that a damaged model may have embedded, until their photos are embedded again.

A repair records the suspects in the database before it mends the model. They stay suspects until they are
compared with their photos or removed, also if the repair ends early or another copy of the model is used.
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

# Faces that are compared first. If none of them differs, the others are not compared, and a note says so.
SAMPLE: Final = 256
# The greatest difference between two vectors of one photo, relative to their length. Vectors of one photo
# differ by 1e-6 between engines and by 1e-2 between precisions. Vectors of two photos of one person, or of
# another network, differ by more than 1e-1.
TOLERANCE: Final = 5e-2


@dataclass(frozen=True)
class Compared:
    """The result of comparing faces of a generation with new embeddings of their photos.

    Attributes:
        suspects: how many faces there were to compare.
        reembedded: how many of them were embedded again.
        ids, vectors: (n,) ids and (n, d) float32 new embeddings, of the faces with another stored vector.
        lost: faces that could not be embedded again: their photos are unreadable, gone or changed.
    """

    suspects: int
    reembedded: int
    ids: Ids
    vectors: Vectors
    lost: tuple[Face, ...]

    @property
    def is_complete(self) -> bool:
        """Whether no suspect was skipped because the sample agrees."""
        return self.reembedded + len(self.lost) == self.suspects


def compare(
    vault: Vault,
    generation: Generation,
    embedder: Callable[[Generation], Embedder],
    suspects: Ids,
    fetching: Fetching = NOTHING_FETCHED,
) -> Compared:
    """Embeds suspects again and returns those with another vector: of a sample, or of all if one differs.

    Args:
        vault: the gallery's.
        generation: the generation of the model.
        embedder: loads the model; not called if there is nothing to compare.
        suspects: ids of the faces; each has a vector.
        fetching: which photos at addresses may be fetched.

    Raises:
        BundleError: the model cannot be loaded.
    """
    suspects = np.sort(suspects)
    nothing = np.empty(0, np.int64), np.empty((0, generation.dimension), np.float32)
    if not len(suspects):
        return Compared(0, 0, *nothing, ())
    loaded = embedder(generation)
    # The sample is spread evenly over the ids, including the first and the last: damage that has lasted until
    # now affects the newest faces.
    sample = suspects[np.unique(np.linspace(0, len(suspects) - 1, SAMPLE).astype(np.int64))]
    found = _compare_all(vault, generation, loaded, sample, fetching)
    rest = np.setdiff1d(suspects, sample)
    # A missing photo says nothing about the other faces: another face is compared in its place.
    while len(rest) and not len(found.ids) and found.reembedded < SAMPLE:
        some, rest = np.split(rest, [SAMPLE - found.reembedded])
        found = _combined(found, _compare_all(vault, generation, loaded, some, fetching))
    if len(rest) and len(found.ids):
        found = _combined(found, _compare_all(vault, generation, loaded, rest, fetching))
    return replace(found, suspects=len(suspects))


def _combined(one: Compared, other: Compared) -> Compared:
    return Compared(
        0,
        one.reembedded + other.reembedded,
        np.concatenate([one.ids, other.ids]),
        np.concatenate([one.vectors, other.vectors]),
        (*one.lost, *other.lost),
    )


def _compare_all(
    vault: Vault, generation: Generation, embedder: Embedder, ids: Ids, fetching: Fetching
) -> Compared:
    with vault.store.read() as reader:
        faces = list(reader.faces(ids.tolist()).values())
        before = _stored_vectors(vault, reader, generation, ids)
        shared = reader.in_shared_photos(ids.tolist())
    differing_ids, differing, lost, reembedded = [], [], list[Face](), 0
    for part in embed_again(faces, embedder, fetching, shared=shared):
        lost += part.lost
        reembedded += len(part.ids)
        for number, vector in zip(part.ids.tolist(), part.vectors, strict=True):
            old = before[number].astype(np.float64)
            # `not <=`, because a comparison with a vector that is not finite is false.
            if not np.linalg.norm(vector - old) <= TOLERANCE * np.linalg.norm(vector):
                differing_ids.append(number)
                differing.append(vector)
    vectors = np.stack(differing) if differing else np.empty((0, generation.dimension), np.float32)
    return Compared(0, reembedded, np.asarray(differing_ids, np.int64), vectors, tuple(lost))


def _stored_vectors(vault: Vault, reader: Reader, generation: Generation, ids: Ids) -> dict[int, Vectors]:
    flat = vault.vectors(generation)
    found: dict[int, Vectors] = {}
    for segment in reader.segments(generation.id):
        here, matrix = flat.rows(segment.id)
        for place in np.flatnonzero(np.isin(here, ids)).tolist():
            found[int(here[place])] = matrix[place]
    return found


def replace_vectors(vault: Vault, generation: Generation, found: Compared) -> int:
    """Replaces stored vectors by the new embeddings of their photos; returns how many were replaced.

    Raises:
        StorageError, GalleryBusy: nothing was replaced.
    """
    with vault.writing() as writer:
        # Faces that were erased meanwhile are not added again.
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
    """Records as suspects the faces that damaged models may have embedded.

    These are all faces that were enrolled since the last comparison with each model.

    Args:
        vault: the gallery's.
        folders: the folders of the damaged models, relative to the gallery.

    Raises:
        StorageError, GalleryBusy: nothing was recorded.
    """
    if not folders:
        return
    # A damaged model may prevent ordinary writes: deferred work and the removal of leftovers wait.
    with vault.noting() as writer:
        end = writer.gallery().next_face_id
        for one in writer.generations().values():
            if one.folder in folders:
                writer.set_suspects(one.id, [*writer.suspects(one.id), (one.checked_before or 0, end)])


def record_comparison(vault: Vault, generation: Generation, found: Compared) -> None:
    """Records the result of a comparison: only faces without their photos stay suspects.

    Raises:
        StorageError, GalleryBusy: nothing was recorded; all stay suspects.
    """
    with vault.writing() as writer:
        before = writer.suspects(generation.id)
        proven = generation.checked_before or 0
        # Only the first range can extend the proven ids: faces between two ranges were not compared.
        if found.is_complete and before and before[0][0] <= proven < before[0][1]:
            writer.set_checked_before(generation.id, before[0][1])
        writer.set_suspects(generation.id, ((face.id, face.id + 1) for face in found.lost))
