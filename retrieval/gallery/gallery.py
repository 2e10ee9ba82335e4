"""The `Gallery`: a model, rows and vectors in one folder; enrolls, searches and forgets.

What is on disk, and in which order it is written, stands in `retrieval.storage.vault`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.database.filters import Where
from retrieval.database.identity_names import twins
from retrieval.database.records import AuditEntry, Calibration, NewFace, Receipt
from retrieval.embedding import reading
from retrieval.embedding.outcome import Outcome, in_their_places
from retrieval.embedding.reading import Meters, Prepared, ReadPhoto, Ready, Stored
from retrieval.errors import GalleryError, ModelMismatch, StorageError
from retrieval.gallery import annotate as metadata
from retrieval.gallery import identities, integrity, moves, relocation
from retrieval.gallery import reembed as reembedding
from retrieval.gallery.active_model import Serving
from retrieval.gallery.annotate import Annotated
from retrieval.gallery.enrollment import Additions
from retrieval.gallery.image_search import search_pictures
from retrieval.gallery.info import GalleryInfo, gallery_info
from retrieval.gallery.integrity import Repaired, Verification
from retrieval.gallery.moves import Relabelled
from retrieval.gallery.reembed import Reembedded
from retrieval.gallery.relocation import Relocated
from retrieval.gallery.sync import Missing
from retrieval.images import pixels
from retrieval.images.decoders import Decode, decode_here
from retrieval.index.knn import Explanation
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.search import calibration
from retrieval.search.nearest import (
    Found,
    Match,
    PeopleResult,
    PersonMatch,
    Question,
    SearchResult,
    nearest_faces,
    nearest_people,
    vector_of,
)
from retrieval.search.people import checked_rule
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.photos import Offered, Photo
from retrieval.sources.photos import of as photos_of
from retrieval.sources.remote import Fetching
from retrieval.storage import backup as backups
from retrieval.storage import compaction, optimization, ownership
from retrieval.storage.backup import BackedUp, Restored
from retrieval.storage.compaction import Compacted
from retrieval.storage.layout import VECTORS
from retrieval.storage.optimization import Optimized
from retrieval.storage.vault import Vault
from retrieval.system import lock
from retrieval.system.files import is_free, whole_folder, why
from retrieval.system.paths import absolute
from retrieval.transfer import export, import_
from retrieval.transfer.import_ import Imported
from retrieval.transfer.manifest import Export

# How many photos are enrolled at a time by the calls of this module.
_BATCH: Final = 32


class Gallery:
    """Faces under one folder. Safe to share between threads; any number of processes may read."""

    def __init__(self, serving: Serving) -> None:
        self.folder = serving.vault.folder
        self.vault = serving.vault
        self._serving = serving
        self._additions = Additions(serving)

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        bundle: ModelBundle,
        *,
        device: str = "auto",
        engine: str = "auto",
        precision: str = "float32",
        via: str = "library",
        shared: bool = False,
        embedder: Embedder | None = None,
    ) -> "Gallery":
        """Makes an empty gallery with a copy of the bundle, whole or not at all.

        Only its owner may read it, whatever the umask; with `shared` the group of its folder may, too.
        `embedder` is the bundle, loaded already on the device, by the engine and in the precision; once the
        gallery is there, it is closed with it.

        Raises:
            GalleryError: `folder` exists and is not empty.
            BundleError: the bundle's files are not the ones that its card names.
            StorageError: the disk refused, or `folder` is a place that cannot be replaced, such as a mount
                point; name a folder below it.
        """
        with _new_gallery(Path(folder), shared=shared) as made:
            Vault.create(made, bundle)
        gallery = cls.open(folder, device=device, engine=engine, precision=precision, via=via)
        if embedder is not None:
            gallery._serving.take(embedder, bundle.fingerprint)
        return gallery

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str = "auto",
        engine: str = "auto",
        precision: str = "float32",
        read_only: bool = False,
        via: str = "library",
    ) -> "Gallery":
        """Opens a gallery; the network is loaded when it is first needed.

        Args:
            folder: the gallery's.
            device, engine, precision: see `Embedder.open`.
            read_only: refuse every change. Works on media that cannot be written to.
            via: what the audit log says of the caller.

        Raises:
            GalleryError: there is none, or a newer version made it.
            GalleryDamaged: its database is not what it was.
            BundleError, ModelMismatch: its model is missing, damaged or another one.
        """
        vault = Vault.open(Path(folder), read_only=read_only, via=via)
        try:
            serving = Serving(vault, device=device, engine=engine, precision=precision)
        except BaseException:
            vault.close()
            raise
        return cls(serving)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as where it is and how it was opened: another process opens it for itself.

        Raises:
            InputError: it is closed.
        """
        self.vault.store.check_open()
        serving, vault = self._serving, self.vault
        options = {"device": serving.device, "engine": serving.engine, "precision": serving.precision}
        options |= {"via": vault.via}
        return _reopened, (os.path.abspath(self.folder), vault.read_only, options)

    def close(self) -> None:
        """Closes the database and the mapped files; ends what the engine started.

        Every later call is an InputError, but for closing it again.
        """
        self.vault.close()
        self._serving.close()

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def bundle(self) -> ModelBundle:
        """The model that answers searches, as of the last call."""
        return self._serving.bundle

    def require(self, bundle: ModelBundle) -> None:
        """Checks that a bundle is the gallery's own.

        Raises:
            ModelMismatch: it has another fingerprint, so its embeddings cannot be compared.
        """
        if bundle.fingerprint != self.bundle.fingerprint:
            raise ModelMismatch(
                f"The gallery {self.folder} was made with another model (fingerprint "
                f"{self.bundle.fingerprint[:12]}, not {bundle.fingerprint[:12]}); "
                "leave --model out, or enroll into a new gallery."
            )

    @property
    def may_use_gpu(self) -> bool:
        """Whether photos are embedded on a GPU, as far as can be said before the model is loaded."""
        return self._serving.may_use_gpu

    @property
    def embedder(self) -> Embedder:
        """The model, loaded."""
        return self._serving.loaded()[1]

    # Enrolling

    def enroll(self, photos: Iterable[Offered]) -> list[Outcome]:
        """Enrolls photos, batch by batch, each batch durable before the next.

        Args:
            photos: pairs of a picture (a path, bytes, a PIL image or a uint8 array) and an identity, or
                None where nobody knows; or Photos, such as those of `photos.scan`.

        Returns:
            One Outcome a photo, in order. A photo that cannot be read is a rejected one, not an error.

        Raises:
            InputError: what is offered is no photo, or as `prepare`.
            StorageError, GalleryBusy: the batch in flight was not enrolled; those before it were.
        """
        outcomes: list[Outcome] = []
        found = photos_of(photos)
        while batch := list(islice(found, _BATCH)):
            outcomes += self.enroll_prepared(self.prepare_many(batch))
        return outcomes

    def recognize(self, photos: Sequence[Photo]) -> list[Outcome | None]:
        """Tells photos whose files are as they were when they were enrolled, without opening one.

        Returns:
            For each photo, in order: that it is known; None where its bytes have to be looked at, because
            the file has another size, time or inode, or something else is said about it than is stored.
        """
        with self.vault.store.read() as reader:
            return reading.recognize(reader, photos)

    def prepare(
        self,
        source: pixels.ImageSource,
        identity: str | None,
        *,
        path: str | None = None,
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> Prepared | Outcome:
        """Reads a picture, unless its bytes are enrolled already; the part of enrolling that runs in threads.

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
        """As `prepare`, for some photos, with one look into the tables for all.

        Bytes are held of at most 16 MiB of files and of one file more; see `pixels.MAX_BYTES`.

        Args:
            photos: some dozens; one with a problem is rejected for it.
            meters: what each step takes is added to them.
            decode: decodes those that have to be embedded.

        Raises:
            InputError, MissingDependency: as `prepare`.
            RunError: as `decode`.
        """
        meters = Meters() if meters is None else meters
        return [
            one for some in reading.read_some(photos, meters) for one in self._prepare(some, meters, decode)
        ]

    def _prepare(
        self, photos: Sequence[Outcome | ReadPhoto], meters: Meters, decode: Decode
    ) -> list[Prepared | Outcome]:
        """What is left to do for photos that were read; those that are to be embedded are decoded."""
        read = [photo for photo in photos if isinstance(photo, ReadPhoto)]
        if not read:
            return [photo for photo in photos if isinstance(photo, Outcome)]
        with meters.look_up.working(len(read)), self.vault.store.read() as reader:
            generation = self._serving.refresh(reader).id
            preprocessing = self.bundle.preprocessing
            stored = Stored.of(reader, [photo.face for photo in read])
        found = [reading.settled(photo, stored, generation) for photo in read]
        left = [photo for photo, one in zip(read, found, strict=True) if one is None]
        with meters.decode.working(len(left)):
            made = reading.decode_photos(left, generation, preprocessing, decode, stored=stored.faces)
            decoded = iter(made)
        return in_their_places(photos, [next(decoded) if one is None else one for one in found])

    def enroll_prepared(self, photos: Sequence[Prepared | Outcome]) -> list[Outcome]:
        """Embeds one batch and makes it durable in one step. Outcomes among the photos pass through.

        Raises:
            StorageError, GalleryBusy: nothing of the batch was enrolled.
            ModelMismatch: the gallery went over to another model after the photos were prepared.
        """
        return self.enroll_ready(self.embed_prepared(photos))

    def embed_prepared(self, photos: Sequence[Prepared | Outcome]) -> Ready:
        """Embeds one batch; the part of enrolling that keeps the processor or the GPU busy.

        Raises:
            ModelMismatch: the gallery went over to another model after the photos were prepared.
        """
        ready = [photo for photo in photos if isinstance(photo, Prepared)]
        vectors = np.empty((0, self.bundle.dimension), np.float32)
        if any(photo.is_new for photo in ready):
            generation, embedder = self._serving.loaded()
            if any(photo.generation != generation for photo in ready):
                raise self._serving.went_over()
            vectors = reading.embedded(ready, embedder)
        kept = [
            dataclasses.replace(one, pixels=None) if isinstance(one, Prepared) and one.is_new else one
            for one in photos
        ]
        return Ready(tuple(kept), vectors, tuple(photo.is_new for photo in ready))

    def enroll_ready(self, batch: Ready, *, contested: set[int] | None = None) -> list[Outcome]:
        """Makes a batch durable in one step. Outcomes in it pass through.

        Args:
            batch: as `embed_prepared` made it.
            contested: ids of faces whose bytes this run was offered under another name; they are not
                removed, and more are added to it. None is a run of one batch.

        Raises:
            StorageError, GalleryBusy: nothing of the batch was enrolled.
            ModelMismatch: the gallery went over to another model after the photos were prepared.
        """
        ready = [photo for photo in batch.photos if isinstance(photo, Prepared)]
        if not ready:
            return [photo for photo in batch.photos if isinstance(photo, Outcome)]
        # The oldest of them: if any was prepared for another model, none of the batch is added.
        generation = min(photo.generation for photo in ready)
        faces = [photo.face for photo in ready]
        options: dict[str, Any] = {"has_vector": batch.has_vector, "generation": generation}
        found = self._additions.add(faces, batch.vectors, contested=contested, **options)
        added = [o or self._once_more(photo) for o, photo in zip(found, ready, strict=True)]
        return in_their_places(batch.photos, added)

    def _once_more(self, photo: Prepared) -> Outcome:
        """Enrolls a photo whose bytes were stored when it was read, and were gone when it was to be added."""
        if photo.pixels is not None:
            return self.enroll_prepared([dataclasses.replace(photo, spare=False)])[0]
        assert photo.photo is not None  # kept where there are no pixels
        return self.enroll_prepared(self.prepare_many([photo.photo]))[0]

    def enroll_vectors(
        self, faces: Sequence[NewFace], vectors: NDArray[Any], *, fingerprint: str | None = None
    ) -> list[Outcome]:
        """Enrolls faces whose embeddings exist already: some thousand rows become durable at a time.

        Args:
            faces: who, where (absolute paths) and the SHA-256 of the bytes in hex. Metadata that come with
                them are a new face's; of a known one, they fill in what it has no key for.
            vectors: (n, d), made by this gallery's model, in the same order.
            fingerprint: of the model that made them; None takes the caller's word.

        Returns:
            One Outcome a face, in order.

        Raises:
            ModelMismatch: another model than `fingerprint` serves, maybe since a moment ago.
            InputError: not as many vectors as faces, another shape, not finite, a malformed SHA-256 or name.
            StorageError, GalleryBusy: the rows in flight were not enrolled; those before them were.
        """
        return self._additions.add_vectors(faces, vectors, fingerprint)

    # Searching

    def search(
        self,
        image: pixels.ImageSource,
        k: int | None = 5,
        *,
        within: float | None = None,
        where: Where | None = None,
        exclude_self: bool = False,
        explanation: Explanation | None = None,
        fpir: float | None = None,
        max_distance: float | None = None,
    ) -> SearchResult:
        """The k nearest stored photos to a picture, and the classifier's prediction.

        Args:
            image: a path, bytes, a PIL image or a uint8 array.
            k: how many; a gallery that has fewer gives them all. None, with `within`, is all.
            within: the greatest Euclidean distance.
            where: the only faces that may be an answer; this is decided before any is ranked.
            exclude_self: leave out the stored face that has the very bytes of the picture.
            explanation: what answering took is added to it.
            fpir: decide by the threshold for this share of strangers, which the gallery was calibrated for;
                None is the one that `calibrate` was asked for.
            max_distance: decide by this Euclidean distance instead. Neither changes which photos are found.

        Raises:
            UnreadableImage: the picture cannot be read.
            InputError: k below 1, a distance that is negative or not finite, or an FPIR that the gallery was
                not calibrated for.
        """
        options: dict[str, Any] = {"within": within, "where": where, "exclude_self": exclude_self}
        options |= {"explanation": explanation, "fpir": fpir, "max_distance": max_distance}
        return self.search_many([image], k, **options)[0]

    def search_many(
        self,
        images: Iterable[pixels.ImageSource],
        k: int | None = 5,
        *,
        within: float | None = None,
        where: Where | None = None,
        exclude_self: bool = False,
        explanation: Explanation | None = None,
        fpir: float | None = None,
        max_distance: float | None = None,
    ) -> list[SearchResult]:
        """As `search`, for many pictures; one result each, in order."""
        asked = Question(k, within, where, explanation, fpir, max_distance)
        search = partial(nearest_faces, self.vault, asked=asked)
        found = search_pictures(self._serving, images, exclude_self, asked, search)
        return [SearchResult(matches, prediction, decision) for matches, prediction, decision in found]

    def search_by_vector(
        self,
        vector: NDArray[Any],
        k: int | None = 5,
        *,
        within: float | None = None,
        where: Where | None = None,
        explanation: Explanation | None = None,
        fpir: float | None = None,
        max_distance: float | None = None,
    ) -> Found[Match]:
        """The k nearest stored photos to an embedding (d,); otherwise as `search`."""
        asked = Question(k, within, where, explanation, fpir, max_distance)
        return nearest_faces(self.vault, np.asarray(vector)[None], asked=asked)[0]

    def search_by_vectors(
        self,
        vectors: NDArray[Any],
        k: int | None = 5,
        *,
        within: float | None = None,
        where: Where | None = None,
        explanation: Explanation | None = None,
        fpir: float | None = None,
        max_distance: float | None = None,
    ) -> list[Found[Match]]:
        """The k nearest stored photos to each of some embeddings (n, d); otherwise as `search`.

        Raises:
            InputError: another shape, not finite, or k below 1.
        """
        asked = Question(k, within, where, explanation, fpir, max_distance)
        return nearest_faces(self.vault, vectors, asked=asked)

    def search_by_face(
        self,
        face_id: int,
        k: int | None = 5,
        *,
        within: float | None = None,
        where: Where | None = None,
        explanation: Explanation | None = None,
        fpir: float | None = None,
        max_distance: float | None = None,
    ) -> Found[Match]:
        """The k nearest stored photos to a stored one, itself left out; otherwise as `search`.

        Raises:
            InputError: there is no such face, or k below 1.
        """
        asked = Question(k, within, where, explanation, fpir, max_distance)
        vectors = vector_of(self.vault, face_id)[None]
        return nearest_faces(self.vault, vectors, [face_id], asked=asked)[0]

    def search_people(
        self,
        images: Iterable[pixels.ImageSource],
        k: int = 5,
        *,
        rule: str = "nearest",
        mean_of: int = 3,
        photos: int = 3,
        where: Where | None = None,
        exclude_self: bool = False,
        explanation: Explanation | None = None,
        fpir: float | None = None,
        max_distance: float | None = None,
    ) -> list[PeopleResult]:
        """The k nearest people to each picture, each with their nearest photos; exact.

        Args:
            images: as of `search`.
            k: how many people, at least 1. Photos without an identity are nobody's.
            rule: how far a person is. "nearest": as their nearest photo. "mean": the mean distance of their
                nearest `mean_of` photos, or of all where there are fewer. "centroid": as the mean of their
                vectors, rounded to float32. Equal people are ordered by when they became known.
            mean_of: see there.
            photos: how many photos of each come back, at most.
            where, exclude_self, explanation, fpir, max_distance: as of `search`.

        Raises:
            InputError: k or `mean_of` below 1, or no such rule.
        """
        asked = Question(k, None, where, explanation, fpir, max_distance)
        options: dict[str, Any] = {"rule": checked_rule(rule, mean_of, photos)}
        options |= {"mean_of": mean_of, "photos": photos}
        search = partial(nearest_people, self.vault, asked=asked, **options)
        found = search_pictures(self._serving, images, exclude_self, asked, search)
        return [PeopleResult(people, prediction, decision) for people, prediction, decision in found]

    def search_people_by_vectors(
        self,
        vectors: NDArray[Any],
        k: int = 5,
        *,
        rule: str = "nearest",
        mean_of: int = 3,
        photos: int = 3,
        where: Where | None = None,
        explanation: Explanation | None = None,
        fpir: float | None = None,
        max_distance: float | None = None,
    ) -> list[Found[PersonMatch]]:
        """As `search_people`, for embeddings (n, d)."""
        options: dict[str, Any] = {"rule": checked_rule(rule, mean_of, photos)}
        options |= {"mean_of": mean_of, "photos": photos}
        asked = Question(k, None, where, explanation, fpir, max_distance)
        return nearest_people(self.vault, vectors, asked=asked, **options)

    def search_people_by_face(
        self,
        face_id: int,
        k: int = 5,
        *,
        rule: str = "nearest",
        mean_of: int = 3,
        photos: int = 3,
        where: Where | None = None,
        explanation: Explanation | None = None,
        fpir: float | None = None,
        max_distance: float | None = None,
    ) -> Found[PersonMatch]:
        """As `search_people`, for a stored face, itself left out."""
        options: dict[str, Any] = {"rule": checked_rule(rule, mean_of, photos)}
        options |= {"mean_of": mean_of, "photos": photos}
        asked = Question(k, None, where, explanation, fpir, max_distance)
        vectors = vector_of(self.vault, face_id)[None]
        return nearest_people(self.vault, vectors, [face_id], asked=asked, **options)[0]

    # What is said about them

    def annotate(
        self,
        *,
        faces: Mapping[int, Mapping[str, Any] | None] = MappingProxyType({}),
        paths: Mapping[str, Mapping[str, Any] | None] = MappingProxyType({}),
        identities: Mapping[str, Mapping[str, Any] | None] = MappingProxyType({}),
    ) -> Annotated:
        """Replaces the metadata of faces and of identities, in one transaction.

        Args:
            faces: metadata by id. They are JSON objects of at most 64 KiB; None, or an empty one, removes.
            paths: metadata of the faces of some files; where several lead to one face, the last decides.
            identities: metadata by name, today's or a former one.

        Returns:
            What changed. What the gallery does not know is no error. Setting what is set already changes
            nothing.

        Raises:
            InputError: metadata that JSON cannot say or that are too large; nothing was changed.
            StorageError, GalleryBusy: nothing was changed.
        """
        return metadata.annotate(self.vault, faces=faces, paths=paths, identities=identities)

    def identity_metadata(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What is said about people, by their names, today's or former ones; strangers are not in it."""
        with self.vault.store.read() as reader:
            return reader.identity_metadata(names)

    # Who is who

    def require_identities(self, names: Iterable[str]) -> None:
        """Checks that somebody has each of some names, today's or former ones; searches take any name.

        Raises:
            InputError: nobody has one; the sentence has the nearest names.
        """
        with self.vault.store.read() as reader:
            identities.require(self.vault, reader, names)

    def identity_twins(self, names: Iterable[str] | None = None) -> tuple[tuple[str, ...], ...]:
        """Identities whose names differ in no more than case, width, spaces or how accents are composed.

        Args:
            names: only those that one of these is among; None is all.
        """
        with self.vault.store.read() as reader:
            return twins(reader.identity_names(), names)

    def rename_identity(self, name: str, new_name: str, *, keep_alias: bool = True) -> int:
        """Gives a person another name; the model's label of that name goes with it.

        Args:
            name: today's.
            new_name: nobody has it.
            keep_alias: let the old name go on to mean this person, so that enrolling a folder of that name
                again is no conflict. Otherwise nothing of it stays in the tables.

        Returns:
            How many faces the person has.

        Raises:
            InputError: there is nobody of that name, or somebody of the new one.
        """
        return identities.rename(self.vault, name, new_name, keep_alias=keep_alias)

    def merge_identities(self, name: str, into: str) -> int:
        """Makes two names one person; the first goes on as an alias of the second.

        Of its metadata, what the second has no key for is kept.

        Returns:
            How many faces changed their identity.

        Raises:
            InputError: there is nobody of one of the names, or they are one already, or the metadata of
                both are too large for one.
        """
        return identities.merge(self.vault, name, into)

    # Forgetting

    def forget(
        self,
        identity: str | None = None,
        *,
        face_id: int | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> Receipt:
        """Erases a person, or one face: rows, vectors, the log, free pages, the model's label of that name.

        Segments that hold one of the vectors are written anew without it and deleted; SQLite writes its
        file anew and empties its log. A tombstone makes `restore` forget again. What cannot be reached from
        here is yours: backups, the photos, and what the model's weights have learned from them.

        Args:
            identity: everything of a person; or
            face_id: one face; or
            path: the face of one file, with every path that it has.

        Returns:
            The receipt, which is stored too.

        Raises:
            InputError: not exactly one of the three, or it does not exist.
            StorageError: the disk refused; where the sentence says so, the faces are gone from every answer
                and their traces will be erased by the next write.
        """
        receipt = identities.forget(self.vault, identity, face_id, path)
        self._serving.current()  # this process too has the name in its memory
        return receipt

    def receipts(self) -> list[Receipt]:
        """Every erasure, oldest first."""
        with self.vault.store.read() as reader:
            return reader.receipts()

    # Deciding

    def calibrate(
        self,
        fpir: float = 0.01,
        *,
        strangers: calibration.Strangers | None = None,
        sample: int = calibration.SAMPLE,
        seed: int = 0,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Calibration:
        """Finds the distance beyond which searches name nobody, and goes by it; see `calibration.calibrate`.

        Args:
            fpir: the share of strangers' searches that may name somebody.
            strangers: embeddings (n, d) of people who are not enrolled, and a name or None for each, some at
                a time. None lets the gallery answer for itself. For photos there is `retrieval.calibrate`.
            sample, seed, on_progress, should_stop: see there.
        """
        options: dict[str, Any] = {"sample": sample, "seed": seed}
        options |= {"on_progress": on_progress, "should_stop": should_stop}
        return calibration.calibrate(self.vault, fpir, strangers=strangers, **options)

    def calibration(self) -> Calibration | None:
        """What is known of the distances of the model that serves; None where nobody has looked."""
        with self.vault.store.read() as reader:
            return self.vault.state(reader).calibration

    # Looking after it

    def optimize(self, *, anew: bool = False) -> Optimized:
        """Makes searches quick, if that is due; see `Vault.optimize`. Answers stay what they are."""
        return optimization.optimize(self.vault, anew=anew)

    def compact(self) -> Compacted:
        """Merges segments into as few as there can be, and writes the database anew without gaps.

        Raises:
            StorageError, GalleryBusy: what was merged before stays merged.
        """
        return compaction.compact(self.vault)

    def verify(self) -> Verification:
        """Reads every byte and compares; see `retrieval.gallery.integrity.verify`."""
        self.vault.store.check_open()
        return integrity.verify(self.folder)

    def repair(
        self,
        *,
        backup: str | os.PathLike[str] | None = None,
        model: ModelBundle | None = None,
        give_up: bool = False,
        fetch: bool = False,
    ) -> Repaired:
        """Mends what can be mended without a guess; see `repair`."""
        self.vault.store.check_open()
        options: dict[str, Any] = {"backup": backup, "model": model, "give_up": give_up, "fetch": fetch}
        return repair(self.folder, device=self._serving.device, engine=self._serving.engine, **options)

    def backup(self, target: str | os.PathLike[str], *, verify: bool = True) -> BackedUp:
        """Copies one snapshot of the gallery while others write; a second time only what is new.

        Args:
            target: the folder of the backup. Files that it has are read; a damaged one is copied again.
            verify: read each copied file back and compare its SHA-256.

        Raises:
            InputError: `target` is something else than a backup of this gallery.
            GalleryDamaged: a file is not what was written; the older backup stays as it was.
            StorageError, GalleryBusy: the older backup stays as it was.
        """
        return backups.back_up(self.vault, Path(target), verify=verify)

    def export(self, target: str | os.PathLike[str]) -> Export:
        """Writes one snapshot as Parquet, with the model's contract and checksums; see `transfer.export`.

        Raises:
            InputError: `target` exists and is not empty.
            StorageError, GalleryBusy: nothing was exported.
            MissingDependency: pyarrow is not installed.
        """
        return export.export(self.vault, Path(target))

    def import_export(
        self,
        exported: Export,
        *,
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Imported:
        """Enrolls what another gallery exported (`export_reader.read_export`); see there."""
        enroll = partial(self.enroll_vectors, fingerprint=exported.fingerprint)
        return import_.import_export(
            self.vault, exported, enroll, on_outcome=on_outcome, should_stop=should_stop
        )

    @classmethod
    def restore(
        cls,
        backup: str | os.PathLike[str],
        folder: str | os.PathLike[str],
        *,
        receipts: Sequence[Receipt] = (),
        via: str = "library",
    ) -> Restored:
        """Makes a gallery what a backup says: a new one, or an existing one of which it is a backup.

        What was forgotten since stays forgotten: by the tombstones of the existing gallery, and by
        `receipts` where that is lost.

        Raises:
            DataError: there is no backup, or one of its files is not what was written; nothing was changed.
            InputError: the gallery in `folder` is another one than the backup's.
            StorageError, GalleryBusy: nothing was changed.
        """
        source, target = Path(backup), Path(folder)
        if not is_free(target):
            with closing(Vault.open(target, via=via)) as vault:
                restored = backups.restore(source, vault, receipts=receipts)
                optimization.optimize(vault)
                return restored
        bundle = backups.gallery_model(source)
        with _new_gallery(target) as made:
            Vault.create(made, bundle)
            with closing(Vault.open(made, via=via)) as vault:
                restored = backups.restore(source, vault, receipts=receipts, fresh=True)
                optimization.optimize(vault)
        return dataclasses.replace(restored, folder=os.fspath(target))

    def reembed(
        self,
        bundle: ModelBundle,
        *,
        switch: bool = True,
        give_up: bool = False,
        fetch: bool = False,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Reembedded:
        """Embeds every face with another model and goes over to it; see `gallery.reembed.reembed`."""
        done = reembedding.reembed(
            self.vault,
            bundle,
            lambda loaded: Embedder.open(loaded, device=self._serving.device, engine=self._serving.engine),
            switch=switch,
            give_up=give_up,
            fetch=fetch,
            on_progress=on_progress,
            should_stop=should_stop,
        )
        self._serving.current()
        if done.switched:
            optimization.optimize(self.vault)
        return done

    def other_model(self) -> ModelBundle:
        """The model that does not serve: the former one, to go back to, or one in the making.

        Raises:
            InputError: there is none.
        """
        return reembedding.other_model(self.vault)

    def drop_other_model(self) -> int:
        """Deletes the model that does not serve, with its vectors; returns how many those were.

        Raises:
            InputError: there is none.
        """
        return reembedding.drop_other(self.vault)

    def missing_files(
        self,
        sources: Iterable[str | os.PathLike[str]],
        *,
        photos: Iterable[Photo] | None = None,
        passed_over: PassedOver | None = None,
        gone: Iterable[str | os.PathLike[str]] = (),
    ) -> Missing:
        """What `remove_missing` would do; changes nothing."""
        return moves.find_missing(self.vault, sources, photos, passed_over=passed_over, gone=gone)

    def remove_missing(
        self,
        sources: Iterable[str | os.PathLike[str]],
        *,
        photos: Iterable[Photo] | None = None,
        passed_over: PassedOver | None = None,
        gone: Iterable[str | os.PathLike[str]] = (),
    ) -> Missing:
        """Follows photos that have moved, and removes faces whose files are gone, in one transaction.

        A known path is dead when its file is gone, or has other bytes by now. A file that cannot be looked at
        (no permission, a disk error, a damaged archive) is not gone. A face all of whose paths are dead

        - follows its bytes where a source has them, if nobody says there that it is somebody else;
        - follows them under another name where all faces of its person do, under the same one: the person is
          renamed, or becomes one with whoever keeps that name. Metadata stay;
        - stays as it is where a source has its bytes otherwise (`Missing.kept`);
        - stays as it is where no source has them as far as it could be looked at, but not all of them could,
          or its path is one that the scan passes over (`Missing.held`);
        - is removed where no source has them.

        Args:
            sources: folders, files and archives on this machine; only paths below them can be gone.
            photos: what the sources have, as `photos.scan` gives it; None scans them.
            passed_over: what the scan that gives `photos` adds to. Without it, nothing is known of folders
                that were passed over.
            gone: folders or archives that may have disappeared as a whole, beside the sources.

        Returns:
            What was done. No trace of what was removed is left, as after `forget`.

        Raises:
            DataError: a source does not exist.
            InputError: there is not one photo in a source: it may not be mounted; or it is one that does not
                show what is gone (`photos.check_comparable`); or people became one whose metadata are too
                large together.
            StorageError, GalleryBusy: nothing was changed.
        """
        return moves.remove_missing(self.vault, sources, photos, passed_over=passed_over, gone=gone)

    def relabel(self, photos: Iterable[Photo], *, dry_run: bool = False) -> Relabelled:
        """Lets stored photos have the identities that are said now, in one transaction.

        A face changes if its bytes are among the photos under one other name, and never under today's. Where
        all faces of a person change to the same name, the person is renamed, or becomes one with whoever has
        that name; metadata stay. Who has no face left disappears, with former names and metadata.

        Args:
            photos: such as those of `photos.scan`. One without an identity or with new bytes changes nothing.
            dry_run: only say what would change.

        Raises:
            InputError: people became one whose metadata are too large together.
            StorageError, GalleryBusy: nothing was changed.
        """
        return (moves.find_relabelled if dry_run else moves.relabel)(self.vault, photos)

    def relocate(
        self, old: str | os.PathLike[str], new: str | os.PathLike[str], *, dry_run: bool = False
    ) -> Relocated:
        """Rewrites the beginning of known paths, for a library that lies at another place now.

        No file is read. A file that is the very same (size, time and inode) is known without being opened
        afterwards; any other is read once by the next ingest.

        Args:
            old: a folder, an archive or a file, or the beginning of addresses; no file need be there.
            new: what `old` is called now. Members of archives below it follow.
            dry_run: only say what would be done.

        Raises:
            InputError: no known path is `old` or lies below it, or both are the same.
            StorageError, GalleryBusy: nothing was changed.
        """
        return relocation.relocate(self.vault, old, new, dry_run=dry_run)

    def fetching(self, *, fetch: bool) -> Fetching:
        """What `audit_report.page` needs to show photos at addresses, from the hosts of enrolled photos."""
        with self.vault.store.read() as reader:
            return Fetching(fetch, reader.hosts())

    def audit_log(self) -> list[AuditEntry]:
        """What was done to the gallery, oldest first."""
        with self.vault.store.read() as reader:
            return reader.audit_log()

    def info(self) -> GalleryInfo:
        """What the gallery holds."""
        return gallery_info(self._serving)


def repair(
    folder: str | os.PathLike[str],
    *,
    backup: str | os.PathLike[str] | None = None,
    model: ModelBundle | None = None,
    give_up: bool = False,
    fetch: bool = False,
    device: str = "auto",
    engine: str = "auto",
) -> Repaired:
    """Mends what can be mended of a gallery, also one that can no longer be opened.

    Args:
        folder: the gallery's.
        backup: a backup of it, for files that have the SHA-256 which was written down.
        model: another copy of its model.
        give_up: remove faces whose vectors nothing can bring back.
        fetch: read photos at addresses, from hosts that photos were enrolled from; see `remote.Fetching`.
        device, engine: see `Embedder.open`.

    Raises:
        GalleryError: there is no gallery.
        StorageError, GalleryBusy: what was mended until then stays mended.
    """
    files = backups.files_by_sha256(Path(backup)) if backup is not None else {}
    return integrity.repair(
        Path(folder),
        lambda loaded: Embedder.open(loaded, device=device, engine=engine),
        backup=files.get,
        model=model,
        give_up=give_up,
        fetch=fetch,
    )


def _reopened(folder: str, read_only: bool, options: dict[str, str]) -> Gallery:
    return Gallery.open(folder, read_only=read_only, **options)


@contextmanager
def _new_gallery(target: Path, *, shared: bool = False) -> Iterator[Path]:
    """A new folder that becomes the gallery `target` when everything in it is there.

    Raises:
        GalleryError: `target` exists and is not empty.
        StorageError: the disk refused.
    """
    lock.check(target)
    try:
        with whole_folder(target, shared=shared) as made:
            yield made
            ownership.place(made / VECTORS, target)
    except FileExistsError as error:
        raise GalleryError(f"{target} exists already and is not empty; choose another folder.") from error
    except OSError as error:
        raise StorageError(f"The gallery {target} cannot be made: {why(error)}.") from error
