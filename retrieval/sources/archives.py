"""Archives: reads the files in a tar or zip in memory, for `photos`; nothing is extracted to disk.

A tar is read from its beginning to its end without seeking, so it may be a pipe. The compression is detected
from the first bytes; the file name only tells that a file is a tar or a zip.
"""

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, Final, TypeAlias, cast

from retrieval.errors import Reason, UnreadableImage
from retrieval.images.pixels import MAX_BYTES
from retrieval.sources.exclusion import Exclusion, PassedOver
from retrieval.system.archive_paths import inside, kind

_OPENERS_BY_MAGIC: Final = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open))

# Headers of tar that only hold a long name or attributes for the next header.
_HEADER_ONLY_TYPES: Final = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_MAX_HEADER_BYTES: Final = 2**20

# The limit against archive bombs: all members together may have 128 MiB, plus 200 bytes per byte of the
# archive. A kilobyte of bzip2 may hold gigabytes, but photos are compressed already.
_UNPACKED_ALLOWANCE_BYTES: Final = 128 * 2**20
_MAX_EXPANSION: Final = 200
# Consecutive zero bytes, as padding of concatenated archives. tarfile reads each 512 of them as a header.
_MAX_ZERO_BYTES: Final = 16 * 2**20
_BOMB_DETAIL: Final = f"it unpacks to more than {_MAX_EXPANSION} times its own bytes"

_LINK_DETAIL: Final = "it is a link inside an archive, and only the file itself is taken"
_TOO_LARGE_DETAIL: Final = f"it has more than {MAX_BYTES:,} bytes, which is the limit"


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive.

    Attributes:
        name: its path in the archive, as `inside` returns it; empty for a problem of the archive itself.
        content: its bytes; None where there is a problem.
        problem, detail: why it cannot be read.
    """

    name: str
    content: bytes | None = None
    problem: Reason | None = None
    detail: str | None = None


def members(
    name: str,
    opened: Callable[[], BinaryIO],
    *,
    exclusion: Exclusion = Exclusion(),
    passed_over: PassedOver | None = None,
) -> Iterator[Member]:
    """Returns the files of an archive, those of a tar in its order, those of a zip sorted by name.

    One member is in memory at a time, none of more than `MAX_BYTES`. Folders and system files are passed
    over. Links, devices and unreadable members have a `problem`. A damaged archive ends with one Member that
    has an empty name and a problem: the members of a tar before the damage are returned; a zip without the
    list of contents at its end gives none.

    Args:
        name: of the archive; its suffix tells whether it is a tar or a zip.
        opened: opens the archive for reading; a zip must be seekable.
        exclusion: selects what is passed over, as in a folder (see `folders.walk`).
        passed_over: counts the files that are passed over.
    """
    try:
        file = opened()
    except UnreadableImage as error:
        yield Member("", None, error.reason, error.detail)
        return
    except OSError as error:
        denied = isinstance(error, PermissionError)
        reason = Reason.NO_PERMISSION if denied else Reason.IO_ERROR
        yield Member("", None, reason, f"the archive cannot be opened: {error.strerror or error}")
        return
    with file:
        found = _tar_members if kind(name) == "tar" else _zip_members
        yield from found(file, _MemberFilter(exclusion, passed_over))


@dataclass(frozen=True, slots=True)
class _MemberFilter:
    """Decides by its name whether a member is taken; counts those that are passed over."""

    exclusion: Exclusion
    passed_over: PassedOver | None

    def __call__(self, name: str) -> bool:
        rule = self.exclusion.rule_of_member(name) if name else None
        if rule is not None and self.passed_over is not None:
            self.passed_over.add_file(rule)
        return bool(name) and rule is None


def on_disk(path: str) -> BinaryIO:
    """Opens an archive on this machine; for a pipe, waits until a writer opens it."""
    return open(path, "rb")


class Shelf:
    """Reads members of archives on disk by path. The archive read last stays open for the next call."""

    def __init__(self) -> None:
        self._opened: _Opened | None = None

    def read(self, archive: str, name: str) -> bytes:
        """Returns the bytes of a member.

        Raises:
            UnreadableImage: the archive or the member is missing, damaged or too large.
        """
        try:
            return self._archive(archive).read(name)
        except UnreadableImage:
            raise
        except KeyError as error:
            raise UnreadableImage(Reason.MISSING, "there is no such file in the archive") from error
        except Exception as error:
            raise UnreadableImage(Reason.DAMAGED, f"its archive cannot be read: {_message(error)}") from error

    def has(self, archive: str, name: str) -> bool:
        """Returns whether an archive has a member; True too where the archive cannot be read."""
        try:
            return self._archive(archive).has(name)
        except Exception:
            # Damaged, no permission, not an archive: none of these shows that the member is gone.
            return True

    def close(self) -> None:
        """Closes the open archive, if there is one."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def __enter__(self) -> "Shelf":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _archive(self, path: str) -> "_Opened":
        if self._opened is None or self._opened.path != path:
            self.close()
            self._opened = _ZipFile(path) if kind(path) == "zip" else _TarFile(path)
        return self._opened


# tar


class _Damage(tarfile.ReadError):
    """A damaged archive, such as one with an invalid header, which tarfile would take for the end."""


class _Header(tarfile.TarInfo):
    """A header. Each archive gets its own subclass, which counts consecutive zero bytes read as headers."""

    zeros = 0

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        if not any(buf):
            cls.zeros += len(buf)
            if cls.zeros > _MAX_ZERO_BYTES:
                raise _Damage(f"it has more than {_MAX_ZERO_BYTES:,} zeros in a row")
            return super().frombuf(buf, encoding, errors)  # the end mark, or padding before it
        cls.zeros = 0
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise _Damage(str(error)) from error
        if header.size < 0 or (header.type in _HEADER_ONLY_TYPES and header.size > _MAX_HEADER_BYTES):
            raise _Damage("a header with a hostile size")
        return header


class _Counted(io.RawIOBase):
    """A file that counts the bytes that were read from it, in `count`; bytes read twice count twice."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.count = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self.count += len(data)
        return data

    def seek(self, place: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()


class _Tail(io.RawIOBase):
    """The uncompressed bytes of a tar. Keeps the last block that was read: a complete tar ends with zeros.

    Reading raises `_Damage` where the bytes exceed the limit for an archive of this size.
    """

    def __init__(self, file: BinaryIO, packed: _Counted | None) -> None:
        self._file = file
        self._packed = packed
        self._last = b""
        self._count = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self._last = (self._last + data)[-tarfile.BLOCKSIZE :]
        self._count += len(data)
        if (
            self._packed is not None
            and self._count > _UNPACKED_ALLOWANCE_BYTES + _MAX_EXPANSION * self._packed.count
        ):
            raise _Damage(_BOMB_DETAIL)
        return data

    def seek(self, place: int, whence: int = os.SEEK_SET, /) -> int:
        self._last = b""
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()

    def ends_well(self) -> bool:
        return self._last == bytes(tarfile.BLOCKSIZE)


def _tar_members(file: BinaryIO, taken: _MemberFilter) -> Iterator[Member]:
    tail: _Tail | None = None
    tar: tarfile.TarFile | None = None
    found = 0
    while True:
        member = None
        try:
            if tar is None or tail is None:
                tail = _Tail(*_decompressed(file))
                tar = _open_tar(tail, "r|")
            info = _next(tar)
            if info is not None:
                member = _tar_member(tar, info, taken)
            elif not tail.ends_well():
                raise _Damage("it has no end mark, so it may have been cut")
        except Exception as error:
            # A parser may raise any exception for hostile bytes; one bad archive must never end a run.
            detail = f"the archive is damaged after {found:,} files: {_message(error)}"
            yield Member("", None, Reason.DAMAGED, detail)
            return
        if info is None:
            return
        if member is not None:
            found += 1
            yield member


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo, taken: _MemberFilter) -> Member | None:
    name = inside(info.name)
    if info.isdir() or not taken(name):
        return None
    if info.issym() or info.islnk():
        return Member(name, None, Reason.NOT_A_FILE, _LINK_DETAIL)
    if not info.isreg():
        return Member(name, None, Reason.NOT_A_FILE, "it is not a regular file")
    if info.size > MAX_BYTES:
        return Member(name, None, Reason.TOO_MANY_BYTES, _TOO_LARGE_DETAIL)
    content = cast(Any, tar.extractfile(info)).read()
    if len(content) != info.size:
        raise _Damage("unexpected end of data")
    return Member(name, content)


def _decompressed(file: BinaryIO) -> tuple[BinaryIO, _Counted | None]:
    """Returns the uncompressed bytes of a tar, and the count of compressed ones; None if not compressed."""
    buffered = file if hasattr(file, "peek") else io.BufferedReader(cast(io.RawIOBase, file))
    head = cast(Any, buffered).peek(6)
    for magic, decompress in _OPENERS_BY_MAGIC:
        if head.startswith(magic):
            packed = _Counted(buffered)
            return cast(BinaryIO, decompress(cast(BinaryIO, packed))), packed
    return buffered, None


def _open_tar(file: Any, mode: Any) -> tarfile.TarFile:
    # ignore_zeros reads all of several concatenated archives, and a pipe to its end.
    header = type("_ArchiveHeader", (_Header,), {})
    return tarfile.open(fileobj=file, mode=mode, tarinfo=header, ignore_zeros=True, encoding="utf-8")


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    info = tar.next()
    # Otherwise tarfile keeps every member in memory.
    cast(Any, tar).members = []
    return info


class _TarFile:
    """A seekable tar with an index of where each file begins. Indexing reads a compressed tar to its end."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = on_disk(path)
        try:
            self._data, packed = _decompressed(self._file)
            self._offsets = dict(_offsets(self._data, packed))
        except BaseException:
            self._file.close()
            raise

    def has(self, name: str) -> bool:
        return inside(name) in self._offsets

    def read(self, name: str) -> bytes:
        start, size = self._offsets[inside(name)]
        if size > MAX_BYTES:
            raise UnreadableImage(Reason.TOO_MANY_BYTES, _TOO_LARGE_DETAIL)
        self._data.seek(start)
        return self._data.read(size)

    def close(self) -> None:
        self._data.close()
        self._file.close()


def _offsets(data: BinaryIO, packed: _Counted | None) -> Iterator[tuple[str, tuple[int, int]]]:
    """Returns (name, (offset, size)) of each regular file of a tar, in uncompressed bytes."""
    tail = _Tail(data, packed)
    with closing(_open_tar(tail, "r:")) as tar:
        before = -1
        while (info := _next(tar)) is not None:
            if info.offset <= before:
                raise _Damage("headers that lead back")
            before = info.offset
            if info.isreg() and not info.issparse():
                yield inside(info.name), (info.offset_data, info.size)
        # A truncated tar does not show that a member it lacks is gone.
        if not tail.ends_well():
            raise _Damage("it has no end mark, so it may have been cut")


# zip


def _zip_members(file: BinaryIO, taken: _MemberFilter) -> Iterator[Member]:
    try:
        archive = zipfile.ZipFile(file)
        listed = sorted(((_zip_name(info), info) for info in archive.infolist()), key=lambda one: one[0])
    except Exception as error:
        yield Member("", None, Reason.DAMAGED, f"the archive is damaged: {_message(error)}")
        return
    with archive:
        left = _UNPACKED_ALLOWANCE_BYTES + _MAX_EXPANSION * file.seek(0, os.SEEK_END)
        for name, info in listed:
            if info.is_dir() or not taken(name):
                continue
            left -= min(info.file_size, MAX_BYTES)
            if left < 0:
                # Members may overlap, so that a small file declares far more bytes than it has.
                yield Member("", None, Reason.DAMAGED, f"the archive is damaged: {_BOMB_DETAIL}")
                return
            yield _zip_member(archive, info, name)


def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Member:
    try:
        return Member(name, _zip_content(archive, info))
    except UnreadableImage as error:
        return Member(name, None, error.reason, error.detail)


def _zip_content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    file_type = stat.S_IFMT(info.external_attr >> 16)
    if file_type not in (0, stat.S_IFREG):
        link = file_type == stat.S_IFLNK
        raise UnreadableImage(Reason.NOT_A_FILE, _LINK_DETAIL if link else "it is not a regular file")
    if info.flag_bits & 1:
        raise UnreadableImage(Reason.UNSUPPORTED_FORMAT, "it is encrypted; unpack the archive first")
    if info.file_size > MAX_BYTES:
        raise UnreadableImage(Reason.TOO_MANY_BYTES, _TOO_LARGE_DETAIL)
    try:
        with archive.open(info) as file:
            # A member that unpacks to more than its declared size is cut there, and fails its checksum.
            return file.read(MAX_BYTES)
    except NotImplementedError as error:
        raise UnreadableImage(
            Reason.UNSUPPORTED_FORMAT,
            "it is compressed in a way that we do not read; unpack the archive first",
        ) from error
    except Exception as error:
        raise UnreadableImage(
            Reason.DAMAGED, f"its data in the archive are damaged: {_message(error)}"
        ) from error


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Returns a member's name; many programs write UTF-8 without its flag, which zipfile decodes as cp437."""
    if info.flag_bits & 0x800:
        return inside(info.filename)
    try:
        return inside(info.filename.encode("cp437").decode())
    except UnicodeError:
        return inside(info.filename)


class _ZipFile:
    """A zip on disk, with the index that its list of contents gives."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._archive = zipfile.ZipFile(path)
        self._infos = {_zip_name(info): info for info in self._archive.infolist()}

    def has(self, name: str) -> bool:
        return inside(name) in self._infos

    def read(self, name: str) -> bytes:
        return _zip_content(self._archive, self._infos[inside(name)])

    def close(self) -> None:
        self._archive.close()


_Opened: TypeAlias = _TarFile | _ZipFile


def _message(error: Exception) -> str:
    """Returns the message of a library's exception, in at most 200 characters, as the end of a sentence."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
