"""Folders: the files below a folder with their identities, always in the same order, for `photos.scan`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from retrieval.database import identity_names
from retrieval.errors import Reason
from retrieval.sources.exclusion import IGNORE_FILE, Exclusion, PassedOver
from retrieval.system.paths import composed, is_utf8_name

# Files that mark the folder of a model, a gallery or a backup, which holds no photos to enroll.
_OWN_FILES: Final = frozenset({"bundle.json", "gallery.db", "backup.json"})
_OWN_FILES_RULE: Final = "models, galleries and backups"


@dataclass(frozen=True, slots=True)
class File:
    """A file of a folder and its identity.

    Attributes:
        path: absolute, as given (symbolic links are not resolved).
        identity: the name of the person, in Unicode's composed form (NFC); None for files of the root itself.
        problem: why the file is not usable, known from its name or its folder without opening it.
    """

    path: Path
    identity: str | None
    problem: Reason | None = None


def walk(
    root: str | os.PathLike[str],
    *,
    exclusion: Exclusion = Exclusion(),
    passed_over: PassedOver | None = None,
    ours_too: bool = False,
) -> Iterator[File]:
    """Returns every file below a folder, folder by folder, names in code point order.

    Each subfolder of the root is an identity, at any depth of its files; files in the root itself have none.
    File extensions are ignored. The walk passes over what `exclusion` selects, which by default are names
    that begin with a dot and the system files of operating systems and NAS boxes, and over the folders of
    models, galleries and backups. A folder that cannot be listed, or that links back to one above it, is one
    File with a `problem`.

    Args:
        root: the folder; it is walked even if its own name would be passed over.
        exclusion: selects what is passed over; `Exclusion.with_file_of` adds the folder's own patterns.
        passed_over: counts what is passed over; to count the files in a folder, the folder is listed.
        ours_too: whether the folders of models, galleries and backups are walked like others.
    """
    seen = _Walk(exclusion, passed_over, ours_too)
    # An explicit stack, since folders may be nested deeper than Python's recursion limit.
    waiting: list[Iterator[_Entry]] = [iter([_Entry(Path(os.path.abspath(root)), None, folder=True)])]
    while waiting:
        found = next(waiting[-1], None)
        if found is None:
            waiting.pop()
        elif found.folder:
            try:
                inside = _inside(found, seen)
            except OSError as error:
                denied = isinstance(error, PermissionError)
                yield File(found.path, found.identity, Reason.NO_PERMISSION if denied else Reason.IO_ERROR)
                continue
            if inside is None:
                yield File(found.path, found.identity, Reason.LINK_LOOP)
            else:
                waiting.append(inside)
        else:
            yield File(found.path, found.identity, _problem(found))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file or a folder of a walk.

    `above` are the (device, inode) pairs of the folders that contain it, to detect link loops; `names` are
    the parts of its path below the root.
    """

    path: Path
    identity: str | None
    folder: bool
    above: tuple[tuple[int, int], ...] = ()
    names: tuple[str, ...] = ()


def _problem(file: _Entry) -> Reason | None:
    if not is_utf8_name(os.fspath(file.path)):
        return Reason.NAME_NOT_UTF8
    return Reason.BAD_IDENTITY if file.identity and identity_names.problem(file.identity) else None


@dataclass(frozen=True, slots=True)
class _Walk:
    """The exclusion of one walk, and the counts of what it passes over."""

    exclusion: Exclusion
    passed_over: PassedOver | None
    ours_too: bool

    def takes(self, entry: os.DirEntry[str], names: tuple[str, ...]) -> bool:
        """Returns whether an entry of a folder is taken; counts it where it is passed over."""
        folder = _is_folder(entry)
        rule = self.exclusion.rule(names, folder=folder)
        # The source's own file of patterns is not reported as skipped.
        if rule is not None and names != (IGNORE_FILE,):
            self.count(rule, entry.path, folder=folder)
        return rule is None

    def count(self, rule: str, path: str, *, folder: bool) -> None:
        if self.passed_over is not None and folder:
            self.passed_over.add_folder(rule, path)
        elif self.passed_over is not None:
            self.passed_over.add_file(rule)

    def count_ours(self, path: str) -> None:
        self.count(_OWN_FILES_RULE, path, folder=True)
        if self.passed_over is not None:
            self.passed_over.ours.append(path)


def _inside(folder: _Entry, walk: _Walk) -> Iterator[_Entry] | None:
    """Returns the entries of a folder, sorted by name; None for a folder that contains itself by a link."""
    status = folder.path.stat()
    here = (status.st_dev, status.st_ino)
    if here in folder.above:
        return None
    with os.scandir(folder.path) as listed:
        entries = sorted(listed, key=lambda entry: entry.name)
    if not walk.ours_too and any(entry.name in _OWN_FILES for entry in entries):
        walk.count_ours(os.fspath(folder.path))
        return iter(())
    below = ((entry, (*folder.names, entry.name)) for entry in entries)
    return (
        _found(entry, names, folder, (*folder.above, here))
        for entry, names in below
        if walk.takes(entry, names)
    )


def _found(
    entry: os.DirEntry[str], names: tuple[str, ...], folder: _Entry, above: tuple[tuple[int, int], ...]
) -> _Entry:
    is_folder = _is_folder(entry)
    names_someone = is_folder and not folder.above
    identity = composed(entry.name) if names_someone else folder.identity
    return _Entry(Path(entry.path), identity, is_folder, above, names)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself, or into a folder without permission. Reading it as a file raises the error.
        return False
