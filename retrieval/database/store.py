"""Store: the database of a gallery for the vault: creation, opening, snapshots and transactions.

SQLite is the authority on which faces exist. A segment without a row does not exist.
"""

import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, insert
from sqlalchemy.exc import DatabaseError, OperationalError

from retrieval.database import page_checksums, schema
from retrieval.database.connections import check_beside, check_no_link, is_still, make_engine
from retrieval.database.migrations import (
    SCHEMA_VERSION,
    check_schema,
    migrate,
    runner,
    stored_version,
)
from retrieval.database.reader import Reader
from retrieval.database.records import Generation, utc_now
from retrieval.database.sqlite_errors import blames_machine, translated
from retrieval.database.tables import gallery_table, generation_table
from retrieval.database.writer import Writer
from retrieval.errors import GalleryDamaged, GalleryError, InputError, StorageError
from retrieval.system import lock
from retrieval.system.files import create, make_room, other_than_file, sync, why, why_not_written

# The file that a writer locks, beside the database.
LOCK_NAME: Final = "writer.lock"


def _file_at(path: Path) -> tuple[int, int]:
    """Returns what tells a file from another one that takes its place while it is open.

    Raises:
        StorageError: there is none.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {why(error)}.") from error
    return status.st_dev, status.st_ino


class SnapshotLost(StorageError):
    """Another process wrote to a database that could only be read without a lock."""


class Store:
    """A gallery's database. Safe to share between threads."""

    def __init__(self, path: Path, engine: Engine, *, replaced: bool = False) -> None:
        self.path = path
        self._engine = engine
        self.closed = False
        # The file that the connections of the engine have open, where another one may take its place.
        self._file = _file_at(path) if replaced else None

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        fingerprint: str,
        dimension: int,
        folder: str = "model",
        card_sha256: str = "",
        folder_id: str | None = None,
    ) -> "Store":
        """Creates the database of an empty gallery, with the given model as its first generation.

        `folder_id` is the id of its vectors folder (see `retrieval.storage.ownership`).

        Raises:
            StorageError: the file system refused.
        """
        try:
            # Before SQLite creates it with the mode of the umask; SQLite's log takes the mode of this file.
            create(path, inherit=True).close()
        except OSError as error:
            raise StorageError(f"The database {path} cannot be made: {why(error)}.") from error
        store = cls(path, make_engine(path))
        now = utc_now()
        with store._translated(), store._engine.begin() as connection:
            schema.create(connection, SCHEMA_VERSION)
            connection.execute(
                insert(generation_table),
                asdict(Generation(1, fingerprint, dimension, folder, card_sha256, now)),
            )
            connection.execute(
                insert(gallery_table).values(
                    id=1,
                    uuid=str(uuid.uuid4()),
                    created_at=now,
                    next_face_id=1,
                    next_segment_id=1,
                    generation_id=1,
                    revision=1,
                    revision_check=-1,
                    next_identity_id=1,
                    next_generation_id=2,
                    next_basis_id=1,
                    folder_id=folder_id,
                )
            )
        return store

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False, timeout: float = 30.0) -> "Store":
        """Opens a database; migrates one of an older version, after taking a copy.

        Args:
            path: the database file.
            read_only: change nothing, not even the schema version; works on a read-only file system.
            timeout: seconds to wait for another writer before a migration.

        Raises:
            GalleryError: there is no database, a newer version made it, or an older one and `read_only` is
                set.
            GalleryDamaged: the file is not the database of a gallery.
            GalleryBusy: another process is writing while a migration is needed.
            StorageError: the file system cannot lock files, or is not writable.
        """
        if (other := other_than_file(path)) is not None:
            raise GalleryError(f"{path} is {other}, not a database; restore the gallery from a backup.")
        if not path.is_file():
            raise GalleryError(f"{path.parent} is not a gallery: it has no {path.name}.")
        if not read_only:
            check_no_link(path)
            if (reason := why_not_written(path.parent)) is not None:
                raise StorageError(f"{path.parent} cannot be written to: {reason}.")
        check_beside(path)
        # Without locks SQLite would report "database is locked" after 30 s.
        lock.check_existing(path.with_name(LOCK_NAME))
        store = cls(path, make_engine(path, read_only=read_only))
        try:
            version = store._version()
            if version == SCHEMA_VERSION:
                store._check_schema(exact=True)
                if not read_only and store._leftovers():
                    with lock.exclusive(path.with_name(LOCK_NAME), timeout=timeout):
                        store._drop_leftovers()
            if version != SCHEMA_VERSION and read_only:
                raise GalleryError(
                    f"The gallery {path.parent} was made by an older version of faceprint (schema {version}, "
                    f"this one knows {SCHEMA_VERSION}); open it once for writing, with `faceprint compact`."
                )
            if version != SCHEMA_VERSION:
                with lock.exclusive(path.with_name(LOCK_NAME), timeout=timeout):
                    store._upgrade()
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def open_replaced(cls, path: Path) -> "Store":
        """Opens a database that never changes, and that another one may take the place of, by a rename.

        Each snapshot is of the file that is there when it begins.

        Raises:
            GalleryError: there is no database, or another version made it.
            GalleryDamaged: the file is not the database of a gallery.
        """
        if (other := other_than_file(path)) is not None:
            raise GalleryError(f"{path} is {other}, not a database; run `faceprint follow` again.")
        store = cls(path, make_engine(path, read_only=True, immutable=True), replaced=True)
        try:
            version = store._version()
            if version != SCHEMA_VERSION:
                raise GalleryError(
                    f"The gallery {path.parent} was made by an older version of faceprint (schema "
                    f"{version}, this "
                    f"one knows {SCHEMA_VERSION}); publish it with this version, and follow it."
                )
            store._check_schema(exact=True)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Closes all connections; later reads and writes raise an error."""
        self.closed = True
        self._engine.dispose()

    def check_open(self) -> None:
        """Checks that the database is not closed: SQLAlchemy would silently reopen it.

        Raises:
            InputError: it is closed.
        """
        if self.closed:
            raise InputError(f"The gallery {self.path.parent} is closed; open it again with Gallery.open.")

    @contextmanager
    def read(self) -> Iterator[Reader]:
        """Yields a snapshot until the with statement ends.

        Raises:
            SnapshotLost: at the end, if SQLite could not lock the file and it has changed: the data read are
                invalid.
        """
        self.check_open()
        before = self._stamp()
        self._notice_replaced()
        with self._translated(), self._engine.begin() as connection:
            yield Reader(connection)
        if before != self._stamp():
            raise SnapshotLost(f"{self.path} was changed by another process while it was read; try again.")

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """Yields a transaction, committed durably at the end of the with statement unless it raises."""
        with self._translated(), self._engine.connect() as connection:
            connection.execution_options(faceprint_write=True)
            with connection.begin():
                writer = Writer(connection)
                yield writer
                writer.finish()

    @contextmanager
    def driver(self) -> Iterator[Any]:
        """Yields the `sqlite3` connection, outside of any transaction."""
        with self._translated(), self._engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None  # a connection that is checked out always has one
            try:
                yield driver
            except sqlite3.OperationalError as error:
                raise OperationalError(None, None, error) from error
            except sqlite3.DatabaseError as error:
                raise DatabaseError(None, None, error) from error

    def vacuum(self) -> None:
        """Rewrites the file, through the log, so that no page contains deleted rows.

        `secure_delete` alone is not enough: SQLite leaves copies of a row behind when it moves rows between
        pages, and later overwrites only the last one.
        """
        with self.driver() as driver:
            driver.execute("VACUUM")

    def checkpoint(self, *, timeout: float) -> bool:
        """Copies SQLite's log into the database and empties it; returns whether the log is empty."""
        with self.driver() as driver:
            driver.execute(f"PRAGMA busy_timeout = {int(1000 * timeout)}")
            try:
                return page_checksums.checkpoint(driver, self.path, mode="TRUNCATE")
            finally:
                driver.execute("PRAGMA busy_timeout = 30000")

    def copy(self, target: Path) -> None:
        """Copies one snapshot of the database to a new file, durably, without blocking writers.

        The copy is a single file without a log, even while it is read.

        Raises:
            StorageError: it cannot be copied.
            OSError: the copy cannot be made durable.
        """
        # SQLite would replay the journal of an interrupted copy into this one.
        for suffix in ("-journal", "-wal", "-shm"):
            journal = target.with_name(target.name + suffix)
            make_room(journal)
            journal.unlink(missing_ok=True)
        make_room(target)
        create(target, inherit=True).close()
        with self.driver() as driver:
            try:
                with closing(sqlite3.connect(target)) as copied:
                    driver.backup(copied)
                    copied.execute("PRAGMA journal_mode = DELETE")
            except sqlite3.Error as error:
                raise StorageError(f"{self.path} cannot be copied to {target}: {error}.") from error
        sync(target)

    def problems(self) -> list[str]:
        """Returns the defects that SQLite's own checks find in the file."""
        try:
            with self.driver() as driver:
                lines = [str(row[0]) for row in driver.execute("PRAGMA integrity_check")]
                dangling = driver.execute("PRAGMA foreign_key_check").fetchall()
                lines += schema.type_problems(driver.execute)
        except (GalleryDamaged, StorageError) as error:
            if blames_machine(error):
                raise
            return [str(error)]
        problems = [line for line in lines if line != "ok"]
        return problems + [f"a row of {row[0]} refers to nothing" for row in dangling]

    def upgrade_copies(self) -> list[Path]:
        """Returns the copies of the database that were taken before migrations."""
        return sorted(self.path.parent.glob(f"{self.path.stem}-[0-9][0-9][0-9][0-9]{self.path.suffix}"))

    def _notice_replaced(self) -> None:
        """Closes the connections to a file that another one has taken the place of."""
        if self._file is not None and (found := _file_at(self.path)) != self._file:
            # Not the other way round: another thread would go on with a connection to the former file.
            self._engine.dispose()
            self._file = found

    def _stamp(self) -> tuple[int, int] | None:
        """Returns modification time and size, which change with every write; None where SQLite can lock."""
        if self._file is not None or not is_still(self.path):
            return None
        status = self.path.stat()
        return status.st_mtime_ns, status.st_size

    def _version(self) -> str | None:
        with self._translated(), self._engine.connect() as connection:
            return stored_version(connection, self.path)

    def _check_schema(self, *, exact: bool) -> None:
        """Checks that the database has exactly the tables of a gallery; see `database.schema`."""
        with self._translated(), self._engine.connect() as connection:
            check_schema(connection, self.path, exact=exact)

    def _leftovers(self) -> list[str]:
        with self._translated(), self._engine.connect() as connection:
            return schema.leftovers(runner(connection))

    def _drop_leftovers(self) -> None:
        """Removes the temporary tables of a killed migration."""
        if names := self._leftovers():
            page_checksums.discard(self.path)
            with self._translated(), self._engine.begin() as connection:
                for name in names:
                    connection.exec_driver_sql(f'DROP TABLE "{name}"')

    def _upgrade(self) -> None:
        version = self._version()  # another process may have migrated it meanwhile
        if version == SCHEMA_VERSION:
            return
        self._check_schema(exact=False)
        copy = self.path.with_name(f"{self.path.stem}-{version or '0000'}{self.path.suffix}")
        part = copy.with_suffix(".part")
        try:
            make_room(copy)  # before the database is read for nothing
            self.copy(part)
            os.replace(part, copy)
            sync(copy.parent)
        except OSError as error:
            raise StorageError(
                f"{self.path} has to be brought up to date and cannot be copied to "
                f"{error.filename2 or error.filename or copy} before: {why(error)}."
            ) from error
        # Migrations change pages without changing the revision.
        page_checksums.discard(self.path)
        self._drop_leftovers()
        with self._translated(), self._engine.begin() as connection:
            migrate(connection)
            check_schema(connection, self.path, exact=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Translates errors of SQLAlchemy into faceprint's."""
        self.check_open()
        with translated(self.path):
            yield
