"""Sync: what becomes of faces without their files, and which sources can show that these are gone."""

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
    """A person all of whose photos are under another name now.

    Attributes:
        name, new_name: before, and from now on.
        faces: how many the person has.
        merged: whether there was somebody of the new name already, who has these faces now.
    """

    name: str
    new_name: str
    faces: int
    merged: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """A face whose files are gone, and whose bytes lie elsewhere under names that contradict its own.

    Attributes:
        face: as it is stored.
        paths: where its bytes are now.
        identities: whom the sources name there, in the order of `paths`; None for nobody.
    """

    face: Face
    paths: tuple[str, ...]
    identities: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Unseen:
    """A place that could not be looked at, so that bytes which were seen nowhere may be there.

    Attributes:
        path: of a file, a folder or an archive.
        why: in words.
        rule: that passes over it; None for one that cannot be read.
    """

    path: str
    why: str
    rule: str | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """Known paths whose files are gone, and what becomes of their faces.

    Attributes:
        paths: the paths that are no longer known.
        faces: the faces that go: no other path leads to them, and no source has their bytes.
        moved: the faces that follow their bytes, as they were.
        renamed: the people all of whose photos were found under another name.
        kept: the faces that stay as they are, because somebody has to decide.
        held: the faces that would be removed, but stay: their bytes may be in a place that was not readable.
        unseen: these places; empty where no face is held back.
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
    """Absolute paths of sources with at least one photo each, and of folders that may be gone as a whole.

    Raises:
        DataError: a source does not exist.
        InputError: there is not one photo in a source, or it does not show what is gone.
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
