"""Uploads: photos, or a zip of photos, that a job enrolls; they lie in a private folder until it has ended.

The folder is a temporary one of the system (TMPDIR). That of a killed service is removed when the next one
starts: a lock tells whether a folder is in use, so services do not remove each other's.
"""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from retrieval.errors import InputError, StorageError, UnreadableImage
from retrieval.images.pixels import read_bytes
from retrieval.service.photos import check_pixels
from retrieval.service.settings import Limits
from retrieval.sources import photos
from retrieval.sources.photos import Photo
from retrieval.system import files
from retrieval.system.paths import composed, readable, shown

_PREFIX: Final = "faceprint-uploads-"

# How a zip begins, one without files too. The name of a file says nothing about its bytes.
_ZIP: Final = (b"PK\x03\x04", b"PK\x05\x06")

# The characters that are kept of the name of a zip, of up to 4 bytes each: a file's name has 255 at most.
_MAX_NAME: Final = 60


@dataclass(frozen=True, slots=True)
class Sent:
    """A file as the caller sent it: its name there, and its bytes."""

    name: str
    content: bytes

    @property
    def is_zip(self) -> bool:
        """Whether it is a zip, by its bytes."""
        return self.content.startswith(_ZIP)


@dataclass(frozen=True, slots=True)
class Kept:
    """A file in the folder of its upload, and the name that the caller gave it."""

    name: str
    path: Path
    is_zip: bool


class Upload:
    """The files of one upload, on the disk until `close`."""

    def __init__(self, sent: Sequence[Sent]) -> None:
        """Writes the files.

        Raises:
            StorageError: they cannot be written.
        """
        self._held = ExitStack()
        parent = Path(tempfile.gettempdir())
        try:
            folder = self._held.enter_context(files.temporary_folder(parent, _PREFIX))
            self._kept = [_written(folder, number, one) for number, one in enumerate(sent)]
        except OSError as error:
            self._held.close()
            raise StorageError(
                f"The upload cannot be kept in {parent}: {files.why(error)}; free space there, or set TMPDIR."
            ) from error

    def close(self) -> None:
        """Removes the files; again does nothing."""
        self._held.close()

    def photos(
        self, identity: str | None, identity_from: str | None, limits: Limits
    ) -> Iterator[tuple[str, Photo]]:
        """Yields the name and the photo of each file, or of each member of a zip, with its content.

        The photos have no path: the gallery keeps no trace of where they were.

        Args:
            identity: the name of all; None for those that the folders of a zip give.
            identity_from: which folders, see `photos.scan`.
            limits: of requests.
        """
        for kept in self._kept:
            if kept.is_zip:
                named = _of_zip(kept, identity, identity_from)
            else:
                named = iter([(kept.name, _of_file(kept, identity))])
            for name, photo in named:
                yield name, _within(limits, photo)


def remove_leftovers() -> None:
    """Removes the uploads of services that were killed, as far as this user may."""
    with suppress(OSError):
        files.remove_abandoned(Path(tempfile.gettempdir()), _PREFIX)


def check(sent: Sequence[Sent], identity: str | None, identity_from: str | None) -> None:
    """Checks that files may be one upload: photos, or one zip.

    Raises:
        InputError: they may not, or there are no folders that could give names.
    """
    zips = sum(one.is_zip for one in sent)
    if zips > 1 or (zips and len(sent) > 1):
        raise InputError("Send photos or one zip: a zip beside other files, or a second one, is refused.")
    if identity_from is not None and not zips:
        raise InputError("`identity_from` is about the folders of a zip; give photos a name as `identity`.")
    if identity_from is not None and identity is not None:
        raise InputError("Give `identity` or `identity_from`: each of them names the people.")


def _written(folder: Path, number: int, sent: Sent) -> Kept:
    # In a folder of its own, a zip keeps its name, which photos.scan compares with that of its outer folder.
    path = folder / f"{number}"
    if sent.is_zip:
        files.make_folder(path)
        path /= _safe_name(sent.name)
    with files.create(path) as file:
        file.write(sent.content)
    return Kept(sent.name, path, sent.is_zip)


def _safe_name(name: str) -> str:
    base = composed(re.split(r"[/\\]", name)[-1])
    kept = shown(base, lambda letter: "")[:_MAX_NAME]
    return kept if kept.lower().endswith(".zip") else f"{kept}.zip"


def _of_file(kept: Kept, identity: str | None) -> Photo:
    try:
        return Photo(None, identity, content=read_bytes(kept.path))
    except UnreadableImage as error:
        return Photo(None, identity, error.reason, detail=error.detail)


def _of_zip(kept: Kept, identity: str | None, identity_from: str | None) -> Iterator[tuple[str, Photo]]:
    place = str(kept.path)
    for photo in photos.scan([place], identity_from=identity_from if identity is None else "none"):
        name = kept.name + readable(photo.path or place).removeprefix(place)
        yield name, replace(photo, path=None, identity=photo.identity if identity is None else identity)


def _within(limits: Limits, photo: Photo) -> Photo:
    """Returns a photo; one with more pixels than requests may have is a rejected one."""
    if not isinstance(photo.content, bytes) or photo.problem is not None:
        return photo
    try:
        check_pixels(photo.content, limits)
    except UnreadableImage as error:
        return replace(photo, content=None, problem=error.reason, detail=error.detail)
    return photo
