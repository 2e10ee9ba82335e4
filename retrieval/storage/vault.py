"""The `Vault`: rows and vectors of a gallery, consistent after any crash; independent of images.

    my.gallery/
      gallery.db               SQLite: which faces exist, and their identities
      gallery.sums             a checksum for each page of gallery.db
      vectors/00000007.faiss   their vectors, immutable segments
      vectors/00000007-1.codes 8-bit codes that searches read first, in basis 1
      vectors/00000001.basis   the transform that codes are made with (see `retrieval.index.quantization`)
      vectors/gallery.id       the gallery that owns this folder (see `retrieval.storage.ownership`)
      model/                   a copy of the bundle (model-2/, ... after the gallery was embedded anew)
      writer.lock              the process id of the writer
      tokens.json              who may ask the service, and tokens.used.json (see `retrieval.service.tokens`)
      follower.json            in a read-only copy: what it follows (see `retrieval.storage.following`)

The order of every write: a new segment file is durable first, then one transaction references it and inserts
its faces. A crash in between leaves an unreferenced file, which the next writer removes. Work that can only
be done after a commit (erasing traces, removing a name from a model's card) is recorded in the transaction;
the next writer does it if this one cannot.
"""

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from retrieval.database import page_checksums
from retrieval.database.engines.sqlite_file import LOCK_NAME, SnapshotLost
from retrieval.database.reader import Reader
from retrieval.database.records import CodesRow, Generation, Segment
from retrieval.database.sqlite_errors import blames_machine
from retrieval.database.store import Store
from retrieval.database.writer import Writer
from retrieval.errors import (
    BundleError,
    GalleryBusy,
    GalleryDamaged,
    GalleryError,
    InputError,
    ModelMismatch,
    StorageError,
)
from retrieval.index.segments import (
    CodesOf,
    FlatVectors,
    Ids,
    Part,
    SegmentMissing,
    Vectors,
    Written,
)
from retrieval.models.bundle import ModelBundle, Relabel
from retrieval.storage import deferred, leftovers, ownership
from retrieval.storage.any_vault import AnyVault, Sizes, State
from retrieval.storage.codes import Coding, encode
from retrieval.storage.deferred import DeferredWork
from retrieval.storage.following import FollowerCard
from retrieval.storage.layout import BACKUP_CARD, DATABASE, MODEL, VECTORS
from retrieval.system import lock
from retrieval.system.files import (
    is_no_file,
    make_folder,
    open_plain,
    remove,
    remove_abandoned,
    sync,
    temporary_folder,
    why,
    why_not_written,
)

_T = TypeVar("_T")

# The least number of vectors that a thread writes while their rows are inserted.
_PARALLEL_WRITE_MIN: Final = 1024

# The longest wait for another writer, in seconds.
LOCK_TIMEOUT: Final = 30.0

# The most attempts of a read when a writer merges away the files that it was about to open.
_ATTEMPTS: Final = 20

# The size of SQLite's write-ahead log, in bytes, from which it is copied into the database. Each batch of new
# faces changes much the same pages of the index of SHA-256, and a copy writes each of them once.
_MAX_LOG_BYTES: Final = 128 * 2**20


class Vault(AnyVault):
    """Rows and vectors under one folder. Safe to share between threads; any number of processes may read.

    Attributes:
        folder: the folder of the gallery, absolute and without symbolic links: all its files stay the same
            while it is open, whatever becomes of a link to it or of the working directory.
    """

    in_folder = True

    def __init__(
        self,
        name: str,
        folder: Path,
        store: Store,
        *,
        read_only: bool,
        via: str,
        follower: FollowerCard | None = None,
    ) -> None:
        super().__init__(name, store, read_only=read_only, via=via, follower=follower)
        self.folder = folder
        self._vectors: dict[int, FlatVectors] = {}
        self._state: State | None = None
        self._opening = threading.Lock()
        self._log_tried = 0
        self._wrote = False
        self._replaceable: set[str] = set()  # the files that were referenced before the current transaction

    @staticmethod
    def create(folder: Path, bundle: ModelBundle) -> None:
        """Creates the files of an empty gallery, durably, in a new folder, with the folder's permissions.

        Raises:
            OSError: the file system refused.
            BundleError: a file of the bundle does not match its card.
        """
        make_folder(folder / VECTORS, like=folder)
        copy = bundle.save(folder / MODEL, inherit=True)
        folder_id = ownership.new_id()
        ownership.write_id(folder / VECTORS, folder_id)
        store = Store.create(
            folder / DATABASE,
            fingerprint=bundle.fingerprint,
            dimension=bundle.dimension,
            folder=MODEL,
            card_sha256=copy.card_sha256(),
            folder_id=folder_id,
        )
        with store.file.driver() as driver:
            page_checksums.checkpoint(driver, store.path, mode="TRUNCATE")
        store.close()
        sync(folder / DATABASE)
        sync(folder)

    @classmethod
    def open(cls, folder: Path, *, read_only: bool = False, via: str = "library") -> "Vault":
        """Opens the rows and vectors of a gallery.

        Raises:
            GalleryError: there is no gallery, or another version made it.
            GalleryDamaged: its database is damaged.
        """
        if folder.is_file():
            raise GalleryError(f"{folder} is a file; a gallery is a folder.")
        if not folder.is_dir():
            left = ", ".join(path.name for path in leftovers.beside(folder))
            raise GalleryError(
                f"There is no gallery {folder}; make one with `faceprint ingest`"
                + (f", which also removes what a killed one left ({left})." if left else ".")
            )
        if not (folder / DATABASE).exists() and (folder / BACKUP_CARD).is_file():
            raise GalleryError(
                f"{folder} is a backup; make a gallery of it with `faceprint restore {folder} GALLERY`."
            )
        if leftovers.is_unfinished_backup(folder):
            raise GalleryError(leftovers.unfinished_backup(folder))
        name, folder = os.fspath(folder), Path(os.path.realpath(folder))
        follower = FollowerCard.of(folder)
        if follower is None:
            store = Store.open(folder / DATABASE, read_only=read_only, timeout=LOCK_TIMEOUT)
            return cls(name, folder, store, read_only=read_only, via=via)
        if not (folder / DATABASE).exists():
            raise GalleryError(
                f"{name} is an unfinished copy of {follower.current().address}: no state of it is complete "
                "yet; run `faceprint follow`, which goes on from here."
            )
        store = Store.open_replaced(folder / DATABASE)
        return cls(name, folder, store, read_only=True, via=via, follower=follower)

    @property
    def place(self) -> str:
        """The absolute folder."""
        return os.fspath(self.folder)

    def close(self) -> None:
        """Closes the database and the mapped files; does nothing if they are closed."""
        if self.store.closed:
            return
        if self._wrote:
            # A process that is writing now will copy the log itself.
            with suppress(GalleryBusy, StorageError), self._locked(timeout=0):
                self._copy_log(at_least=1)
        for vectors in self._vectors.values():
            vectors.forget_all_but(())
        self.store.close()

    # Reading

    def vectors(self, generation: Generation) -> FlatVectors:
        """Returns the segments of a generation."""
        with self._opening:
            if generation.id not in self._vectors:
                folder = self.folder / VECTORS
                self._vectors[generation.id] = FlatVectors(folder, generation.dimension)
            return self._vectors[generation.id]

    def state(self, reader: Reader) -> State:
        """See `AnyVault`."""
        revision, known = reader.revision(), self._state
        if known is not None and known.revision == revision:
            return known
        generation = self.serving(reader)
        vectors, folder_id = self.folder / VECTORS, reader.gallery().folder_id
        # Another gallery has files of the same names: its vectors would be returned as this one's.
        if folder_id is not None and ownership.read_id(vectors) not in (None, folder_id):
            raise ownership.foreign(self.folder, vectors)
        self._close_replaced(reader)
        rows = reader.segments(generation.id)
        segments = tuple(segment.id for segment in rows)
        coded = {
            one.segment_id: CodesOf(one.basis_id, one.error)
            for one in reader.codes().values()
            if one.segment_id in segments
        }
        faces, calibration = sum(segment.rows for segment in rows), reader.calibration(generation)
        searched = self.vectors(generation).snapshot(segments, coded)
        self._state = State(revision, generation, faces, calibration, searched)
        return self._state

    def _close_replaced(self, reader: Reader) -> None:
        """Closes the mapped files of segments that no longer exist, of all generations.

        While it is mapped, a deleted file keeps its disk space, and its erased vectors.
        """
        existing: dict[int, list[int]] = {}
        for segment in reader.segments():
            existing.setdefault(segment.generation_id, []).append(segment.id)
        with self._opening:
            vectors = dict(self._vectors)
        for generation, flat in vectors.items():
            flat.forget_all_but(existing.get(generation, ()))

    def on_a_snapshot(self, work: Callable[[Reader], _T]) -> _T:
        """Returns the result of `work` on a snapshot; retries on a later one if files were merged away."""
        for _ in range(_ATTEMPTS - 1):
            with suppress(SegmentMissing, SnapshotLost), self.store.read() as reader:
                return work(reader)
        with self.store.read() as reader:
            return work(reader)

    def vector(self, reader: Reader, generation: Generation, face_id: int) -> Vectors | None:
        """See `AnyVault`."""
        vectors = self.vectors(generation)
        for segment in reader.segments(generation.id):
            ids, matrix = vectors.rows(segment.id)
            (rows,) = np.nonzero(ids == face_id)
            if len(rows):
                return np.array(matrix[rows[0]])
        return None

    def rows_at_a_time(self, generation: Generation) -> int:
        """See `AnyVault`."""
        return self.vectors(generation).ceiling

    def proven_parts(self, reader: Reader, proven: set[int]) -> Iterator[tuple[Ids, Vectors]]:
        """See `AnyVault`; the numbers are those of segments.

        Raises:
            SegmentMissing: a writer merged a segment meanwhile, so its file is gone; nothing was yielded.
        """
        generation = self.serving(reader)
        flat, segments = self.vectors(generation), reader.segments(generation.id)
        # A mapped file stays readable after it is unlinked.
        parts = [flat.rows(segment.id) for segment in segments]
        # Small segments go first: merges remove them first.
        for segment in sorted(segments, key=lambda segment: segment.rows):
            if segment.id not in proven:
                self._prove(flat.path(segment.id), segment)
                proven.add(segment.id)
        return iter(parts)

    def _prove(self, path: Path, segment: Segment) -> None:
        try:
            with open_plain(path) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise SegmentMissing(f"{path} is missing; see `faceprint verify {self.name}`.") from error
        except OSError as error:
            if not is_no_file(error):
                raise StorageError(f"{path} cannot be read: {why(error)}.") from error
            digest = ""
        if digest != segment.sha256:
            raise GalleryDamaged(f"{path} is not what was written; see `faceprint verify {self.name}`.")

    # Writing

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Yields the only writer, in one transaction. Unreferenced files are removed before and after it.

        Raises:
            GalleryBusy: another process is writing, and did not finish in time.
            InputError: the gallery was opened for reading only, and could have been opened for writing, or is
                a copy of a published one.
            GalleryError: a folder of the gallery is a symbolic link, or belongs to another gallery.
            StorageError: the file system refused; nothing was changed, unless the message says so.
        """
        if self.follower is not None:
            raise self.follower.refuses_writing()
        if self.read_only:
            if (reason := why_not_written(self.folder)) is not None:
                raise StorageError(f"{self.name} cannot be written to: {reason}.")
            raise InputError(f"{self.name} was opened for reading only; open it for writing.")
        with self._locked(timeout=LOCK_TIMEOUT):
            given = ownership.check_owner(self.folder, self.store, timeout=LOCK_TIMEOUT)
            if not self._wrote:
                self._prepare()
            self._tidy()
            self._run_deferred_work(insist=False)
            self._wrote = True
            with self.store.write() as writer:
                if given is not None:
                    writer.set_gallery(folder_id=given)
                self._replaceable = leftovers.named_files(writer)
                yield writer
                insist = writer.defers
            self._run_deferred_work(insist=insist)
            # The transaction is committed. The rest can wait for the next writer.
            with suppress(StorageError):
                self._tidy(settled=True)
                self._replaceable = set()
                self._copy_log(at_least=_MAX_LOG_BYTES)

    @contextmanager
    def noting(self) -> Iterator[Writer]:
        """Yields the only writer, which touches no file except the database. Only for repairs.

        Raises:
            GalleryBusy, StorageError: as in `writing`.
        """
        if self.follower is not None:
            raise self.follower.refuses_writing()
        with self._locked(timeout=LOCK_TIMEOUT):
            self._wrote = True
            with self.store.write() as writer:
                yield writer

    @contextmanager
    def trying(self) -> Iterator[Writer]:
        """See `AnyVault`: it changes a temporary copy of the tables."""
        with temporary_folder(Path(tempfile.gettempdir()), "faceprint-trial-") as folder:
            self.store.file.copy(folder / DATABASE)
            with closing(Store.open(folder / DATABASE)) as store, store.write() as writer:
                yield writer

    def run_deferred(self) -> None:
        """Runs the deferred work of earlier transactions.

        Raises:
            GalleryBusy, StorageError: it cannot be done now.
        """
        with self.writing() as writer:
            writer.defers = True

    @contextmanager
    def appending(self, writer: Writer, generation: Generation, ids: Ids, vectors: Vectors) -> Iterator[None]:
        """Writes new vectors; 1,024 or more in a thread while the with statement writes their rows.

        The newest segments that are less than twice as large are merged with them. The size at least halves
        from each segment to the next, as in a binary counter, so that a photo costs its own bytes and its
        share of the merges, never a rewrite of the whole gallery.
        """
        flat = self.vectors(generation)
        plan: list[tuple[list[int], list[Part]]] = []
        rest = len(ids)
        while rest > flat.ceiling:
            part = slice(len(ids) - rest, len(ids) - rest + flat.ceiling)
            plan.append(([], [(ids[part], vectors[part])]))
            rest -= flat.ceiling
        if rest:
            plan.append(self._merge(writer, generation, ids[-rest:], vectors[-rest:]))
        first, coding = writer.gallery().next_segment_id, Coding.of(writer, generation)
        if len(ids) < _PARALLEL_WRITE_MIN:
            yield
            written = [self._write(flat, coding, first + n, parts) for n, (_, parts) in enumerate(plan)]
        else:
            # Leaving the executor waits for the thread, even after an error: the lock is held meanwhile.
            with ThreadPoolExecutor(1, thread_name_prefix="faceprint-write") as thread:
                futures = [
                    thread.submit(self._write, flat, coding, first + n, parts)
                    for n, (_, parts) in enumerate(plan)
                ]
                yield
                written = [future.result() for future in futures]
        for (absorbed, _), made in zip(plan, written, strict=True):
            _replace(writer, generation, absorbed, *made)

    def _merge(
        self, writer: Writer, generation: Generation, ids: Ids, vectors: Vectors
    ) -> tuple[list[int], list[Part]]:
        """Returns the ids of the segments to merge, and the parts: their vectors, then the new ones."""
        flat = self.vectors(generation)
        parts: list[Part] = [(ids, vectors)]
        absorbed, rows = [], len(ids)
        for segment in reversed(writer.segments(generation.id)):
            if segment.rows >= 2 * rows or segment.rows + rows > flat.ceiling:
                break
            parts.insert(0, flat.stored(segment.id, segment.rows, segment.sha256))
            absorbed.append(segment.id)
            rows += segment.rows
        return absorbed, parts

    def remove(self, writer: Writer, ids: Sequence[int]) -> None:
        """Removes faces: their rows, and their vectors from all segments of all generations."""
        if not ids:
            return
        gone = np.asarray(ids, np.int64)
        for generation in writer.generations().values():
            for segment in writer.segments(generation.id):
                flat = self.vectors(generation)
                kept = ~np.isin(flat.rows(segment.id)[0], gone)
                if not kept.all():
                    left = flat.stored(segment.id, segment.rows, segment.sha256, kept=kept)
                    if not kept.any():
                        left[1].prove()  # the ids of a damaged file do not say which faces it holds
                    self.put(writer, generation, [segment.id], [left] if kept.any() else [])
        writer.remove_faces(ids)

    def sizes(self, reader: Reader) -> Sizes:
        """See `AnyVault`."""
        codes = sum(one.bytes for one in reader.codes().values())
        return Sizes(
            database=self.store.size(),
            vectors=sum(segment.bytes for segment in reader.segments()),
            codes=codes + sum(basis.bytes for basis in reader.bases().values()),
        )

    def _write(
        self, flat: FlatVectors, coding: Coding, segment: int, parts: Sequence[Part]
    ) -> tuple[Written, CodesRow | None]:
        """Writes a segment and its codes, both durably; the second is None for a segment without codes."""
        return flat.write(segment, parts), encode(flat, coding, segment, parts)

    def bundle(self, reader: Reader, generation: Generation) -> ModelBundle:
        """Returns the model of a generation, with the labels of this snapshot.

        Raises:
            BundleError, ModelMismatch: the model is missing or damaged, or has another fingerprint.
            StorageError: the machine cannot read it.
        """
        try:
            bundle = ModelBundle.load(self.folder / generation.folder)
        except (BundleError, OSError) as error:
            if blames_machine(error):
                raise StorageError(f"The gallery's model cannot be read: {error}") from error
            raise BundleError(
                f"{error} `faceprint repair {self.name}` restores it from a backup or a copy of the model."
            ) from error
        if (generation.fingerprint, generation.dimension) != (bundle.fingerprint, bundle.dimension):
            raise ModelMismatch(
                f"{bundle.folder} is not the model that the gallery was made with; put that one back."
            )
        # The commit changes the snapshot; the card on disk follows later.
        return DeferredWork.read(reader).relabelled(bundle)

    def defer(
        self,
        writer: Writer,
        *,
        erase: bool,
        labels: Mapping[str, Mapping[int, Relabel]],
        rewrite: bool = False,
    ) -> None:
        """Records work to do after the commit; see `deferred.defer`."""
        deferred.defer(self.folder, writer, erase=erase, labels=labels, rewrite=rewrite)

    def _run_deferred_work(self, *, insist: bool) -> None:
        deferred.run(self.store, self.folder, insist=insist, tidy=lambda: self._tidy(settled=True))

    def put(
        self,
        writer: Writer,
        generation: Generation,
        old: Sequence[int],
        parts: Sequence[Part],
    ) -> None:
        """Replaces old segments by a new one of `parts`; without parts it only removes them."""
        if not parts:
            writer.replace_segments(old, [])
            return
        flat, number = self.vectors(generation), writer.gallery().next_segment_id
        coding = Coding.of(writer, generation)
        _replace(writer, generation, old, *self._write(flat, coding, number, parts))

    @contextmanager
    def _locked(self, *, timeout: float) -> Iterator[None]:
        with lock.exclusive(self.folder / LOCK_NAME, timeout=timeout):
            yield

    def restore_folder_id(self) -> None:
        """Restores the id file of the vectors folder. Only for repairs.

        If the folder has another id, each vector file must match its row, and no other may exist.

        Raises:
            GalleryError: the folder belongs to another gallery.
            InputError: the gallery is a copy of a published one.
        """
        if self.follower is not None:
            raise self.follower.refuses_writing()
        with self._locked(timeout=LOCK_TIMEOUT):
            ownership.restore_id(self.folder, self.store)

    def leftovers(self, reader: Reader) -> tuple[list[Path], list[Path]]:
        """Returns unreferenced files: those that the next writer removes, and those that must stay."""
        return leftovers.removable(self.folder, reader, replaced=self._replaceable)

    def _prepare(self) -> None:
        """Prepares the first write of this vault: checks counters and removes abandoned folders.

        Raises:
            GalleryDamaged: a counter is behind: referenced files would be overwritten.
        """
        with self.store.read() as reader:
            if problems := reader.counter_problems():
                raise GalleryDamaged(f"In the database of {self.name} {problems[0]}; restore a backup.")
        # The parent folder may not be writable for this user, and the gallery still is.
        with suppress(OSError):
            remove_abandoned(*leftovers.in_the_making(self.folder))

    def _tidy(self, *, settled: bool = False) -> bool:
        """Removes unreferenced files: leftovers of an interrupted write, and files replaced by the last one.

        Vector files stay while a referenced one is missing (see `leftovers`). Returns whether none stayed.

        A transaction with a failed commit may still reappear: its commit record may be in the log, and take
        effect when the log is read after a crash. So another commit supersedes it before its files are
        removed.
        """
        with self.store.read() as reader:
            unnamed, kept = self.leftovers(reader)
            self._close_replaced(reader)
        if unnamed and not settled:
            with self.store.write() as writer:
                writer.changed = True
            with self.store.read() as reader:
                unnamed, kept = self.leftovers(reader)
        try:
            for path in unnamed:
                remove(path)
        except OSError as error:
            raise StorageError(f"{self.name} cannot be tidied: {why(error)}.") from error
        return not kept

    def _copy_log(self, *, at_least: int) -> None:
        """Copies SQLite's write-ahead log into the database if it has `at_least` so many bytes."""
        log = self.store.path.with_name(f"{DATABASE}-wal")
        size = log.stat().st_size if log.exists() else 0
        if size < self._log_tried:
            self._log_tried = 0
        # A reader of an old snapshot prevents it; the next attempt waits until the log has grown again.
        if size >= at_least and (at_least == 1 or size >= self._log_tried + at_least):
            self._log_tried = 0 if self.store.file.checkpoint(timeout=0.0) else size


def in_folder(vault: AnyVault, instead: str) -> Vault:
    """Returns the vault of a folder, for what needs its files.

    Args:
        vault: of a gallery.
        instead: what to do with one in databases, as the second half of a sentence.

    Raises:
        GalleryError: the gallery is in databases.
    """
    if isinstance(vault, Vault):
        return vault
    raise needs_folder(vault.name, instead)


def needs_folder(gallery: str, instead: str) -> GalleryError:
    """Returns the error for what cannot be done with a gallery in databases; see `in_folder`."""
    return GalleryError(f"{gallery} is in databases and this needs a folder; {instead}.")


def _segment(written: Written, generation: Generation) -> Segment:
    return Segment(written.id, written.rows, written.bytes, written.sha256, generation.id)


def _replace(
    writer: Writer, generation: Generation, old: Sequence[int], written: Written, made: CodesRow | None
) -> None:
    """Replaces the rows of old segments by those of a new one and its codes."""
    writer.replace_segments(old, [_segment(written, generation)])
    if made is not None:
        writer.set_codes(made)
