"""Paths into archives: which names are archives, and which of several paths exists."""

import os
import posixpath
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

from retrieval.system.paths import is_url

Kind: TypeAlias = Literal["tar", "zip"]

_TAR: Final = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


def kind(name: str | os.PathLike[str]) -> Kind | None:
    """Returns the kind of archive that a file of this name is; None where it is none."""
    lower = os.fspath(name).lower()
    if lower.endswith(_TAR):
        return "tar"
    return "zip" if lower.endswith(".zip") else None


def stem(name: str) -> str:
    """Returns the name of an archive without its folder and its suffix: photos for /x/photos.tar.gz."""
    base = posixpath.basename(name)
    suffixes = sorted((s for s in (*_TAR, ".zip") if base.lower().endswith(s)), key=len)
    return base[: -len(suffixes[-1])] if suffixes else base


def inside(name: str) -> str:
    """Returns the path of a member below its archive: never absolute, and never above it."""
    return posixpath.normpath("/" + name).lstrip("/")


def split(path: str) -> tuple[str, str] | None:
    """Returns the archive on a path and the path of the member in it; None where no archive exists on it."""
    archive = os.path.dirname(path)
    while archive not in ("", os.path.dirname(archive)):
        if kind(archive) and os.path.isfile(archive):
            return archive, path[len(archive) + 1 :]
        archive = os.path.dirname(archive)
    return None


def first_present(paths: Sequence[str]) -> str | None:
    """Returns the path to show, of paths with the same bytes: the first that exists, else the first URL.

    Without either it is the first path; None without paths. No content is read: a member exists if its
    archive does.
    """
    if len(paths) < 2:
        return paths[0] if paths else None
    here = (path for path in paths if not is_url(path) and _is_present(path))
    return next(here, next((path for path in paths if is_url(path)), paths[0]))


def _is_present(path: str) -> bool:
    try:
        os.stat(path)
    except NotADirectoryError:
        return split(path) is not None
    except (OSError, ValueError):
        return False
    return True
