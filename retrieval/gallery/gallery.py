"""The `Gallery`: a model, rows and vectors in one folder; enrolls, searches and forgets.

What is on disk, and in which order it is written, stands in `retrieval.storage.vault`.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from retrieval.database.identity_names import twins
from retrieval.database.records import AuditEntry, Calibration, NewFace, Receipt
from retrieval.embedding.outcome import Outcome
from retrieval.gallery import (
    annotate,
    creation,
    identities,
    image_search,
    integrity,
    moves,
    reembed,
    relocation,
    repair,
)
from retrieval.gallery.active_model import ActiveModel
from retrieval.gallery.annotate import Annotated
from retrieval.gallery.enrollment import Enrollment
from retrieval.gallery.info import GalleryInfo, gallery_info
from retrieval.gallery.integrity import Verification
from retrieval.gallery.moves import Relabelled
from retrieval.gallery.reembed import Reembedded
from retrieval.gallery.relocation import Relocated
from retrieval.gallery.repair import Repaired
from retrieval.gallery.sync import Missing
from retrieval.images.pixels import ImageSource
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.search import calibration, nearest
from retrieval.search.nearest import Found, Match, PeopleResult, PersonMatch, SearchResult
from retrieval.search.question import PeopleQuestion, PeopleSearchOptions, PhotoQuestion, PhotoSearchOptions
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.photos import Offered, Photo
from retrieval.sources.remote import Fetching
from retrieval.storage import backup, compaction, optimization
from retrieval.storage.backup import BackedUp, Restored
from retrieval.storage.compaction import Compacted
from retrieval.storage.optimization import Optimized
from retrieval.storage.vault import Vault
from retrieval.transfer import export, import_
from retrieval.transfer.import_ import Imported
from retrieval.transfer.manifest import Export


class Gallery:
    """Faces under one folder. Safe to share between threads; any number of processes may read.

    Every change is one transaction, or several where its method says so. Where the disk refuses
    (StorageError) or another process writes for too long (GalleryBusy), the transaction in flight changed
    nothing.

    Attributes:
        folder: where it is.
        vault: its rows and vectors.
        enrollment: the stages of enrolling, for programs that overlap them as `retrieval.ingest` does.
        recognize, prepare, prepare_many, embed_prepared, enroll_ready, enroll_prepared: these stages.
    """

    def __init__(self, model: ActiveModel) -> None:
        self.folder = model.vault.folder
        self.vault = model.vault
        self._model = model
        self.enrollment = Enrollment(model)
        self.recognize = self.enrollment.recognize
        self.prepare = self.enrollment.prepare
        self.prepare_many = self.enrollment.prepare_many
        self.embed_prepared = self.enrollment.embed_prepared
        self.enroll_ready = self.enrollment.enroll_ready
        self.enroll_prepared = self.enrollment.enroll_prepared

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

        Args:
            folder: the gallery's; missing or empty.
            bundle: the model.
            device, engine, precision, via: as of `open`.
            shared: let the group of its folder read it. Otherwise only its owner may, whatever the umask.
            embedder: the bundle, loaded already on that device, by that engine and in that precision. It is
                closed with the gallery.

        Raises:
            GalleryError: `folder` exists and is not empty.
            BundleError: the bundle's files are not the ones that its card names.
            StorageError: the disk refused, or `folder` is a place that cannot be replaced, such as a mount
                point; name a folder below it.
        """
        creation.create(Path(folder), bundle, shared=shared)
        gallery = cls.open(folder, device=device, engine=engine, precision=precision, via=via)
        if embedder is not None:
            gallery._model.adopt(embedder, bundle.fingerprint)
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
        return cls(ActiveModel.of(vault, device=device, engine=engine, precision=precision))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as where it is and how it was opened: another process opens it for itself.

        Raises:
            InputError: it is closed.
        """
        self.vault.store.check_open()
        model, vault = self._model, self.vault
        reopen = partial(
            Gallery.open,
            device=model.device,
            engine=model.engine,
            precision=model.precision,
            read_only=vault.read_only,
            via=vault.via,
        )
        return reopen, (os.path.abspath(self.folder),)

    def close(self) -> None:
        """Closes the database and the mapped files; ends what the engine started.

        Every later call is an InputError, but for closing it again.
        """
        self.vault.close()
        self._model.close()

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The model

    @property
    def bundle(self) -> ModelBundle:
        """The model that answers searches, as of the last call."""
        return self._model.bundle

    def require(self, bundle: ModelBundle) -> None:
        """Checks that a bundle is the gallery's own.

        Raises:
            ModelMismatch: it has another fingerprint, so its embeddings cannot be compared.
        """
        self._model.require(bundle)

    @property
    def may_use_gpu(self) -> bool:
        """Whether photos are embedded on a GPU, as far as can be said before the model is loaded."""
        return self._model.may_use_gpu

    @property
    def embedder(self) -> Embedder:
        """The model, loaded."""
        return self._model.loaded()[1]

    # Enrolling

    def enroll(self, photos: Iterable[Offered]) -> list[Outcome]:
        """Enrolls photos, batch by batch, each batch durable before the next.

        Args:
            photos: pairs of a picture (a path, bytes, a PIL image or a uint8 array) and an identity, or
                None where nobody knows; or Photos, such as those of `photos.scan`.

        Returns:
            One Outcome a photo, in order. A photo that cannot be read is a rejected one, not an error.

        Raises:
            InputError: what is offered is no photo, or as `Enrollment.prepare`.
            StorageError, GalleryBusy: the batch in flight was not enrolled; those before it were.
        """
        return self.enrollment.enroll(photos)

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
            ModelMismatch: another model than `fingerprint` is active, maybe since a moment ago.
            InputError: not as many vectors as faces, another shape, not finite, a malformed SHA-256 or name.
            StorageError, GalleryBusy: the rows in flight were not enrolled; those before them were.
        """
        return self.enrollment.enroll_vectors(faces, vectors, fingerprint=fingerprint)

    # Searching

    def search(
        self,
        image: ImageSource,
        k: int | None = 5,
        *,
        exclude_self: bool = False,
        **options: Unpack[PhotoSearchOptions],
    ) -> SearchResult:
        """The k nearest stored photos to an image, the classifier's prediction, and the decision.

        Args:
            image: a path, bytes, a PIL image or a uint8 array (h, w), (h, w, 3) or (h, w, 4).
            k: how many, at least 1; a gallery that has fewer gives them all. None, with `within`, is all.
            exclude_self: leave out the stored face that has the very bytes of the image.
            options: see `PhotoSearchOptions`.

        Raises:
            UnreadableImage: the image cannot be read.
            InputError: k below 1, or as the options.
        """
        return self.search_many([image], k, exclude_self=exclude_self, **options)[0]

    def search_many(
        self,
        images: Iterable[ImageSource],
        k: int | None = 5,
        *,
        exclude_self: bool = False,
        **options: Unpack[PhotoSearchOptions],
    ) -> list[SearchResult]:
        """As `search`, for many images; one result each, in order."""
        asked = PhotoQuestion(k, **options)
        return image_search.faces_near_images(self._model, images, asked, exclude_self=exclude_self)

    def search_by_vector(
        self, vector: NDArray[Any], k: int | None = 5, **options: Unpack[PhotoSearchOptions]
    ) -> Found[Match]:
        """The k nearest stored photos to an embedding (d,); otherwise as `search_by_vectors`."""
        return self.search_by_vectors(np.asarray(vector)[None], k, **options)[0]

    def search_by_vectors(
        self, vectors: NDArray[Any], k: int | None = 5, **options: Unpack[PhotoSearchOptions]
    ) -> list[Found[Match]]:
        """The k nearest stored photos to each of some embeddings, nearest first, with the decision.

        Args:
            vectors: (n, d), made by this gallery's model.
            k: as of `search`.
            options: see `PhotoSearchOptions`.

        Raises:
            InputError: another shape, not finite, k below 1, or as the options.
        """
        return nearest.faces_near_vectors(self.vault, vectors, asked=PhotoQuestion(k, **options))

    def search_by_face(
        self, face_id: int, k: int | None = 5, **options: Unpack[PhotoSearchOptions]
    ) -> Found[Match]:
        """The k nearest stored photos to a stored one, itself left out; otherwise as `search_by_vectors`.

        Raises:
            InputError: there is no such face, k below 1, or as the options.
        """
        return nearest.faces_near_face(self.vault, face_id, asked=PhotoQuestion(k, **options))

    def search_people(
        self,
        images: Iterable[ImageSource],
        k: int = 5,
        *,
        exclude_self: bool = False,
        **options: Unpack[PeopleSearchOptions],
    ) -> list[PeopleResult]:
        """The k nearest people to each image, each with their nearest photos; exact.

        Args:
            images: as of `search`.
            k: how many people, at least 1. Photos without an identity belong to nobody.
            exclude_self: as of `search`.
            options: see `PeopleSearchOptions`.

        Raises:
            UnreadableImage: an image cannot be read.
            InputError: k below 1, or as the options.
        """
        asked = PeopleQuestion(k, **options)
        return image_search.people_near_images(self._model, images, asked, exclude_self=exclude_self)

    def search_people_by_vectors(
        self, vectors: NDArray[Any], k: int = 5, **options: Unpack[PeopleSearchOptions]
    ) -> list[Found[PersonMatch]]:
        """As `search_people`, for embeddings (n, d)."""
        return nearest.people_near_vectors(self.vault, vectors, asked=PeopleQuestion(k, **options))

    def search_people_by_face(
        self, face_id: int, k: int = 5, **options: Unpack[PeopleSearchOptions]
    ) -> Found[PersonMatch]:
        """As `search_people`, for a stored face, itself left out; an InputError where there is none."""
        return nearest.people_near_face(self.vault, face_id, asked=PeopleQuestion(k, **options))

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
            fpir: the share of strangers' searches that may name somebody, above 0 and at most 0.5.
            strangers: embeddings (n, d) of people who are not enrolled, and a name or None for each, some at
                a time. None lets the gallery answer for itself. For photos there is `retrieval.calibrate`.
            sample, seed, on_progress, should_stop: see there.
        """
        return calibration.calibrate(
            self.vault,
            fpir,
            strangers=strangers,
            sample=sample,
            seed=seed,
            on_progress=on_progress,
            should_stop=should_stop,
        )

    def calibration(self) -> Calibration | None:
        """The thresholds of the active model; None where it was not calibrated."""
        with self.vault.store.read() as reader:
            return self.vault.state(reader).calibration

    # Metadata

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
        """
        return annotate.annotate(self.vault, faces=faces, paths=paths, identities=identities)

    def identity_metadata(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What is said about people, by their names, today's or former ones; strangers are not in it."""
        with self.vault.store.read() as reader:
            return reader.identity_metadata(names)

    # Identities

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
        self._model.current()  # this process too has the name in its memory
        return receipt

    def receipts(self) -> list[Receipt]:
        """Every erasure, oldest first."""
        with self.vault.store.read() as reader:
            return reader.receipts()

    # Following files that moved

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
        """
        return relocation.relocate(self.vault, old, new, dry_run=dry_run)

    # Switching models

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
        """Embeds every face with another model and switches to it; see `gallery.reembed.reembed`."""
        done = reembed.reembed(
            self.vault,
            bundle,
            self._model.open_other,
            switch=switch,
            give_up=give_up,
            fetch=fetch,
            on_progress=on_progress,
            should_stop=should_stop,
        )
        self._model.current()
        if done.switched:
            optimization.optimize(self.vault)
        return done

    def other_model(self) -> ModelBundle:
        """The model that is not active: the former one, to go back to, or one in the making.

        Raises:
            InputError: there is none.
        """
        return reembed.other_model(self.vault)

    def drop_other_model(self) -> int:
        """Deletes the model that is not active, with its vectors; returns how many those were.

        Raises:
            InputError: there is none.
        """
        return reembed.drop_other(self.vault)

    # Integrity and speed

    def verify(self) -> Verification:
        """Reads every byte and compares it with what was written; see `integrity.verify`."""
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
        """Mends what can be mended without a guess; see `retrieval.repair`, which needs no open gallery."""
        self.vault.store.check_open()
        return repair.repair(
            self.folder,
            backup=backup,
            model=model,
            give_up=give_up,
            fetch=fetch,
            device=self._model.device,
            engine=self._model.engine,
        )

    def optimize(self, *, anew: bool = False) -> Optimized:
        """Makes searches quick, if that is due; see `Vault.optimize`. Answers stay what they are."""
        return optimization.optimize(self.vault, anew=anew)

    def compact(self) -> Compacted:
        """Merges segments into as few as there can be, and writes the database anew without gaps.

        Raises:
            StorageError, GalleryBusy: what was merged before stays merged.
        """
        return compaction.compact(self.vault)

    # Copies

    def backup(self, target: str | os.PathLike[str], *, verify: bool = True) -> BackedUp:
        """Copies one snapshot while others write; a second time only what is new; see `backup.back_up`."""
        return backup.back_up(self.vault, Path(target), verify=verify)

    @classmethod
    def restore(
        cls,
        backup: str | os.PathLike[str],
        folder: str | os.PathLike[str],
        *,
        receipts: Sequence[Receipt] = (),
        via: str = "library",
    ) -> Restored:
        """Makes a new gallery, or one of which there is a backup, what that says; see `creation.restore`."""
        return creation.restore(Path(backup), Path(folder), receipts=receipts, via=via)

    def export(self, target: str | os.PathLike[str]) -> Export:
        """Writes one snapshot as Parquet, with the model's contract and checksums; see `transfer.export`.

        Raises:
            InputError: `target` exists and is not empty.
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

    # About the gallery

    def info(self) -> GalleryInfo:
        """What the gallery holds."""
        return gallery_info(self._model)

    def audit_log(self) -> list[AuditEntry]:
        """What was done to the gallery, oldest first."""
        with self.vault.store.read() as reader:
            return reader.audit_log()

    def fetching(self, *, fetch: bool) -> Fetching:
        """What `audit_report.page` needs to show photos at addresses, of hosts of enrolled photos."""
        with self.vault.store.read() as reader:
            return Fetching(fetch, reader.hosts())
