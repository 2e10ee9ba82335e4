"""Errors of PostgreSQL: their translation into faceprint's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, OperationalError, ProgrammingError

from retrieval.errors import (
    FaceprintError,
    GalleryBusy,
    GalleryDamaged,
    InputError,
    ServerUnavailable,
    StorageError,
)

# https://www.postgresql.org/docs/current/errcodes-appendix.html: a lock that was not free in time, ...
_NOT_FREE: Final = "55P03"
# ... the server's own finding that a table or an index is damaged, ...
_CORRUPTED: Final = frozenset(("XX001", "XX002"))
# ... transactions that the server ended in favour of others, ...
_AGAIN: Final = frozenset(("40001", "40P01"))
# ... no permission for a table, ...
_NOT_ALLOWED: Final = "42501"
# ... a transaction that may only read, as on a standby, ...
_READ_ONLY: Final = "25006"
# ... a value too long for an index, ...
_TOO_LONG: Final = "54000"
# ... too many connections, ...
_TOO_MANY: Final = "53300"
# ... classes of states in which it may answer later: connection, an operator's intervention, ...
_AWAY: Final = frozenset(("08", "57"))
# ... and of all states of the server: also resources, and its machine.
_OF_SERVER: Final = frozenset(("08", "53", "57", "58"))


@contextmanager
def translated(gallery: str) -> Iterator[None]:
    """Translates errors of SQLAlchemy and PostgreSQL into faceprint's.

    Args:
        gallery: the address of the gallery, without a password.

    Raises:
        InputError: PostgreSQL cannot hold a value.
        GalleryBusy: another writer did not finish in time.
        ServerUnavailable: the server does not answer.
        StorageError: the server caused the error.
        GalleryDamaged: the content of the tables caused it.
    """
    try:
        yield
    except DBAPIError as error:
        raise _translation(gallery, error) from error


def _translation(gallery: str, error: DBAPIError) -> FaceprintError:
    state = str(getattr(error.orig, "sqlstate", None) or "")
    reason = _first_line(error)
    if state == _NOT_FREE:
        return GalleryBusy(
            f"Another process is writing to {gallery} and did not finish in time; wait for it, or stop it, "
            "and run the command again."
        )
    if state in _AGAIN:
        return StorageError(
            f"The database {gallery} ended the transaction ({reason}); run the command again."
        )
    if state == _NOT_ALLOWED:
        return StorageError(
            f"The database {gallery} cannot be used: {reason}; grant its user what it lacks, or give another "
            "user."
        )
    if state == _READ_ONLY:
        return StorageError(
            f"The database {gallery} cannot be written to: {reason}; give the address of the primary server."
        )
    if state == _TOO_LONG:
        return InputError(
            f"The database {gallery} cannot store a path or a name of more than 2,704 bytes ({reason}); "
            "shorten it."
        )
    if isinstance(error, DataError):
        return InputError(f"The database {gallery} cannot store a value: {reason}; change it.")
    if not state and error.statement is None and isinstance(error, ProgrammingError):
        # libpq's own, before it asks the server.
        return InputError(f"The address {gallery} has an option that cannot be used: {reason}; correct it.")
    server = state[:2] in _OF_SERVER or (not state and isinstance(error, OperationalError | InterfaceError))
    if server and state not in _CORRUPTED:
        away = state[:2] in _AWAY or state in ("", _TOO_MANY)
        kind = ServerUnavailable if away else StorageError
        return kind(f"The database {gallery} cannot be used: {reason}.")
    return GalleryDamaged(
        f"{gallery} is not a gallery's database, or it is damaged ({reason}); restore it from a backup."
    )


def _first_line(error: DBAPIError) -> str:
    """Returns what PostgreSQL says, without the statement, values and hints of further lines."""
    primary = getattr(getattr(error.orig, "diag", None), "message_primary", None)
    lines = str(primary or error.orig).strip().splitlines()
    return lines[0].rstrip(".").removeprefix("connection failed: ") if lines else type(error.orig).__name__
