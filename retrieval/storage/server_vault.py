"""`ServerVault`: a gallery with its rows in PostgreSQL and its vectors in Milvus.

The order of every change:

1. The writer takes PostgreSQL's advisory lock of the gallery, in the transaction that will change the rows.
2. The ids of new faces are reserved in a transaction of its own (see `Postgresql.reserve_face_ids`).
3. The vectors are stored in Milvus and flushed; only then the transaction commits the rows that name them.
4. Vectors of removed rows are removed from Milvus after the commit.

A process that dies in between leaves vectors without rows, which are in no answer. The next writer compares
the numbers of vectors and of rows, where another process has written before it, and removes what has no row.
A row without its vector, as after a restore of Milvus to an earlier state, is damage, and searches refuse to
answer (see `MilvusVectors.check_complete`).

Milvus is asked when vectors are needed: what concerns names alone works while it is down.
"""

import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import Final, TypeVar

import numpy as np

from retrieval.database.engines.postgresql import Postgresql
from retrieval.database.reader import Reader
from retrieval.database.records import Generation
from retrieval.database.store import Store
from retrieval.database.writer import Writer
from retrieval.errors import GalleryBusy, GalleryDamaged, GalleryError, InputError, StorageError
from retrieval.index.milvus import MilvusVectors, SearchedCollection
from retrieval.index.segments import Ids, Vectors, rows_at_a_time
from retrieval.models.bundle import CARD, ModelBundle, Relabel
from retrieval.storage import model_cache
from retrieval.storage.any_vault import AnyVault, Sizes, State
from retrieval.storage.layout import MODEL

_T = TypeVar("_T")

# The environment variable with the address of the vectors, in place of the one that the gallery states: with
# a password, or where this machine knows the server by another name.
VECTORS_VARIABLE: Final = "FACEPRINT_VECTORS"

# The longest wait for another writer, in seconds.
LOCK_TIMEOUT: Final = 30.0

# The most attempts of a read while a writer removes vectors that it was about to fetch.
_ATTEMPTS: Final = 20

# The most rows that are read to see that none was removed; beyond, all are read.
_MOST_LATER: Final = 100_000

# Rows of vectors that a copy fetches at a time.
_COPY_ROWS: Final = 8192


class _NeverMind(Exception):
    """Rolls a transaction back."""


class ServerVault(AnyVault):
    """Rows in PostgreSQL, vectors in Milvus. Safe to share between threads and processes.

    Args:
        address: of the database, perhaps with a password.
        store: the tables.
        vectors: the address of the vectors; None for `VECTORS_VARIABLE` or the one that the gallery states.
        read_only, via: as of `AnyVault`.
    """

    remains = (
        "No answer has them from now on. Their bytes are gone once PostgreSQL has vacuumed its tables and "
        "recycled its log, on replicas and in archives too; once Milvus has compacted the collection, "
        "removed the old segments and let its log expire; and once the backups of both are gone. The "
        "settings of your servers say when that is."
    )

    def __init__(self, address: str, store: Store, *, vectors: str | None, read_only: bool, via: str) -> None:
        super().__init__(store.engine.gallery, store, read_only=read_only, via=via)
        self._address = address
        self.vectors_address = vectors
        self._opening = threading.Lock()
        self._opened: MilvusVectors | None = None
        self._state: State | None = None
        # The counters after the last change of this process, which left Milvus without superfluous vectors.
        self._left: tuple[int, int] | None = None
        self._removed: dict[Writer, list[int]] = {}

    @staticmethod
    def create(address: str, bundle: ModelBundle, vectors: str) -> None:
        """Creates an empty gallery: a collection, then the tables.

        Args:
            address: of the database.
            bundle: the model.
            vectors: the address of a collection that does not exist.

        Raises:
            InputError, MissingDependency, GalleryError, GalleryBusy, StorageError: as of `Store.create_at`
                and `MilvusVectors.create`; nothing was created.
        """
        gallery = str(uuid.uuid4())
        collection = MilvusVectors.create(vectors, bundle.dimension, owner=owner(gallery, bundle.fingerprint))
        with closing(collection):
            try:
                create_rows(address, bundle, collection.name, gallery=gallery)
            except BaseException:
                collection.drop()
                raise

    @classmethod
    def open(
        cls, address: str, *, vectors: str | None = None, read_only: bool = False, via: str = "library"
    ) -> "ServerVault":
        """Opens the rows of a gallery; the vectors are opened when they are needed.

        A database that follows another one is opened for reading only.

        Raises:
            InputError, MissingDependency, GalleryError, GalleryDamaged, GalleryBusy, StorageError: as of
                `Store.open_at`.
        """
        store = Store.open_at(address, read_only=read_only, timeout=LOCK_TIMEOUT)
        try:
            read_only = read_only or _engine(store).is_standby()
        except BaseException:
            store.close()
            raise
        return cls(address, store, vectors=vectors, read_only=read_only, via=via)

    @property
    def place(self) -> str:
        """See `AnyVault`."""
        return self._address

    def close(self) -> None:
        """See `AnyVault`."""
        self.store.close()
        with self._opening:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    # Reading

    def collection(self) -> MilvusVectors:
        """Returns the collection with the vectors; connects on first use.

        Raises:
            GalleryError: it is of another gallery, or does not exist.
            InputError, MissingDependency, GalleryDamaged, StorageError: as of `MilvusVectors.open`.
        """
        self.store.check_open()
        with self._opening:
            if self._opened is None:
                with self.store.read() as reader:
                    generation, gallery = self.serving(reader), reader.gallery().uuid
                    stated = reader.vectors_address(generation.id)
                address = self.vectors_address or os.environ.get(VECTORS_VARIABLE) or stated
                opened = MilvusVectors.open(address, generation.dimension)
                if opened.owner() != owner(gallery, generation.fingerprint):
                    opened.close()
                    raise GalleryError(
                        f"The collection {opened.name} is not that of the gallery {self.name}, which has its "
                        f"vectors in {stated}; give that address."
                    )
                self._opened = opened
            return self._opened

    def check_vectors(self) -> None:
        """See `AnyVault`."""
        self.collection().check_answers()

    def state(self, reader: Reader) -> State:
        """See `AnyVault`."""
        revision, known = reader.revision(), self._state
        if known is not None and known.revision == revision:
            return known
        generation = self.serving(reader)
        rows = _rows(reader, known)
        vectors = SearchedCollection(self.collection, rows, generation.dimension)
        self._state = State(revision, generation, len(rows), reader.calibration(generation), vectors)
        return self._state

    def on_a_snapshot(self, work: Callable[[Reader], _T]) -> _T:
        """See `AnyVault`."""
        for _ in range(_ATTEMPTS - 1):
            with self.store.read() as reader:
                revision = reader.revision()
                try:
                    return work(reader)
                except GalleryDamaged:
                    with self.store.read() as later:
                        if later.revision() == revision:
                            raise
        with self.store.read() as reader:
            return work(reader)

    def vector(self, reader: Reader, generation: Generation, face_id: int) -> Vectors | None:
        """See `AnyVault`."""
        _, found = self.state(reader).vectors.some(np.array([face_id], np.int64))
        return found[0] if len(found) else None

    def rows_at_a_time(self, generation: Generation) -> int:
        """See `AnyVault`."""
        return rows_at_a_time(generation.dimension)

    def proven_parts(self, reader: Reader, proven: set[int]) -> Iterator[tuple[Ids, Vectors]]:
        """See `AnyVault`: Milvus keeps checksums of its own, so only what is missing is noticed here."""
        rows, collection = _rows(reader, None), self.collection()
        starts = range(0, len(rows), _COPY_ROWS)
        return ((ids, collection.fetch(ids)) for ids in (rows[s : s + _COPY_ROWS] for s in starts))

    def bundle(self, reader: Reader, generation: Generation) -> ModelBundle:
        """See `AnyVault`; the model is run from a copy on this machine (see `model_cache`).

        Raises:
            GalleryDamaged: the database has another model than it states.
            StorageError: the copy cannot be written.
        """
        return model_cache.load(reader, generation)

    def sizes(self, reader: Reader) -> Sizes:
        """See `AnyVault`; of the vectors it is what their numbers take, without Milvus' own overhead."""
        generation = self.serving(reader)
        return Sizes(self.store.size(), 4 * generation.dimension * reader.count(), 0)

    # Writing

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """See `AnyVault`."""
        with self._in_transaction() as writer:
            swept = self._left == _counters(writer) or self._sweep(writer)
            # Until it is committed, what was stored may be without rows, and what was removed have some.
            self._left = None
            self._removed[writer] = []
            try:
                yield writer
                left = _counters(writer, after=True)
            finally:
                removed = self._removed.pop(writer)
        # Removed rows are in no answer any more: their vectors can wait for the next writer.
        with suppress(StorageError):
            if removed:
                self.collection().remove(np.array(removed, np.int64))
            self._left = left if swept else None

    @contextmanager
    def trying(self) -> Iterator[Writer]:
        """See `AnyVault`: the transaction is rolled back; other writers wait for it."""
        with suppress(_NeverMind), self._in_transaction() as writer:
            yield writer
            raise _NeverMind

    @contextmanager
    def _in_transaction(self) -> Iterator[Writer]:
        if self.read_only:
            raise InputError(
                f"{self.name} was opened for reading only, or its server is a standby; open it at the "
                "primary server for writing."
            )
        with self.store.write() as writer:
            yield writer

    def _sweep(self, writer: Writer) -> bool:
        """Removes vectors without a row, which killed writers left; returns whether Milvus could be asked.

        Raises:
            GalleryDamaged: the counter of faces is behind, so vectors would be overwritten.
        """
        if problems := writer.counter_problems():
            raise GalleryDamaged(f"In the database of {self.name} {problems[0]}; restore a backup.")
        with suppress(StorageError):
            collection = self.collection()
            if not collection.is_exactly(writer.count(), writer.last_face_id()):
                following = writer.gallery().next_face_id
                collection.remove(np.setdiff1d(collection.ids(following), _rows(writer, None)))
                # Of a database that was restored, or failed over, to an earlier state.
                while len(later := collection.ids_from(following)):
                    collection.remove(later)
            return True
        return False

    def reserve(self, writer: Writer, count: int) -> int:
        """See `AnyVault`.

        Raises:
            GalleryBusy: another process has reserved ids since this one became the writer.
        """
        first = writer.gallery().next_face_id
        if count and not _engine(self.store).reserve_face_ids(first, count):
            raise GalleryBusy(
                f"Another process began to write to {self.name} while the connection of this one was lost; "
                "run the command again."
            )
        return first

    @contextmanager
    def appending(self, writer: Writer, generation: Generation, ids: Ids, vectors: Vectors) -> Iterator[None]:
        """See `AnyVault`; Milvus stores the vectors while the with statement writes their rows."""
        if not len(ids):
            yield
            return
        # Leaving the executor waits for the thread, even after an error: the lock is held meanwhile.
        with ThreadPoolExecutor(1, thread_name_prefix="faceprint-write") as thread:
            stored = thread.submit(self.collection().put, ids, vectors)
            yield
            stored.result()

    def remove(self, writer: Writer, ids: Sequence[int]) -> None:
        """See `AnyVault`; the vectors are removed after the commit."""
        if ids:
            writer.remove_faces(ids)
            self._removed[writer] += ids

    def defer(self, writer: Writer, *, erase: bool, labels: Mapping[str, Mapping[int, Relabel]]) -> None:
        """See `AnyVault`: the cards of the models change with the commit.

        The servers keep bytes of deleted rows and vectors for as long as their own settings say.
        """
        for generation in writer.generations().values():
            if generation.folder in labels:
                changed = (
                    self.bundle(writer, generation).relabelled(labels[generation.folder]).card().encode()
                )
                model_cache.store_file(writer, generation.id, CARD, changed)
                writer.set_card(generation.id, hashlib.sha256(changed).hexdigest())


def owner(gallery: str, fingerprint: str) -> str:
    """Returns what the collection of a gallery's model says that it is of."""
    return f"faceprint gallery {gallery}, model {fingerprint}"


def check_free(address: str) -> str:
    """Checks that a gallery can be created in a schema, and creates nothing; returns its name for messages.

    Raises:
        InputError, MissingDependency, GalleryError, GalleryBusy, StorageError: as of `Store.create_at`.
    """
    with closing(Postgresql(address)) as engine:
        with suppress(_NeverMind), engine.creating():
            raise _NeverMind
        return engine.gallery


def create_rows(
    address: str,
    bundle: ModelBundle,
    vectors: str,
    *,
    gallery: str,
    fill: Callable[[Writer], None] = lambda writer: None,
) -> None:
    """Creates the tables of a gallery, with its model.

    Args:
        address: of the database.
        bundle: the model.
        vectors: where its vectors are, without a password.
        gallery: the UUID of the gallery.
        fill: adds further rows, in the same transaction.

    Raises:
        InputError, MissingDependency, GalleryError, GalleryBusy, StorageError: as of `Store.create_at`.
        BundleError: a file of the model is not what its card states.
    """

    def fill_all(writer: Writer) -> None:
        writer.set_vectors_address(1, vectors)
        model_cache.store(writer, 1, bundle)
        fill(writer)

    Store.create_at(
        address,
        fingerprint=bundle.fingerprint,
        dimension=bundle.dimension,
        folder=MODEL,
        card_sha256=bundle.card_sha256(),
        gallery=gallery,
        fill=fill_all,
    ).close()


def _counters(writer: Writer, *, after: bool = False) -> tuple[int, int]:
    """Returns the revision, with `after` that of the commit, and the next id of a face.

    If they are not what the last change of a process left, another one has written since, or was killed.
    """
    row = writer.gallery()
    return row.revision + (after and writer.changed), row.next_face_id


def _engine(store: Store) -> Postgresql:
    assert isinstance(store.engine, Postgresql)  # `Store.open_at` opened it
    return store.engine


def _rows(reader: Reader, known: State | None) -> Ids:
    """Returns the ids of all faces, ascending.

    Args:
        reader: a snapshot.
        known: the state of an earlier one: ids are never used again, so if as many as the later ones were
            added since, none was removed.
    """
    if known is not None and isinstance(known.vectors, SearchedCollection):
        before = known.vectors.rows
        last = int(before[-1]) if len(before) else 0
        later = np.array(reader.face_ids_after(last, _MOST_LATER), np.int64)
        if len(before) + len(later) == reader.count():
            return np.concatenate([before, later])
    return np.fromiter(reader.face_ids(), np.int64)
