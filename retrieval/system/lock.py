"""The writer lock of a gallery: one holder at a time, named by its process id, released when it dies."""

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

# Errors of the disk or the machine; other errors mean that the file system has no locks.
_DISK_ERRORS: Final = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.ESTALE, errno.EINTR)

# The longest holder text in bytes; a process id has fewer digits.
_MAX_PID_BYTES: Final = 32


@contextmanager
def exclusive(path: Path, *, timeout: float) -> Iterator[None]:
    """Holds the lock file `path` until the with statement ends.

    The operating system releases the lock when the process ends, however it ends. Two threads of one process
    exclude each other like two processes.

    Args:
        path: created if it does not exist; while the lock is held, it contains the holder's process id.
        timeout: seconds to wait for another holder.

    Raises:
        GalleryBusy: the other holder did not release in time; names its process id.
        StorageError: the lock file cannot be created, is a symbolic link or not a plain file, or is on a
            file system that cannot lock files.
    """
    descriptor = _opened(path)
    try:
        _acquire(descriptor, path, timeout)
        try:
            _write_holder(descriptor, str(os.getpid()))
            try:
                yield
            finally:
                _write_holder(descriptor, "")
        finally:
            # Closing is not enough: a process that was forked meanwhile has the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def check_lockable(folder: Path) -> None:
    """Checks that files can be locked in a folder, before a gallery is created there.

    A gallery needs two kinds of locks: flock for its one writer, and POSIX locks for SQLite, which reports
    only "database is locked" where they are missing.

    Args:
        folder: if it does not exist, its nearest existing parent is tested.

    Raises:
        StorageError: the file system cannot lock files.
    """
    there = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    # Where no file can be made, the caller's own attempt reports why.
    with suppress(OSError), tempfile.TemporaryFile(dir=there, buffering=0) as probe:
        _check_open(probe.fileno(), folder)


def check_existing(path: Path) -> None:
    """Checks the same for a folder with the lock file `path`, at less cost and without creating a file.

    Raises:
        StorageError: the file system cannot lock files.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return  # a gallery that was never written to, or is not readable
    try:
        # faceprint takes no POSIX lock of this file, but where both kinds are the same the writer holds one.
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise _lock_error(path.parent, error) from error
    finally:
        os.close(descriptor)


def _check_open(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # NFS makes both kinds the same, so that one would block the other.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise _lock_error(folder, error) from error


def _lock_error(folder: Path, error: OSError) -> StorageError:
    if error.errno in _DISK_ERRORS:
        return StorageError(f"No file can be locked in {folder}: {why(error)}.")
    return StorageError(
        f"{folder} lies on a file system that cannot lock files ({why(error)}); use a local disk."
    )


def _opened(path: Path) -> int:
    """Opens or creates the lock file and returns its descriptor.

    Raises:
        StorageError: it cannot be created, or is not a plain file.
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


def _write_holder(descriptor: int, name: str) -> None:
    """Writes the holder's process id. Failure is ignored: a full disk must not prevent deleting."""
    with suppress(OSError):
        # A file with other text, such as a hard link of another file, is not overwritten.
        if _holder(descriptor) is None:
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, name.encode(), 0)


def _holder(descriptor: int) -> str | None:
    """Returns the process id in a lock file, "" where it is empty; None for a file with other text."""
    text = os.pread(descriptor, _MAX_PID_BYTES + 1, 0)
    named = len(text) <= _MAX_PID_BYTES and (text.strip() == b"" or text.strip().isdigit())
    return text.decode().strip() if named else None


def _acquire(descriptor: int, path: Path, timeout: float) -> None:
    try:
        acquired = wait_for_lock(descriptor, timeout)
    except OSError as error:
        raise _lock_error(path.parent, error) from error
    if not acquired:
        raise GalleryBusy(
            f"Process {_holder(descriptor) or 'unknown'} is writing to {path.parent} and did not finish "
            f"within {timeout:g} s; wait for it, or stop it, and run the command again."
        )


def wait_for_lock(descriptor: int, timeout: float) -> bool:
    """Locks an open file or folder for this descriptor; returns False where another one keeps the lock.

    Args:
        descriptor: the descriptor of the file or folder.
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
