"""Sync, for `Gallery.remove_missing`: its result types, and the check of its sources.

A source must be able to show that files are gone.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from retrieval.database.records import Face
from retrieval.errors import InputError
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.photos import check_comparable, scan
from retrieval.system.paths import absolute


@dataclass(frozen=True, slots=True)
class Renamed:
    """An identity for which all photos have another name now.

    Attributes:
        name, new_name: the identity's name before and after the change.
        faces: how many faces the identity has.
        merged: whether another identity has the new name, and these faces now.
    """

    name: str
    new_name: str
    faces: int
    merged: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """An unchanged face: the sources contradict its identity, or its bytes lie where they cannot be enrolled.

    Attributes:
        face: the stored face.
        paths: the paths where its bytes are now.
        identities: the identity that the sources name at each of `paths`; None where they name none.
    """

    face: Face
    paths: tuple[str, ...]
    identities: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Unseen:
    """A place that was not read, so that bytes which were found nowhere may be there.

    Attributes:
        path: the path of a file, a folder or an archive.
        why: the reason, in words.
        rule: the rule that excludes the place from the scan; None for a place that cannot be read.
    """

    path: str
    why: str
    rule: str | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """Known paths without files, and the changes to their faces.

    Attributes:
        paths: the paths that are removed from the gallery.
        faces: the removed faces: they have no other path, and no source has their bytes.
        moved: the faces that get the paths where their bytes are now, in their state before the change.
        renamed: the identities for which all photos were found under another name.
        kept: the unchanged faces that need a decision by the user.
        held: the unchanged faces that would be removed if all places had been read: their bytes may be in
            one of `unseen`.
        unseen: the places that were not read; empty if no face is held.
    """

    paths: tuple[str, ...]
    faces: tuple[Face, ...]
    moved: tuple[Face, ...] = ()
    renamed: tuple[Renamed, ...] = ()
    kept: tuple[Kept, ...] = ()
    held: tuple[Face, ...] = ()
    unseen: tuple[Unseen, ...] = ()


def roots(
    sources: Iterable[str | os.PathLike[str]], gone: Iterable[str | os.PathLike[str]] = ()
) -> list[str]:
    """Returns the absolute paths of sources with at least one photo each, and of folders in `gone`.

    A folder in `gone` may have disappeared as a whole.

    Raises:
        DataError: a source does not exist.
        InputError: a source has no photo, or cannot show that files are gone.
    """
    sources, gone = list(sources), list(gone)
    check_comparable([*sources, *gone])
    for root in map(absolute, sources):
        passed_over = PassedOver()
        if next(scan([root], passed_over=passed_over), None) is None:
            raise InputError(
                f"There is not one photo in {root}{passed_over.aside()}, so nothing is taken for gone; is it "
                "mounted? "
                "To remove people, use `faceprint forget`; to drop what was below a folder that is gone for "
                "good, name another source, and this one as `gone`."
            )
    return [absolute(source) for source in [*sources, *gone]]
