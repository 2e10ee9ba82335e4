"""One writer at a time: a lock that its holder's death releases, and that names its holder."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from retrieval.errors import GalleryBusy, StorageError
from retrieval.files import why

_POLL_SECONDS: Final = 0.02


@contextmanager
def exclusive(path: Path, *, timeout: float) -> Iterator[None]:
    """Holds the lock file `path` for the length of a with statement.

    The operating system drops the lock when the process ends, however it ends. Two threads of one
    process exclude each other as two processes do.

    Args:
        path: made when it is not there; its text is the process id of the holder, while there is one.
        timeout: seconds to wait for another holder.

    Raises:
        GalleryBusy: the other did not let go in time; names its process id.
        StorageError: the lock file cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"{path.parent} cannot be written to: {why(error)}.") from error
    try:
        _acquire(descriptor, path, timeout)
        _sign(descriptor, str(os.getpid()))
        try:
            yield
        finally:
            _sign(descriptor, "")
    finally:
        # Not by closing alone: a process that was forked meanwhile has the descriptor too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _sign(descriptor: int, name: str) -> None:
    """Writes the holder's name. The lock holds without it: a full disk must not hinder who would delete."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, name.encode(), 0)


def _acquire(descriptor: int, path: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
        if time.monotonic() >= deadline:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise GalleryBusy(
                f"Process {holder} is writing to {path.parent} and did not finish within {timeout:g} s; "
                "wait for it, or stop it, and run the command again."
            )
        time.sleep(_POLL_SECONDS)
