"""`Postgresql`: a gallery's tables in one schema of a PostgreSQL database.

    postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE?schema=NAME

A gallery has a schema for itself; without `schema` it is the first of the user's search path, as `public`.

What PostgreSQL does differently from SQLite here:

- A snapshot is a transaction with REPEATABLE READ, READ ONLY.
- The only writer holds an advisory lock of the gallery until its transaction ends. A process that dies, or
  loses its connection, loses lock and transaction together.
- A commit is durable before it returns, even if the server's default is not to wait for its log.
- If the connection is lost during a commit, only the next snapshot shows whether it took effect.
- Deleted rows are in no answer at once, but their bytes stay in the server's files until VACUUM has run and
  their pages were written again, and in its log, archives, standbys and backups while these are kept.
"""

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, make_url, text, update
from sqlalchemy.exc import ArgumentError

from retrieval.database import schema
from retrieval.database.engines import postgresql_schema
from retrieval.database.engines.postgresql_errors import translated
from retrieval.database.metadata import to_json
from retrieval.database.migrations import SCHEMA_VERSION, migrate
from retrieval.database.tables import gallery_table
from retrieval.errors import GalleryDamaged, GalleryError, InputError, MissingDependency
from retrieval.system.places import Place

# The first schema version of galleries in PostgreSQL: tables of older ones exist in SQLite only.
_FIRST_VERSION: Final = "0010"

# Seconds to wait for a connection, and for another writer.
_CONNECT_SECONDS: Final = 10
_LOCK_SECONDS: Final = 30.0

_DRIVERS: Final = ("postgresql", "postgresql+psycopg", "postgres")

_EMPTY_SCHEMA: Final = re.compile(r"[?&]schema=(&|$)")  # which SQLAlchemy leaves out
_SCHEMA_NAME: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}")

# The upper half of the keys of advisory locks: "face" in ASCII. The lower half is the number of a table.
_LOCK_CLASS: Final = 0x66616365 << 32

_SETTINGS: Final = """
    SELECT set_config('lock_timeout', :timeout, true),
           CASE WHEN current_setting('synchronous_commit') = 'off'
                THEN set_config('synchronous_commit', 'on', true) END
"""


class Postgresql:
    """An opened schema of a PostgreSQL database; the `DatabaseEngine` of a gallery on a server.

    Attributes:
        gallery: the address without a password.
        sql: its connections.
    """

    def __init__(self, address: str, *, read_only: bool = False, lock_timeout: float = _LOCK_SECONDS) -> None:
        """Prepares the connections; the first one is made when it is needed.

        Args:
            address: as in the text of this module.
            read_only: refuse writing.
            lock_timeout: seconds to wait for another writer.

        Raises:
            InputError: the address is none of PostgreSQL.
            MissingDependency: psycopg is not installed.
        """
        url = _parsed(address)
        self.gallery = str(Place.of(address))
        self._read_only = read_only
        self._lock_timeout = lock_timeout
        self._lock_key: int | None = None
        self.sql = _engine(url)
        self._snapshots = self.sql.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )

    @classmethod
    def open(
        cls, address: str, *, read_only: bool = False, lock_timeout: float = _LOCK_SECONDS
    ) -> "Postgresql":
        """Opens the tables of a gallery; migrates those of an older version.

        Raises:
            InputError: the address is none of PostgreSQL.
            GalleryError: there is no gallery, a newer version made it, or an older one and `read_only` is
                set.
            GalleryDamaged: the tables are not as faceprint makes them.
            GalleryBusy: another process is writing while a migration is needed.
            StorageError: the server cannot be reached, or refused.
        """
        opened = cls(address, read_only=read_only, lock_timeout=lock_timeout)
        try:
            version = opened._version()
            if version != SCHEMA_VERSION and read_only:
                raise GalleryError(
                    f"The gallery {opened.gallery} was made by an older version of faceprint (schema "
                    f"{version}, this one knows {SCHEMA_VERSION}); open it once for writing."
                )
            if version != SCHEMA_VERSION:
                opened._upgrade()
            opened._check_schema()
        except BaseException:
            opened.close()
            raise
        return opened

    @classmethod
    def has_gallery(cls, address: str) -> bool:
        """Returns whether a schema has a gallery.

        Raises:
            InputError, MissingDependency: as of `Postgresql`.
            StorageError: the server cannot be reached, or refused.
        """
        with closing(cls(address, read_only=True)) as opened, opened.reading() as connection:
            return postgresql_schema.version(connection) is not None

    def close(self) -> None:
        """See `DatabaseEngine`."""
        self.sql.dispose()

    @contextmanager
    def creating(self) -> Iterator[Connection]:
        """See `DatabaseEngine`.

        Raises:
            GalleryError: the schema does not exist or is not empty, or the database is not in UTF-8.
        """
        with translated(self.gallery), self.sql.begin() as connection:
            self._settle(connection)
            name = postgresql_schema.current(connection)
            encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
            if encoding != "UTF8":
                raise GalleryError(
                    f"The database {self.gallery} stores texts as {encoding}, which cannot hold every name; "
                    "make one with ENCODING 'UTF8'."
                )
            if name is None:
                raise GalleryError(
                    f"The database {self.gallery} has no such schema; make it with CREATE SCHEMA, owned by "
                    "the user of the address."
                )
            # Two processes that create at once: the second one finds the tables of the first.
            _lock(
                connection,
                connection.execute(
                    text("SELECT to_regnamespace(:name)::oid::bigint"), {"name": f'"{name}"'}
                ).scalar_one(),
            )
            if postgresql_schema.version(connection) is not None:
                raise GalleryError(f"There is a gallery in {self.gallery} already; give another schema.")
            if found := postgresql_schema.tables(connection):
                raise GalleryError(
                    f"The schema {name} of {self.gallery} has the table {found[0]} already; give a gallery a "
                    "schema of its own, with ?schema=NAME."
                )
            schema.create(connection, SCHEMA_VERSION, postgresql_schema.server_tables())
            yield connection
            postgresql_schema.analyze(connection)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """See `DatabaseEngine`."""
        with translated(self.gallery), self._snapshots.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """See `DatabaseEngine`.

        Raises:
            InputError: it was opened for reading only.
        """
        if self._read_only:
            raise InputError(f"{self.gallery} was opened for reading only; open it for writing.")
        with translated(self.gallery), self.sql.begin() as connection:
            self._settle(connection)
            if self._lock_key is None:
                self._lock_key = postgresql_schema.number_of_gallery_table(connection)
            # Statements after it see what the former writer committed: the isolation is READ COMMITTED.
            _lock(connection, self._lock_key)
            yield connection

    def problems(self) -> list[str]:
        """See `DatabaseEngine`; reads every row."""
        with self.reading() as connection:
            found = postgresql_schema.problems(connection)
            off = [
                f"the server runs with {name} off, so a power cut may damage what was committed"
                for name in ("fsync", "full_page_writes")
                if connection.exec_driver_sql(f"SHOW {name}").scalar_one() == "off"
            ]
        try:
            with self.reading() as connection:
                postgresql_schema.read_all(connection)
        except GalleryDamaged as error:
            found.append(str(error).rstrip("."))
        return found + off

    def size(self) -> int:
        """See `DatabaseEngine`."""
        with self.reading() as connection:
            return postgresql_schema.size(connection)

    def reserve_face_ids(self, first: int, count: int) -> bool:
        """Reserves the next ids of faces, durably, whatever becomes of the transaction that writes now.

        It is a transaction of its own, before that one changes the gallery's row. A writer that lost its lock
        without noticing it, and one that got the lock since, cannot both reserve the same ids, so neither
        puts its vectors in the place of the other's.

        Returns:
            Whether `first` was the next id.
        """
        with translated(self.gallery), self.sql.begin() as connection:
            self._settle(connection)
            row = gallery_table.c.next_face_id
            changed = update(gallery_table).where(row == first).values(next_face_id=first + count)
            return connection.execute(changed).rowcount == 1

    def is_standby(self) -> bool:
        """Returns whether the server follows another one, and so takes no changes."""
        with self.reading() as connection:
            return bool(connection.exec_driver_sql("SELECT pg_is_in_recovery()").scalar_one())

    def _settle(self, connection: Connection) -> None:
        """Sets what holds until the transaction ends: how long to wait for locks, and durable commits."""
        connection.execute(text(_SETTINGS), {"timeout": f"{max(1, int(1000 * self._lock_timeout))}ms"})

    def _version(self) -> str:
        with self.reading() as connection:
            version = postgresql_schema.version(connection)
        if version is None:
            raise GalleryError(
                f"There is no gallery in {self.gallery}; check the names of the database and of the schema, "
                "and that its user may use the schema."
            )
        if version > SCHEMA_VERSION:
            raise GalleryError(
                f"The gallery {self.gallery} was made by a newer version of faceprint (schema {version}, "
                f"this one knows {SCHEMA_VERSION}); upgrade faceprint to open it."
            )
        if version < _FIRST_VERSION:
            raise GalleryDamaged(
                f"{self.gallery} states schema {version}, and no gallery in PostgreSQL ever had it; restore "
                "it from a backup."
            )
        return version

    def _upgrade(self) -> None:
        """Runs the pending migrations in one transaction."""
        with self.writing() as connection:
            # Another process may have migrated it meanwhile.
            if postgresql_schema.version(connection) != SCHEMA_VERSION:
                migrate(connection)

    def _check_schema(self) -> None:
        with self.reading() as connection:
            problems = postgresql_schema.problems(connection)
        if problems:
            raise GalleryDamaged(
                f"{self.gallery} is not a database as faceprint makes it: {problems[0]}; undo that, or "
                "restore it from a backup."
            )


def _lock(connection: Connection, number: int) -> None:
    """Takes the advisory lock of a table or schema until the transaction ends.

    Raises:
        DBAPIError: another transaction held it for longer than the lock timeout.
    """
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_CLASS | number})


def _parsed(address: str) -> URL:
    """Returns the parts of an address, with the name of the schema as an option of the connection.

    Raises:
        InputError: it is none of PostgreSQL.
    """
    shape, shown = "postgresql+psycopg://USER@HOST/DATABASE?schema=NAME", Place.of(address)
    try:
        url = make_url(address)
    except (ArgumentError, ValueError) as error:
        raise InputError(f"This is no address of a PostgreSQL database; write it as {shape}.") from error
    if url.drivername.lower() not in _DRIVERS:
        raise InputError(f"{shown} is no address of PostgreSQL; write it as {shape}.")
    if "@" in f"{url.host}{url.database}":
        raise InputError(
            f"The password in the address of {shown} has an @ as it is; write %40 for it, and %2F for a "
            "slash, or leave the password to ~/.pgpass."
        )
    if not url.database:
        raise InputError(f"{shown} names no database; write it as {shape}.")
    url = url.set(drivername="postgresql+psycopg")
    name = url.query.get("schema")
    if name is None and not _EMPTY_SCHEMA.search(address):
        return url
    if not isinstance(name, str) or not _SCHEMA_NAME.fullmatch(name) or "options" in url.query:
        raise InputError(
            f"The schema of {shown} cannot be chosen so; give schema=NAME once, in lower "
            "case, with letters, digits and underscores, and no options beside it."
        )
    query = {key: value for key, value in url.query.items() if key != "schema"}
    return url.set(query={**query, "options": f"-csearch_path={name}"})


def _engine(url: URL) -> Engine:
    """Returns the connections of an address; none is made yet.

    Raises:
        MissingDependency: psycopg is not installed.
    """
    arguments: dict[str, Any] = {"client_encoding": "utf8", "application_name": "faceprint"}
    arguments["connect_timeout"] = _CONNECT_SECONDS
    given = {key: value for key, value in arguments.items() if key not in url.query}
    try:
        # The ping finds connections that a restarted server has closed.
        return create_engine(url, connect_args=given, json_serializer=to_json, pool_pre_ping=True)
    except ImportError as error:
        raise MissingDependency(
            "A gallery in PostgreSQL needs psycopg; install it with `pip install 'faceprint[postgres]'`."
        ) from error
