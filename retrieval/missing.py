"""Missing: known paths whose files are gone, and the faces that no other path leads to."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from retrieval import archives
from retrieval.errors import InputError
from retrieval.photos import check_comparable, scan
from retrieval.places import absolute, is_utf8_name
from retrieval.store import Face, Reader
from retrieval.vault import Vault


@dataclass(frozen=True, slots=True)
class Missing:
    """Known paths whose files are gone, and the faces that no other path leads to."""

    paths: tuple[str, ...]
    faces: tuple[Face, ...]


def find(vault: Vault, sources: Iterable[str | os.PathLike[str]]) -> Missing:
    """What is missing below some sources; see `Gallery.missing_files`."""
    with vault.store.read() as reader:
        return _missing(reader, _roots(sources))


def remove(vault: Vault, sources: Iterable[str | os.PathLike[str]]) -> Missing:
    """Removes what is missing below some sources, without a trace; see `Gallery.remove_missing`."""
    roots = _roots(sources)
    with vault.writing() as writer:
        missing = _missing(writer, roots)
        if missing.paths:
            writer.remove_files(missing.paths)
            vault.remove(writer, [face.id for face in missing.faces])
            vault.owe(writer, erase=True, labels={})
            vault.log(writer, "sync", faces=len(missing.faces), files=len(missing.paths))
    return missing


def _roots(sources: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Sources as absolute paths, each with a photo in it."""
    sources = list(sources)
    check_comparable(sources)
    roots = [absolute(source) for source in sources]
    for root in roots:
        if next(scan([root]), None) is None:
            raise InputError(
                f"There is not one photo in {root}, so nothing is taken for gone; is it mounted? "
                "To remove people, use `faceprint forget`."
            )
    return roots


def _missing(reader: Reader, roots: Sequence[str]) -> Missing:
    paths: list[str] = []
    alive: set[int] = set()
    faces: set[int] = set()
    with archives.Shelf() as shelf:
        for path, number in reader.all_files():
            below = any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)
            if below and _is_gone(path, shelf):
                paths.append(path)
                faces.add(number)
            else:
                alive.add(number)
    return Missing(tuple(sorted(paths)), tuple(reader.faces(sorted(faces - alive)).values()))


def _is_gone(path: str, shelf: archives.Shelf) -> bool:
    if not is_utf8_name(path):
        return False  # the locale would look for another name
    try:
        os.stat(path)
    except NotADirectoryError:
        member = archives.split(path)
        return member is None or not shelf.has(*member)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False
