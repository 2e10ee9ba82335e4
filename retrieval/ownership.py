"""Ownership: which gallery a folder of vectors belongs to, so that no writer deletes what another one needs.

A gallery's row and the file `gallery.id` in its folder of vectors hold the same random id. The file is
durable before the transaction that names it. Two galleries that share a folder of vectors would each remove
what they do not name, and the lock of one does not keep the other out: a writer refuses such a folder.
"""

import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from retrieval.errors import GalleryError, StorageError
from retrieval.files import is_no_file, why, write_durably

ID_NAME: Final = "gallery.id"

_MAX_BYTES: Final = 256


def new_id() -> str:
    """A random id."""
    return str(uuid.uuid4())


def read_id(vectors: Path) -> str | None:
    """The id in a folder of vectors; None where there is none, "" for what is no file.

    Raises:
        StorageError: it cannot be read.
    """
    path = vectors / ID_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if is_no_file(error):
            return ""
        raise StorageError(f"{path} cannot be read: {why(error)}.") from error
    try:
        data = os.read(descriptor, _MAX_BYTES)
    except OSError as error:
        if is_no_file(error):
            return ""
        raise StorageError(f"{path} cannot be read: {why(error)}.") from error
    finally:
        os.close(descriptor)
    # Exactly as it was written, or a damaged file could pass.
    text = data.decode("ascii", "replace")
    return text[:-1] if text.endswith("\n") else ""


def write_id(vectors: Path, folder_id: str) -> None:
    """Writes the id of a folder of vectors durably.

    Raises:
        StorageError: the disk refused.
    """
    try:
        write_durably(vectors / ID_NAME, f"{folder_id}\n".encode(), inherit=True, anything=True)
    except OSError as error:
        raise StorageError(f"{vectors / ID_NAME} cannot be written: {why(error)}.") from error


def links(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of a gallery's own folders that are symbolic links."""
    return [name for name in names if (folder / name).is_symlink()]


def linked(folder: Path, name: str) -> GalleryError:
    """The refusal to write through a link."""
    return GalleryError(
        f"{folder / name} is a symbolic link, and a gallery that is written to must hold all its files "
        "itself, or a copy of it would share them; move that folder into the link's place, or link the whole "
        "gallery folder instead."
    )


def foreign(folder: Path, vectors: Path) -> GalleryError:
    """The refusal to write into a folder that is not the gallery's."""
    return GalleryError(
        f"{vectors} is not the folder of vectors that belongs to {folder}; put the gallery's own one back, "
        "or restore a backup. Galleries are copied whole, or with `faceprint backup` and `faceprint restore`."
    )


def emptied(folder: Path, vectors: Path) -> GalleryError:
    """The refusal to write where vectors are missing, and nothing says that the folder is the gallery's."""
    return GalleryError(
        f"{vectors} has neither {ID_NAME} nor all vector files of {folder}: it may be another folder, or a "
        "disk that is not mounted; put the gallery's own one back, or see what "
        f"`faceprint repair {folder}` can mend."
    )
