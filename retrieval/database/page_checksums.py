"""Page checksums: one for each page of a gallery's database, so that every flipped byte is detected.

`PRAGMA integrity_check` checks the structure of rows and indexes; it does not see changes of a cell's text or
of the unused parts of a page. `gallery.sums` beside `gallery.db` holds a checksum of each page at one
revision, the WAL included:

    magic, page size, number of pages, revision | BLAKE2b of each page, 8 bytes | SHA-256 of all that

A checkpoint hashes the pages that it copies from the WAL, so it reads no page of the database. Its order of
steps is safe against a crash: frames are copied (the WAL still exists), the checksums are written, the WAL is
truncated. After a crash between these steps, each page that may differ has a frame in the WAL, and
`check_pages` skips it.

SQLite may also copy the WAL itself, when a process was killed and the last connection of another one closes.
Only then does the database without its WAL have a higher revision than the checksums: they are out of date,
which is not damage. A flipped byte cannot imitate this, since the row also holds the negated revision. If the
revision is lower, inconsistent or unreadable, the pages are compared.

Only SQLite opens the database here: closing any descriptor of a file releases all POSIX locks of the process
on it (https://www.sqlite.org/howtocorrupt.html, 2.2), and another process would then delete the WAL that this
one writes to. So the pages are read through SQLite's own descriptor.
"""

import fcntl
import hashlib
import os
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote

from retrieval.errors import GalleryDamaged, StorageError
from retrieval.system.files import is_no_file, make_room, open_plain, sync, why, write_durably

Mode = Literal["PASSIVE", "FULL", "RESTART", "TRUNCATE"]

_HEADER: Final = struct.Struct(">16sIIq")
_MAGIC: Final = b"faceprint sums 1"
_SUM_BYTES: Final = 8
_DIGEST_BYTES: Final = hashlib.sha256().digest_size

# In place of a checksum: the page may be in the middle of a change, so it is not compared.
_UNKNOWN: Final = bytes(_SUM_BYTES)

# https://www.sqlite.org/fileformat2.html#the_write_ahead_log
_WAL_MAGIC: Final = (0x377F0682, 0x377F0683)
_WAL_HEADER: Final = 32
_FRAME_HEADER: Final = 24

_READ_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged file.

    Attributes:
        file: the damaged file.
        pages: the numbers of damaged pages from 1, ascending; empty for the checksums, and if unknown.
        problem: one sentence that says what to do.
    """

    file: Path
    pages: tuple[int, ...]
    problem: str


@dataclass(frozen=True, slots=True)
class PageCheck:
    """The result of `check_pages`.

    Attributes:
        damage: the damaged files; empty without damage.
        compared: the number of pages that were compared with their checksums: all but those in the WAL, and
            those of `begin_change`.
        out_of_date: the checksums are missing, or a process was killed before it wrote them: no page can be
            checked until the next checkpoint. This is not damage.
    """

    damage: tuple[Damage, ...]
    compared: int
    out_of_date: bool


@dataclass(frozen=True, slots=True)
class _Sums:
    """The checksums of all pages at a revision; page 1 has the first 8 bytes of `sums`."""

    page_size: int
    revision: int
    sums: bytes

    def __len__(self) -> int:
        return len(self.sums) // _SUM_BYTES

    def __iter__(self) -> Iterator[bytes]:
        return (self.sums[start : start + _SUM_BYTES] for start in range(0, len(self.sums), _SUM_BYTES))


def sums_path(path: Path) -> Path:
    """Returns the path of the checksums of the database `path`: `gallery.sums` beside `gallery.db`."""
    return path.with_suffix(".sums")


def checkpoint(driver: sqlite3.Connection, path: Path, *, mode: Mode) -> bool:
    """Copies the WAL into the database, and writes the checksums of its pages.

    If the checksums were out of date, the whole database is read. The caller holds the writer lock.

    Args:
        driver: a connection to the database, outside a transaction. All connections of all processes
            have `journal_mode = WAL` and `wal_autocheckpoint = 0`.
        path: the database. Its table `gallery` has one row, with `revision`, which every transaction
            raises, and `revision_check`, which is `-revision`.
        mode: of SQLite's checkpoint; all but PASSIVE wait for readers, up to the connection's busy timeout.

    Returns:
        True if the whole WAL was copied. False if a reader keeps an older snapshot; the checksums are valid
        in both cases.

    Raises:
        StorageError: the disk refused.
        GalleryDamaged: SQLite cannot read the database, or its revision is inconsistent.
    """
    with translated(path):
        known = _usable_sums(path)
        revision = _revision(driver)
        if revision is None:
            raise GalleryDamaged(f"{path} contradicts itself about its revision; restore it from a backup.")
        # Always passive first: only its result gives the number of committed frames in the file.
        _, frames, copied = _checkpoint(driver, "PASSIVE")
        if frames < 0:
            return False
        changed = _sums_in_wal(path, frames)
        if changed is None:
            return False
        updated = _updated(driver, path, known, changed, revision)
        if updated != known:
            write_durably(sums_path(path), _pack(updated), inherit=True, anything=True)
        busy = 0
        if mode != "PASSIVE":
            busy, frames, copied = _checkpoint(driver, mode)
        return not busy and frames == copied


def check_pages(path: Path) -> PageCheck:
    """Compares each page with its checksum, except pages that have a frame in the WAL.

    The caller holds the writer lock. To check all pages, it first calls
    `checkpoint(driver, path, mode="TRUNCATE")`, and keeps that connection open during this call.

    Raises:
        StorageError: a file cannot be read.
    """
    with translated(path):
        # Before the pages: any page that another process copies from the WAL from now on is in this set.
        uncertain = {number for number, _ in _frames(path)}
        with closing(_open_alone(path)) as alone:
            revision = _revision_alone(alone)
            try:
                sums = _read(path)
            except GalleryDamaged as error:
                return PageCheck((Damage(sums_path(path), (), str(error)),), 0, out_of_date=False)
            if sums is None or _is_out_of_date(sums, revision):
                readable = revision is not None or bool(uncertain)
                return PageCheck(() if readable else (_damage(path, ()),), 0, out_of_date=True)
            changed = tuple(_changed_pages(path, sums, uncertain))
        skipped = uncertain | {number for number, one in enumerate(sums, 1) if one == _UNKNOWN}
        compared = len(sums) - sum(number <= len(sums) for number in skipped)
        return PageCheck((_damage(path, changed),) if changed else (), compared, out_of_date=False)


def write_sums(path: Path) -> None:
    """Writes the checksums of the database `path`, which has no WAL and is not written to.

    Raises:
        StorageError: the disk refused.
        GalleryDamaged: the database cannot be read, or its revision is inconsistent.
    """
    with translated(path), closing(_open_alone(path)) as alone:
        revision = _revision_alone(alone)
        if revision is None:
            raise GalleryDamaged(f"{path} contradicts itself about its revision; restore it from a backup.")
        ((page_size,),) = alone.execute("PRAGMA page_size").fetchall()
        sums = b"".join(map(sum_of, _pages(path, page_size)))
        write_durably(sums_path(path), _pack(_Sums(page_size, revision, sums)), inherit=True, anything=True)


def discard(path: Path) -> None:
    """Removes the checksums of the database `path` durably, if they exist.

    To be called under the writer lock before pages change without a higher revision: before VACUUM and
    before a migration. The next checkpoint computes them anew.

    Raises:
        StorageError: the disk refused.
    """
    with translated(path):
        make_room(sums_path(path))
        sums_path(path).unlink(missing_ok=True)
        sync(path.parent)


def pages(path: Path) -> Iterator[bytes]:
    """Yields all pages of the database without its WAL, as they are when each is read.

    Raises:
        StorageError: it cannot be read.
        GalleryDamaged: it is no database.
    """
    with translated(path), closing(_open_alone(path)) as alone:
        ((page_size,),) = alone.execute("PRAGMA page_size").fetchall()
        yield from _pages(path, page_size)


def sums_by_page(path: Path) -> dict[int, bytes | None]:
    """Returns the checksum of each page by its number, None where `begin_change` removed it.

    The result is empty where the checksums are missing or damaged.

    Raises:
        StorageError: the checksums cannot be read.
    """
    known = _intact(path)
    return {number: None if one == _UNKNOWN else one for number, one in enumerate(known or (), 1)}


def begin_change(path: Path, numbers: Iterable[int]) -> None:
    """Removes the checksums of pages that are about to be changed in place, durably.

    To be called under the writer lock, with an empty WAL, for pages that are what was written.
    `end_change` writes the new ones. After a crash before that, these pages are not compared until it is
    called for them, or until they are written.

    Raises:
        StorageError: the disk refused.
    """
    end_change(path, dict.fromkeys(numbers, _UNKNOWN))


def end_change(path: Path, sums: Mapping[int, bytes]) -> None:
    """Writes the checksums of pages that were changed in place, by their numbers, durably.

    Nothing is written where the checksums are missing or damaged: the next checkpoint computes all.

    Raises:
        StorageError: the disk refused.
    """
    known = _intact(path)
    if known is not None:
        changed = _Sums(known.page_size, known.revision, _replaced(known.sums, sums))
        with translated(path):
            write_durably(sums_path(path), _pack(changed), inherit=True, anything=True)


def _intact(path: Path) -> _Sums | None:
    """Returns the stored checksums; None if they are missing or damaged."""
    with translated(path):
        try:
            return _read(path)
        except GalleryDamaged:
            return None


def _replaced(sums: bytes | bytearray, changed: Mapping[int, bytes]) -> bytes:
    """Returns the checksums with some of them replaced; numbers beyond the end are left out."""
    replaced = bytearray(sums)
    for number, value in changed.items():
        if number * _SUM_BYTES <= len(sums):
            replaced[number * _SUM_BYTES - _SUM_BYTES : number * _SUM_BYTES] = value
    return bytes(replaced)


def _updated(
    driver: sqlite3.Connection, path: Path, known: _Sums | None, changed: dict[int, bytes], revision: int
) -> _Sums:
    """Returns the current checksums: the known ones, else those of the file, updated by the WAL."""
    ((page_size,),) = driver.execute("PRAGMA page_size").fetchall()
    ((count,),) = driver.execute("PRAGMA page_count").fetchall()
    if known is None or known.page_size != page_size:
        with closing(_open_alone(path)):
            sums = bytearray().join(map(sum_of, _pages(path, page_size)))
    else:
        sums = bytearray(known.sums)
    del sums[count * _SUM_BYTES :]
    # A page that is added without a frame is a hole: the lock-byte page at 1 GiB, which SQLite never writes.
    sums += sum_of(bytes(page_size)) * (count - len(sums) // _SUM_BYTES)
    return _Sums(page_size, revision, _replaced(sums, changed))


def _changed_pages(path: Path, sums: _Sums, uncertain: set[int]) -> Iterator[int]:
    """Yields the numbers of pages that have changed, are missing, or are in excess."""
    # While a WAL exists, the file may lack pages at its end, or have pages that will be truncated.
    absent = bytes(sums.page_size) if uncertain else b""
    pairs = zip_longest(sums, _pages(path, sums.page_size))
    for number, (expected, page) in enumerate(pairs, 1):
        if number in uncertain or expected == _UNKNOWN or (expected is None and uncertain):
            continue
        if expected != sum_of(absent if page is None else page):
            yield number


def _damage(path: Path, pages: tuple[int, ...]) -> Damage:
    listed = ", ".join(map(str, pages[:8])) + (", ..." if len(pages) > 8 else "")
    where = f"{len(pages)} of its pages ({listed}) are not what was written" if pages else "it cannot be read"
    return Damage(path, pages, f"{path} is damaged: {where}; restore it from a backup.")


# The file of checksums


def _usable_sums(path: Path) -> _Sums | None:
    """Returns the stored checksums; None if the whole database must be read again."""
    try:
        sums = _read(path)
    except GalleryDamaged:
        return None
    if sums is not None:
        with closing(_open_alone(path)) as alone:
            if _is_out_of_date(sums, _revision_alone(alone)):
                return None
    return sums


def _is_out_of_date(sums: _Sums, revision: int | None) -> bool:
    """Returns whether the database without its WAL is newer; an inconsistent revision never is."""
    return revision is not None and revision > sums.revision


def _read(path: Path) -> _Sums | None:
    """Returns the checksums; None if they do not exist or have another format.

    Raises:
        GalleryDamaged: the file is damaged.
    """
    try:
        with open_plain(sums_path(path)) as file:
            data = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        if not is_no_file(error):
            raise
        raise GalleryDamaged(
            f"{sums_path(path)} is damaged ({why(error)}); `faceprint compact {path.parent}` makes it anew."
        ) from error
    if (
        len(data) < _HEADER.size + _DIGEST_BYTES
        or hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]
    ):
        raise GalleryDamaged(
            f"{sums_path(path)} is damaged; `faceprint compact {path.parent}` makes it anew."
        )
    magic, page_size, _, revision = _HEADER.unpack_from(data)
    return _Sums(page_size, revision, data[_HEADER.size : -_DIGEST_BYTES]) if magic == _MAGIC else None


def _pack(sums: _Sums) -> bytes:
    data = _HEADER.pack(_MAGIC, sums.page_size, len(sums), sums.revision) + sums.sums
    return data + hashlib.sha256(data).digest()


def sum_of(page: bytes | bytearray | memoryview) -> bytes:
    """Returns the checksum of a page."""
    return hashlib.blake2b(page, digest_size=_SUM_BYTES).digest()


# The database and its WAL


def _checkpoint(driver: sqlite3.Connection, mode: Mode) -> tuple[int, int, int]:
    """Returns SQLite's result: busy, frames in the WAL (-1: another connection holds it), frames copied."""
    ((busy, frames, copied),) = driver.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
    return busy, frames, copied


def _revision(connection: sqlite3.Connection) -> int | None:
    """Returns the revision that a connection sees; None if it contradicts its negated copy."""
    match connection.execute("SELECT revision, revision_check FROM gallery").fetchmany(2):
        case [(int() as revision, int() as opposite)] if revision == -opposite:
            return revision
    return None


def _revision_alone(alone: sqlite3.Connection) -> int | None:
    """Returns the revision of the database without its WAL; None if it is inconsistent or unreadable."""
    try:
        # In an untrusted database `gallery` may be a view, and reading it could run without end.
        if alone.execute("SELECT type FROM sqlite_master WHERE name = 'gallery'").fetchall() != [("table",)]:
            return None
        return _revision(alone)
    except (sqlite3.Error, UnicodeDecodeError):
        return None


def _open_alone(path: Path) -> sqlite3.Connection:
    """Returns a read-only connection to the database without its WAL, which takes no lock."""
    uri = f"file:{quote(os.fsencode(path.absolute()))}?mode=ro&immutable=1"
    alone = sqlite3.connect(uri, uri=True)
    # A truncated copy is shorter than its first page states; its rows can still be read.
    alone.execute("PRAGMA writable_schema = ON")
    return alone


def _pages(path: Path, page_size: int) -> Iterator[bytes]:
    """Yields the pages of the file while `_open_alone` has it open; the last one may be short."""
    start, step = 0, max(1, _READ_BYTES // page_size) * page_size
    while block := _block(path, step, start):
        whole = len(block) - len(block) % page_size or len(block)
        for offset in range(0, whole, page_size):
            yield block[offset : offset + page_size]
        start += whole


def _block(path: Path, size: int, start: int) -> bytes:
    """Reads through SQLite's own descriptor of the file, which is open as long as its connection."""
    status = path.stat()
    while True:
        descriptor = _sqlite_descriptor(path, status)
        try:
            block = os.pread(descriptor, size, start)
        except OSError:
            if _is_of_sqlite(descriptor, status):
                raise
            continue
        # Another thread may have closed what looked like the descriptor, and opened another file there.
        if _is_of_sqlite(descriptor, status):
            return block


def _sqlite_descriptor(path: Path, status: os.stat_result) -> int:
    """Returns SQLite's own descriptor of the file; SQLite closes it only when no lock is lost by that."""
    for name in os.listdir("/dev/fd"):
        if _is_of_sqlite(int(name), status):
            return int(name)
    raise StorageError(f"{path} cannot be read: /dev/fd does not list this process's open files.")


def _is_of_sqlite(descriptor: int, status: os.stat_result) -> bool:
    """Returns whether a descriptor is one of `_open_alone` for the file with a status."""
    try:
        # Twice: between two calls the number may become that of another file.
        return (
            os.path.samestat(os.fstat(descriptor), status)
            and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            and os.path.samestat(os.fstat(descriptor), status)
        )
    except OSError:  # closed meanwhile, like the descriptor of the listing
        return False


def _sums_in_wal(path: Path, frames: int) -> dict[int, bytes] | None:
    """Returns the checksum of each page in the first `frames` frames of the WAL, as it was written last.

    None if there are fewer: the file was removed by hand, and SQLite still has it open.
    """
    written = [number for number, _ in islice(_frames(path), frames)]
    last = {number: place for place, number in enumerate(written)}
    # Read twice: the pages themselves would take the memory of the whole WAL.
    sums = {
        number: sum_of(page)
        for place, (number, page) in enumerate(islice(_frames(path), frames))
        if last.get(number) == place
    }
    return sums if len(written) == frames and len(sums) == len(last) else None


def _frames(path: Path) -> Iterator[tuple[int, memoryview]]:
    """Yields (page number, page) of each frame in the WAL, oldest first; the last may be uncommitted."""
    with suppress(FileNotFoundError), open_plain(Path(f"{path.resolve()}-wal")) as wal:
        header = wal.read(_WAL_HEADER)
        if len(header) < _WAL_HEADER or int.from_bytes(header[:4], "big") not in _WAL_MAGIC:
            return
        length, salts = _FRAME_HEADER + int.from_bytes(header[8:12], "big"), header[16:24]
        while block := memoryview(wal.read(_READ_BYTES // length * length)):
            for start in range(0, len(block) - length + 1, length):
                frame = block[start : start + length]
                if frame[8:16] != salts:
                    return
                yield int.from_bytes(frame[:4], "big"), frame[_FRAME_HEADER:]


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Translates errors of SQLite and of the operating system into `StorageError` and `GalleryDamaged`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{error.filename or path} cannot be used: {why(error)}.") from error
    except sqlite3.OperationalError as error:
        raise StorageError(f"The database {path} cannot be used: {error}.") from error
    # UnicodeDecodeError: SQLite's message quotes a damaged name, which sqlite3 cannot decode.
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise GalleryDamaged(f"{path} is damaged ({error}); restore it from a backup.") from error
