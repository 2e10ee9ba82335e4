"""Facts proven about files, cached for this user so that they are proven once.

A fact is remembered as the existence of an empty file whose name is the SHA-256 of the fact, in
`$XDG_CACHE_HOME/faceprint/proofs` (or `~/.cache/...`). So there is nothing to parse, to merge or to tear,
and no name or path can be read from it. Where the folder cannot be used, facts are proven each time.

A file is known by its device, inode, size and times. What is not seen this way: bytes that change beneath
the file system, and a file system whose maker chooses all of these. `faceprint verify` reads every byte.
"""

import hashlib
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

_T = TypeVar("_T")

Fact: TypeAlias = tuple[str | int, ...]

# A file that is written right after it was read may keep its times, which some file systems count in steps
# of 2 seconds; nothing is remembered of a file that was changed more recently than this, in nanoseconds.
_SETTLED_NANOSECONDS: Final = 3 * 10**9
# More facts than this are not kept: the oldest go.
_MAX_FACTS: Final = 1024
_FACTS_KEPT: Final = 512


class NotTheFile(Exception):
    """A file does not have the SHA-256 that it should have."""


def load(
    path: Path,
    sha256: str,
    *,
    check: Callable[[bytes], None],
    checked: Fact,
    use: Callable[[Path | bytes], _T],
    most: int,
) -> _T:
    """Hands a file to a loader once its bytes are proven: by reading them now, or by an earlier proof.

    Args:
        path: the file.
        sha256: what its bytes must have, in hex.
        check: looks at bytes of that SHA-256 before they are loaded; raises where it refuses them.
        checked: what `check` proves; stands for it and for everything that its verdict depends on.
        use: loads bytes, or a path to a file that was proven before. Called a second time, with bytes, if
            the file changed meanwhile.
        most: the largest file that is read, in bytes.

    Raises:
        NotTheFile: the file has another SHA-256 or is larger than `most`.
        OSError: the file cannot be read.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its other end
        raise NotTheFile
    before = _identity(found)
    if known(("file", *before, sha256, *checked)):
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
        remember(("file", *_identity(status), sha256, *checked))
    return loaded


def known(fact: Fact) -> bool:
    """Whether a fact is remembered."""
    folder = _folder()
    try:
        return (
            folder is not None
            and _mine(os.lstat(folder), stat.S_ISDIR)
            and _mine(os.lstat(folder / _name(fact)), stat.S_ISREG)
        )
    except OSError:
        return False


def remember(fact: Fact) -> None:
    """Remembers a fact, where that is possible."""
    folder = _folder()
    if folder is None:
        return
    # Remembering only saves time: a read-only or full home folder is no error.
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _mine(os.lstat(folder), stat.S_ISDIR):
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
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # As the XDG specification says, a relative path is ignored; a user may have no home folder.
    base = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~")) / ".cache"
    return base / "faceprint" / "proofs" if base.is_absolute() else None


def _mine(status: os.stat_result, kind: Callable[[int], bool]) -> bool:
    """Whether only this user can have made it."""
    mine = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return kind(status.st_mode) and mine and not status.st_mode & 0o022


def _name(fact: Fact) -> str:
    return hashlib.sha256(repr(fact).encode()).hexdigest()


def _identity(status: os.stat_result) -> tuple[int, int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
