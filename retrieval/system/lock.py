"""A lock for one writer at a time, released when its process dies, that names its holder."""

import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from retrieval.errors import GalleryBusy, StorageError
from retrieval.system.files import open_or_create, other_than_file, try_lock, why

_POLL_SECONDS: Final = 0.02

# What says that the disk or the machine fails, and not that the file system has no locks.
_DISK_ERRORS: Final = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.ESTALE, errno.EINTR)

# More than a process id has digits.
_MAX_PID_BYTES: Final = 32


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
        StorageError: the lock file cannot be made, is a symbolic link or no plain file, or lies on a file
            system that cannot lock files.
    """
    descriptor = _opened(path)
    try:
        _acquire(descriptor, path, timeout)
        try:
            _sign(descriptor, str(os.getpid()))
            try:
                yield
            finally:
                _sign(descriptor, "")
        finally:
            # Not by closing alone: a process that was forked meanwhile has the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def check_lockable(folder: Path) -> None:
    """Finds out whether files can be locked in a folder, before one is made that has to be.

    A gallery needs two kinds of locks: flock for its one writer, and POSIX locks for SQLite, which says no
    more than "database is locked" where there are none.

    Args:
        folder: where nothing is yet, the nearest folder above it is asked.

    Raises:
        StorageError: the file system cannot lock files.
    """
    there = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    # Where no file can be made, whoever makes one will say why.
    with suppress(OSError), tempfile.TemporaryFile(dir=there, buffering=0) as probe:
        _check_open(probe.fileno(), folder)


def check_existing(path: Path) -> None:
    """The same of a folder whose lock file `path` is there, at less cost and without making anything.

    Raises:
        StorageError: the file system cannot lock files.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return  # a gallery that nobody has written to yet, or may not be read
    try:
        # Nobody holds a POSIX lock of this file, but where both kinds are the same its writer does.
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise _without_locks(path.parent, error) from error
    finally:
        os.close(descriptor)


def _check_open(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # NFS makes both kinds the same, and one would stand in the way of the other.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise _without_locks(folder, error) from error


def _without_locks(folder: Path, error: OSError) -> StorageError:
    if error.errno in _DISK_ERRORS:
        return StorageError(f"No file can be locked in {folder}: {why(error)}.")
    return StorageError(
        f"{folder} lies on a file system that cannot lock files ({why(error)}); use a local disk."
    )


def _opened(path: Path) -> int:
    """A descriptor of the lock file.

    Raises:
        StorageError: it cannot be made, or is something that is not to be written to.
    """
    try:
        descriptor = open_or_create(path, inherit=True)
    except OSError as error:
        if path.is_symlink():
            raise StorageError(f"{path} is a symbolic link, not a lock file; remove it.") from error
        if (other := other_than_file(path)) is not None:
            raise StorageError(f"{path} is {other}, not a lock file; remove it.") from error
        raise StorageError(f"{path.parent} cannot be written to: {why(error)}.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StorageError(f"{path} is {other_than_file(path)}, not a lock file; remove it.")
    return descriptor


def _sign(descriptor: int, name: str) -> None:
    """Writes the holder's name. The lock holds without it: a full disk must not hinder who would delete."""
    with suppress(OSError):
        # Something else under this name, such as a second name (hard link) of another file, stays as it is.
        if _name(descriptor) is None:
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, name.encode(), 0)


def _name(descriptor: int) -> str | None:
    """The process id in a lock file, "" where there is none; None of a file with any other text."""
    text = os.pread(descriptor, _MAX_PID_BYTES + 1, 0)
    named = len(text) <= _MAX_PID_BYTES and (text.strip() == b"" or text.strip().isdigit())
    return text.decode().strip() if named else None


def _acquire(descriptor: int, path: Path, timeout: float) -> None:
    try:
        acquired = wait_for_lock(descriptor, timeout)
    except OSError as error:
        raise _without_locks(path.parent, error) from error
    if not acquired:
        raise GalleryBusy(
            f"Process {_name(descriptor) or 'unknown'} is writing to {path.parent} and did not finish "
            f"within {timeout:g} s; wait for it, or stop it, and run the command again."
        )


def wait_for_lock(descriptor: int, timeout: float) -> bool:
    """Locks an open file or folder for this descriptor alone; False where another one keeps its lock.

    Args:
        descriptor: of the file.
        timeout: seconds to wait for another holder.

    Raises:
        OSError: the file system cannot lock files.
    """
    deadline = time.monotonic() + timeout
    while not try_lock(descriptor):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
