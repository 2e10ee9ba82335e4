"""Object stores: files by name under one address; a folder of this machine, or what fsspec reaches (s3://...).

An object is whole or absent, and a publisher needs one promise more: that of several who create an object at
the same time, one does. A folder keeps it by hard links, S3 by conditional writes (If-None-Match). A store
that does not keep it, or that keeps what is deleted, is refused.
"""

import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import unquote

from retrieval.errors import DataError, InputError, MissingDependency, StorageError
from retrieval.sources import remote
from retrieval.system.files import (
    create_whole,
    make_folder,
    make_output_folder,
    remove_abandoned_file,
    sync,
    why,
)
from retrieval.system.paths import is_url

_PROBE: Final = "probe"
_PART: Final = re.compile(r"\..*\.part")

# What stores answer where an object exists already, or another request creates it at the same time.
_TAKEN: Final = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})


class ObjectMissing(StorageError):
    """There is no object of this name: it was never written, or was deleted meanwhile."""


class ObjectStore(Protocol):
    """Objects by name, such as `heads/000000000001.json`, under an address. Safe to share between threads.

    Every method raises a StorageError where the store cannot be reached, or refuses.
    """

    address: str

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object that does not exist; returns False where it does, and then changes nothing."""

    def put(self, name: str, data: bytes) -> None:
        """Writes an object, or replaces it."""

    def get(self, name: str) -> bytes:
        """Returns the bytes of an object; ObjectMissing where there is none."""

    def sizes(self, below: str) -> dict[str, int]:
        """Returns the sizes in bytes of the objects below a folder, by name; empty without such a folder."""

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; those that are missing are no error."""

    def check_writable(self) -> None:
        """Checks that the store keeps what a publisher needs: one creates, and what is deleted is gone.

        Raises:
            InputError: it does not.
        """


def open_objects(address: str) -> ObjectStore:
    """Returns the objects at an address: a folder, `file:///folder`, or one that fsspec reaches.

    Raises:
        DataError: there is no way to reach such an address.
        MissingDependency: fsspec, or what it needs for this kind of address, is not installed.
    """
    if not is_url(address):
        return FolderObjects(Path(address))
    scheme, _, rest = address.partition("://")
    if scheme.lower() == "file":
        return FolderObjects(Path(unquote("/" + rest.partition("/")[2])), address)
    return RemoteObjects(address)


class FolderObjects:
    """The objects in a folder: a mounted disk, or one that several machines share."""

    def __init__(self, folder: Path, address: str | None = None) -> None:
        self.address = os.path.abspath(folder) if address is None else address
        self._folder = Path(os.path.abspath(folder))

    def is_in(self, folder: Path) -> bool:
        """Returns whether the objects lie in another folder."""
        return self._folder.resolve().is_relative_to(folder.resolve())

    def create(self, name: str, data: bytes) -> bool:
        """See `ObjectStore`."""
        return self._written(name, data, replace=False)

    def put(self, name: str, data: bytes) -> None:
        """See `ObjectStore`."""
        self._written(name, data, replace=True)

    def _written(self, name: str, data: bytes, *, replace: bool) -> bool:
        path = self._folder / name
        with self._translated():
            self._make_folders(path.parent)
            part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
            return create_whole(path, data, part, replace=replace)

    def _make_folders(self, folder: Path) -> None:
        if not folder.is_dir():
            if folder == self._folder:
                make_output_folder(folder)
                return
            self._make_folders(folder.parent)
            make_folder(folder, like=self._folder, exist_ok=True)
            sync(folder.parent)

    def get(self, name: str) -> bytes:
        """See `ObjectStore`."""
        with self._translated():
            try:
                return (self._folder / name).read_bytes()
            except FileNotFoundError as error:
                raise _missing(self.address, name) from error

    def sizes(self, below: str) -> dict[str, int]:
        """See `ObjectStore`."""
        found: dict[str, int] = {}
        with self._translated():
            for path in self._files(self._folder / below):
                if not _PART.fullmatch(path.name):
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        found[path.relative_to(self._folder).as_posix()] = path.stat().st_size
        return found

    def _files(self, folder: Path) -> Iterator[Path]:
        for parent, _, names in os.walk(folder):
            yield from (Path(parent, name) for name in names)

    def delete(self, names: Iterable[str]) -> None:
        """See `ObjectStore`; also removes what killed publishers left half written."""
        with self._translated():
            for name in names:
                (self._folder / name).unlink(missing_ok=True)
            for path in list(self._files(self._folder)):
                if _PART.fullmatch(path.name):
                    remove_abandoned_file(path)
            for parent, folders, files in os.walk(self._folder / "objects", topdown=False):
                if not folders and not files:
                    with suppress(OSError):  # another publisher writes there
                        os.rmdir(parent)

    def check_writable(self) -> None:
        """See `ObjectStore`."""
        _check_creates(self)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{error.filename or self._folder} cannot be used: {why(error)}.") from error


class RemoteObjects:
    """The objects at an address that fsspec reaches."""

    def __init__(self, address: str) -> None:
        remote.check_address(address)
        import fsspec

        scheme = address.partition("://")[0].lower()
        try:
            # Another process writes there: what was listed before does not count.
            self._files, root = fsspec.core.url_to_fs(
                address, use_listings_cache=False, skip_instance_cache=True
            )
        except ImportError as error:
            raise MissingDependency(f"{scheme}:// cannot be used yet: {str(error).rstrip('.')}.") from error
        except Exception as error:
            raise DataError(f"{address} cannot be opened: {_words(error)}.") from error
        self.address = address.rstrip("/")
        self._root = str(root).rstrip("/")

    def create(self, name: str, data: bytes) -> bool:
        """See `ObjectStore`."""
        try:
            self._files.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        except Exception as error:
            if _says_taken(error):
                return False
            raise self._failed("written", name, error) from error
        return True

    def put(self, name: str, data: bytes) -> None:
        """See `ObjectStore`."""
        self._tried("written", name, lambda path: self._files.pipe_file(path, data))

    def get(self, name: str) -> bytes:
        """See `ObjectStore`."""
        try:
            return bytes(self._files.cat_file(self._path(name)))
        except FileNotFoundError as error:
            raise _missing(self.address, name) from error
        except Exception as error:
            raise self._failed("read", name, error) from error

    def sizes(self, below: str) -> dict[str, int]:
        """See `ObjectStore`."""
        self._files.invalidate_cache()
        try:
            found = self._files.find(self._path(below), detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise self._failed("listed", below, error) from error
        start = len(self._root.lstrip("/")) + 1
        return {path.lstrip("/")[start:]: int(facts["size"]) for path, facts in found.items()}

    def delete(self, names: Iterable[str]) -> None:
        """See `ObjectStore`."""
        paths = [self._path(name) for name in names]
        try:
            if paths:
                self._files.rm(paths)
            return
        except Exception as error:
            # One that is missing may have stopped the others from being deleted.
            last = error
        for path in paths:
            try:
                self._files.rm_file(path)
            except FileNotFoundError:
                continue
            except Exception as error:
                raise self._failed("deleted", path.removeprefix(f"{self._root}/"), error) from last

    def check_writable(self) -> None:
        """See `ObjectStore`."""
        if "s3" in self._protocols():
            self._check_unversioned()
        _check_creates(self)

    def _protocols(self) -> tuple[str, ...]:
        named = self._files.protocol
        return (named,) if isinstance(named, str) else tuple(named)

    def _check_unversioned(self) -> None:
        bucket = self._root.partition("/")[0]
        try:
            status = self._files.call_s3("get_bucket_versioning", Bucket=bucket).get("Status")
        except Exception as error:
            if _code(error) in ("NotImplemented", "501"):
                return
            raise InputError(
                f"The bucket of {self.address} does not say whether it keeps versions ({_words(error)}); "
                "allow s3:GetBucketVersioning, or name another bucket."
            ) from error
        if status:
            raise InputError(
                f"The bucket of {self.address} keeps versions of its objects ({status.lower()}), so what is "
                "forgotten would stay in it; publish to a bucket that never had versioning."
            )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _tried(self, done: str, name: str, work: Callable[[str], Any]) -> Any:
        try:
            return work(self._path(name))
        except Exception as error:
            raise self._failed(done, name, error) from error

    def _failed(self, done: str, name: str, error: Exception) -> StorageError:
        return StorageError(f"{self.address}/{name} cannot be {done}: {_words(error)}.")


def _check_creates(objects: ObjectStore) -> None:
    """Checks that an object can be created once only, with one that is deleted again."""
    name = f"{_PROBE}/{secrets.token_hex(8)}"
    refused = InputError(
        f"{objects.address} does not refuse to create an object that exists (a conditional write), so two "
        "publishers could overwrite each other; publish to a folder, or to a store that does, as S3 by "
        "If-None-Match."
    )
    try:
        if not objects.create(name, b"1"):
            raise refused
        if objects.create(name, b"2") or objects.get(name) != b"1":
            raise refused
    finally:
        with suppress(StorageError):
            objects.delete([name])


def _missing(address: str, name: str) -> ObjectMissing:
    return ObjectMissing(f"There is no {name} at {address}.")


def _code(error: BaseException) -> str:
    """Returns the code of an answer of S3; empty for other errors."""
    for one in (error, error.__cause__):
        answer = getattr(one, "response", None)
        if isinstance(answer, dict):
            return str(answer.get("Error", {}).get("Code", ""))
    return ""


def _says_taken(error: BaseException) -> bool:
    return _code(error) in _TAKEN or isinstance(error.__cause__, FileExistsError)


def _words(error: BaseException) -> str:
    """Returns what an exception of fsspec, which may be of any type, says, as a part of a sentence."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
