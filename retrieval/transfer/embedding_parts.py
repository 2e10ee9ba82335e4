"""Embedding parts: Parquet files that a run over many machines writes into one folder, or to an address.

A part is whole or absent. The file `run.json` beside the parts names the model and, once the run is complete,
every part; so a reader of the folder knows whether one is missing.
"""

import glob
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from retrieval.errors import FaceprintError, InputError, StorageError
from retrieval.sources import remote
from retrieval.system.files import create, make_output_folder, sync, why, write_durably
from retrieval.system.manifests import parse_tree
from retrieval.system.paths import absolute, is_url

PART: Final = re.compile(r"part-\d{8,}-[0-9a-f]{16}\.parquet")
RUN: Final = "run.json"

# An object at these addresses appears whole, when its upload ends. Elsewhere a file is renamed into place.
_OBJECT_STORES: Final = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2", "memory"}
)
_GLOB: Final = re.compile(r"[*?\[]")
_UNFINISHED: Final = re.compile(rf"\.{PART.pattern}\.[0-9a-f]+")
_DAMAGED: Final = "embed the photos again, into another folder"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The content of `run.json`.

    Attributes:
        id: random; differs between two runs into one folder.
        model: the fingerprint of the model.
        sources: as they were named.
        complete: whether every photo is embedded or rejected.
        found, embedded, rejected, faces: the counts of a complete run, as of `EmbedReport`.
        parts: the number of rows of each part, by its name.
    """

    id: str
    model: str
    sources: list[str]
    complete: bool = False
    found: int = 0
    embedded: int = 0
    rejected: int = 0
    faces: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class PartsFolder(Protocol):
    """A folder of parts, as `parts_folder` returns it. Its methods raise StorageError where they fail."""

    location: str

    def make(self) -> None:
        """Makes the folder if it is missing."""

    def names(self) -> list[str]:
        """Returns the names of the files in it, sorted; none where there is no folder."""

    def read(self, name: str) -> bytes | None:
        """Returns the bytes of a small file; None where it is missing."""

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file, whole or not at all."""

    def put(self, path: Path, name: str) -> None:
        """Copies a file of this machine into the folder, whole or not at all; an older one is replaced."""

    def remove(self, name: str) -> None:
        """Removes a file, if it exists."""

    def remove_unfinished(self) -> None:
        """Removes what killed processes left of parts; no process may be writing one."""

    def part(self, name: str) -> "Part":
        """Returns a part by its name."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file of vectors to be read.

    Attributes:
        name: the path or address, for people.
        path: the file, where it is on this machine; None for an address.
    """

    name: str
    path: Path | None = None

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """Yields a file of this machine: the part itself, or a copy of what is at an address.

        Raises:
            InputError: the address cannot be read. An error in the with statement names the address.
        """
        if self.path is not None:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="faceprint-part-") as folder:
            copy = Path(folder) / "part.parquet"
            try:
                system, place = _file_system(self.name)
                system.get_file(place, os.fspath(copy))
            except FaceprintError:
                raise
            except Exception as error:
                raise InputError(f"{self.name} cannot be read: {_words(error)}.") from error
            try:
                yield copy
            except FaceprintError as error:
                error.args = (str(error).replace(os.fspath(copy), self.name), *error.args[1:])
                raise


def parts_folder(location: str | os.PathLike[str]) -> PartsFolder:
    """Returns the folder of parts at a path or an address.

    Raises:
        DataError, MissingDependency: fsspec does not know the address, or lacks a package for it.
    """
    place = absolute(location)
    return _AtAddress(place.rstrip("/")) if is_url(place) else _OnDisk(Path(place))


class _OnDisk:
    """A folder of parts on disk, which the machines of a run share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.location = os.fspath(folder)

    def make(self) -> None:
        if self._folder.is_dir():
            return  # with the permissions that let the machines of a run write into it
        with self._translated():
            make_output_folder(self._folder)

    def names(self) -> list[str]:
        with self._translated():
            return sorted(os.listdir(self._folder)) if self._folder.exists() else []

    def read(self, name: str) -> bytes | None:
        with self._translated(), suppress(FileNotFoundError):
            return (self._folder / name).read_bytes()
        return None

    def write(self, name: str, data: bytes) -> None:
        with self._translated():
            write_durably(self._folder / name, data, inherit=True)

    def put(self, path: Path, name: str) -> None:
        # A machine that was given up may still write the same part: each write has a name of its own.
        temporary = self._folder / f".{name}.{secrets.token_hex(8)}"
        with self._translated():
            with open(path, "rb") as made, create(temporary, inherit=True) as file:
                try:
                    shutil.copyfileobj(made, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(temporary, self._folder / name)
                except BaseException:
                    with suppress(OSError):
                        temporary.unlink(missing_ok=True)
                    raise
            sync(self._folder)

    def remove(self, name: str) -> None:
        with self._translated():
            (self._folder / name).unlink(missing_ok=True)

    def remove_unfinished(self) -> None:
        for name in filter(_UNFINISHED.fullmatch, self.names()):
            self.remove(name)

    def part(self, name: str) -> Part:
        return Part(os.fspath(self._folder / name), self._folder / name)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.location} cannot be used: {why(error)}.") from error


class _AtAddress:
    """A folder of parts at an address that fsspec knows, such as s3://bucket/run."""

    def __init__(self, url: str) -> None:
        self.location = url
        self._system, self._place = _file_system(url)
        protocol = self._system.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        self._whole = bool(names & _OBJECT_STORES)

    def make(self) -> None:
        if not self._whole:
            with self._translated():
                self._system.makedirs(self._place, exist_ok=True)

    def names(self) -> list[str]:
        with self._translated():
            self._system.invalidate_cache()  # another machine may have written since the last listing
            try:
                found = self._system.ls(self._place, detail=False)
            except FileNotFoundError:
                return []
            return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)

    def read(self, name: str) -> bytes | None:
        with self._translated():
            try:
                return bytes(self._system.cat_file(f"{self._place}/{name}"))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        with self._translated():
            self._system.pipe_file(f"{self._place}/{name}", data)

    def put(self, path: Path, name: str) -> None:
        target = f"{self._place}/{name}"
        with self._translated():
            if self._whole:
                self._system.put_file(os.fspath(path), target)
                return
            temporary = f"{self._place}/.{name}.{secrets.token_hex(8)}"
            self._system.put_file(os.fspath(path), temporary)
            self._system.mv(temporary, target)

    def remove(self, name: str) -> None:
        with self._translated(), suppress(FileNotFoundError):
            self._system.rm_file(f"{self._place}/{name}")

    def remove_unfinished(self) -> None:
        for name in [] if self._whole else filter(_UNFINISHED.fullmatch, self.names()):
            self.remove(name)

    def part(self, name: str) -> Part:
        return Part(f"{self.location}/{name}")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except FaceprintError:
            raise
        except Exception as error:  # fsspec raises errors of any type
            raise StorageError(f"{self.location} cannot be used: {_words(error)}.") from error


def _file_system(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system of an address, and the place in it."""
    remote.check_address(url)
    from fsspec.core import url_to_fs

    try:
        system, place = url_to_fs(url)
    except Exception as error:
        raise InputError(f"{url} cannot be opened: {_words(error)}.") from error
    return system, str(place)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_record(folder: PartsFolder) -> RunRecord | None:
    """Returns the content of a folder's `run.json`; None where there is none.

    Raises:
        InputError: it is damaged.
        StorageError: it cannot be read.
    """
    data = folder.read(RUN)
    if data is None:
        return None
    name = f"{folder.location}/{RUN}"
    tree = parse_tree(data, RunRecord, name=name, error=InputError, advice=_DAMAGED)
    return RunRecord(**{key: tree[key] for key in RunRecord.__slots__ if key in tree})


def write_record(folder: PartsFolder, record: RunRecord) -> None:
    """Writes a folder's `run.json`.

    Raises:
        StorageError: it cannot be written.
    """
    folder.write(RUN, (json.dumps(asdict(record), ensure_ascii=False, indent=1) + "\n").encode())


def found_parts(sources: Iterable[str | os.PathLike[str]]) -> list[Part]:
    """Returns the files of vectors that some sources name, sorted within each source.

    Args:
        sources: Parquet files; folders of parts, which must be complete; patterns with `*`, `?` or `[...]`;
            each a path or an address.

    Raises:
        InputError: a pattern matches nothing, or a folder has no complete run.
        DataError, MissingDependency: as `parts_folder`.
        StorageError: a folder cannot be read.
    """
    return [part for source in sources for part in _parts_of(source)]


def _parts_of(source: str | os.PathLike[str]) -> Sequence[Part]:
    place = absolute(source)
    named = os.fspath(source)
    if is_url(place):
        if _GLOB.search(place):
            return _matching(named, [Part(one) for one in _addresses(place)])
        return [Part(place)] if place.endswith(".parquet") else _parts_in(parts_folder(place))
    if os.path.isdir(place):
        return _parts_in(parts_folder(place))
    if _GLOB.search(place) and not os.path.lexists(place):
        return _matching(named, [Part(one, Path(one)) for one in sorted(glob.glob(place))])
    return [Part(named, Path(named))]


def _addresses(pattern: str) -> list[str]:
    system, place = _file_system(pattern)
    try:
        system.invalidate_cache()
        return sorted(system.unstrip_protocol(one) for one in system.glob(place))
    except Exception as error:
        raise StorageError(f"{pattern} cannot be listed: {_words(error)}.") from error


def _matching(pattern: str, parts: list[Part]) -> list[Part]:
    if not parts:
        raise InputError(f"No file matches {pattern}; check the path.")
    return parts


def _parts_in(folder: PartsFolder) -> list[Part]:
    """Returns the parts of a complete run, in the order of its photos."""
    record = read_record(folder)
    again = f"or name the files themselves, '{folder.location}/*.parquet'"
    if record is None:
        raise InputError(f"{folder.location} has no {RUN} of `faceprint embed --on ray`; check it, {again}.")
    if not record.complete:
        raise InputError(f"The run into {folder.location} is not complete; repeat it, {again}.")
    missing = sorted(record.parts.keys() - set(folder.names()))
    if missing:
        raise InputError(
            f"{folder.location} lacks {len(missing):,} of {len(record.parts):,} parts, first {missing[0]}; "
            f"repeat the run, {again}."
        )
    return [folder.part(name) for name in sorted(record.parts)]
