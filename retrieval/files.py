"""Files that are whole or not there: what a crash, a full disk or a lost machine leaves behind."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# How much older than its reading a file's time must be to be trusted, in nanoseconds. A file that is written
# right after it was read may keep its time, which some file systems count in steps of 2 seconds.
_SETTLED: Final = 3 * 10**9


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when a file is written: its size in bytes, the time in ns, the number of its inode."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        """That of a file, by its status."""
        # Inodes have 64 bits without a sign, and databases have them with one.
        inode = (status.st_ino + 2**63) % 2**64 - 2**63
        return cls(status.st_size, status.st_mtime_ns, inode)

    def settled(self, now_ns: int) -> bool:
        """Whether a file that has changed since `now_ns` must have another stamp."""
        return self.mtime_ns < now_ns - _SETTLED


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: temporary file, fsync, rename, fsync of the folder.

    Raises:
        OSError: the disk refused; the file is then what it was before, or, when only the folder could
            not be made durable, already the new one.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, survive the loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def why(error: OSError) -> str:
    """The operating system's words for an error, as the end of a sentence."""
    return (error.strerror or str(error)).lower()


def is_free(folder: Path) -> bool:
    """Whether a folder can be made there: nothing is there, or an empty folder."""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A name for a folder that becomes `target` when everything in it is there, or never exists.

    The files in it are the caller's to make durable.

    Raises:
        FileExistsError: `target` is there and is not an empty folder.
        OSError: the disk refused.
    """
    taken = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
    if not is_free(target):
        raise taken
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f".{target.name}-", ignore_cleanup_errors=True
    ) as temporary:
        made = Path(temporary) / "whole"
        yield made
        sync(made)
        try:
            with suppress(FileNotFoundError):
                # Renaming onto a folder takes an empty one.
                target.rmdir()
            os.rename(made, target)
        except OSError as error:
            raise error if is_free(target) else taken from error
    sync(target.parent)
