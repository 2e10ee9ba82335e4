"""Moves known paths to a new root, for `Gallery.relocate`: in one transaction, without reading a file."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from retrieval.database.reader import Reader
from retrieval.errors import InputError
from retrieval.storage.any_vault import AnyVault
from retrieval.system.files import Stamp
from retrieval.system.paths import absolute, is_url, is_utf8


@dataclass(frozen=True, slots=True)
class Relocated:
    """The result of a relocation.

    Attributes:
        paths: number of known paths that were moved below the new root, including paths that the same photo
            had there already.
        faces: number of faces in the photos with these paths.
        present: number of these paths with an existing file; addresses are not checked.
        left: unchanged paths: other bytes are known at their new path.
    """

    paths: int
    faces: int
    present: int
    left: tuple[str, ...]


def relocate(
    vault: AnyVault, old: str | os.PathLike[str], new: str | os.PathLike[str], *, dry_run: bool = False
) -> Relocated:
    """Replaces the root of known paths; see `Gallery.relocate`."""
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
    """The changes of a relocation.

    Attributes:
        moved: known paths to remove.
        files: photo id by path, of paths to add.
        stamps: stamp by path, of added paths with an unchanged file.
        result: the counts.
    """

    moved: Iterable[str]
    files: Mapping[str, int]
    stamps: Mapping[str, Stamp]
    result: Relocated


def _plan(vault: AnyVault, reader: Reader, before: str, after: str) -> _Plan:
    known = reader.files_below(before)
    if not known:
        raise InputError(f"{vault.name} knows no file {before} and none below it; check the path.")
    target = {path: after + path[len(before) :] for path in known}
    owners = reader.files(target.values())
    left = _immovable_paths({path: number for path, (number, _) in known.items()}, target, owners)
    moved = {path: target[path] for path in known if path not in left}
    # A new path that the photo has already is not added again.
    files = {
        new_path: known[path][0]
        for path, new_path in moved.items()
        if new_path not in owners or new_path in moved
    }
    present, stamps = 0, {}
    for path, new_path in moved.items():
        stamp = _stamp(new_path)
        present += stamp is not None
        # The stamp is valid only for the very same file, moved.
        if stamp is not None and stamp == known[path][1]:
            stamps[new_path] = stamp
    result = Relocated(
        paths=len(moved),
        faces=reader.count_of_photos({known[path][0] for path in moved}),
        present=present,
        left=tuple(sorted(left)),
    )
    return _Plan(moved, files, stamps, result)


def _immovable_paths(
    known: Mapping[str, int], target: Mapping[str, str], owners: Mapping[str, int]
) -> set[str]:
    """Known paths that cannot move: their new path belongs to another photo and does not move away itself.

    The search is repeated, because one root may be below the other.
    """
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
    """Returns the stamp of a file; None if there is no file, and for an address."""
    try:
        return None if is_url(path) else Stamp.of(os.stat(path))
    except OSError:
        return None


def _root(root: str | os.PathLike[str]) -> str:
    """Returns the absolute form of a root, as in known paths, without a separator at its end.

    Raises:
        InputError: the root is empty, or not valid Unicode as known paths are.
    """
    if not os.fspath(root):
        raise InputError("A root must have a name; an empty one is none.")
    path = absolute(root)
    if not is_utf8(path):
        raise InputError(f"{path!a} is not valid Unicode, so no known path can lie there.")
    return path.rstrip("/") if is_url(path) else path.rstrip(os.sep)
