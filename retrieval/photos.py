"""Where photographs are: files on disk and who is on them, in an order that never varies."""

import json
import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from retrieval.errors import DataError, Reason

# What operating systems leave in every folder, and nobody ever meant to enroll.
_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})

# What a model and a gallery are known by: their files are nobody's photos.
_OURS = frozenset({"bundle.json", "gallery.db", "backup.json"})


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
    `__MACOSX`) are passed over, and so are the folders of models and galleries. A folder that cannot be
    listed or that links back to one above it comes out as one Photo with its `problem`.

    Raises:
        DataError: a source that does not exist; raised before the first photo.
    """
    roots = [Path(os.path.abspath(source)) for source in sources]
    for root in roots:
        # Path.exists raises for a name that is too long and for a barred folder; this says no.
        if not os.path.exists(root):
            raise DataError(f"There is no file or folder {root}; check the path.")
    return _scan(roots)


def from_report(path: str | os.PathLike[str]) -> list[Photo]:
    """The rejected photos of a report that `faceprint ingest --report` wrote, in its order.

    Raises:
        DataError: there is no such file, or it is something else.
    """
    try:
        lines = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
        return [
            Photo(Path(line["path"]), line["identity"], _as_it_was(line["reason"]))
            for line in lines
            if line["status"] == "rejected" and line["path"] is not None
        ]
    except OSError as error:
        raise DataError(
            f"The report {path} cannot be read: {(error.strerror or str(error)).lower()}."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a report of faceprint ingest; pass what --report wrote.") from error


def _as_it_was(reason: str) -> Reason | None:
    """A name that is not UTF-8 stands in a report as it can be written, and leads nowhere."""
    return Reason.NAME_NOT_UTF8 if reason == Reason.NAME_NOT_UTF8 else None


def count(sources: Iterable[str | os.PathLike[str]]) -> int:
    """How many photos `scan` will give."""
    return sum(1 for _ in scan(sources))


def _scan(roots: list[Path]) -> Iterator[Photo]:
    for root in roots:
        if root.is_dir():
            yield from _walk(root)
        else:
            yield _photo(root, None)


def _walk(root: Path) -> Iterator[Photo]:
    """The photos below a folder, by a stack of our own: folders may lie deeper than calls may."""
    waiting: list[Iterator[_Found]] = [iter([_Found(root, None, folder=True)])]
    while waiting:
        found = next(waiting[-1], None)
        if found is None:
            waiting.pop()
        elif found.folder:
            try:
                inside = _inside(found)
            except OSError as error:
                denied = isinstance(error, PermissionError)
                yield Photo(found.path, found.identity, Reason.NO_PERMISSION if denied else Reason.IO_ERROR)
                continue
            if inside is None:
                yield Photo(found.path, found.identity, Reason.LINK_LOOP)
            else:
                waiting.append(inside)
        else:
            yield _photo(found.path, found.identity)


@dataclass(frozen=True, slots=True)
class _Found:
    """A file or a folder; `above` names the folders on the way to it, to stop at link loops."""

    path: Path
    identity: str | None
    folder: bool
    above: tuple[tuple[int, int], ...] = ()


def _inside(folder: _Found) -> Iterator[_Found] | None:
    """What a folder holds, files and folders in one order; None for a folder that is among those above it."""
    status = folder.path.stat()
    here = (status.st_dev, status.st_ino)
    if here in folder.above:
        return None
    with os.scandir(folder.path) as listed:
        entries = sorted((e for e in listed if not _is_litter(e.name)), key=lambda entry: entry.name)
    if any(entry.name in _OURS for entry in entries):
        return iter(())
    return (_found(entry, folder, (*folder.above, here)) for entry in entries)


def _found(entry: os.DirEntry[str], folder: _Found, above: tuple[tuple[int, int], ...]) -> _Found:
    is_folder = _is_folder(entry)
    names_someone = is_folder and not folder.above
    return _Found(Path(entry.path), _name(entry.name) if names_someone else folder.identity, is_folder, above)


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself, or into a barred folder. Whoever reads it is told so.
        return False


def _photo(path: Path, identity: str | None) -> Photo:
    return Photo(path, identity, None if is_utf8(os.fspath(path)) else Reason.NAME_NOT_UTF8)


def _name(folder_name: str) -> str:
    """One spelling a name, that can be written anywhere.

    macOS stores decomposed accents, everybody else composed ones; bytes that are not UTF-8 become `\\xe9`.
    """
    return unicodedata.normalize("NFC", readable(folder_name))


def readable(name: str | os.PathLike[str]) -> str:
    """A name that can be written anywhere: lone surrogates, for bytes that are not UTF-8, are spelled out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_utf8(text: str) -> bool:
    """Whether a name read from the disk was UTF-8 (Python marks other bytes with surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
