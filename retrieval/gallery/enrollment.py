"""The stages of enrollment, for `Gallery.enroll` and `bulk.ingest`: photos become faces of a gallery.

A photo is recognized by its file, or it is read, looked up by the SHA-256 of its bytes, decoded, embedded and
committed. `Gallery.enroll` runs the stages one after the other. `bulk.ingest` runs them concurrently.
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
from retrieval.embedding.outcome import Outcome, in_their_places, of_photo
from retrieval.embedding.reading import AUTO, Meters, Prepared, ReadPhoto, Ready, Stored
from retrieval.gallery.active_model import ActiveModel
from retrieval.gallery.face_writer import FaceWriter
from retrieval.images.decoders import Decode, decode_here
from retrieval.images.photo_reader import FaceSelection
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

    def enroll(self, offered: Iterable[Offered], selection: FaceSelection = AUTO) -> list[Outcome]:
        """Enrolls photos through all stages, batch by batch; see `Gallery.enroll`."""
        outcomes: list[Outcome] = []
        found = photos.of(offered)
        while batch := list(islice(found, BATCH)):
            outcomes += self.enroll_prepared(self.prepare_many(batch, selection=selection))
        return outcomes

    def recognize(self, photos: Sequence[Photo]) -> list[Outcome | None]:
        """Stage 1: recognizes photos with files that are unchanged since enrollment, without opening a file.

        Args:
            photos: some dozens of photos; all are looked up in one snapshot.

        Returns:
            For each photo, in order: the outcome of a known photo; None if its bytes have to be read, because
            the file has another size, time or inode, or the photo has another identity or other metadata than
            the stored ones.
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
        """Stage 2 for one image: reads it, and decodes it unless its bytes are enrolled. Thread-safe.

        Args:
            source: a path or an address, bytes, a PIL image or a uint8 array.
            identity: the identity of the person in the image, or None.
            path: the path to store for an image that is not given as a path, such as a member of an archive.
            metadata: stored with a new face; for a known face, only keys that it lacks are added.

        Returns:
            A Prepared for `enroll_prepared`; an Outcome if nothing is left to do.

        Raises:
            InputError: the array is not an image, the identity is not valid Unicode, `path` is not absolute,
                or the metadata cannot be stored.
            MissingDependency: `source` is an address, and fsspec is not installed.
        """
        if isinstance(source, str | os.PathLike):
            photo = Photo(absolute(source), identity, metadata=metadata)
        else:
            photo = Photo(path, identity, metadata=metadata, content=source)
        return self.prepare_many([photo])[0]

    def prepare_many(
        self,
        photos: Sequence[Photo],
        *,
        meters: Meters | None = None,
        decode: Decode = decode_here,
        selection: FaceSelection = AUTO,
    ) -> list[Prepared | Outcome]:
        """Stage 2: reads photos, looks up their bytes, and decodes photos that are new. Thread-safe.

        At most 16 MiB of file contents and one file more are held in memory, and are looked up in one
        snapshot; see `pixels.MAX_BYTES`.

        Args:
            photos: some dozens; a photo with a problem is rejected for that problem.
            meters: the time of each step is added to them.
            decode: decodes the photos that have to be embedded.
            selection: which faces of a photo, for a model with a face detector.

        Returns:
            For each photo, in order, the result of `prepare`.

        Raises:
            InputError, MissingDependency: as `prepare`.
            RunError: as `decode`.
        """
        meters = Meters() if meters is None else meters
        return [
            one
            for group in reading.read_in_groups(photos, meters)
            for one in self._prepare(group, meters, decode, selection)
        ]

    def _prepare(
        self,
        entries: Sequence[Outcome | ReadPhoto],
        meters: Meters,
        decode: Decode,
        selection: FaceSelection,
    ) -> list[Prepared | Outcome]:
        """Looks up photos that were read in one snapshot, and decodes those that have to be embedded."""
        read = [entry for entry in entries if isinstance(entry, ReadPhoto)]
        if not read:
            return [entry for entry in entries if isinstance(entry, Outcome)]
        with meters.look_up.working(len(read)), self._store.read() as reader:
            generation = self._model.refresh(reader).id
            photo_reader = self._model.photo_reader()
            stored = Stored.of(reader, [photo.face for photo in read])
        found = [reading.settled(photo, stored, generation, selection) for photo in read]
        left = [photo for photo, one in zip(read, found, strict=True) if one is None]
        decoded = iter(
            reading.decode_photos(
                left,
                generation,
                photo_reader,
                decode,
                meters,
                selection=selection,
                stored=stored.photos,
            )
        )
        return in_their_places(entries, [next(decoded) if one is None else one for one in found])

    def embed_prepared(self, photos: Sequence[Prepared | Outcome]) -> Ready:
        """Stage 3: embeds the new photos of a batch. This stage uses the processor or the GPU fully.

        Args:
            photos: results of `prepare` or `prepare_many`. Outcomes among them pass through.

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
            dataclasses.replace(one, pixels=()) if isinstance(one, Prepared) and one.is_new else one
            for one in photos
        )
        return Ready(kept, vectors, tuple(photo.is_new for photo in ready))

    def enroll_ready(self, batch: Ready, *, contested: set[int] | None = None) -> list[Outcome]:
        """Stage 4: commits a batch in one transaction. Outcomes in it pass through.

        Args:
            batch: the result of `embed_prepared`.
            contested: ids of photos with bytes that this run was offered under another name. These photos are
                not removed, and the set is extended. None stands for a run of one batch.

        Returns:
            One Outcome per photo, in order.

        Raises:
            StorageError, GalleryBusy: nothing of the batch was enrolled.
            ModelMismatch: the gallery switched models after the photos were prepared.
        """
        ready = [photo for photo in batch.photos if isinstance(photo, Prepared)]
        if not ready:
            return [photo for photo in batch.photos if isinstance(photo, Outcome)]
        embedded = list(zip(ready, batch.has_vector, strict=True))
        found = self._writer.add(
            [face for photo in ready for face in photo.faces],
            batch.vectors,
            has_vector=[has for photo, has in embedded for _ in photo.faces],
            offers=[number for number, photo in enumerate(ready) for _ in photo.faces],
            # The oldest generation: if one photo was prepared for another model, no photo is added.
            generation=min(photo.generation for photo in ready),
            contested=contested,
        )
        of_faces = iter(found)
        added = [self._outcome(photo, list(islice(of_faces, len(photo.faces)))) for photo in ready]
        return in_their_places(batch.photos, added)

    def enroll_prepared(self, photos: Sequence[Prepared | Outcome]) -> list[Outcome]:
        """Stages 3 and 4 for one batch: embeds and commits it.

        Raises:
            StorageError, GalleryBusy: nothing of the batch was enrolled.
            ModelMismatch: the gallery switched models after the photos were prepared.
        """
        return self.enroll_ready(self.embed_prepared(photos))

    def _outcome(self, photo: Prepared, found: Sequence[Outcome | None]) -> Outcome:
        """Returns the outcome of a photo from those of its faces."""
        decided = [one for one in found if one is not None]
        return of_photo(decided) if len(decided) == len(found) else self._enroll_again(photo)

    def _enroll_again(self, photo: Prepared) -> Outcome:
        """Enrolls a photo again if its bytes were stored when it was read, and erased before the commit."""
        if photo.pixels:
            return self.enroll_prepared([dataclasses.replace(photo, spare=False)])[0]
        assert photo.photo is not None  # kept where there are no pixels
        return self.enroll_prepared(self.prepare_many([photo.photo], selection=photo.selection))[0]

    def enroll_vectors(
        self, faces: Sequence[NewFace], vectors: NDArray[Any], *, fingerprint: str | None = None
    ) -> list[Outcome]:
        """Commits faces with existing embeddings; see `Gallery.enroll_vectors`."""
        return self._writer.add_vectors(faces, vectors, fingerprint)
