"""Store: the tables of a gallery for the vault: creation, opening, snapshots and transactions.

The tables are the authority on which faces exist. A vector without a row does not exist. `engines` has the
databases that may hold them: one SQLite file in the gallery's folder, or a PostgreSQL server.
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert

from retrieval.database.engines.protocol import DatabaseEngine
from retrieval.database.engines.sqlite_file import SqliteFile
from retrieval.database.reader import Reader
from retrieval.database.records import Generation, utc_now
from retrieval.database.tables import gallery_table, generation_table
from retrieval.database.writer import Writer
from retrieval.errors import GalleryError, InputError


class Store:
    """A gallery's tables. Safe to share between threads.

    Attributes:
        engine: the database that holds them.
        closed: whether it is closed.
    """

    def __init__(self, engine: DatabaseEngine) -> None:
        self.engine = engine
        self.closed = False

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
        """Creates the tables of an empty gallery in a new file, with the given model as first generation.

        `folder_id` is the id of its vectors folder (see `retrieval.storage.ownership`).

        Raises:
            StorageError: the file system refused.
        """
        first = Generation(1, fingerprint, dimension, folder, card_sha256, utc_now())
        return cls._created(SqliteFile.create(path), first, folder_id)

    @classmethod
    def create_at(
        cls,
        address: str,
        *,
        fingerprint: str,
        dimension: int,
        folder: str = "model",
        card_sha256: str = "",
        gallery: str | None = None,
        fill: Callable[[Writer], None] = lambda writer: None,
    ) -> "Store":
        """Creates the tables of an empty gallery in a PostgreSQL database.

        Args:
            address: as of `retrieval.database.engines.postgresql`.
            fingerprint, dimension, folder, card_sha256: of the model, as of `Generation`.
            gallery: the UUID of the gallery; None for a new one.
            fill: adds the first rows, in the same transaction.

        Raises:
            InputError, MissingDependency: as of `Postgresql`.
            GalleryError: the schema does not exist or is not empty, or the database is not in UTF-8.
            GalleryBusy, StorageError: the server cannot be reached, or refused; nothing was changed.
        """
        from retrieval.database.engines.postgresql import Postgresql

        first = Generation(1, fingerprint, dimension, folder, card_sha256, utc_now())
        return cls._created(Postgresql(address), first, None, gallery, fill)

    @classmethod
    def _created(
        cls,
        engine: DatabaseEngine,
        first: Generation,
        folder_id: str | None,
        gallery: str | None = None,
        fill: Callable[[Writer], None] = lambda writer: None,
    ) -> "Store":
        try:
            with engine.creating() as connection:
                _insert_gallery(connection, first, folder_id=folder_id, gallery=gallery)
                fill(Writer(connection))
        except BaseException:
            engine.close()
            raise
        return cls(engine)

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False, timeout: float = 30.0) -> "Store":
        """Opens the tables in a file; migrates those of an older version (see `SqliteFile.open`)."""
        return cls(SqliteFile.open(path, read_only=read_only, timeout=timeout))

    @classmethod
    def open_at(cls, address: str, *, read_only: bool = False, timeout: float = 30.0) -> "Store":
        """Opens the tables in a PostgreSQL database (see `Postgresql.open`).

        `timeout` is how long each transaction waits for another writer, in seconds.
        """
        from retrieval.database.engines.postgresql import Postgresql

        return cls(Postgresql.open(address, read_only=read_only, lock_timeout=timeout))

    @classmethod
    def open_replaced(cls, path: Path) -> "Store":
        """Opens a file that another one may take the place of (see `SqliteFile.open_replaced`)."""
        return cls(SqliteFile.open_replaced(path))

    @property
    def file(self) -> SqliteFile:
        """Returns the SQLite file that holds the tables.

        Raises:
            GalleryError: a server holds them.
            InputError: it is closed.
        """
        self.check_open()
        return self._file()

    @property
    def path(self) -> Path:
        """Returns the path of `file`, also after it was closed."""
        return self._file().path

    def _file(self) -> SqliteFile:
        if isinstance(self.engine, SqliteFile):
            return self.engine
        raise GalleryError(f"{self.engine.gallery} is no folder, and only a gallery in a folder can do this.")

    def close(self) -> None:
        """Closes all connections; later reads and writes raise an error."""
        self.closed = True
        self.engine.close()

    def check_open(self) -> None:
        """Checks that the database is not closed: SQLAlchemy would silently reopen it.

        Raises:
            InputError: it is closed.
        """
        if self.closed:
            raise InputError(f"The gallery {self.engine.gallery} is closed; open it again with Gallery.open.")

    @contextmanager
    def read(self) -> Iterator[Reader]:
        """Yields a snapshot until the with statement ends; see `DatabaseEngine.reading`."""
        self.check_open()
        with self.engine.reading() as connection:
            yield Reader(connection)

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """Yields a transaction, committed durably at the end of the with statement unless it raises."""
        self.check_open()
        with self.engine.writing() as connection:
            writer = Writer(connection)
            yield writer
            writer.finish()

    def zero_unused(self, writer: Writer) -> bool:
        """Zeroes the bytes of the file that no row uses; see `SqliteFile.zero_unused`.

        Args:
            writer: a transaction of `write`, which changes a row only afterwards.
        """
        return self.file.zero_unused(writer.connection)

    def size(self) -> int:
        """Returns the bytes on disk of the tables."""
        self.check_open()
        return self.engine.size()

    def problems(self) -> list[str]:
        """Returns what the database's own checks find wrong, a clause each; empty without any."""
        self.check_open()
        return self.engine.problems()


def _insert_gallery(
    connection: Connection, first: Generation, *, folder_id: str | None, gallery: str | None
) -> None:
    """Inserts the rows of an empty gallery, with its first generation."""
    row: dict[str, Any] = {
        "id": 1,
        "uuid": gallery or str(uuid.uuid4()),
        "created_at": first.created_at,
        "next_face_id": 1,
        "next_segment_id": 1,
        "generation_id": first.id,
        "revision": 1,
        "revision_check": -1,
        "next_identity_id": 1,
        "next_generation_id": first.id + 1,
        "next_basis_id": 1,
        "folder_id": folder_id,
    }
    connection.execute(insert(generation_table), asdict(first))
    connection.execute(insert(gallery_table).values(row))
