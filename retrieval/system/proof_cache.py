"""A cache of proven facts about files, for this user, so that each fact is proven once.

A fact is stored as an empty file named by the SHA-256 of the fact, in `$XDG_CACHE_HOME/faceprint/proofs` (or
`~/.cache/...`). So there is no content to parse, merge or tear, and no name or path can be read from it.
Where the folder cannot be used, facts are proven each time.

A file is identified by its device, inode, size and times. This misses bytes that change below the file
system, and a file system made to forge all of these. `faceprint verify` reads every byte.
"""

import hashlib
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

from retrieval.system.cache import cache_folder

_T = TypeVar("_T")

Fact: TypeAlias = tuple[str | int, ...]

# Facts about a file that changed more recently than this, in nanoseconds, are not stored. A file that is
# written right after a read may keep its times: some file systems count them in steps of 2 seconds.
_SETTLED_NANOSECONDS: Final = 3 * 10**9
# At this number of facts the oldest are deleted, down to `_FACTS_KEPT`.
_MAX_FACTS: Final = 1024
_FACTS_KEPT: Final = 512


class NotTheFile(Exception):
    """A file does not have the expected SHA-256, is too large, or is not a plain file."""


def load(
    path: Path,
    sha256: str,
    *,
    check: Callable[[bytes], None],
    checked: Fact,
    use: Callable[[Path | bytes], _T],
    most: int,
) -> _T:
    """Returns a file loaded by `use`, after its bytes are proven: by reading them, or by an earlier proof.

    Args:
        path: the file.
        sha256: the expected SHA-256 of its bytes, in hex.
        check: validates bytes of that SHA-256 before they are loaded; raises to refuse them.
        checked: the fact that `check` proves; identifies the check and everything that its result depends on.
        use: loads bytes, or the path of a file that was proven earlier. Called a second time, with bytes, if
            the file changed meanwhile.
        most: the largest file that is read, in bytes.

    Raises:
        NotTheFile: the file has another SHA-256, is larger than `most`, or is not a plain file.
        OSError: the file cannot be read.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its other end
        raise NotTheFile
    before = _identity(found)
    if is_proven(("file", *before, sha256, *checked)):
        loaded = use(path)
        if _identity(os.stat(path)) == before:
            return loaded
    now = time.time_ns()
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise NotTheFile
        data = file.read(most + 1)
        unchanged = _identity(os.fstat(file.fileno())) == _identity(status)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise NotTheFile
    check(data)
    loaded = use(data)
    if unchanged and max(status.st_mtime_ns, status.st_ctime_ns) < now - _SETTLED_NANOSECONDS:
        store(("file", *_identity(status), sha256, *checked))
    return loaded


def is_proven(fact: Fact) -> bool:
    """Returns whether a fact is stored."""
    folder = _folder()
    try:
        return (
            folder is not None
            and _is_private(os.lstat(folder), stat.S_ISDIR)
            and _is_private(os.lstat(folder / _name(fact)), stat.S_ISREG)
        )
    except OSError:
        return False


def store(fact: Fact) -> None:
    """Stores a fact, if the cache folder can be used."""
    folder = _folder()
    if folder is None:
        return
    # The cache only saves time: a read-only or full home folder is no error.
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(os.lstat(folder), stat.S_ISDIR):
            return
        _prune(folder)
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        os.close(os.open(folder / _name(fact), flags, 0o600))


def _prune(folder: Path) -> None:
    entries = list(os.scandir(folder))
    if len(entries) < _MAX_FACTS:
        return
    entries.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime_ns)
    for entry in entries[:-_FACTS_KEPT]:
        os.unlink(entry.path)


def _folder() -> Path | None:
    return cache_folder("proofs")


def _is_private(status: os.stat_result, kind: Callable[[int], bool]) -> bool:
    """Returns whether a file of this kind can have been made by this user only."""
    mine = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return kind(status.st_mode) and mine and not status.st_mode & 0o022


def _name(fact: Fact) -> str:
    return hashlib.sha256(repr(fact).encode()).hexdigest()


def _identity(status: os.stat_result) -> tuple[int, int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
