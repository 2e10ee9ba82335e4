"""Files that are whole or not there: what a crash, a full disk or a lost machine leaves behind."""

import os
from pathlib import Path


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
