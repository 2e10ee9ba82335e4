"""Connections for the store: opens SQLite for the writer and for readers, and checks the files beside it."""

import functools
import os
import sqlite3
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from sqlalchemy import URL, Connection, Dialect, Engine, create_engine, event
from sqlalchemy.pool import NullPool, QueuePool
from sqlalchemy.util import LRUCache

from retrieval.database.metadata import to_json
from retrieval.errors import GalleryError
from retrieval.system.files import other_than_file
from retrieval.system.forks import shared_lock

# Held while a connection that can write is opened, so that a descriptor that appears meanwhile is its own.
OPENING: Final = shared_lock()

_CACHE_KIB: Final = 256 * 1024

# Compiled statements that are kept. Faceprint has about 200, and conditions on metadata make more.
_MAX_STATEMENTS: Final = 1000


def make_engine(path: Path, *, read_only: bool = False, immutable: bool = False) -> Engine:
    """Returns the SQLAlchemy engine of a database, with connections for writing or for reading only.

    Args:
        path: the database.
        read_only: refuse writing.
        immutable: the file never changes: it is read without locks and without a log.
    """
    if read_only:
        # Whether the database is read without locks is decided anew for each connection.
        pool = QueuePool if immutable or os.access(path.parent, os.W_OK) else NullPool

        def connect() -> sqlite3.Connection:
            return _connect_to_read(path, immutable=immutable or is_still(path))

        engine = create_engine("sqlite://", creator=connect, poolclass=pool)
    else:
        # Not a URL in one string: in that a ? or a % of the path has a meaning.
        url = URL.create("sqlite", database=os.fspath(path))
        engine = create_engine(url, connect_args={"timeout": 30}, json_serializer=to_json)
        event.listen(engine, "do_connect", _open)
    engine.dialect, cache = _compiler()
    engine.update_execution_options(compiled_cache=cache)
    event.listen(engine, "connect", _prepare_to_read if read_only else _prepare)
    event.listen(engine, "begin", _begin)
    return engine


@functools.cache
def _compiler() -> tuple[Dialect, LRUCache[Any, Any]]:
    """Returns what makes SQL of statements, and the statements that it has made, of all databases.

    An engine has them of its own otherwise, and compiles each statement anew: most of the time that it takes
    to open a small gallery.
    """
    engine = create_engine("sqlite://", json_serializer=to_json)
    # A dialect learns what this SQLite can do from its first connection.
    engine.connect().close()
    engine.dispose()
    return engine.dialect, LRUCache(_MAX_STATEMENTS)


def _connect_to_read(path: Path, *, immutable: bool) -> sqlite3.Connection:
    # Not merely `query_only`: the last of such connections to close would still copy the log.
    options = "mode=ro&immutable=1" if immutable else "mode=ro"
    uri = f"file:{quote(os.fsencode(path.absolute()))}?{options}"
    return sqlite3.connect(uri, uri=True, timeout=30, check_same_thread=False)


def is_still(path: Path) -> bool:
    """Whether a database lies where this user cannot write, and no other process has it open for writing.

    WAL needs a file beside the database even for reading. Where it is not there and cannot be made, SQLite
    reads the database only when it is told that it does not change.
    """
    log = path.with_name(f"{path.name}-wal")
    return not os.access(path.parent, os.W_OK) and not (log.exists() and log.stat().st_size > 0)


def _open(dialect: Dialect, _record: object, arguments: Any, options: Any) -> Any:
    with OPENING:
        return dialect.connect(*arguments, **options)


def _prepare(driver: Any, _record: object) -> None:
    # The driver's own idea of transactions is older than WAL; SQLAlchemy's documentation says to
    # switch it off and to emit BEGIN oneself.
    driver.isolation_level = None
    _distrust(driver)
    driver.execute("PRAGMA journal_mode = WAL")
    driver.execute("PRAGMA synchronous = FULL")
    driver.execute("PRAGMA foreign_keys = ON")
    # Deleted rows are overwritten with zeros and do not linger on free pages.
    driver.execute("PRAGMA secure_delete = ON")
    # The log is copied into the database by `page_checksums.checkpoint`, which writes down the pages.
    driver.execute("PRAGMA wal_autocheckpoint = 0")
    # Photos are looked up in an index at random: 20 MB for a million photos. Allocated only as needed.
    driver.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")


def _prepare_to_read(driver: Any, _record: object) -> None:
    driver.isolation_level = None
    _distrust(driver)
    driver.execute("PRAGMA query_only = ON")


def _distrust(driver: Any) -> None:
    """Hardens a connection to an untrusted database: no code in it runs, and broken cells are detected."""
    driver.execute("PRAGMA trusted_schema = OFF")
    driver.execute("PRAGMA cell_size_check = ON")


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("faceprint_write", False)
    # A reader's snapshot begins with its first SELECT; a writer takes its place at once.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def check_no_link(path: Path) -> None:
    """Checks that a part of a gallery lies in it: others may write, and lock, what a link leads to.

    Raises:
        GalleryError: it is a symbolic link.
    """
    if path.is_symlink():
        raise GalleryError(
            f"{path} is a symbolic link, and a gallery that is written to must hold all its files itself; "
            f"put what it leads to in its place."
        )


def check_beside(path: Path) -> None:
    """Checks the files that SQLite has beside a database: of others it says only that it cannot open one.

    Raises:
        GalleryError: one is a symbolic link, or no file.
    """
    for suffix in ("-wal", "-shm", "-journal"):
        beside = path.with_name(path.name + suffix)
        check_no_link(beside)
        if (other := other_than_file(beside)) is not None:
            raise GalleryError(
                f"{beside} is {other}, and SQLite keeps a file of its own there; move it away."
            )
