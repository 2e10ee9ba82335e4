"""Relocation: paths below an old root get a new root in one transaction; no file is read."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from retrieval.database.reader import Reader
from retrieval.errors import InputError
from retrieval.storage.vault import Vault
from retrieval.system.files import Stamp
from retrieval.system.paths import absolute, is_url, is_utf8


@dataclass(frozen=True, slots=True)
class Relocated:
    """What relocating did.

    Attributes:
        paths: how many known paths lie below the new root now; those that the same face had there already
            are among them.
        faces: how many faces have them.
        present: how many of these files are there; addresses are not looked at.
        left: paths that stay as they were, because other bytes are known at the new place.
    """

    paths: int
    faces: int
    present: int
    left: tuple[str, ...]


def relocate(
    vault: Vault, old: str | os.PathLike[str], new: str | os.PathLike[str], *, dry_run: bool = False
) -> Relocated:
    """Rewrites the beginning of known paths; see `Gallery.relocate`."""
    before, after = (_root(root) for root in (old, new))
    if before == after:
        raise InputError(f"{before} is both the old root and the new one; name two.")
    if dry_run:
        with vault.store.read() as reader:
            return _plan(vault, reader, before, after).result
    with vault.writing() as writer:
        plan = _plan(vault, writer, before, after)
        writer.remove_files(plan.moved)
        writer.add_files(plan.files.items(), plan.stamps)
        vault.log(
            writer, "relocate", faces=plan.result.faces, files=plan.result.paths, left=len(plan.result.left)
        )
    return plan.result


@dataclass(frozen=True)
class _Plan:
    """Known paths that go, the faces of those that come, and the stamps of these that still hold."""

    moved: Iterable[str]
    files: Mapping[str, int]
    stamps: Mapping[str, Stamp]
    result: Relocated


def _plan(vault: Vault, reader: Reader, before: str, after: str) -> _Plan:
    known = reader.files_below(before)
    if not known:
        raise InputError(f"{vault.folder} knows no file {before} and none below it; check the path.")
    target = {path: after + path[len(before) :] for path in known}
    owners = reader.files(target.values())
    left = _left({path: number for path, (number, _) in known.items()}, target, owners)
    moved = {path: target[path] for path in known if path not in left}
    # A path that the face has there already stays as it is.
    files = {place: known[path][0] for path, place in moved.items() if place not in owners or place in moved}
    present, stamps = 0, {}
    for path, place in moved.items():
        stamp = _stamp(place)
        present += stamp is not None
        # The stamp says something of the file only where it is the very same file, moved.
        if stamp is not None and stamp == known[path][1]:
            stamps[place] = stamp
    result = Relocated(
        paths=len(moved),
        faces=len({known[path][0] for path in moved}),
        present=present,
        left=tuple(sorted(left)),
    )
    return _Plan(moved, files, stamps, result)


def _left(known: Mapping[str, int], target: Mapping[str, str], owners: Mapping[str, int]) -> set[str]:
    """Paths whose new place is another face's and stays so; of two roots, one may lie below the other."""
    left: set[str] = set()
    while True:
        more = {
            path
            for path, number in known.items()
            if path not in left
            and (target[path] in left or target[path] not in known)
            and owners.get(target[path], number) != number
        }
        if not more:
            return left
        left |= more


def _stamp(path: str) -> Stamp | None:
    """That of a file; None where there is none, and for an address."""
    try:
        return None if is_url(path) else Stamp.of(os.stat(path))
    except OSError:
        return None


def _root(root: str | os.PathLike[str]) -> str:
    """A root as paths begin with it, without a separator at its end.

    Raises:
        InputError: it is not valid Unicode, as known paths are.
    """
    if not os.fspath(root):
        raise InputError("A root must have a name; an empty one is none.")
    path = absolute(root)
    if not is_utf8(path):
        raise InputError(f"{path!a} is not valid Unicode, so no known path can lie there.")
    return path.rstrip("/") if is_url(path) else path.rstrip(os.sep)
