"""Enrollment: photos become faces of a gallery, stage by stage, so that a pipeline can overlap the stages.

A photo is recognized by its file or read, looked up by the SHA-256 of its bytes, decoded, embedded and
committed. `Gallery.enroll` goes through the stages one after the other, `bulk.ingest` runs them side by side.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.database.records import NewFace
from retrieval.embedding import reading
from retrieval.embedding.outcome import Outcome, in_their_places
from retrieval.embedding.reading import Meters, Prepared, ReadPhoto, Ready, Stored
from retrieval.gallery.active_model import ActiveModel
from retrieval.gallery.face_writer import FaceWriter
from retrieval.images.decoders import Decode, decode_here
from retrieval.images.pixels import ImageSource
from retrieval.sources import photos
from retrieval.sources.photos import Offered, Photo
from retrieval.system.paths import absolute

# Photos that `Enrollment.enroll` embeds and commits together.
BATCH: Final = 32


class Enrollment:
    """The stages of enrolling photos into an open gallery. Safe to share between threads."""

    def __init__(self, model: ActiveModel) -> None:
        self._model = model
        self._store = model.vault.store
        self._writer = FaceWriter(model)

    def enroll(self, offered: Iterable[Offered]) -> list[Outcome]:
        """Takes photos through all stages, batch by batch; see `Gallery.enroll`."""
        outcomes: list[Outcome] = []
        found = photos.of(offered)
        while batch := list(islice(found, BATCH)):
            outcomes += self.enroll_prepared(self.prepare_many(batch))
        return outcomes

    def recognize(self, photos: Sequence[Photo]) -> list[Outcome | None]:
        """Stage 1: tells photos whose files are as they were when they were enrolled, without opening one.

        Args:
            photos: some dozens of photos; all are looked up in one snapshot.

        Returns:
            For each photo, in order: that it is known; None where its bytes have to be looked at, because
            the file has another size, time or inode, or something else is said about it than is stored.
        """
        with self._store.read() as reader:
            return reading.recognize(reader, photos)

    def prepare(
        self,
        source: ImageSource,
        identity: str | None,
        *,
        path: str | None = None,
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> Prepared | Outcome:
        """Stage 2 for one picture: reads it, unless its bytes are enrolled already. May run in any thread.

        Args:
            source: a path or an address, bytes, a PIL image or a uint8 array.
            identity: who is on it, or None.
            path: what a picture is known by that is no path itself, such as a member of an archive.
            metadata: a new face's; of a known one, they fill in what it has no key for.

        Returns:
            What `enroll_prepared` takes; an Outcome when there is nothing left to do.

        Raises:
            InputError: an array that is not a picture, an identity that is not valid Unicode, a `path` that
                is not absolute, or metadata that cannot be stored.
            MissingDependency: an address, and fsspec is not installed.
        """
        if isinstance(source, str | os.PathLike):
            photo = Photo(absolute(source), identity, metadata=metadata)
        else:
            photo = Photo(path, identity, metadata=metadata, content=source)
        return self.prepare_many([photo])[0]

    def prepare_many(
        self, photos: Sequence[Photo], *, meters: Meters | None = None, decode: Decode = decode_here
    ) -> list[Prepared | Outcome]:
        """Stage 2: reads photos, looks up their bytes in one snapshot, and decodes those that are new.

        May run in any thread. Bytes are held of at most 16 MiB of files and of one file more; see
        `pixels.MAX_BYTES`.

        Args:
            photos: some dozens; one with a problem is rejected for it.
            meters: what each step takes is added to them.
            decode: decodes those that have to be embedded.

        Returns:
            For each photo, in order, as `prepare`.

        Raises:
            InputError, MissingDependency: as `prepare`.
            RunError: as `decode`.
        """
        meters = Meters() if meters is None else meters
        return [
            one for some in reading.read_some(photos, meters) for one in self._prepare(some, meters, decode)
        ]

    def _prepare(
        self, entries: Sequence[Outcome | ReadPhoto], meters: Meters, decode: Decode
    ) -> list[Prepared | Outcome]:
        """What is left to do for photos that were read; those that are to be embedded are decoded."""
        read = [entry for entry in entries if isinstance(entry, ReadPhoto)]
        if not read:
            return [entry for entry in entries if isinstance(entry, Outcome)]
        with meters.look_up.working(len(read)), self._store.read() as reader:
            generation = self._model.refresh(reader).id
            preprocessing = self._model.bundle.preprocessing
            stored = Stored.of(reader, [photo.face for photo in read])
        found = [reading.settled(photo, stored, generation) for photo in read]
        left = [photo for photo, one in zip(read, found, strict=True) if one is None]
        with meters.decode.working(len(left)):
            made = reading.decode_photos(left, generation, preprocessing, decode, stored=stored.faces)
            decoded = iter(made)
        return in_their_places(entries, [next(decoded) if one is None else one for one in found])

    def embed_prepared(self, photos: Sequence[Prepared | Outcome]) -> Ready:
        """Stage 3: embeds the new photos of a batch; keeps the processor or the GPU busy.

        Args:
            photos: as `prepare` or `prepare_many` gave them. Outcomes among them pass through.

        Raises:
            ModelMismatch: the gallery switched models after the photos were prepared.
            RunError: as `Embedder.embed`.
        """
        ready = [photo for photo in photos if isinstance(photo, Prepared)]
        vectors = np.empty((0, self._model.bundle.dimension), np.float32)
        if any(photo.is_new for photo in ready):
            generation, embedder = self._model.loaded()
            if any(photo.generation != generation for photo in ready):
                raise self._model.switched()
            vectors = reading.embedded(ready, embedder)
        kept = tuple(
            dataclasses.replace(one, pixels=None) if isinstance(one, Prepared) and one.is_new else one
            for one in photos
        )
        return Ready(kept, vectors, tuple(photo.is_new for photo in ready))

    def enroll_ready(self, batch: Ready, *, contested: set[int] | None = None) -> list[Outcome]:
        """Stage 4: makes a batch durable in one transaction. Outcomes in it pass through.

        Args:
            batch: as `embed_prepared` made it.
            contested: ids of faces whose bytes this run was offered under another name; they are not
                removed, and more are added to it. None is a run of one batch.

        Returns:
            One Outcome a photo, in order.

        Raises:
            StorageError, GalleryBusy: nothing of the batch was enrolled.
            ModelMismatch: the gallery switched models after the photos were prepared.
        """
        ready = [photo for photo in batch.photos if isinstance(photo, Prepared)]
        if not ready:
            return [photo for photo in batch.photos if isinstance(photo, Outcome)]
        found = self._writer.add(
            [photo.face for photo in ready],
            batch.vectors,
            has_vector=batch.has_vector,
            # The oldest of them: if any was prepared for another model, none of the batch is added.
            generation=min(photo.generation for photo in ready),
            contested=contested,
        )
        added = [outcome or self._once_more(photo) for outcome, photo in zip(found, ready, strict=True)]
        return in_their_places(batch.photos, added)

    def enroll_prepared(self, photos: Sequence[Prepared | Outcome]) -> list[Outcome]:
        """Stages 3 and 4 for one batch: embeds it and makes it durable.

        Raises:
            StorageError, GalleryBusy: nothing of the batch was enrolled.
            ModelMismatch: the gallery switched models after the photos were prepared.
        """
        return self.enroll_ready(self.embed_prepared(photos))

    def _once_more(self, photo: Prepared) -> Outcome:
        """Enrolls a photo whose bytes were stored when it was read, and were gone when it was to be added."""
        if photo.pixels is not None:
            return self.enroll_prepared([dataclasses.replace(photo, spare=False)])[0]
        assert photo.photo is not None  # kept where there are no pixels
        return self.enroll_prepared(self.prepare_many([photo.photo]))[0]

    def enroll_vectors(
        self, faces: Sequence[NewFace], vectors: NDArray[Any], *, fingerprint: str | None = None
    ) -> list[Outcome]:
        """Commits faces whose embeddings exist already; see `Gallery.enroll_vectors`."""
        return self._writer.add_vectors(faces, vectors, fingerprint)
