"""The `Vault`: rows and vectors of a gallery, in step after any crash; it knows nothing of images.

    my.gallery/
      gallery.db               SQLite: which faces exist, and their identities
      gallery.sums             a checksum for each page of gallery.db
      vectors/00000007.faiss   their vectors, immutable segments
      vectors/00000007-1.codes 8-bit codes that searches read first, in basis 1
      vectors/00000001.basis   the transform that codes are made with (see `retrieval.index.quantization`)
      vectors/gallery.id       the gallery that owns this folder (see `retrieval.storage.ownership`)
      model/                   a copy of the bundle (model-2/, ... after the gallery was embedded anew)
      writer.lock              who is writing

The order of every write: vectors durable in a new segment file, then one transaction that names it and
inserts its faces. A crash in between leaves a file that nothing names, and the next writer removes it.
What can only be done after a transaction (erasing traces, taking a name off a model's card) is written
down in the transaction, and the next writer does it if this one cannot.
"""

import getpass
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from retrieval.database import page_checksums
from retrieval.database.reader import Reader
from retrieval.database.records import (
    AuditEntry,
    Calibration,
    CodesRow,
    Generation,
    Segment,
    utc_now,
)
from retrieval.database.sqlite_errors import blames_machine
from retrieval.database.store import LOCK_NAME, SnapshotLost, Store
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
from retrieval.storage.codes import Coding, encode
from retrieval.storage.deferred import DeferredWork
from retrieval.storage.layout import BACKUP_CARD, DATABASE, MODEL, VECTORS
from retrieval.system import lock
from retrieval.system.files import (
    make_folder,
    remove,
    remove_abandoned,
    sync,
    why,
    why_not_written,
)

_T = TypeVar("_T")

# From how many vectors on a thread writes them while their rows are inserted.
_PARALLEL_WRITE_MIN: Final = 1024

# How long a writer waits for another one, in seconds.
LOCK_TIMEOUT: Final = 30.0

# How often a search starts over when a writer merges the files that it was about to open.
_ATTEMPTS: Final = 20

# How long SQLite's log may become, in bytes, before it is copied into the database.
_LOG_BYTES: Final = 32 * 2**20


@dataclass(frozen=True, slots=True)
class State:
    """What a search needs to know of a snapshot: which model, which segments, and of their codes.

    Beside these, how many faces there are, and what was found out about their distances, if anything.
    """

    revision: int
    generation: Generation
    segments: tuple[int, ...]
    coded: Mapping[int, CodesOf]
    faces: int
    calibration: Calibration | None


class Vault:
    """Rows and vectors under one folder. Safe to share between threads; any number of processes may read.

    Attributes:
        folder: the gallery's.
        store: the tables.
        read_only: whether writing is refused.
        via: what the audit log says of the caller: a command, or "library".
    """

    def __init__(self, folder: Path, store: Store, *, read_only: bool, via: str) -> None:
        self.folder = folder
        self.store = store
        self.read_only = read_only
        self.via = via
        self._vectors: dict[int, FlatVectors] = {}
        self._state: State | None = None
        self._opening = threading.Lock()
        self._log_tried = 0
        self._wrote = False
        self._replaceable: set[str] = set()  # the files that were named before the transaction at hand

    @staticmethod
    def create(folder: Path, bundle: ModelBundle) -> None:
        """Makes an empty gallery's files, durable, in a new folder, for those who may use that.

        Raises:
            OSError: the disk refused.
            BundleError: the bundle's files are not the ones that its card names.
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
        with store.driver() as driver:
            page_checksums.checkpoint(driver, store.path, mode="TRUNCATE")
        store.close()
        sync(folder / DATABASE)
        sync(folder)

    @classmethod
    def open(cls, folder: Path, *, read_only: bool = False, via: str = "library") -> "Vault":
        """Opens a gallery's rows and vectors.

        Raises:
            GalleryError: there is none, or another version made it.
            GalleryDamaged: its database is not what it was.
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
        store = Store.open(folder / DATABASE, read_only=read_only, timeout=LOCK_TIMEOUT)
        return cls(folder, store, read_only=read_only, via=via)

    def close(self) -> None:
        """Closes the database and the mapped files; a second time it does nothing."""
        if self.store.closed:
            return
        if self._wrote:
            # A process that writes at this moment will copy the log itself.
            with suppress(GalleryBusy, StorageError), self._locked(timeout=0):
                self._copy_log(at_least=1)
        for vectors in self._vectors.values():
            vectors.forget_all_but(())
        self.store.close()

    # Reading

    def vectors(self, generation: Generation) -> FlatVectors:
        """The segments of one generation."""
        with self._opening:
            if generation.id not in self._vectors:
                folder = self.folder / VECTORS
                self._vectors[generation.id] = FlatVectors(folder, generation.dimension)
            return self._vectors[generation.id]

    def state(self, reader: Reader) -> State:
        """What a snapshot is; read anew only when something has changed since it was last asked."""
        revision, known = reader.revision(), self._state
        if known is not None and known.revision == revision:
            return known
        generation = self.serving(reader)
        vectors, folder_id = self.folder / VECTORS, reader.gallery().folder_id
        # Another gallery has files of the same names: its vectors would be answered as this one's.
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
        self._state = State(revision, generation, segments, coded, faces, calibration)
        return self._state

    def _close_replaced(self, reader: Reader) -> None:
        """Closes the mapped files of segments that no longer exist, of every generation.

        While it is mapped, a deleted file keeps its room on the disk, and what was to be erased.
        """
        existing: dict[int, list[int]] = {}
        for segment in reader.segments():
            existing.setdefault(segment.generation_id, []).append(segment.id)
        with self._opening:
            vectors = dict(self._vectors)
        for generation, flat in vectors.items():
            flat.forget_all_but(existing.get(generation, ()))

    def serving(self, reader: Reader) -> Generation:
        """The generation that answers searches."""
        return reader.serving_generation()

    def on_a_snapshot(self, work: Callable[[Reader], _T]) -> _T:
        """What `work` makes of a snapshot; of a later one where a writer merged its files away meanwhile."""
        for _ in range(_ATTEMPTS - 1):
            with suppress(SegmentMissing, SnapshotLost), self.store.read() as reader:
                return work(reader)
        with self.store.read() as reader:
            return work(reader)

    def vector(self, reader: Reader, generation: Generation, face_id: int) -> Vectors | None:
        """A face's vector (d,); None where the generation has none."""
        vectors = self.vectors(generation)
        for segment in reader.segments(generation.id):
            ids, matrix = vectors.rows(segment.id)
            (rows,) = np.nonzero(ids == face_id)
            if len(rows):
                return np.array(matrix[rows[0]])
        return None

    # Writing

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """The only writer, in one transaction. Files that nothing names are removed before and after.

        Raises:
            GalleryBusy: another process is writing, and did not finish in time.
            InputError: the gallery was opened for reading only, and could have been opened for writing.
            GalleryError: a folder of the gallery is a symbolic link, or belongs to another gallery.
            StorageError: the disk refused; nothing was changed, unless the sentence says so.
        """
        if self.read_only:
            if (reason := why_not_written(self.folder)) is not None:
                raise StorageError(f"{self.folder} cannot be written to: {reason}.")
            raise InputError(f"{self.folder} was opened for reading only; open it for writing.")
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
            # The transaction stands. What is left to do can wait for the next writer.
            with suppress(StorageError):
                self._tidy(settled=True)
                self._replaceable = set()
                self._copy_log(at_least=_LOG_BYTES)

    @contextmanager
    def noting(self) -> Iterator[Writer]:
        """The only writer, as `writing`, that touches no file but the database. Only for who mends.

        Raises:
            GalleryBusy, StorageError: as `writing`.
        """
        with self._locked(timeout=LOCK_TIMEOUT):
            self._wrote = True
            with self.store.write() as writer:
                yield writer

    def settle(self) -> None:
        """Does what earlier transactions have deferred.

        Raises:
            GalleryBusy, StorageError: it cannot be done now.
        """
        with self.writing() as writer:
            writer.defers = True

    @contextmanager
    def appending(self, writer: Writer, generation: Generation, ids: Ids, vectors: Vectors) -> Iterator[None]:
        """Writes new vectors, many of them while the body of the with statement writes their rows.

        The newest segments that are not twice as large become one with them. Sizes then fall at least by
        half from one segment to the next, as the digits of a binary counter: a photo costs its own bytes and
        its share of the merges, never the whole gallery.
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
            # Leaving it waits for the thread, whatever happens in the body: the lock is held meanwhile.
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
        """New vectors behind those of the segments that become one with them, and these segments' ids."""
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

    def append(self, writer: Writer, generation: Generation, ids: Ids, vectors: Vectors) -> None:
        """As `appending`, for vectors whose rows are there already."""
        with self.appending(writer, generation, ids, vectors):
            pass

    def remove(self, writer: Writer, ids: Sequence[int]) -> None:
        """Removes faces: their rows, and their vectors from every segment of every generation."""
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
                        left[1].prove()  # which faces it has is known by its ids
                    self.put(writer, generation, [segment.id], [left] if kept.any() else [])
        writer.remove_faces(ids)

    def size(self, reader: Reader) -> int:
        """Bytes on disk, of vectors, their codes, and the database."""
        database = self.store.path.stat().st_size
        vectors = sum(segment.bytes for segment in reader.segments())
        return database + vectors + self.codes_size(reader)

    def codes_size(self, reader: Reader) -> int:
        """Bytes on disk, of codes and bases."""
        codes_bytes = sum(one.bytes for one in reader.codes().values())
        return codes_bytes + sum(basis.bytes for basis in reader.bases().values())

    def _write(
        self, flat: FlatVectors, coding: Coding, segment: int, parts: Sequence[Part]
    ) -> tuple[Written, CodesRow | None]:
        """Writes a segment and its codes, both durable; the second is None where it has none."""
        return flat.write(segment, parts), encode(flat, coding, segment, parts)

    def bundle(self, reader: Reader, generation: Generation) -> ModelBundle:
        """The model of a generation, under the labels that it has in this snapshot.

        Raises:
            BundleError, ModelMismatch: the model is missing, damaged or another one.
        """
        try:
            bundle = ModelBundle.load(self.folder / generation.folder)
        except (BundleError, OSError) as error:
            if blames_machine(error):
                raise StorageError(f"The gallery's model cannot be read: {error}") from error
            raise BundleError(
                f"{error} `faceprint repair {self.folder} --backup BACKUP` does that, or --model MODEL."
            ) from error
        if (generation.fingerprint, generation.dimension) != (bundle.fingerprint, bundle.dimension):
            raise ModelMismatch(
                f"{bundle.folder} is not the model that the gallery was made with; put that one back."
            )
        # The snapshot is there at once; the card follows.
        return DeferredWork.read(reader).relabelled(bundle)

    def defer(self, writer: Writer, *, erase: bool, labels: Mapping[str, Mapping[int, Relabel]]) -> None:
        """Writes down what has to be done once the transaction stands; see `deferred.defer`."""
        deferred.defer(self.folder, writer, erase=erase, labels=labels)

    def _run_deferred_work(self, *, insist: bool) -> None:
        deferred.run(self.store, self.folder, insist=insist, tidy=lambda: self._tidy(settled=True))

    def log(
        self, writer: Writer, action: str, *, faces: int = 0, extend: int | None = None, **detail: Any
    ) -> int:
        """Adds to the audit log: to its newest entry if that is number `extend`. Returns the number."""
        if extend is not None and writer.extend_audit(extend, faces):
            return extend
        now = utc_now()
        return writer.add_audit(AuditEntry(now, now, who(), self.via, action, faces, detail))

    def put(
        self,
        writer: Writer,
        generation: Generation,
        old: Sequence[int],
        parts: Sequence[Part],
    ) -> None:
        """Makes a new segment of `parts` exist, if there are any, and old ones not exist."""
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

    def claim(self) -> None:
        """Says that the folder of vectors is this gallery's, where that was lost. Only for who mends.

        Where the folder has another id, each vector file must be what was written, and no other be there.

        Raises:
            GalleryError: it is another gallery's.
        """
        with self._locked(timeout=LOCK_TIMEOUT):
            ownership.claim(self.folder, self.store)

    def leftovers(self, reader: Reader) -> tuple[list[Path], list[Path]]:
        """What no row names: what the next writer removes, and what has to stay (see `leftovers`)."""
        return leftovers.removable(self.folder, reader, replaced=self._replaceable)

    def _prepare(self) -> None:
        """What is done once, before the first thing is written.

        Raises:
            GalleryDamaged: a counter is behind: files that rows name would be written over.
        """
        with self.store.read() as reader:
            if problems := reader.counter_problems():
                raise GalleryDamaged(f"In the database of {self.folder} {problems[0]}; restore a backup.")
        # The folder above may be one that this user cannot write to, and a gallery in it all the same.
        with suppress(OSError):
            remove_abandoned(*leftovers.in_the_making(self.folder))

    def _tidy(self, *, settled: bool = False) -> bool:
        """Removes what nothing names: what an interrupted write left, or what the last one replaced.

        Vector files stay while one is missing (see `leftovers`); says whether none did.

        A transaction whose commit failed may still come to life: its end may stand in the log, unnoticed
        until the log is read again after a crash. So before its files go, another commit takes its place.
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
            raise StorageError(f"{self.folder} cannot be tidied: {why(error)}.") from error
        return not kept

    def _copy_log(self, *, at_least: int) -> None:
        """Copies SQLite's log into the database once it is long."""
        log = self.store.path.with_name(f"{DATABASE}-wal")
        size = log.stat().st_size if log.exists() else 0
        if size < self._log_tried:
            self._log_tried = 0
        # Where a reader keeps an old snapshot the log stays; the next try waits until it has grown again.
        if size >= at_least and (at_least == 1 or size >= self._log_tried + at_least):
            self._log_tried = 0 if self.store.checkpoint(timeout=0.0) else size


def who() -> str:
    """The user of the operating system."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"


def _segment(written: Written, generation: Generation) -> Segment:
    return Segment(written.id, written.rows, written.bytes, written.sha256, generation.id)


def _replace(
    writer: Writer, generation: Generation, old: Sequence[int], written: Written, made: CodesRow | None
) -> None:
    """Makes a new segment, with its codes, exist in place of old ones."""
    writer.replace_segments(old, [_segment(written, generation)])
    if made is not None:
        writer.set_codes(made)
