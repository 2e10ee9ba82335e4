"""Files that are complete or absent after a crash, a full disk or a power loss.

Whatever is opened for writing, made or deleted goes through here, by three rules. A symbolic link is never
followed: it is replaced or removed itself. What is made is readable by its owner only, whatever the umask,
unless the folder of ours that it lies in is shared. What is in the making is locked by its process, so that
the next one can tell what a killed one left, and removes it.
"""

import errno
import fcntl
import grp
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Final

from retrieval.errors import FaceprintError

# How much older than its reading a file's time must be to be trusted, in nanoseconds. A file that is written
# right after it was read may keep its time, which some file systems count in steps of 2 seconds.
_SETTLED_NANOSECONDS: Final = 3 * 10**9

_PRIVATE_MODE: Final = 0o700
# What `shared=True` makes of a folder. The set-group-ID bit gives new files the folder's group, whoever makes
# them, so that `chgrp -R` is enough to share a gallery with another group.
_SHARED_MODE: Final = 0o2750

# What a file system without Unix modes (FAT, some network shares) says to fchmod.
_MODES_UNSUPPORTED: Final = frozenset(
    {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
)

# Nothing is there, or something else than a file.
_NO_FILE_ERRORS: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO})
# What is wrong with a given path: that, or it is not allowed.
_PATH_ERRORS: Final = _NO_FILE_ERRORS | {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM}

# What stands in the place of a file, by the type bits of its mode.
_KINDS_BY_TYPE_BITS: Final = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# Linux: opened by these names, a file is opened anew, and at its beginning.
_DESCRIPTORS: Final = Path("/proc/self/fd")

# In a temporary folder, the file that its process keeps locked; other versions had "bundle" and no lock.
_LOCK_NAME: Final = ".faceprint-lock"
_WHOLE: Final = "whole"
_UNLOCKED: Final = frozenset({_WHOLE, "bundle"})
# What is put behind a prefix, by this version and by older ones.
_RANDOM_SUFFIX: Final = "[a-z0-9_]{8}"


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when a file is written: its size in bytes, the time in ns, the number of its inode."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        """That of a file, by its status."""
        # Inodes have 64 bits without a sign, and databases have them with one.
        inode = (status.st_ino + 2**63) % 2**64 - 2**63
        return cls(status.st_size, status.st_mtime_ns, inode)

    def settled(self, now_ns: int) -> bool:
        """Whether a file that has changed since `now_ns` must have another stamp."""
        return self.mtime_ns < now_ns - _SETTLED_NANOSECONDS


def create(path: Path, *, inherit: bool = False) -> BinaryIO:
    """Opens a new file for writing, in place of what has its name; of a symbolic link the link is removed.

    The file is locked until it is closed. What a killed process left under this name is replaced; what a
    living one is writing is not.

    Args:
        path: of the file, such as the temporary name of one that is replaced afterwards.
        inherit: who may read and write the folder may read and write the file. Otherwise only its owner may.

    Raises:
        BlockingIOError: another process, or another thread, has the file open here.
        OSError: the disk refused, or a folder has this name.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            _remove_abandoned_file(path)
            continue
        try:
            if _is_locked(descriptor) is not False and _is_at(path, descriptor):
                _set_mode(descriptor, _of_folder(path.parent) & 0o666 if inherit else 0o600)
                return open(descriptor, "wb")
        except BaseException:
            os.close(descriptor)
            raise
        # Another process took it for abandoned before it was locked.
        os.close(descriptor)


def open_or_create(path: Path, *, inherit: bool = False) -> int:
    """Opens a file for reading and writing, made if it is not there; never through a symbolic link.

    Args:
        path: of the file.
        inherit: as of `create`, for a file that is made now.

    Returns:
        The descriptor, which is the caller's to close.

    Raises:
        OSError: the disk refused; ELOOP for a link.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        with suppress(FileNotFoundError):
            return os.open(path, flags)
        with suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            _set_mode(descriptor, _of_folder(path.parent) & 0o666 if inherit else 0o600)
            return descriptor


def make_folder(
    path: Path, *, like: Path | None = None, shared: bool = False, exist_ok: bool = False
) -> None:
    """Makes a folder for its owner only, whatever the umask.

    Args:
        path: of the folder; the one above it is there.
        like: who may read and write this folder may read and write the new one.
        shared: the group may read it, and whatever is made in it with `inherit`.
        exist_ok: take one that is there, as it is; a link to one is refused.

    Raises:
        FileExistsError: something is there.
        OSError: the disk refused.
    """
    try:
        os.mkdir(path, _PRIVATE_MODE)
    except FileExistsError as error:
        if path.is_symlink():
            error.strerror = "A symbolic link is in its place"
        if not exist_ok or path.is_symlink() or not path.is_dir():
            raise
        return
    _set_folder_mode(path, _SHARED_MODE if shared else _PRIVATE_MODE if like is None else _of_folder(like))


def make_output_folder(path: Path) -> None:
    """Makes a folder that somebody named for results, and those above it, or takes an empty one.

    Either is its owner's only. A folder with anything in it stays as it is.

    Raises:
        OSError: the disk refused, or a file has this name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error
    if not path.is_dir():
        make_folder(path)
    elif not any(path.iterdir()):
        _set_folder_mode(path.resolve(), _PRIVATE_MODE)


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it, if it is there; of a link the link itself.

    Raises:
        OSError: the disk refused.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def other_than_file(path: Path) -> str | None:
    """What is there instead of a plain file: "a folder", "a pipe", ...; links are followed.

    None where a plain file is there, or nothing, or where that cannot be told.
    """
    with suppress(OSError):
        return _KINDS_BY_TYPE_BITS.get(stat.S_IFMT(os.stat(path).st_mode))
    return None


def open_plain(path: Path) -> BufferedReader:
    """Opens a plain file for reading, and nothing else: a pipe would be waited for.

    Raises:
        OSError: it cannot be opened; `is_no_file` where nothing is there, or something else.
    """
    if (other := other_than_file(path)) is not None:
        number = errno.EISDIR if other == "a folder" else errno.ENXIO
        raise OSError(number, f"It is {other}, not a file", os.fspath(path))
    return open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")


def open_file_or_pipe(path: Path) -> BufferedReader:
    """Opens a plain file or a pipe for reading, and nothing else: /dev/zero has no end.

    Raises:
        OSError: it cannot be opened; `is_no_file` where nothing is there, or something else.
    """
    if other_than_file(path) == "a pipe":
        return open(path, "rb")
    return open_plain(path)


@contextmanager
def path_in_utf8(path: Path) -> Iterator[str]:
    """A path of a plain file for libraries that take UTF-8 alone, until the with statement ends.

    FAISS, onnxruntime, safetensors and pyarrow encode a path as UTF-8, whatever the bytes of its name are. Of
    a path that is other bytes they get that of an open descriptor, which they can map as any other.

    Raises:
        OSError: it has to be opened and cannot be.
    """
    if _is_same_in_utf8(path) or not _DESCRIPTORS.is_dir():
        yield os.fspath(path)
        return
    with open_plain(path) as file:
        yield os.fspath(_DESCRIPTORS / str(file.fileno()))


def _is_same_in_utf8(path: Path) -> bool:
    try:
        return os.fsencode(path) == os.fspath(path).encode()
    except UnicodeEncodeError:
        return False


def make_room(path: Path) -> None:
    """Removes what is in the place of a file of ours and is none; a file, and a link to one, stay.

    Raises:
        OSError: the disk refused, or it is a folder with files in it, which are not ours to remove.
    """
    if not path.is_symlink() and path.is_dir():
        try:
            path.rmdir()
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                error.strerror = "It is a folder with files in it, which has to be moved away"
            raise
    elif other_than_file(path) is not None:
        path.unlink()


@contextmanager
def replacing(path: Path, *, inherit: bool = False, anything: bool = False) -> Iterator[BinaryIO]:
    """A file that replaces `path`, durably, when the with statement ends without an error.

    Args:
        path: of the file. Of a link the link is replaced, not what it leads to; a pipe or a device is
            refused, and so is a link to one, such as /dev/stdout.
        inherit: as of `create`.
        anything: the file is one of ours in a folder of ours: a pipe, a device or an empty folder that
            has its name is replaced too.

    Raises:
        OSError: the disk refused; the file is then what it was before, or, when only the folder could
            not be made durable, already the new one.
    """
    if not anything and _is_special(path):
        raise OSError(errno.EINVAL, "It is a pipe or a device, not a file", os.fspath(path))
    temporary = path.with_name(f".{path.name}.part")
    with create(temporary, inherit=inherit) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if anything:
                make_room(path)
            # Before it is closed and unlocked: another process might take it for abandoned.
            os.replace(temporary, path)
        except BaseException:
            # The first error tells more than one of clearing up; the next writing removes it.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    sync(path.parent)


def write_durably(path: Path, data: bytes, *, inherit: bool = False, anything: bool = False) -> None:
    """Writes a file whole or not at all: temporary file, fsync, rename, fsync of the folder.

    Args:
        path, inherit, anything: as of `replacing`.
        data: all of the file.

    Raises:
        OSError: the disk refused; the file is then what it was before, or, when only the folder could
            not be made durable, already the new one.
    """
    with replacing(path, inherit=inherit, anything=anything) as file:
        file.write(data)


def copy_durably(source: Path, target: Path, *, inherit: bool = False) -> None:
    """Copies a file's bytes into a new file, and makes them durable; the folder's entry is the caller's.

    Raises:
        OSError: the disk refused.
    """
    with open_plain(source) as original, create(target, inherit=inherit) as copy:
        shutil.copyfileobj(original, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())


def who_else_reads(folder: Path) -> str | None:
    """A sentence about who beside the owner can read files in a folder; None where that is nobody.

    It is None too where a group can that the folder is shared with on purpose: it has the set-group-ID bit.

    Raises:
        OSError: the folder cannot be read.
    """
    status = os.stat(folder)
    allowed = _readers(folder, 0o044)
    alone = f"`chmod -R go-rwx {folder}` makes it yours alone"
    if allowed & 0o004:
        return f"{folder} can be read by every user who can reach it; {alone}."
    if allowed and not status.st_mode & stat.S_ISGID:
        group = _group_name(status.st_gid)
        return f"{folder} can be read by the group {group}; {alone}, `chmod g+s {folder}` marks it as shared."
    return None


def _readers(path: Path, allowed: int) -> int:
    """The read bits, of those `allowed`, that a file or some file below a folder has."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        return status.st_mode & allowed
    # Only who may enter a folder can read what is in it.
    allowed &= (status.st_mode & 0o011) << 2
    found = 0
    for inside in os.listdir(path) if allowed else ():
        with suppress(OSError):  # removed meanwhile, or another user's
            found |= _readers(path / inside, allowed)
    return found


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, survive the loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def why(error: OSError) -> str:
    """The operating system's words for an error, as the end of a sentence."""
    return (error.strerror or str(error)).lower()


def why_not_written(folder: Path) -> str | None:
    """Why nothing can be written to a folder, as the end of a sentence; None where something can.

    Raises:
        OSError: there is no such folder.
    """
    if os.access(folder, os.W_OK):
        return None
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return "it is on a read-only file system; mount that for writing, or copy the gallery to another disk"
    return os.strerror(errno.EACCES).lower()


def is_no_file(error: OSError) -> bool:
    """Whether an error says that nothing is there, or something else than a file."""
    return error.errno in _NO_FILE_ERRORS


def is_about_path(error: OSError) -> bool:
    """Whether an error is about what was named; any other (disk, memory, open files) is the machine's."""
    return error.errno in _PATH_ERRORS


def is_free(folder: Path) -> bool:
    """Whether a folder can be made there: nothing is there, or an empty folder."""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def whole_folder(target: Path, *, like: Path | None = None, shared: bool = False) -> Iterator[Path]:
    """A new folder that becomes `target` when everything in it is there, or never exists.

    The files in it are the caller's to make durable. What killed processes left beside `target` when they
    made it is removed first.

    Args:
        target: of the folder; those above it are made.
        like, shared: as of `make_folder`.

    Raises:
        FileExistsError: `target` is there and is not an empty folder.
        OSError: the disk refused.
    """
    taken = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
    if not is_free(target):
        raise taken
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent, f".{target.name}-") as temporary:
        made = temporary / _WHOLE
        make_folder(made, like=like, shared=shared)
        with _called(made, target):
            yield made
        sync(made)
        try:
            with suppress(FileNotFoundError):
                # Renaming onto a folder takes an empty one.
                target.rmdir()
            os.rename(made, target)
        except OSError as error:
            raise error if is_free(target) else taken from error
    sync(target.parent)


@contextmanager
def _called(made: Path, target: Path) -> Iterator[None]:
    """Lets errors about what is in a folder name the one that it becomes, which the user knows."""

    def renamed(said: object) -> object:
        return said.replace(os.fspath(made), os.fspath(target)) if isinstance(said, str) else said

    try:
        yield
    except OSError as error:
        error.filename = renamed(error.filename)
        raise
    except FaceprintError as error:
        error.args = tuple(map(renamed, error.args))
        raise


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new private folder, named `prefix` and 8 characters, that is gone when the with statement ends.

    Where a process is killed its folder stays, until the next one asks for a folder of the same name: whether
    a folder is in use is told by a lock in it. On a file system without locks none is removed.

    Raises:
        OSError: the disk refused.
    """
    remove_abandoned(parent, prefix)
    folder, descriptor = _locked_folder(parent, prefix)
    try:
        yield folder
    finally:
        # What cannot be removed now is abandoned, and the next one tries again.
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes the temporary folders of processes that were killed, as far as this user may.

    Raises:
        OSError: `parent` cannot be listed.
    """
    for folder in _candidates(parent, prefix):
        # Gone meanwhile, or on a file system that cannot lock: then nobody can tell whether it is in use.
        with suppress(OSError):
            descriptor = _claimed(folder)
            if descriptor is not None:
                try:
                    remove(folder)
                finally:
                    os.close(descriptor)


def abandoned(parent: Path, prefix: str) -> list[Path]:
    """The temporary folders of processes that were killed: what `remove_abandoned` would remove.

    Raises:
        OSError: `parent` cannot be listed.
    """
    return [folder for folder in _candidates(parent, prefix) if not _in_use(folder)]


def try_lock(descriptor: int) -> bool:
    """Locks an open file for this descriptor alone, without waiting; False where another one has it.

    The operating system drops the lock when the descriptor is closed, however its process ends.

    Raises:
        OSError: the file system cannot lock files.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


def _is_locked(descriptor: int) -> bool | None:
    """`try_lock`; None where the file system cannot lock."""
    try:
        return try_lock(descriptor)
    except OSError:
        return None


def _is_special(path: Path) -> bool:
    """Whether something is there that is neither a file nor a folder, links followed."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a name is still that of an open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_abandoned_file(path: Path) -> None:
    """Removes what has the name of a file that is to be made, unless a living process is writing it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        # A link, a pipe, a file that may not be written. Of a folder this raises.
        path.unlink(missing_ok=True)
        return
    try:
        if _is_locked(descriptor) is False:
            raise BlockingIOError(errno.EAGAIN, "Another process is writing it", os.fspath(path))
        if _is_at(path, descriptor):
            path.unlink()
    finally:
        os.close(descriptor)


def _of_folder(folder: Path) -> int:
    """The mode of what is made in a folder for those who may use the folder."""
    return os.stat(folder).st_mode & 0o077 | _PRIVATE_MODE


def _set_folder_mode(path: Path, mode: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        # A folder takes the set-group-ID bit from the one above it.
        _set_mode(descriptor, mode | os.fstat(descriptor).st_mode & stat.S_ISGID)
    finally:
        os.close(descriptor)


def _set_mode(descriptor: int, mode: int) -> None:
    if stat.S_IMODE(os.fstat(descriptor).st_mode) == mode:
        return
    try:
        os.fchmod(descriptor, mode)
    except OSError as error:
        if error.errno not in _MODES_UNSUPPORTED:
            raise


def _candidates(parent: Path, prefix: str) -> list[Path]:
    """This user's folders that are named and filled as temporary ones are."""
    pattern = re.compile(re.escape(prefix) + _RANDOM_SUFFIX)
    found = []
    with os.scandir(parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):  # removed meanwhile
                    mine = entry.stat(follow_symlinks=False).st_uid == os.geteuid()
                    names = set(os.listdir(entry.path))
                    if mine and (_LOCK_NAME in names or names <= _UNLOCKED):
                        found.append(Path(entry.path))
    return sorted(found)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """A new folder and the descriptor that locks it; None where the file system cannot lock."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        try:
            make_folder(folder)
            descriptor = _claimed(folder)
        except FileNotFoundError:
            if parent.is_dir():
                continue  # taken for abandoned before it was locked
            raise
        except OSError as error:
            # Without a folder it is not for want of locks.
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or not folder.is_dir():
                with suppress(OSError):
                    remove(folder)
                raise
            return folder, None
        if descriptor is not None:
            return folder, descriptor


def _claimed(folder: Path) -> int | None:
    """The descriptor that locks a temporary folder now; None where its process lives.

    Raises:
        OSError: the folder is gone, or the file system cannot lock.
    """
    path = folder / _LOCK_NAME
    descriptor = open_or_create(path)
    try:
        if try_lock(descriptor) and _is_at(path, descriptor):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _in_use(folder: Path) -> bool:
    """Whether the process of a temporary folder lives, or nobody can tell; changes nothing."""
    try:
        descriptor = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return _is_locked(descriptor) is not True
    finally:
        os.close(descriptor)
