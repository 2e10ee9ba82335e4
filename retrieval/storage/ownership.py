"""Ownership: which gallery a folder of vectors belongs to, so that no writer deletes another's files.

A gallery's row and the file `gallery.id` in its folder of vectors hold the same random id. The file is
durable before the transaction that names it. Two galleries that share a folder of vectors would each remove
what they do not name, and the lock of one does not keep the other out: a writer refuses such a folder.

A gallery that was copied whole has the same id. So the file also says where the gallery was made, or lay that
wrote to the folder last: where a gallery lies there still, another one, and this very folder is in it too (as
by a bind mount), the folder is that gallery's. Where none does (it was moved), the first that writes has it.
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

# A path of 4096 bytes, each of them as %XX, and the rest.
_MAX_BYTES: Final = 16384


def new_id() -> str:
    """A random id."""
    return str(uuid.uuid4())


def read_id(vectors: Path) -> str | None:
    """The id in a folder of vectors; None where there is none, "" for what is damaged or no file.

    Raises:
        StorageError: it cannot be read.
    """
    data = _read(vectors)
    return None if data is None else _parsed(data)[0]


def home(vectors: Path) -> Path | None:
    """Where the gallery lay that wrote to a folder of vectors last; None where that is not said.

    Raises:
        StorageError: it cannot be read.
    """
    return _parsed(_read(vectors) or b"")[1]


def size(vectors: Path) -> int:
    """Bytes of what is said; 0 where nothing is."""
    return len(_read(vectors) or b"")


def sharer(folder: Path, vectors: Path, database: str) -> Path | None:
    """Another gallery that has the same folder of vectors, and wrote to it last; None where there is none.

    Args:
        folder, vectors: the gallery's.
        database: the name of a gallery's database in its folder.

    Raises:
        StorageError: it cannot be read who wrote last.
    """
    return _sharer(home(vectors), folder, vectors, database)


def _sharer(other: Path | None, folder: Path, vectors: Path, database: str) -> Path | None:
    if other is None or not _is(other / vectors.name, vectors):
        return None
    there = (other / database).is_file() and not _is(other / database, folder / database)
    return other if there else None


def _is(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _parsed(data: bytes) -> tuple[str, Path | None]:
    """The id and the gallery's path; exactly as they were written, or a damaged file could pass."""
    lines = data.decode("ascii", "replace").split("\n")
    if len(lines) == 2 and not lines[1]:  # of an older version, or of a gallery in the making
        return lines[0], None
    if len(lines) != 4 or data != _content(lines[0], lines[1]):
        return "", None
    path = unquote_to_bytes(lines[1])
    # A valid checksum proves little, and no writer records such a path.
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
    """Writes the id of a folder of vectors durably.

    Args:
        vectors: the folder.
        folder_id: its id.
        folder: the gallery's; None where it is still to be moved to its place.

    Raises:
        StorageError: the disk refused.
    """
    data = f"{folder_id}\n".encode()
    if folder is not None:
        data = _content(folder_id, quote(os.fsencode(os.path.realpath(folder)), safe="/"))
    try:
        write_durably(vectors / ID_NAME, data, inherit=True, anything=True)
    except OSError as error:
        raise StorageError(f"{printable(vectors / ID_NAME)} cannot be written: {why(error)}.") from error


def place(vectors: Path, folder: Path) -> None:
    """Says where a gallery that was just made will lie, before it is moved there.

    Until the first write there, the file would name the folder that the gallery was made in, or none: a copy
    of the gallery that shares the vectors would not be refused.

    Args:
        vectors: the folder, where it is now.
        folder: the gallery's, where it will be.

    Raises:
        StorageError: the file cannot be read, or the disk refused.
    """
    if folder_id := read_id(vectors):
        write_id(vectors, folder_id, folder)


def settle(folder: Path, vectors: Path, folder_id: str, database: str, *, timeout: float) -> None:
    """Says that a gallery writes to its folder of vectors now, unless that is said already.

    A disk that is full is no reason not to write: whoever deletes needs no room.

    Args:
        folder, vectors, folder_id: the gallery's.
        database: the name of a gallery's database in its folder.
        timeout: seconds to wait for another process that has locked the folder.

    Raises:
        GalleryBusy: the other did not let go in time.
        GalleryError: the folder is another gallery's.
        StorageError: it cannot be read who wrote last.
    """
    with _alone(vectors, timeout):
        known = home(vectors)
        if (other := _sharer(known, folder, vectors, database)) is not None:
            raise shared(folder, vectors, other)
        if known is None or not _is(known / database, folder / database):
            with suppress(StorageError):
                write_id(vectors, folder_id, folder)


@contextmanager
def _alone(vectors: Path, timeout: float) -> Iterator[None]:
    """Keeps the writers of other galleries out, which have other locks; where folders can be locked."""
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
            # Not by closing alone: a process that was forked meanwhile has the descriptor too.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def check_owner(folder: Path, store: Store, *, timeout: float) -> str | None:
    """Whether the folder of vectors is this gallery's; the id for a gallery that has none yet.

    Raises:
        GalleryBusy: another process has locked that folder, and did not let go in time.
        GalleryError: it is not, or another one's too, or it or a model's folder is a symbolic link; or
            the database is another one's too.
    """
    with store.read() as reader:
        known, segments = reader.gallery().folder_id, reader.segments()
        names = [VECTORS, *(generation.folder for generation in reader.generations().values())]
    for name in links(folder, names):
        raise linked(folder, name)
    # SQLite writes into the file, whatever its names are.
    if os.stat(folder / DATABASE).st_nlink > 1:
        raise hard_linked(folder / DATABASE)
    vectors = folder / VECTORS
    found = read_id(vectors)
    if known is not None and found == known:
        settle(folder, vectors, known, DATABASE, timeout=timeout)
        return None
    if known is not None and found is not None:
        raise foreign(folder, vectors)
    if (other := sharer(folder, vectors, DATABASE)) is not None:
        raise shared(folder, vectors, other)
    if not all(_seems_there(folder, segment) for segment in segments):
        if known is not None:
            raise emptied(folder, vectors)
        return None
    # The transaction that named the id in the file may have been lost, and may still come to life.
    given = known or found or new_id()
    if found != given:
        write_id(vectors, given, folder)
    return given if known is None else None


def _seems_there(folder: Path, segment: Segment) -> bool:
    path = segment_path(folder, segment.id)
    return path.is_file() and path.stat().st_size == segment.bytes


def claim(folder: Path, store: Store) -> None:
    """Says that the folder of vectors is this gallery's, where that was lost. Only for the one writer.

    Where the folder has another id, each vector file must be what was written, and no other be there.

    Raises:
        GalleryError: it is another gallery's.
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
    """Those of a gallery's own folders that are symbolic links."""
    return [name for name in names if (folder / name).is_symlink()]


def linked(folder: Path, name: str) -> GalleryError:
    """The refusal to write through a link."""
    return GalleryError(
        f"{printable(folder / name)} is a symbolic link, and a gallery that is written to must hold all its "
        "files itself, or a copy of it would share them; move that folder into the link's place, or link the "
        "whole gallery folder instead."
    )


def hard_linked(database: Path) -> GalleryError:
    """The refusal to write to a database that is in another folder as well, as after `cp -al`."""
    return GalleryError(
        f"{printable(database)} has another name (a hard link), and writing would break the gallery that has "
        f"it; copy {printable(database.parent)} with `cp -a`, without links, and use that copy."
    )


def foreign(folder: Path, vectors: Path) -> GalleryError:
    """The refusal to write into a folder that is not the gallery's."""
    return GalleryError(
        f"{printable(vectors)} is not the folder of vectors that belongs to {printable(folder)}; put the "
        "gallery's own one back, or restore a backup. Galleries are copied whole, or with `faceprint backup` "
        "and `faceprint restore`."
    )


def shared(folder: Path, vectors: Path, other: Path) -> GalleryError:
    """The refusal to write into a folder that two galleries have, as by a bind mount."""
    owner = printable(other)
    return GalleryError(
        f"{printable(vectors)} is also the folder of vectors of the gallery {owner}, and each would delete "
        f"what the other needs; give {printable(folder)} a copy of that folder instead of the same one, or "
        f"use {owner}."
    )


def emptied(folder: Path, vectors: Path) -> GalleryError:
    """The refusal to write where vectors are missing, and nothing says that the folder is the gallery's."""
    gallery = printable(folder)
    return GalleryError(
        f"{printable(vectors)} has neither {ID_NAME} nor all vector files of {gallery}: it may be another "
        "folder, or a disk that is not mounted; put the gallery's own one back, or see what "
        f"`faceprint repair {gallery}` can mend."
    )
