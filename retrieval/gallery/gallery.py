"""The `Gallery` class, the facade of the library: a model, rows and vectors, in a folder or in databases.

Its searches are in `searches`, its upkeep (other models, integrity, speed, backups, exports) in `upkeep`.
`retrieval.storage.vault` describes the files on disk and the order in which they are written.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from numpy.typing import NDArray

from retrieval.database.identity_names import twins
from retrieval.database.records import AuditEntry, Calibration, Merge, NewFace, Receipt
from retrieval.embedding.outcome import Outcome
from retrieval.embedding.reading import AUTO
from retrieval.gallery import (
    annotate,
    copying,
    creation,
    identities,
    merges,
    moves,
    relocation,
)
from retrieval.gallery.active_model import ActiveModel
from retrieval.gallery.annotate import Annotated
from retrieval.gallery.copying import Copied
from retrieval.gallery.enrollment import Enrollment
from retrieval.gallery.info import GalleryInfo, gallery_info
from retrieval.gallery.merges import UndoneMerge
from retrieval.gallery.moves import Relabelled
from retrieval.gallery.relocation import Relocated
from retrieval.gallery.searches import GallerySearches
from retrieval.gallery.sync import Missing
from retrieval.gallery.upkeep import GalleryUpkeep
from retrieval.images.photo_reader import FaceSelection, PhotoReader
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.search import calibration
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.photos import Offered, Photo
from retrieval.sources.remote import Fetching
from retrieval.storage.vault import in_folder
from retrieval.system.places import Place


class Gallery(GallerySearches, GalleryUpkeep):
    """The enrolled faces of one gallery. Safe to share between threads; any number of processes may read.

    Each change is one transaction, or several if its method says so. If a file cannot be written
    (StorageError) or another process writes for too long (GalleryBusy), the current transaction changed
    nothing.

    Attributes:
        name: what messages call it: its folder, or its address without a password.
        vault: its rows and vectors.
        model: the active model, for programs that embed photos by themselves, as the service does.
        enrollment: the stages of enrollment, for programs that run them concurrently, as `retrieval.ingest`
            does.
        recognize, prepare, prepare_many, embed_prepared, enroll_ready, enroll_prepared: these stages.
    """

    def __init__(self, model: ActiveModel) -> None:
        self.name = model.vault.name
        self.vault = model.vault
        self.model = self._model = model
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
        vectors: str | None = None,
        device: str = "auto",
        engine: str = "auto",
        precision: str = "float32",
        via: str = "library",
        shared: bool = False,
        embedder: Embedder | None = None,
    ) -> "Gallery":
        """Creates an empty gallery with a copy of the bundle, completely or not at all, and opens it.

        Args:
            folder: the gallery's, missing or empty; or the address of an empty schema in PostgreSQL,
                as `postgresql+psycopg://USER@HOST/DATABASE?schema=NAME`.
            bundle: the model.
            vectors: with an address, that of a new collection in Milvus for the vectors, as
                `milvus://HOST:PORT/COLLECTION`. The gallery stores it without user and password.
            device, engine, precision, via: as of `open`.
            shared: allow the group of the folder to read the gallery. Otherwise only its owner can read it,
                whatever the umask. In databases, their users and rights decide.
            embedder: the same model, loaded on that device, by that engine and in that precision. It is
                closed with the gallery.

        Raises:
            GalleryError: the folder exists and is not empty; or the schema is not empty, or the collection
                exists.
            InputError: an address without `vectors`, or a folder with it.
            BundleError: the bundle's files are not the files that its card names.
            StorageError: a file cannot be written, or `folder` cannot be replaced, for example because it is
                a mount point; use a folder below it.
        """
        place = Place.of(folder)
        creation.create(place, bundle, vectors=vectors, shared=shared)
        gallery = cls.open(place, vectors=vectors, device=device, engine=engine, precision=precision, via=via)
        if embedder is not None:
            gallery._model.adopt(embedder, bundle.fingerprint)
        return gallery

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        vectors: str | None = None,
        device: str = "auto",
        engine: str = "auto",
        precision: str = "float32",
        read_only: bool = False,
        via: str = "library",
    ) -> "Gallery":
        """Opens a gallery; the network is loaded on first use.

        Args:
            folder: the gallery's, or the address of its database.
            vectors: with an address, where this machine finds the vectors, and with which password, if that
                is not what the gallery states; None for `FACEPRINT_VECTORS` of the environment, if it is set.
            device, engine, precision: see `Embedder.open`.
            read_only: refuse every change. This works on read-only media.
            via: the caller's name in the audit log.

        Raises:
            GalleryError: there is no gallery, or a newer version created it.
            GalleryDamaged: the database is not what was written.
            BundleError, ModelMismatch: the model is missing, damaged or another one.
        """
        vault = creation.open_vault(Place.of(folder), vectors=vectors, read_only=read_only, via=via)
        return cls(ActiveModel.of(vault, device=device, engine=engine, precision=precision))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the folder and the options of `open`: unpickling opens the gallery again.

        Raises:
            InputError: the gallery is closed.
        """
        return self._model.reopening(Gallery.open)

    def close(self) -> None:
        """Closes the database and the mapped files, and ends threads and processes of the engine.

        Each later call raises an InputError, except another `close`.
        """
        self.vault.close()
        self._model.close()

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def folder(self) -> Path:
        """The gallery's folder.

        Raises:
            GalleryError: it is in databases.
        """
        return in_folder(self.vault, "use its `name`").folder

    # The model

    @property
    def bundle(self) -> ModelBundle:
        """The active model, which answers searches, as of the last call."""
        return self._model.bundle

    def require(self, bundle: ModelBundle) -> None:
        """Checks that a bundle is the gallery's active model.

        Raises:
            ModelMismatch: the bundle has another fingerprint, so its embeddings cannot be compared.
        """
        self._model.require(bundle)

    @property
    def may_use_gpu(self) -> bool:
        """Whether photos may be embedded on a GPU; an estimate, made without loading the model."""
        return self._model.may_use_gpu

    @property
    def embedder(self) -> Embedder:
        """The active model; loaded on first use."""
        return self._model.loaded()[1]

    @property
    def photo_reader(self) -> PhotoReader:
        """What reads photos for the active model: its preprocessing, and its face detector if it has one."""
        return self._model.photo_reader()

    # Enrolling

    def enroll(self, photos: Iterable[Offered], *, selection: FaceSelection = AUTO) -> list[Outcome]:
        """Enrolls photos in batches; each batch is durable before the next starts.

        Args:
            photos: pairs of an image (a path, bytes, a PIL image or a uint8 array) and an identity, or None
                if the identity is unknown; or Photos, such as those of `photos.scan`.
            selection: which faces of a photo, for a model with a face detector; by default the largest of a
                photo with a name, and all of one without.

        Returns:
            One Outcome per photo, in order. A photo that cannot be read is a rejected one, not an error.

        Raises:
            InputError: an item of `photos` is no photo, or as `Enrollment.prepare`.
            StorageError, GalleryBusy: the current batch was not enrolled; batches before it were.
        """
        return self.enrollment.enroll(photos, selection)

    def enroll_vectors(
        self, faces: Sequence[NewFace], vectors: NDArray[Any], *, fingerprint: str | None = None
    ) -> list[Outcome]:
        """Enrolls faces with existing embeddings; each transaction has some thousand faces.

        Args:
            faces: identity, absolute path and SHA-256 of the bytes in hex of each face. Metadata are stored
                with a new face; for a known face, only keys that it lacks are added.
            vectors: (n, d), in the same order, embedded by this gallery's model.
            fingerprint: fingerprint of the model that embedded them; None skips the check.

        Returns:
            One Outcome per face, in order.

        Raises:
            ModelMismatch: another model than `fingerprint` is active, perhaps because of a switch meanwhile.
            InputError: the numbers of vectors and faces differ, the vectors have another shape or are not
                finite, or a SHA-256, path, name or metadata cannot be stored.
            StorageError, GalleryBusy: the current transaction added nothing; those before it were committed.
        """
        return self.enrollment.enroll_vectors(faces, vectors, fingerprint=fingerprint)

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
        """Finds and stores the distance beyond which searches answer UNKNOWN; see `calibration.calibrate`.

        Args:
            fpir: the share of non-mated searches that may return an identity, above 0 and at most 0.5.
            strangers: batches of embeddings (n, d) of people who are not enrolled, with a name or None for
                each. None uses the enrolled faces instead. For photos, use `retrieval.calibrate`.
            sample, seed, on_progress, should_stop: see `calibration.calibrate`.
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
        """Returns the thresholds of the active model; None if it is not calibrated."""
        with self.vault.store.read() as reader:
            return self.vault.state(reader).calibration

    # Metadata

    def annotate(
        self,
        *,
        faces: Mapping[int, Mapping[str, Any] | None] = MappingProxyType({}),
        paths: Mapping[str, Mapping[str, Any] | None] = MappingProxyType({}),
        identities: Mapping[str, Mapping[str, Any] | None]
        | Mapping[int, Mapping[str, Any] | None] = MappingProxyType({}),
    ) -> Annotated:
        """Replaces the metadata of faces and of identities, in one transaction.

        Args:
            faces: metadata by face id: JSON objects of at most 64 KiB. None, or an empty object, removes the
                metadata.
            paths: metadata by the path of a face; if several paths belong to one face, the last one applies.
            identities: metadata by name, current or former, or by the id of the identity.

        Returns:
            The number of changes, and the unknown ids, paths and names, which are no error. Setting the
            stored metadata again changes nothing.

        Raises:
            InputError: metadata cannot be encoded as JSON or are too large; nothing was changed.
        """
        return annotate.annotate(self.vault, faces=faces, paths=paths, identities=identities)

    def identity_metadata(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Returns the metadata of identities by name, current or former; unknown names are left out."""
        with self.vault.store.read() as reader:
            return reader.identity_metadata(names)

    # Identities

    def require_identities(self, names: Iterable[str]) -> None:
        """Checks that an identity has each of some names, current or former; searches accept any name.

        Raises:
            InputError: no identity has one of the names; the error states the most similar names.
        """
        with self.vault.store.read() as reader:
            identities.require(self.vault, reader, names)

    def identity_twins(self, names: Iterable[str] | None = None) -> tuple[tuple[str, ...], ...]:
        """Returns groups of identities with almost the same name.

        Their names differ only in case, width, spaces or how accents are composed.

        Args:
            names: only groups with one of these names; None returns all groups.
        """
        with self.vault.store.read() as reader:
            return twins(reader.identity_names(), names)

    def rename_identity(self, name: str | int, new_name: str, *, keep_alias: bool = True) -> int:
        """Renames an identity, and the model's label of that name.

        Args:
            name: the current name, or the id of the identity.
            new_name: a name that no identity has.
            keep_alias: keep the old name as an alias of this identity, so that enrolling a folder of that
                name again is no conflict. Otherwise the old name is erased from the tables; a merge of an
                identity of that name cannot be undone then.

        Returns:
            The number of faces of the identity.

        Raises:
            InputError: no identity has `name`, or another identity has `new_name`.
        """
        return identities.rename(self.vault, name, new_name, keep_alias=keep_alias)

    def merge_identities(self, name: str | int, into: str | int) -> int:
        """Merges the identity `name` into the identity `into`; `name` becomes an alias of it.

        Metadata of the first identity are kept for keys that the second one lacks. Each identity is given by
        its current name or its id.

        Returns:
            The number of faces that changed their identity.

        Raises:
            InputError: no identity has one of the names, both names are of one identity already, or the
                merged metadata are too large.
        """
        return merges.merge(self.vault, name, into).faces

    def merges(self, *, before: int | None = None, limit: int | None = None) -> list[Merge]:
        """Returns the merges that can be undone, newest first: not those by `remove_missing` or `relabel`.

        Args:
            before: only merges with a lower id, for the next page of a list.
            limit: at most so many.
        """
        with self.vault.store.read() as reader:
            return reader.merges(before=before, limit=limit)

    def undo_merge(self, merge_id: int | None = None) -> UndoneMerge:
        """Undoes a merge: the merged identity gets its id, name, former names, metadata and faces again.

        Only what still belongs to the other identity is given back: faces that were assigned to a third one
        since stay there, and faces that were enrolled since stay with the other identity. That one loses the
        metadata that it got by the merge, except values that were changed since. The models' labels follow.

        Args:
            merge_id: the id of a merge, from `merges`; None undoes the newest.

        Returns:
            What was restored and what was not.

        Raises:
            NotFound: there is no such merge, it was undone already, or its faces or the other identity were
                forgotten.
            InputError: another identity has the name by now, the other identity was merged into a third one
                since, or it has none of the faces any more.
        """
        return merges.undo(self.vault, merge_id)

    def assign_identity(self, face_ids: Iterable[int], identity: str | None) -> int:
        """Gives faces an identity, for instance the faces of a photo of several people.

        An identity that has no face then is removed with its former names.

        Args:
            face_ids: the ids of the faces.
            identity: a current or former name, or a new one; None makes the faces anonymous.

        Returns:
            The number of faces that changed their identity.

        Raises:
            InputError: there is no such face, or the name cannot be stored.
        """
        return identities.assign(self.vault, face_ids, identity)

    # Forgetting

    def forget(
        self,
        identity: str | int | None = None,
        *,
        face_id: int | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> Receipt:
        """Erases an identity, a face or a photo: rows, vectors, log, free pages, and the model's label of it.

        A photo that shows other faces too stays, with its paths, until the last of its faces is erased.

        Segments with one of the vectors are rewritten without it, and the old ones are deleted. The bytes of
        the database that no row uses are zeroed, and SQLite's log is emptied. A tombstone makes `restore`
        erase the same faces again. The caller has to handle what the gallery cannot reach: backups, the
        photos, and what the model's weights have learned from the photos.

        Args:
            identity: the name or the id of an identity, to erase with all of its faces; or
            face_id: the id of one face; or
            path: a path of one photo, which is erased with all of its faces and paths.

        Returns:
            The receipt, which is stored too.

        Raises:
            InputError: not exactly one of the three is given, or it does not exist.
            StorageError: a file cannot be written. If the error says so, the faces are already removed from
                all answers, and the next write erases their traces.
        """
        receipt = identities.forget(self.vault, identity, face_id, path)
        self._model.current()  # drops the name from the memory of this process too
        return receipt

    def receipts(self) -> list[Receipt]:
        """Returns the receipts of all erasures, oldest first."""
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
        relabelled_by: Iterable[Photo] | None = None,
    ) -> Missing:
        """Returns what `remove_missing` would do, or do after `relabel(relabelled_by)`; changes nothing."""
        return moves.find_missing(
            self.vault, sources, photos, passed_over=passed_over, gone=gone, relabelled_by=relabelled_by
        )

    def remove_missing(
        self,
        sources: Iterable[str | os.PathLike[str]],
        *,
        photos: Iterable[Photo] | None = None,
        passed_over: PassedOver | None = None,
        gone: Iterable[str | os.PathLike[str]] = (),
    ) -> Missing:
        """Updates the paths of moved photos and removes faces without files, in one transaction.

        A known path is dead if its file is gone or has other bytes now. A file that cannot be read (no
        permission, a disk error, a damaged archive) is not gone. A face with only dead paths

        - gets the new paths of its bytes in a source, if the source does not name another identity there;
        - gets them with another identity if the same new name applies to all faces of its identity. The
          identity is renamed, or merged into the one that keeps that name. Metadata are kept;
        - is left unchanged if a source has its bytes otherwise (`Missing.kept`);
        - is left unchanged if its bytes were not found, but not all places could be read, or the scan passes
          over its path (`Missing.held`);
        - is removed if no source has its bytes.

        Args:
            sources: folders, files and archives on this machine; only paths below them can be gone.
            photos: the photos of the sources, from `photos.scan`; None scans the sources.
            passed_over: the object to which the scan that yields `photos` adds what it excludes. Without it,
                excluded folders are unknown.
            gone: folders or archives, beside the sources, that may have disappeared as a whole.

        Returns:
            The changes. No trace of removed faces is left, as after `forget`.

        Raises:
            DataError: a source does not exist.
            InputError: a source has no photo, perhaps because it is not mounted; or a source cannot show that
                files are gone (`photos.check_comparable`); or metadata of merged identities are too large
                together.
        """
        return moves.remove_missing(self.vault, sources, photos, passed_over=passed_over, gone=gone)

    def relabel(self, photos: Iterable[Photo], *, dry_run: bool = False) -> Relabelled:
        """Changes identities of stored photos to those that `photos` name, in one transaction.

        A face changes if `photos` have its bytes under exactly one other name, and never under the current
        one. If all faces of an identity change to the same name, the identity is renamed, or merged into the
        one that has that name; metadata are kept. An identity without faces is removed, with its former names
        and metadata.

        Args:
            photos: for example from `photos.scan`. A photo without an identity or with new bytes changes
                nothing.
            dry_run: only return what would change.

        Returns:
            The changes.

        Raises:
            InputError: metadata of merged identities are too large together.
        """
        return (moves.find_relabelled if dry_run else moves.relabel)(self.vault, photos)

    def relocate(
        self, old: str | os.PathLike[str], new: str | os.PathLike[str], *, dry_run: bool = False
    ) -> Relocated:
        """Replaces the root of known paths, for a photo library that was moved.

        No file is read. A file that is the very same (size, time and inode) is recognized afterwards without
        being opened; the next ingest reads any other file once.

        Args:
            old: a folder, an archive or a file, or the beginning of addresses; it need not exist any more.
            new: the new path of `old`. Paths of archive members below it change too.
            dry_run: only return what would be done.

        Returns:
            The number of changes, and the paths that stay.

        Raises:
            InputError: no known path is `old` or below it, or both are the same.
        """
        return relocation.relocate(self.vault, old, new, dry_run=dry_run)

    def copy(
        self,
        target: str | os.PathLike[str],
        *,
        vectors: str | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Copied:
        """Copies one snapshot of the gallery to a new folder, or to new databases; see `copying.copy`.

        The copy keeps the ids of the faces and the UUID of the gallery. An interrupted copy is resumed by the
        same call. At the end both are compared.

        Args:
            target: the new gallery's, as `folder` of `create`.
            vectors, on_progress, should_stop: see `copying.copy`.
        """
        return copying.copy(
            self.vault, Place.of(target), vectors=vectors, on_progress=on_progress, should_stop=should_stop
        )

    # About the gallery

    def info(self) -> GalleryInfo:
        """Returns counts and sizes of the gallery."""
        return gallery_info(self._model)

    def audit_log(self) -> list[AuditEntry]:
        """Returns the entries of the audit log, oldest first."""
        with self.vault.store.read() as reader:
            return reader.audit_log()

    def fetching(self, *, fetch: bool) -> Fetching:
        """Returns what `audit_report.page` needs to show photos at addresses, of hosts of enrolled photos."""
        with self.vault.store.read() as reader:
            return Fetching(fetch, reader.hosts())
