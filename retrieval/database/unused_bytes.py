"""Unused bytes of a database's pages: they may hold copies of deleted rows, and are zeroed in place.

With `PRAGMA secure_delete` SQLite zeroes what it deletes. When it moves rows between pages, however, it
leaves copies between a page's pointers and its cells
(https://www.sqlite.org/fileformat2.html#b_tree_pages), and later zeroes only the row itself. No statement
reaches these bytes, and `VACUUM` writes the whole database anew to be rid of them: seconds for a million
faces, in which nobody else can write.

So they are zeroed in the file. SQLite never reads them, so that a crash or a torn write on the way is of no
consequence. No other process may write a page meanwhile, or its new cells could be overwritten: the caller
holds SQLite's write lock, and the WAL is empty, so that nobody has a page to copy from it either.
"""

import errno
import fcntl
import os
import sqlite3
import struct
import weakref
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final

from retrieval.database import page_checksums
from retrieval.database.connections import OPENING
from retrieval.errors import StorageError
from retrieval.system.forks import shared_lock

# The kinds of b-tree pages, and the bytes before their pointers.
_HEADERS: Final = {2: 12, 5: 12, 10: 8, 13: 8}
_FIRST_FREE: Final = struct.Struct(">xH")
_CELLS: Final = struct.Struct(">3xHH")

# What a deleted cell begins with: the place of the next one in the page, and its length.
_FREE: Final = struct.Struct(">HH")

# Below it the first byte of all other pages is 0: those of the free list and of long texts begin with the
# number of a page, in 4 bytes.
_MAX_PAGES: Final = 1 << 24

# The least size of a page; the last one of a database that was cut may have less.
_LEAST_PAGE: Final = 512

_READ_BYTES: Final = 1 << 20
# More than the descriptors that SQLite may have kept of closed connections, for the next ones.
_ATTEMPTS: Final = 100

# A page's number, where its unused bytes begin and end in it, and its checksum.
_Gap = tuple[int, int, int, bytes]


class OwnDescriptor:
    """A descriptor of the database that belongs to a connection of its own, so that nobody else closes it.

    The file is not opened otherwise: closing it again would release SQLite's locks on it. While another
    connection has the database open, SQLite keeps the descriptor of each one that is closed, so that all
    users in a process share one (see `shared`).
    """

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self._number = -1
        self._end: Callable[[], object] | None = None

    def number(self) -> int | None:
        """Returns the descriptor, which stays open until `close`; None if there is none."""
        if self._end is not None and not _is_of(self._number, self.path.stat()):
            self.close()  # another file has taken the place of the one that it opened
        if self._end is None:
            self._open()
        return None if self._end is None else self._number

    def _open(self) -> None:
        with ExitStack() as others:
            for _ in range(_ATTEMPTS):
                with OPENING:
                    before = _descriptors(self.path)
                    connection = sqlite3.connect(self.path, check_same_thread=False)
                    opened = _descriptors(self.path) - before
                if len(opened) == 1:
                    self._number, self._end = opened.pop(), weakref.finalize(self, connection.close)
                    return
                # It took a descriptor that SQLite had kept, or the number of one that was closed just then.
                others.enter_context(closing(connection))

    def close(self) -> None:
        """Closes the connection, as the end of the object does; the next `number` opens another one."""
        if self._end is not None:
            self._end()
            self._end = None


_SHARED: Final = weakref.WeakValueDictionary[str, OwnDescriptor]()
_SHARING: Final = shared_lock()


def shared(path: Path) -> OwnDescriptor:
    """Returns the descriptor of all in this process that have the database open; it ends with the last."""
    with _SHARING:
        # Not the path as it was spelled: a link in it, or the working directory, may lead elsewhere later.
        real = os.path.realpath(path)
        return _SHARED.setdefault(real, OwnDescriptor(Path(real)))


def zero(driver: sqlite3.Connection, own: OwnDescriptor) -> bool:
    """Zeroes the unused bytes of all pages, durably, and writes down the new checksums of these pages.

    Connections may have such pages in memory, and would write them back: the transaction must change a row
    afterwards, which makes them read all pages anew.

    Args:
        driver: a connection to the database that has just begun a write transaction. `secure_delete` was on
            in all connections that ever wrote to it.
        own: of the same database.

    Returns:
        False, and nothing was changed, where it cannot be done this way, and only `VACUUM` is left.

    Raises:
        StorageError: the disk refused, or a page is damaged; a part may have been done.
    """
    with page_checksums.translated(own.path):
        ((page_size,),) = driver.execute("PRAGMA page_size").fetchall()
        ((pages,),) = driver.execute("PRAGMA page_count").fetchall()
        # With auto_vacuum there are pages of another kind, which may begin as those of a b-tree do.
        ((moves,),) = driver.execute("PRAGMA auto_vacuum").fetchall()
        log = own.path.with_name(f"{own.path.name}-wal")
        descriptor = own.number()
        empty = not (log.exists() and log.stat().st_size > 0)
        if moves or pages >= _MAX_PAGES or not empty or descriptor is None:
            return False
        _zero_pages(descriptor, own.path, page_size, pages)
        # Pages in the memory of the transaction's connection are from before.
        driver.execute("PRAGMA shrink_memory")
        return True


def share(path: Path) -> float:
    """Returns how much of the database `VACUUM` could save, 0 to 1: an estimate, without what is in the WAL.

    Raises:
        StorageError: the database cannot be read.
        GalleryDamaged: it is no database.
    """
    unused = size = 0
    for page in page_checksums.pages(path):
        size += len(page)
        if page == bytes(len(page)):
            unused += len(page)  # of the free list
        elif page[0] in _HEADERS and len(page) >= _LEAST_PAGE:
            unused += _unused(page)
    return unused / size if size else 0.0


def _unused(page: bytes) -> int:
    """Returns the unused bytes of a page of a b-tree: before its cells, and those of deleted cells."""
    header = _HEADERS[page[0]]
    cells, end = _CELLS.unpack_from(page)
    unused: int = max(0, (end or 65536) - header - 2 * cells) + page[7]
    (at,) = _FIRST_FREE.unpack_from(page)
    # A list by rising places; a damaged page may have another, which must not be followed for ever.
    while 0 < at <= len(page) - 4:
        following, length = _FREE.unpack_from(page, at)
        unused += length
        at = following if following > at else 0
    return min(unused, len(page))


def _descriptors(path: Path) -> set[int]:
    """Returns this process's descriptors of a file that can write, all of them SQLite's."""
    status = path.stat()
    return {int(name) for name in os.listdir("/dev/fd") if _is_of(int(name), status)}


def _is_of(descriptor: int, status: os.stat_result) -> bool:
    """Returns whether a descriptor can write to the file with a status."""
    try:
        same = os.path.samestat(os.fstat(descriptor), status)
        return same and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    except OSError:  # closed meanwhile, like the descriptor of the listing
        return False


def _zero_pages(descriptor: int, path: Path, page_size: int, pages: int) -> None:
    former = page_checksums.sums_by_page(path)
    # An earlier call was killed, or the disk failed: it is not known which of their bytes are on the disk.
    unsure = {number for number, one in former.items() if one is None and number <= pages}
    gaps = dict.fromkeys(unsure, (0, 0))
    damaged = set()
    for number, start, end, checksum in _gaps(descriptor, path, page_size, pages, unsure):
        gaps[number] = start, end
        if former.get(number) not in (None, checksum):
            damaged.add(number)
    if not gaps:
        return
    # Somebody else changed a damaged page: it keeps the checksum that says so.
    page_checksums.begin_change(path, gaps.keys() - damaged)
    sums = {}
    for number, (start, end) in gaps.items():
        offset = (number - 1) * page_size
        page = bytearray(os.pread(descriptor, page_size, offset))
        page[start:end] = bytes(end - start)
        if os.pwrite(descriptor, page[start:end], offset + start) < end - start:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
        if number not in damaged:
            sums[number] = page_checksums.sum_of(page)
    os.fsync(descriptor)
    page_checksums.end_change(path, sums)


def _gaps(descriptor: int, path: Path, page_size: int, pages: int, unsure: Set[int]) -> Iterator[_Gap]:
    """Yields the unused bytes that are not zero, and all of some pages.

    The first page has the schema, and nothing of a person.

    Raises:
        StorageError: a page is so damaged that they are unknown, or it is not there.
    """
    zeros, step = bytes(page_size), max(1, _READ_BYTES // page_size)
    for first in range(0, pages, step):
        count = min(step, pages - first)
        block = os.pread(descriptor, count * page_size, first * page_size)
        if len(block) < count * page_size:
            raise StorageError(f"{path} is damaged: it ends too early; restore it from a backup.")
        for index in range(1 if first == 0 else 0, count):
            at = index * page_size
            header = _HEADERS.get(block[at])
            if header is None:
                continue
            number = first + index + 1
            cells, end = _CELLS.unpack_from(block, at)
            start, end = header + 2 * cells, end or 65536
            is_known = start <= end <= page_size
            if is_known and block[at + start : at + end] == zeros[: end - start] and number not in unsure:
                continue
            # In a damaged page what it uses may be in there: SQLite reads by the places alone.
            if not is_known or any(place < end for place in _places(block, at, header, cells)):
                raise StorageError(f"page {number} of {path} is damaged; restore it from a backup.")
            yield number, start, end, page_checksums.sum_of(block[at : at + page_size])


def _places(block: bytes, at: int, header: int, cells: int) -> tuple[int, ...]:
    """Returns the places of a page's cells, and that of the first deleted cell if there is any."""
    (deleted,) = _FIRST_FREE.unpack_from(block, at)
    places = struct.unpack_from(f">{cells}H", block, at + header)
    return (*places, deleted) if deleted else places
