"""The write stage of enrollment: compares faces with the stored ones and commits them with their vectors."""

import dataclasses
import re
from collections.abc import Iterable, Sequence, Set
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.database.identity_names import check_identity
from retrieval.database.metadata import encoded
from retrieval.database.reader import Reader
from retrieval.database.records import FaceRegion, Generation, NewFace
from retrieval.database.tables import face_table
from retrieval.database.writer import Writer
from retrieval.embedding.outcome import Deduplicator, Outcome, Status
from retrieval.embedding.reading import Stored
from retrieval.errors import InputError, ModelMismatch, UnreadableImage
from retrieval.gallery.active_model import ActiveModel
from retrieval.images.pixels import content_sha256, read_bytes
from retrieval.index.searched import checked_vectors
from retrieval.index.segments import Ids
from retrieval.models.engine import PrecisionDrift
from retrieval.system.garbage import collection_paused
from retrieval.system.paths import is_absolute, is_url, is_utf8

_SHA256: Final = re.compile("[0-9a-f]{64}")

# Files that are read at most, while other writers wait, to find faces that were renamed in a circle.
_MAX_FOLLOWED: Final = 10_000


class FaceWriter:
    """Adds faces to an open gallery. Consecutive additions extend one entry of the audit log."""

    def __init__(self, model: ActiveModel) -> None:
        self._model = model
        self._vault = model.vault
        self._entry: int | None = None
        self._drift: PrecisionDrift | None = None

    def add_vectors(
        self, faces: Sequence[NewFace], vectors: NDArray[Any], fingerprint: str | None
    ) -> list[Outcome]:
        """Adds faces with existing embeddings; see `Gallery.enroll_vectors`."""
        _check_faces(faces, vectors)
        generation = self._model.current()
        if fingerprint not in (None, generation.fingerprint):
            raise ModelMismatch(
                f"The gallery {self._vault.name} has another model (fingerprint "
                f"{generation.fingerprint[:12]}) than made these vectors ({str(fingerprint)[:12]})."
            )
        step = self._vault.rows_at_a_time(generation)
        outcomes: list[Outcome] = []
        contested: set[int] = set()
        for start in range(0, len(faces), step):
            part = slice(start, start + step)
            added = self.add(faces[part], vectors[part], generation=generation.id, contested=contested)
            outcomes += [outcome for outcome in added if outcome is not None]
        return outcomes

    def add(
        self,
        faces: Sequence[NewFace],
        vectors: NDArray[Any],
        *,
        has_vector: Sequence[bool] | None = None,
        offers: Sequence[int] | None = None,
        generation: int | None = None,
        contested: set[int] | None = None,
    ) -> list[Outcome | None]:
        """Adds faces in one transaction.

        Args:
            faces: the faces.
            vectors: (m, d), one for each face that has a vector, in order.
            has_vector: for each face, whether it has a vector; None if all have one.
            offers: for each face, the number of the photo that was read; None for faces of vectors.
            generation: number of the generation that the faces were prepared for; None accepts any.
            contested: ids of photos that are kept even if other bytes take their last path. Photos with bytes
                that are offered under another name now, or that lie at the path of a renamed file, are added
                to the set. A caller that passes the same set for a whole run loses none of these photos.

        Returns:
            One Outcome per face, in order; None for a face without a vector if its bytes are not stored.

        Raises:
            ModelMismatch: another generation than the given one is active.
            StorageError, GalleryBusy: nothing was added.
        """
        has_vector = [True] * len(faces) if has_vector is None else has_vector
        contested = set() if contested is None else contested
        # With 8,192 faces a call, the collector took a seventh of the processor's time. While this call waits
        # for another writer, the other threads of a service need it.
        with self._vault.writing() as writer, collection_paused():
            current = self._vault.serving(writer)
            if generation not in (None, current.id):
                raise self._model.switched()
            checked = checked_vectors(vectors, current.dimension)
            stored = Stored.of(writer, faces)
            faces = [stored.under_todays_name(face) for face in faces]
            deduplicator = stored.deduplicator(contested, partial(_photos_reached_by_paths, writer))
            outcomes = [
                deduplicator.decide(row, face, has_vector=has, offer=None if offers is None else offers[row])
                for row, (face, has) in enumerate(zip(faces, has_vector, strict=True))
            ]
            contested |= deduplicator.contested
            if not deduplicator.changes_nothing:
                vector_rows = np.cumsum(has_vector) - 1
                self._apply(writer, current, deduplicator, checked, vector_rows, contested)
                self._log_enrolled(writer, len(deduplicator.new))
            else:
                writer.set_stamps(deduplicator.stamps)
            writer.add_hosts(_hosts(faces, outcomes))
        return outcomes

    def _log_enrolled(self, writer: Writer, faces: int) -> None:
        """Writes the audit log; a new entry starts when the drift of distances becomes known or changes."""
        drift = self._model.drift
        extend = self._entry if drift == self._drift else None
        self._drift = drift
        detail = {} if drift is None else dataclasses.asdict(drift)
        self._entry = self._vault.log(writer, "enroll", faces=faces, extend=extend, **detail)

    def _apply(
        self,
        writer: Writer,
        generation: Generation,
        deduplicator: Deduplicator,
        vectors: NDArray[np.float32],
        vector_rows: Ids,
        contested: Set[int],
    ) -> None:
        """Stores the changes of `deduplicator`; row i of the batch has the vector `vector_rows[i]`."""
        first = self._vault.reserve(writer, len(deduplicator.new))
        ids = np.arange(first, first + len(deduplicator.new), dtype=np.int64)
        rows = vector_rows[[row for row, _ in deduplicator.new]] if deduplicator.new else vector_rows[:0]
        if not deduplicator.orphaned:
            everything = len(rows) == len(vectors)  # usual in bulk; saves a copy of 64 MB
            with self._vault.appending(writer, generation, ids, vectors if everything else vectors[rows]):
                _store_rows(writer, first, deduplicator)
            return
        _store_rows(writer, first, deduplicator)
        gone = writer.without_files(deduplicator.orphaned - contested)
        self._vault.remove(writer, gone)
        # If one path occurs twice in a batch with different bytes, only the later face is kept.
        stays = ~np.isin(ids, np.asarray(gone, np.int64))
        self._vault.append(writer, generation, ids[stays], vectors[rows[stays]])


def _check_faces(faces: Sequence[NewFace], vectors: NDArray[Any]) -> None:
    """Checks that faces can be stored, and that there are as many vectors as faces.

    Raises:
        InputError: a face cannot be stored, or the number of vectors differs.
    """
    for face in faces:
        if not _SHA256.fullmatch(face.sha256):
            raise InputError(f"{face.sha256!a} is not a SHA-256 in hexadecimal digits.")
        if face.path is not None and not (is_utf8(face.path) and is_absolute(face.path)):
            raise InputError(f"The path {face.path!a} cannot be stored: it must be absolute, in Unicode.")
        if face.metadata != {}:
            encoded(face.metadata, face.path or face.sha256)
        _check_region(face)
    for name in dict.fromkeys(face.identity for face in faces if face.identity is not None):
        check_identity(name)
    if len(faces) != len(vectors):
        raise InputError(f"{len(faces):,} faces came with {len(vectors):,} vectors; give as many of both.")


def _check_region(face: NewFace) -> None:
    if face.region is not None:
        try:
            FaceRegion.of_json(face.region.as_json())
        except (ValueError, TypeError) as error:
            raise InputError(
                f"The region of {face.path or face.sha256} cannot be stored: {error}."
            ) from error


def _photos_reached_by_paths(reader: Reader, paths: Iterable[str]) -> set[int]:
    """Returns the ids of photos with bytes at known paths now, then at paths of these photos, and so on."""
    found: set[int] = set()
    visited: set[str] = set()
    pending = list(paths)
    while pending and len(visited) < _MAX_FOLLOWED:
        path = pending.pop()
        if path in visited or is_url(path):
            continue
        visited.add(path)
        try:
            digest = content_sha256(read_bytes(path))
        except UnreadableImage:
            continue
        for photo in reader.photos_by_sha256({digest}).values():
            found.add(photo.id)
            pending += photo.paths
    return found


def _hosts(faces: Sequence[NewFace], outcomes: Sequence[Outcome | None]) -> set[str]:
    """Returns the hosts from which photos were fetched, except rejected photos."""
    return {
        face.host
        for face, outcome in zip(faces, outcomes, strict=True)
        if face.host is not None and outcome is not None and outcome.status is not Status.REJECTED
    }


def _store_rows(writer: Writer, first: int, deduplicator: Deduplicator) -> None:
    writer.add_faces(first, [face for _, face in deduplicator.new], deduplicator.photos)
    writer.remove_files(deduplicator.paths)
    writer.add_files(deduplicator.paths.items(), deduplicator.stamps)
    writer.set_stamps({path: s for path, s in deduplicator.stamps.items() if path not in deduplicator.paths})
    writer.set_metadata(face_table, deduplicator.metadata)
    for number, name in deduplicator.names.items():
        writer.name_face(number, name)
    if deduplicator.names:
        writer.remove_orphaned_identities()
