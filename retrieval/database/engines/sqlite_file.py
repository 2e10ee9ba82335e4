"""`SqliteFile`: a gallery's tables in one SQLite file, and what concerns that file alone.

Its write-ahead log, the checksums of its pages, the traces of deleted rows, copies, and the upgrade of a file
that an older version made.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import NullPool

from retrieval.database import page_checksums, schema, unused_bytes
from retrieval.database.connections import check_beside, check_no_link, is_still, make_engine
from retrieval.database.migrations import SCHEMA_VERSION, check_schema, migrate, runner, stored_version
from retrieval.database.sqlite_errors import blames_machine, translated
from retrieval.database.unused_bytes import OwnDescriptor
from retrieval.errors import GalleryDamaged, GalleryError, GalleryReplaced, StorageError
from retrieval.system import lock
from retrieval.system.files import create, make_room, other_than_file, sync, why, why_not_written

# The file that a writer locks, beside the database.
LOCK_NAME: Final = "writer.lock"


def _status(path: Path) -> os.stat_result:
    """Returns the status of a file.

    Raises:
        StorageError: it cannot be read.
        GalleryReplaced: there is none.
    """
    try:
        return os.stat(path)
    except FileNotFoundError as error:
        raise GalleryReplaced(
            f"{path} is no longer there; open the gallery again where it is now."
        ) from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {why(error)}.") from error


def _file_at(path: Path) -> tuple[int, int]:
    """Returns what tells a file from another one that takes its place while it is open."""
    status = _status(path)
    return status.st_dev, status.st_ino


class SnapshotLost(StorageError):
    """Another process wrote to a database that could only be read without a lock."""


class SqliteFile:
    """An opened SQLite file; the `DatabaseEngine` of a gallery in a folder.

    Attributes:
        path: the file.
        sql: its connections.
    """

    def __init__(self, path: Path, sql: Engine, *, replaced: bool = False) -> None:
        self.path = path
        self.sql = sql
        # Whether another file may take the place of this one.
        self._replaced = replaced
        # The file that the connections have open, once there are any.
        self._file = _file_at(path) if replaced else None
        self._descriptor: OwnDescriptor | None = unused_bytes.shared(path)

    @classmethod
    def create(cls, path: Path) -> "SqliteFile":
        """Creates an empty file for the tables, with the permissions of its folder.

        Raises:
            StorageError: the file system refused.
        """
        try:
            # Before SQLite creates it with the mode of the umask; SQLite's log takes the mode of this file.
            create(path, inherit=True).close()
        except OSError as error:
            raise StorageError(f"The database {path} cannot be made: {why(error)}.") from error
        return cls(path, make_engine(path))

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False, timeout: float = 30.0) -> "SqliteFile":
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
        opened = cls(path, make_engine(path, read_only=read_only))
        try:
            version = opened._version()
            if version == SCHEMA_VERSION:
                opened._check_schema(exact=True)
                if not read_only and opened._leftovers():
                    with lock.exclusive(path.with_name(LOCK_NAME), timeout=timeout):
                        opened._drop_leftovers()
            if version != SCHEMA_VERSION and read_only:
                raise GalleryError(
                    f"The gallery {path.parent} was made by an older version of faceprint (schema {version}, "
                    f"this one knows {SCHEMA_VERSION}); open it once for writing, with `faceprint compact`."
                )
            if version != SCHEMA_VERSION:
                with lock.exclusive(path.with_name(LOCK_NAME), timeout=timeout):
                    opened._upgrade()
        except BaseException:
            opened.close()
            raise
        return opened

    @classmethod
    def open_replaced(cls, path: Path) -> "SqliteFile":
        """Opens a database that never changes, and that another one may take the place of, by a rename.

        Each snapshot is of the file that is there when it begins.

        Raises:
            GalleryError: there is no database, or another version made it.
            GalleryDamaged: the file is not the database of a gallery.
        """
        if (other := other_than_file(path)) is not None:
            raise GalleryError(f"{path} is {other}, not a database; run `faceprint follow` again.")
        opened = cls(path, make_engine(path, read_only=True, immutable=True), replaced=True)
        try:
            version = opened._version()
            if version != SCHEMA_VERSION:
                raise GalleryError(
                    f"The gallery {path.parent} was made by an older version of faceprint (schema "
                    f"{version}, this "
                    f"one knows {SCHEMA_VERSION}); publish it with this version, and follow it."
                )
            opened._check_schema(exact=True)
        except BaseException:
            opened.close()
            raise
        return opened

    @property
    def gallery(self) -> str:
        """Returns the folder of the gallery."""
        return str(self.path.parent)

    def size(self) -> int:
        """See `DatabaseEngine`."""
        return self.path.stat().st_size

    def close(self) -> None:
        """See `DatabaseEngine`; the last connection of all processes copies the log into the file."""
        self.sql.dispose()
        self._descriptor = None

    @contextmanager
    def creating(self) -> Iterator[Connection]:
        """See `DatabaseEngine`."""
        with translated(self.path), self.sql.begin() as connection:
            schema.create(connection, SCHEMA_VERSION)
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """See `DatabaseEngine`.

        Raises:
            SnapshotLost: at the end, if SQLite could not lock the file and it has changed: the data read are
                invalid.
        """
        before = self._stamp()
        self._notice_replaced()
        with translated(self.path), self.sql.begin() as connection:
            self._require_its_place()
            yield connection
        if before != self._stamp():
            raise SnapshotLost(f"{self.path} was changed by another process while it was read; try again.")

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """See `DatabaseEngine`."""
        with translated(self.path), self.sql.connect() as connection:
            connection.execution_options(faceprint_write=True)
            with connection.begin():
                self._require_its_place()
                yield connection
                # Files that the transaction names were written meanwhile, beside what is there now.
                self._require_its_place()

    @contextmanager
    def driver(self) -> Iterator[Any]:
        """Yields the `sqlite3` connection, outside of any transaction."""
        with translated(self.path), self.sql.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None  # a connection that is checked out always has one
            self._require_its_place()
            try:
                yield driver
            except sqlite3.OperationalError as error:
                raise OperationalError(None, None, error) from error
            except sqlite3.DatabaseError as error:
                raise DatabaseError(None, None, error) from error

    def zero_unused(self, connection: Connection) -> bool:
        """Zeroes the bytes of the file that no row uses, so that no page contains deleted rows.

        Args:
            connection: in a transaction of `writing`, which changes a row only afterwards. The log is empty.

        Returns:
            False where only `vacuum` can do it; nothing was changed.
        """
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        assert self._descriptor is not None  # it is not closed
        return unused_bytes.zero(driver, self._descriptor)

    def unused(self) -> float:
        """Returns how much of the file `vacuum` could save, 0 to 1; see `unused_bytes.share`."""
        return unused_bytes.share(self.path)

    def vacuum(self) -> None:
        """Rewrites the file, through the log: it has no free pages then, and none contains deleted rows.

        Raises:
            StorageError: a page is damaged; the checksums of the new file would hide that.
        """
        damaged = [one for one in page_checksums.check_pages(self.path).damage if one.pages]
        if damaged:
            raise StorageError(damaged[0].problem)
        page_checksums.discard(self.path)
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
        """See `DatabaseEngine`."""
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
        if self._replaced and (found := _file_at(self.path)) != self._file:
            # Not the other way round: another thread would go on with a connection to the former file.
            self.sql.dispose()
            self._file = found

    def _require_its_place(self) -> None:
        """Checks that the file that a connection has open is still in its place, with the others beside it.

        Otherwise rows would go to one gallery and their vectors to another.

        Raises:
            GalleryReplaced: another one is there, as after a copy was put in its place, or none.
        """
        # Without a pool each transaction opens the file that is there.
        if self._replaced or isinstance(self.sql.pool, NullPool):
            return
        found = _file_at(self.path)
        if self._file is None:
            # Not sooner: an overlay file system copies a file when it is opened for writing.
            self._file = found
        elif found != self._file:
            raise GalleryReplaced(
                f"Another file took the place of {self.path} while it was open; open the gallery again."
            )

    def _stamp(self) -> tuple[int, int] | None:
        """Returns modification time and size, which change with every write; None where SQLite can lock."""
        if self._replaced or not is_still(self.path):
            return None
        status = _status(self.path)
        return status.st_mtime_ns, status.st_size

    def _version(self) -> str | None:
        with translated(self.path), self.sql.connect() as connection:
            self._require_its_place()
            return stored_version(connection, self.path)

    def _check_schema(self, *, exact: bool) -> None:
        """Checks that the database has exactly the tables of a gallery; see `database.schema`."""
        with translated(self.path), self.sql.connect() as connection:
            check_schema(connection, self.path, exact=exact)

    def _leftovers(self) -> list[str]:
        with translated(self.path), self.sql.connect() as connection:
            return schema.leftovers(runner(connection))

    def _drop_leftovers(self) -> None:
        """Removes the temporary tables of a killed migration."""
        if names := self._leftovers():
            page_checksums.discard(self.path)
            with translated(self.path), self.sql.begin() as connection:
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
        with translated(self.path), self.sql.begin() as connection:
            migrate(connection)
            check_schema(connection, self.path, exact=True)
