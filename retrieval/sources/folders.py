"""Folders: the files below a folder, with their identities, always in the same order."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from retrieval.database import identity_names
from retrieval.errors import Reason
from retrieval.sources.exclusion import IGNORE_FILE, Exclusion, PassedOver
from retrieval.system.paths import composed, is_utf8_name

# What a model and a gallery are known by: their files are nobody's photos.
_OWN_FILES: Final = frozenset({"bundle.json", "gallery.db", "backup.json"})
_OWN_FILES_RULE: Final = "models, galleries and backups"


@dataclass(frozen=True, slots=True)
class File:
    """A file and who is on it.

    Attributes:
        path: absolute, as given (symbolic links are not resolved).
        identity: the name of the person, in Unicode's composed form (NFC), or None when nobody said.
        problem: why the file cannot even be opened, known from its name or its folder alone.
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
    """Every file below a folder, folder by folder, names in code point order.

    Each subfolder is an identity, however deep its files lie; files in the folder itself have none.
    Extensions decide nothing. What `exclusion` says is passed over, names that begin with a dot and the
    litter of operating systems and NAS boxes always; so are the folders of models and galleries. A folder
    that cannot be listed or that links back to one above it comes out as one File with its `problem`.

    Args:
        root: the folder itself is walked whatever its name is.
        exclusion: what is passed over; `Exclusion.with_file_of` adds the folder's own patterns.
        passed_over: what was is added to it; counting the files in folders that are takes listing these.
        ours_too: whether the folders of models, galleries and backups are walked like others.
    """
    seen = _Walk(exclusion, passed_over, ours_too)
    # By a stack of our own: folders may lie deeper than calls may.
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
    """A file or a folder.

    `above` are the folders on the way to it, to stop at link loops; `names` is the path from the root on.
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
    """What one walk passes over, and where that is counted."""

    exclusion: Exclusion
    passed_over: PassedOver | None
    ours_too: bool

    def takes(self, entry: os.DirEntry[str], names: tuple[str, ...]) -> bool:
        """Whether an entry of a folder is not passed over."""
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
    """What a folder holds, files and folders in one order; None for a folder that is among those above it."""
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
        # A link to itself, or into a barred folder. Whoever reads it is told so.
        return False
