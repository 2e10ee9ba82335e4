"""Ownership: which gallery a vectors folder belongs to, so that no writer deletes files of another gallery.

The row of a gallery and the file `gallery.id` in its vectors folder hold the same random id. The file is
durable before the transaction that names it. Two galleries that share a vectors folder would each remove the
files that they do not reference, and the lock of one does not exclude the other. So a writer refuses such a
folder.

A full copy of a gallery has the same id. So the file also records the path of the gallery that wrote to the
folder last (or was created there). If another gallery still exists at that path and contains this same folder
(for example by a bind mount), the folder belongs to it. If not (the gallery was moved), the folder belongs to
the first gallery that writes.
"""

import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from retrieval.database.records import Segment
from retrieval.database.store import Store
from retrieval.errors import GalleryBusy, GalleryError, StorageError
from retrieval.storage.layout import DATABASE, ID_NAME, VECTORS, segment_path
from retrieval.storage.leftovers import unnamed
from retrieval.system.files import is_no_file, make_folder, make_room, open_plain, why, write_durably
from retrieval.system.lock import wait_for_lock
from retrieval.system.paths import printable

# The most bytes of the file: a path of 4096 bytes, each as %XX, and the rest.
_MAX_BYTES: Final = 16384


def new_id() -> str:
    """Returns a new random id."""
    return str(uuid.uuid4())


def read_id(vectors: Path) -> str | None:
    """Returns the id of a vectors folder; None without an id file, "" where it is damaged or not a file.

    Raises:
        StorageError: it cannot be read.
    """
    data = _read(vectors)
    return None if data is None else _parsed(data)[0]


def last_writer(vectors: Path) -> Path | None:
    """Returns the path of the gallery that wrote to a vectors folder last; None where it is not recorded.

    Raises:
        StorageError: the id file cannot be read.
    """
    return _parsed(_read(vectors) or b"")[1]


def size(vectors: Path) -> int:
    """Returns the size of the id file in bytes; 0 without one."""
    return len(_read(vectors) or b"")


def sharer(folder: Path, vectors: Path, database: str) -> Path | None:
    """Returns another gallery that has the same vectors folder and wrote to it last; None without one.

    Args:
        folder, vectors: the folder of this gallery, and its vectors folder.
        database: the name of the database in the folder of a gallery.

    Raises:
        StorageError: the id file cannot be read.
    """
    return _sharer(last_writer(vectors), folder, vectors, database)


def _sharer(other: Path | None, folder: Path, vectors: Path, database: str) -> Path | None:
    if other is None or not _is_same_file(other / vectors.name, vectors):
        return None
    there = (other / database).is_file() and not _is_same_file(other / database, folder / database)
    return other if there else None


def _is_same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _parsed(data: bytes) -> tuple[str, Path | None]:
    """Returns the id and the gallery's path; "" unless the bytes are exactly as written."""
    lines = data.decode("ascii", "replace").split("\n")
    if len(lines) == 2 and not lines[1]:  # from an older version, or of a gallery that is being created
        return lines[0], None
    if len(lines) != 4 or data != _content(lines[0], lines[1]):
        return "", None
    path = unquote_to_bytes(lines[1])
    # A valid checksum proves little, and writers never record such a path.
    if b"\0" in path or not path.startswith(b"/"):
        return "", None
    return lines[0], Path(os.fsdecode(path))


def _content(folder_id: str, quoted: str) -> bytes:
    said = f"{folder_id}\n{quoted}\n"
    return f"{said}{hashlib.sha256(said.encode()).hexdigest()}\n".encode()


def _read(vectors: Path) -> bytes | None:
    path = vectors / ID_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return os.read(descriptor, _MAX_BYTES)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if is_no_file(error):
            return b""
        raise StorageError(f"{printable(path)} cannot be read: {why(error)}.") from error


def write_id(vectors: Path, folder_id: str, folder: Path | None = None) -> None:
    """Writes the id file of a vectors folder durably.

    Args:
        vectors: the vectors folder.
        folder_id: its id.
        folder: the folder of the gallery; None while it is not at its final path.

    Raises:
        StorageError: the file system refused.
    """
    data = f"{folder_id}\n".encode()
    if folder is not None:
        data = _content(folder_id, quote(os.fsencode(os.path.realpath(folder)), safe="/"))
    try:
        write_durably(vectors / ID_NAME, data, inherit=True, anything=True)
    except OSError as error:
        raise StorageError(f"{printable(vectors / ID_NAME)} cannot be written: {why(error)}.") from error


def record_path(vectors: Path, folder: Path) -> None:
    """Records the final path of a new gallery, before it is moved there.

    Without this, until the first write, the file would name the temporary folder of the gallery, or none: a
    copy of the gallery that shares the vectors folder would not be refused.

    Args:
        vectors: the vectors folder at its current path.
        folder: the final path of the gallery.

    Raises:
        StorageError: the file cannot be read, or the file system refused.
    """
    if folder_id := read_id(vectors):
        write_id(vectors, folder_id, folder)


def record_last_writer(folder: Path, vectors: Path, folder_id: str, database: str, *, timeout: float) -> None:
    """Records this gallery as the last writer of its vectors folder, unless it is already recorded.

    A failure to record it, such as on a full disk, is ignored: deleting must stay possible.

    Args:
        folder, vectors, folder_id: the folder of this gallery, its vectors folder and that folder's id.
        database: the name of the database in the folder of a gallery.
        timeout: seconds to wait for another process that has locked the folder.

    Raises:
        GalleryBusy: the other process did not release its lock in time.
        GalleryError: the folder belongs to another gallery.
        StorageError: the id file cannot be read.
    """
    with _locked_folder(vectors, timeout):
        known = last_writer(vectors)
        if (other := _sharer(known, folder, vectors, database)) is not None:
            raise shared(folder, vectors, other)
        if known is None or not _is_same_file(known / database, folder / database):
            with suppress(StorageError):
                write_id(vectors, folder_id, folder)


@contextmanager
def _locked_folder(vectors: Path, timeout: float) -> Iterator[None]:
    """Locks the folder itself against writers of other galleries, where folders can be locked."""
    descriptor = None
    try:
        with suppress(OSError):
            descriptor = os.open(vectors, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            if not wait_for_lock(descriptor, timeout):
                raise GalleryBusy(
                    f"Another process has locked {printable(vectors)} and did not let go within {timeout:g} "
                    "s; wait for it, or stop it, and run the command again."
                )
        yield
    finally:
        if descriptor is not None:
            # Closing is not enough: a process that was forked meanwhile has the descriptor too.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def check_owner(folder: Path, store: Store, *, timeout: float) -> str | None:
    """Checks that the vectors folder belongs to this gallery; returns the id to store if it has none yet.

    Raises:
        GalleryBusy: another process has locked the folder, and did not release it in time.
        GalleryError: the folder belongs to another gallery too or instead; it or a model folder is a
            symbolic link; or the database has another hard link.
    """
    with store.read() as reader:
        known, segments = reader.gallery().folder_id, reader.segments()
        names = [VECTORS, *(generation.folder for generation in reader.generations().values())]
    for name in links(folder, names):
        raise linked(folder, name)
    # SQLite writes into the file, which every hard link shares.
    if os.stat(folder / DATABASE).st_nlink > 1:
        raise hard_linked(folder / DATABASE)
    vectors = folder / VECTORS
    found = read_id(vectors)
    if known is not None and found == known:
        record_last_writer(folder, vectors, known, DATABASE, timeout=timeout)
        return None
    if known is not None and found is not None:
        raise foreign(folder, vectors)
    if (other := sharer(folder, vectors, DATABASE)) is not None:
        raise shared(folder, vectors, other)
    if not all(_has_expected_size(folder, segment) for segment in segments):
        if known is not None:
            raise emptied(folder, vectors)
        return None
    # The transaction that stored this id may seem lost, and may still reappear from the log.
    given = known or found or new_id()
    if found != given:
        write_id(vectors, given, folder)
    return given if known is None else None


def _has_expected_size(folder: Path, segment: Segment) -> bool:
    path = segment_path(folder, segment.id)
    return path.is_file() and path.stat().st_size == segment.bytes


def restore_id(folder: Path, store: Store) -> None:
    """Restores the id file of the vectors folder. Only the holder of the writer lock may call it.

    If the folder has another id, each vector file must match its row, and no other may exist.

    Raises:
        GalleryError: the folder belongs to another gallery.
    """
    with store.read() as reader:
        known, segments = reader.gallery().folder_id, reader.segments()
        names = [VECTORS, *(generation.folder for generation in reader.generations().values())]
        stray = list(unnamed(folder, reader))
    for name in links(folder, names):
        raise linked(folder, name)
    vectors = folder / VECTORS
    found = read_id(vectors)
    if (other := sharer(folder, vectors, DATABASE)) is not None:
        raise shared(folder, vectors, other)
    if known is None or found == known:
        return
    if found is not None and any(path.parent == vectors for path in stray):
        raise foreign(folder, vectors)
    if found is not None and not all(_is_proven(folder, segment) for segment in segments):
        raise foreign(folder, vectors)
    try:
        if not vectors.is_dir():
            make_room(vectors)
        make_folder(vectors, like=folder, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{vectors} cannot be made: {why(error)}.") from error
    write_id(vectors, known, folder)


def _is_proven(folder: Path, segment: Segment) -> bool:
    path = segment_path(folder, segment.id)
    try:
        with open_plain(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == segment.sha256
    except OSError as error:
        if is_no_file(error):
            return False
        raise StorageError(f"{path} cannot be read: {why(error)}.") from error


def links(folder: Path, names: Iterable[str]) -> list[str]:
    """Returns those of a gallery's own folders that are symbolic links."""
    return [name for name in names if (folder / name).is_symlink()]


def linked(folder: Path, name: str) -> GalleryError:
    """Returns the error for writing through a symbolic link."""
    return GalleryError(
        f"{printable(folder / name)} is a symbolic link, and a gallery that is written to must hold all its "
        "files itself, or a copy of it would share them; move that folder into the link's place, or link the "
        "whole gallery folder instead."
    )


def hard_linked(database: Path) -> GalleryError:
    """Returns the error for writing to a database with another hard link, as after `cp -al`."""
    return GalleryError(
        f"{printable(database)} has another name (a hard link), and writing would break the gallery that has "
        f"it; copy {printable(database.parent)} with `cp -a`, without links, and use that copy."
    )


def foreign(folder: Path, vectors: Path) -> GalleryError:
    """Returns the error for a vectors folder that does not belong to the gallery."""
    return GalleryError(
        f"{printable(vectors)} is not the folder of vectors that belongs to {printable(folder)}; put the "
        "gallery's own one back, or restore a backup. Galleries are copied whole, or with `faceprint backup` "
        "and `faceprint restore`."
    )


def shared(folder: Path, vectors: Path, other: Path) -> GalleryError:
    """Returns the error for a vectors folder that two galleries share, as by a bind mount."""
    owner = printable(other)
    return GalleryError(
        f"{printable(vectors)} is also the folder of vectors of the gallery {owner}, and each would delete "
        f"what the other needs; give {printable(folder)} a copy of that folder instead of the same one, or "
        f"use {owner}."
    )


def emptied(folder: Path, vectors: Path) -> GalleryError:
    """Returns the error for a folder that lacks vector files and has no id file of the gallery."""
    gallery = printable(folder)
    return GalleryError(
        f"{printable(vectors)} has neither {ID_NAME} nor all vector files of {gallery}: it may be another "
        "folder, or a disk that is not mounted; put the gallery's own one back, or see what "
        f"`faceprint repair {gallery}` can mend."
    )
