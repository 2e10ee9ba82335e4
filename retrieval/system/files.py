"""File operations that survive a crash, a full disk or a power loss: a file is complete or absent.

All packages open files for writing, create and delete them through this module. It has three rules. A
symbolic link is never followed: the link itself is replaced or removed. A new file is readable by its owner
only, whatever the umask, unless the gallery folder that holds it is shared. A temporary file or folder is
locked by its process, so that the next process recognizes and removes what a killed process left.
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

# A modification time is trusted if it is at least this much older than the read, in nanoseconds. A file that
# is written right after a read may keep its time: some file systems count it in steps of 2 seconds.
_SETTLED_NANOSECONDS: Final = 3 * 10**9

_PRIVATE_MODE: Final = 0o700
# The mode of a folder with `shared=True`. The set-group-ID bit gives new files the group of the folder,
# whichever user makes them, so that `chgrp -R` is enough to share a gallery with another group.
_SHARED_MODE: Final = 0o2750

# The errors of fchmod on a file system without Unix modes (FAT, some network shares).
_MODES_UNSUPPORTED: Final = frozenset(
    {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
)

# The path does not exist, or is not a file.
_NO_FILE_ERRORS: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO})
# The errors of a given path: those, a name that is too long, and missing permissions.
_PATH_ERRORS: Final = _NO_FILE_ERRORS | {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM}

# Words for what is not a plain file, by the type bits of its mode.
_KINDS_BY_TYPE_BITS: Final = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# Linux: opening one of these names opens the file again, with a new position at its beginning.
_DESCRIPTORS: Final = Path("/proc/self/fd")

# The file in a temporary folder that its process keeps locked; older versions had "bundle" and no lock.
_LOCK_NAME: Final = ".faceprint-lock"
_WHOLE: Final = "whole"
_UNLOCKED: Final = frozenset({_WHOLE, "bundle"})
# The random suffix of a temporary folder, in this version and in older ones.
_RANDOM_SUFFIX: Final = "[a-z0-9_]{8}"


@dataclass(frozen=True, slots=True)
class Stamp:
    """A fingerprint that changes when a file is written: size in bytes, modification time in ns, inode."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        """Returns the stamp of a file from its status."""
        # Inodes are unsigned 64-bit integers; SQLite stores signed ones.
        inode = (status.st_ino + 2**63) % 2**64 - 2**63
        return cls(status.st_size, status.st_mtime_ns, inode)

    def settled(self, now_ns: int) -> bool:
        """Returns whether any change of the file after `now_ns` changes the stamp."""
        return self.mtime_ns < now_ns - _SETTLED_NANOSECONDS


def create(path: Path, *, inherit: bool = False) -> BinaryIO:
    """Opens a new file for writing; a file or symbolic link with its name is removed first.

    The file is locked until it is closed. A leftover of a killed process is replaced; a file that a living
    process is writing is not.

    Args:
        path: the file, usually a temporary name that is renamed afterwards.
        inherit: the file gets the read and write permissions of its folder. Otherwise only its owner has any.

    Raises:
        BlockingIOError: another process, or another thread, is writing the file.
        OSError: the file system refused, or a folder has this name.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            _remove_abandoned_file(path)
            continue
        try:
            if _is_locked(descriptor) is not False and _is_at(path, descriptor):
                _set_mode(descriptor, _inherited_mode(path.parent) & 0o666 if inherit else 0o600)
                return open(descriptor, "wb")
        except BaseException:
            os.close(descriptor)
            raise
        # Another process removed it as abandoned before it was locked.
        os.close(descriptor)


def open_or_create(path: Path, *, inherit: bool = False) -> int:
    """Opens a file for reading and writing, and creates a missing one; never through a symbolic link.

    Args:
        path: the file.
        inherit: as in `create`, for a new file.

    Returns:
        The descriptor, which the caller closes.

    Raises:
        OSError: the file system refused; ELOOP for a symbolic link.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        with suppress(FileNotFoundError):
            return os.open(path, flags)
        with suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            _set_mode(descriptor, _inherited_mode(path.parent) & 0o666 if inherit else 0o600)
            return descriptor


def make_folder(
    path: Path, *, like: Path | None = None, shared: bool = False, exist_ok: bool = False
) -> None:
    """Makes a folder for its owner only, whatever the umask.

    Args:
        path: the folder; its parent exists.
        like: the new folder gets the permissions of this folder.
        shared: the group may read the folder, and all that is made in it with `inherit`.
        exist_ok: accept an existing folder unchanged; a symbolic link to one is refused.

    Raises:
        FileExistsError: the path exists.
        OSError: the file system refused.
    """
    try:
        os.mkdir(path, _PRIVATE_MODE)
    except FileExistsError as error:
        if path.is_symlink():
            error.strerror = "A symbolic link is in its place"
        if not exist_ok or path.is_symlink() or not path.is_dir():
            raise
        return
    _set_folder_mode(
        path, _SHARED_MODE if shared else _PRIVATE_MODE if like is None else _inherited_mode(like)
    )


def make_output_folder(path: Path) -> None:
    """Makes an output folder that the user named, and its parents, or takes over an empty one.

    A new or empty folder is made private to its owner. A folder with content keeps its mode.

    Raises:
        OSError: the file system refused, or a file has this name.
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
    """Removes a file, or a folder with its content, if it exists; a symbolic link is removed itself.

    Raises:
        OSError: the file system refused.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def other_than_file(path: Path) -> str | None:
    """Returns what a path is instead of a plain file: "a folder", "a pipe", ...; links are followed.

    Returns None for a plain file, for nothing, and where the path cannot be examined.
    """
    with suppress(OSError):
        return _KINDS_BY_TYPE_BITS.get(stat.S_IFMT(os.stat(path).st_mode))
    return None


def open_plain(path: Path) -> BufferedReader:
    """Opens a plain file for reading, and nothing else: opening a pipe would block.

    Raises:
        OSError: it cannot be opened; `is_no_file` is True for a missing path or something else than a file.
    """
    if (other := other_than_file(path)) is not None:
        number = errno.EISDIR if other == "a folder" else errno.ENXIO
        raise OSError(number, f"It is {other}, not a file", os.fspath(path))
    return open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")


def open_file_or_pipe(path: Path) -> BufferedReader:
    """Opens a plain file or a pipe for reading, and nothing else: /dev/zero has no end.

    Raises:
        OSError: it cannot be opened; `is_no_file` is True for a missing path or something else.
    """
    if other_than_file(path) == "a pipe":
        return open(path, "rb")
    return open_plain(path)


@contextmanager
def path_in_utf8(path: Path) -> Iterator[str]:
    """Yields a path of a plain file for libraries that accept only UTF-8, until the with statement ends.

    FAISS, onnxruntime, safetensors and pyarrow encode a path as UTF-8, whatever the bytes of its name are.
    For a path with other bytes they get the path of an open descriptor, which they can map like any other.

    Raises:
        OSError: the file must be opened and cannot be.
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
    """Removes a pipe, device or empty folder at the path of an own file; a file, or a link to one, stays.

    Raises:
        OSError: the file system refused, or the path is a folder with files in it, which are kept.
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
    """Yields a file that replaces `path`, durably, when the with statement ends without an error.

    Args:
        path: the file. A symbolic link is replaced, not its target; a pipe or a device is refused, and so
            is a link to one, such as /dev/stdout.
        inherit: as in `create`.
        anything: for faceprint's own files in its own folders: a pipe, a device or an empty folder with
            this name is replaced too.

    Raises:
        OSError: the file system refused. The old file is then unchanged, or, if only the sync of the folder
            failed, already replaced.
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
            # Before it is closed and unlocked: another process might remove it as abandoned.
            os.replace(temporary, path)
        except BaseException:
            # The first error says more than one of the cleanup; the next write removes the leftover.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    sync(path.parent)


def write_durably(path: Path, data: bytes, *, inherit: bool = False, anything: bool = False) -> None:
    """Writes a file whole or not at all: temporary file, fsync, rename, fsync of the folder.

    Args:
        path, inherit, anything: as in `replacing`.
        data: the whole content.

    Raises:
        OSError: as in `replacing`.
    """
    with replacing(path, inherit=inherit, anything=anything) as file:
        file.write(data)


def copy_durably(source: Path, target: Path, *, inherit: bool = False) -> None:
    """Copies the bytes of a file into a new file and syncs them; the caller syncs the folder.

    Raises:
        OSError: the file system refused.
    """
    with open_plain(source) as original, create(target, inherit=inherit) as copy:
        shutil.copyfileobj(original, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())


def create_whole(path: Path, data: bytes, temporary: Path, *, replace: bool = False) -> bool:
    """Writes a file durably, whole or not at all; of several that create it at the same time, one does.

    Args:
        path: the file.
        data: its content.
        temporary: a path in the same folder that no other call uses.
        replace: replace a file that exists.

    Returns:
        True if this call made the file; False where it exists.

    Raises:
        OSError: the file system refused, or has no hard links.
    """
    with create(temporary, inherit=True) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if replace:
                os.replace(temporary, path)
            else:
                os.link(temporary, path, follow_symlinks=False)
        except FileExistsError:
            return False
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def remove_abandoned_file(path: Path) -> None:
    """Removes a temporary file of `create`, unless a living process is writing it.

    Raises:
        OSError: the file system refused.
    """
    with suppress(BlockingIOError):
        _remove_abandoned_file(path)


def who_else_reads(folder: Path) -> str | None:
    """Returns a sentence on who besides the owner can read files in a folder; None if no one can.

    Also None if only a group can read a folder that is marked as shared, by the set-group-ID bit.

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
    """Returns the read bits, among those `allowed`, of a file or of any file below a folder."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        return status.st_mode & allowed
    # Files in a folder can be read only by users who may enter the folder.
    allowed &= (status.st_mode & 0o011) << 2
    found = 0
    for inside in os.listdir(path) if allowed else ():
        with suppress(OSError):  # removed since, or of another user
            found |= _readers(path / inside, allowed)
    return found


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def sync(path: Path) -> None:
    """Makes the bytes of a file, or the entries of a folder, survive a power loss (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def why(error: OSError) -> str:
    """Returns the operating system's message for an error, as the end of a sentence."""
    return (error.strerror or str(error)).lower()


def why_not_written(folder: Path) -> str | None:
    """Returns why a folder is not writable, as the end of a sentence; None where it is writable.

    Raises:
        OSError: the folder does not exist.
    """
    if os.access(folder, os.W_OK):
        return None
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return "it is on a read-only file system; mount that for writing, or copy the gallery to another disk"
    return os.strerror(errno.EACCES).lower()


def is_no_file(error: OSError) -> bool:
    """Returns whether an error means that the path does not exist or is not a file."""
    return error.errno in _NO_FILE_ERRORS


def is_about_path(error: OSError) -> bool:
    """Returns whether an error is about the given path, not about the machine (disk, memory, open files)."""
    return error.errno in _PATH_ERRORS


def is_free(folder: Path) -> bool:
    """Returns whether a folder can be made at a path: it does not exist, or is an empty folder."""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def whole_folder(target: Path, *, like: Path | None = None, shared: bool = False) -> Iterator[Path]:
    """Yields a new folder that is renamed to `target` when the with statement ends without an error.

    The caller syncs the files in it. Temporary folders that killed processes left beside `target` are
    removed first.

    Args:
        target: the folder; its parents are made.
        like, shared: as in `make_folder`.

    Raises:
        FileExistsError: `target` exists and is not an empty folder.
        OSError: the file system refused.
    """
    taken = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
    if not is_free(target):
        raise taken
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent, f".{target.name}-") as temporary:
        made = temporary / _WHOLE
        make_folder(made, like=like, shared=shared)
        with _errors_name_target(made, target):
            yield made
        sync(made)
        try:
            with suppress(FileNotFoundError):
                # An empty folder at `target` is replaced.
                target.rmdir()
            os.rename(made, target)
        except OSError as error:
            raise error if is_free(target) else taken from error
    sync(target.parent)


@contextmanager
def _errors_name_target(made: Path, target: Path) -> Iterator[None]:
    """Replaces the temporary folder in errors by its final path, which the user knows."""

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
    """Yields a new private folder, `prefix` and 8 characters, that is removed when the with statement ends.

    The folder of a killed process stays until the next call with the same `parent` and `prefix`: a lock file
    in a folder tells whether it is in use. On a file system without locks, leftovers with a lock file stay.

    Raises:
        OSError: the file system refused.
    """
    remove_abandoned(parent, prefix)
    folder, descriptor = _locked_folder(parent, prefix)
    try:
        yield folder
    finally:
        # What cannot be removed now is abandoned; the next call tries again.
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes the temporary folders of killed processes, as far as this user may.

    Raises:
        OSError: `parent` cannot be listed.
    """
    for folder in _temporary_folders(parent, prefix):
        # It was removed since, or the file system cannot lock: then it may be in use.
        with suppress(OSError):
            descriptor = _try_claim(folder)
            if descriptor is not None:
                try:
                    remove(folder)
                finally:
                    os.close(descriptor)


def abandoned(parent: Path, prefix: str) -> list[Path]:
    """Returns the temporary folders of killed processes: those that `remove_abandoned` would remove.

    Raises:
        OSError: `parent` cannot be listed.
    """
    return [folder for folder in _temporary_folders(parent, prefix) if not _in_use(folder)]


def try_lock(descriptor: int) -> bool:
    """Locks an open file for this descriptor, without waiting; returns False where another one holds it.

    The operating system releases the lock when the descriptor is closed, however its process ends.

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
    """Returns the result of `try_lock`; None where the file system cannot lock."""
    try:
        return try_lock(descriptor)
    except OSError:
        return None


def _is_special(path: Path) -> bool:
    """Returns whether a path exists and is neither a file nor a folder; links are followed."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _is_at(path: Path, descriptor: int) -> bool:
    """Returns whether a path still names the open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_abandoned_file(path: Path) -> None:
    """Removes what is at the path of a new file, unless a living process is writing it.

    Raises:
        BlockingIOError: another process is writing it.
        OSError: the file system refused, or it is a folder.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        # A link, a pipe, or a file without write permission. A folder raises.
        path.unlink(missing_ok=True)
        return
    try:
        if _is_locked(descriptor) is False:
            raise BlockingIOError(errno.EAGAIN, "Another process is writing it", os.fspath(path))
        if _is_at(path, descriptor):
            path.unlink()
    finally:
        os.close(descriptor)


def _inherited_mode(folder: Path) -> int:
    """Returns the mode of a new entry that inherits the group and other permissions of its folder."""
    return os.stat(folder).st_mode & 0o077 | _PRIVATE_MODE


def _set_folder_mode(path: Path, mode: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        # A new folder inherits the set-group-ID bit of its parent.
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


def _temporary_folders(parent: Path, prefix: str) -> list[Path]:
    """Returns this user's folders that have the name and the content of temporary ones."""
    pattern = re.compile(re.escape(prefix) + _RANDOM_SUFFIX)
    found = []
    with os.scandir(parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):  # removed since
                    mine = entry.stat(follow_symlinks=False).st_uid == os.geteuid()
                    names = set(os.listdir(entry.path))
                    if mine and (_LOCK_NAME in names or names <= _UNLOCKED):
                        found.append(Path(entry.path))
    return sorted(found)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """Returns a new folder and the descriptor that locks it; None where the file system cannot lock."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        try:
            make_folder(folder)
            descriptor = _try_claim(folder)
        except FileNotFoundError:
            if parent.is_dir():
                continue  # removed as abandoned before it was locked
            raise
        except OSError as error:
            # Without a folder, missing locks are not the reason.
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or not folder.is_dir():
                with suppress(OSError):
                    remove(folder)
                raise
            return folder, None
        if descriptor is not None:
            return folder, descriptor


def _try_claim(folder: Path) -> int | None:
    """Locks a temporary folder and returns the descriptor; None where a living process holds it.

    Raises:
        OSError: the folder does not exist, or the file system cannot lock.
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
    """Returns whether a temporary folder is locked by a living process, or may be; changes nothing."""
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
