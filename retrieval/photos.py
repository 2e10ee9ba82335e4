"""Where photographs are: files on disk and who is on them, in an order that never varies."""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from retrieval.errors import DataError, Reason

# What operating systems leave in every folder, and nobody ever meant to enroll.
_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass(frozen=True, slots=True)
class Photo:
    """A file and who is on it.

    Attributes:
        path: absolute, as given (symbolic links are not resolved).
        identity: the name of the person, in Unicode's composed form (NFC), or None when nobody said.
        problem: why the file cannot even be opened, known from its name or its folder alone.
    """

    path: Path
    identity: str | None
    problem: Reason | None = None


def scan(sources: Iterable[str | os.PathLike[str]]) -> Iterator[Photo]:
    """Every photo of some sources, folder by folder, names in code point order.

    A source is a file (identity unknown) or a folder: each of its subfolders is an identity, however
    deep its files lie; files in the folder itself have no identity. Extensions decide nothing. Names
    that begin with a dot and the litter of operating systems (`Thumbs.db`, `desktop.ini`,
    `__MACOSX`) are passed over. A folder that cannot be listed or that links back to one above it
    comes out as one Photo with its `problem`.

    Raises:
        DataError: a source that does not exist; raised before the first photo.
    """
    roots = [Path(os.path.abspath(source)) for source in sources]
    for root in roots:
        if not root.exists():
            raise DataError(f"There is no file or folder {root}; check the path.")
    return _scan(roots)


def count(sources: Iterable[str | os.PathLike[str]]) -> int:
    """How many photos `scan` will give."""
    return sum(1 for _ in scan(sources))


def _scan(roots: list[Path]) -> Iterator[Photo]:
    for root in roots:
        if root.is_dir():
            yield from _walk(root, None, (), top=True)
        else:
            yield _photo(root, None)


def _walk(
    folder: Path, identity: str | None, above: tuple[tuple[int, int], ...], *, top: bool = False
) -> Iterator[Photo]:
    """The photos below a folder; `above` names the folders on the way here, to stop at link loops."""
    try:
        status = folder.stat()
        # Files and folders in one order, so that the order of the disk never shows.
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        denied = isinstance(error, PermissionError)
        yield Photo(folder, identity, Reason.NO_PERMISSION if denied else Reason.IO_ERROR)
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        yield Photo(folder, identity, Reason.LINK_LOOP)
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in _LITTER:
            continue
        path = Path(entry.path)
        if entry.is_dir():
            yield from _walk(path, _name(entry.name) if top else identity, (*above, here))
        else:
            yield _photo(path, identity)


def _photo(path: Path, identity: str | None) -> Photo:
    fits = _is_utf8(os.fspath(path)) and _is_utf8(identity or "")
    return Photo(path, identity, None if fits else Reason.NAME_NOT_UTF8)


def _name(folder_name: str) -> str:
    """One spelling a name: macOS stores decomposed accents, everybody else composed ones."""
    return unicodedata.normalize("NFC", folder_name)


def _is_utf8(text: str) -> bool:
    """Whether a name read from the disk was UTF-8 (Python marks other bytes with surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
