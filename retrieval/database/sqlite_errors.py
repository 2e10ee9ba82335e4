"""Errors of SQLite: their translation into faceprint's, and whether the machine caused one."""

import errno
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy.exc import DatabaseError, OperationalError

from retrieval.errors import GalleryDamaged, GalleryReplaced, StorageError
from retrieval.system import lock
from retrieval.system.files import is_no_file

# A disk with fewer free bytes counts as full: the size of the -shm file that SQLite creates to read.
_MIN_FREE_BYTES: Final = 32 * 1024

# https://www.sqlite.org/rescode.html: errors of the machine, not of the content of the file ...
_MACHINE: Final = frozenset(
    (
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
    )
)
# ... except these: a truncated page, or a page that fails a checksum or the check of the file system.
_NOT_MACHINE: Final = frozenset(
    (sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS, sqlite3.SQLITE_IOERR_DATA)
)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Translates errors of SQLAlchemy and SQLite into faceprint's.

    Raises:
        StorageError: the machine caused the error.
        GalleryDamaged: the content of the file caused it.
    """
    try:
        yield
    except MemoryError as error:
        raise StorageError(f"The database {path} cannot be used: out of memory.") from error
    except (DatabaseError, UnicodeDecodeError, json.JSONDecodeError) as error:
        # The second where SQLite's own message quotes damaged bytes, the last where metadata are damaged.
        reason = error.orig if isinstance(error, DatabaseError) else error
        # Python calls a text that is not in UTF-8 an operational error.
        if isinstance(error, OperationalError) and not str(reason).startswith("Could not decode to UTF-8"):
            if "locked" in str(reason):
                lock.check_lockable(path.parent)
            raise StorageError(f"The database {path} cannot be used: {reason}{_no_space(path)}.") from error
        raise GalleryDamaged(
            f"{path} is not a gallery's database, or it is damaged ({reason}); restore it from a backup."
        ) from error


def blames_machine(error: BaseException | None) -> bool:
    """Returns whether the machine caused an error (disk full, permissions, too many open files, no memory).

    Such an error says nothing about the content of a file, so it is not damage, and neither is an open file
    that another one took the place of. A missing file, or a folder in its place, is damage.
    """
    while error is not None:
        if isinstance(error, GalleryReplaced):
            return True
        cause = error.orig if isinstance(error, DatabaseError) else error
        if isinstance(cause, sqlite3.Error):
            code = int(getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR))
            return code & 0xFF in _MACHINE and code not in _NOT_MACHINE
        if isinstance(error, OSError):
            return error.errno is not None and not is_no_file(error)
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__
    return False


def _no_space(path: Path) -> str:
    """Returns a note if the disk is full: SQLite sometimes reports that as an I/O error."""
    try:
        free = os.statvfs(path.parent)
    except OSError:
        return ""
    return (
        f" ({os.strerror(errno.ENOSPC).lower()})" if free.f_bavail * free.f_frsize < _MIN_FREE_BYTES else ""
    )
