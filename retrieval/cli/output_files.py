"""The files that a command writes, checked before it runs, so that no run of hours ends without its result.

Each has a folder that can be written to, and a path of its own, which no input has, outside the gallery.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from retrieval.errors import InputError
from retrieval.system.paths import is_url
from retrieval.system.places import Place

# Parameters of commands that name a file to write.
_WRITTEN: Final = ("report", "summary", "json_file", "page", "fix", "plot")
_WRITTEN_BY_COMMAND: Final[Mapping[str, tuple[str, ...]]] = {"embed": ("out",), "forget": ("receipt",)}

# Parameters that name a file to read. A report may replace the report that --retry reads: it is read beforehand.
_READ: Final = ("metadata", "embeddings", "vectors", "paths")


def refuse_collisions(command: str, given: Mapping[str, Any], spelled: Mapping[str, str]) -> None:
    """Refuses a file to write that another parameter names too, or that lies in the gallery.

    Args:
        command: its name.
        given: the values on the command line, by the parameters of the command's function.
        spelled: the name of each parameter on the command line.

    Raises:
        InputError: there is such a file; the sentence names it, and the options.
    """
    taken = {_place(path): name for name in _READ for path in _named(given.get(name))}
    gallery = given.get("gallery")
    folder = gallery.folder if isinstance(gallery, Place) else None
    for name, path in _written(command, given):
        place = _place(path)
        if place is None:
            continue
        other = taken.get(place)
        if other == name:
            continue
        if other is not None:
            raise InputError(f"{spelled[other]} and {spelled[name]} both name {path}; name two files.")
        if folder is not None and os.path.realpath(folder) in map(str, Path(place).parents):
            raise InputError(f"{spelled[name]} {path} lies in the gallery {folder}; name a file outside it.")
        taken[place] = name


def refuse_addresses(given: Mapping[str, Any], spelled: Mapping[str, str]) -> None:
    """Refuses the address of a database where a file or folder is named: it would become one, with a password.

    Args:
        given, spelled: as of `refuse_collisions`.

    Raises:
        InputError: there is such an address; the sentence names the option.
    """
    for name, value in given.items():
        for path in value if isinstance(value, tuple | list) else [value]:
            if isinstance(path, Path) and Place.of(path).database is not None:
                raise InputError(f"{spelled[name]} is the address of a database; name a file or a folder.")


def refuse_unwritable(command: str, given: Mapping[str, Any], spelled: Mapping[str, str]) -> None:
    """Refuses a file to write that is a folder, or that has no folder to which this user may write.

    Args:
        command, given, spelled: as of `refuse_collisions`.

    Raises:
        InputError: there is such a file; the sentence names it, and its option.
    """
    for name, path in _written(command, given):
        option = spelled[name]
        try:
            _check_folder(path, option)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError(f"{option} {path} cannot be written: {reason}; name another file.") from error


def _check_folder(path: Path, option: str) -> None:
    """Checks the folder of a file to write.

    Raises:
        InputError: there is no such folder, or there is one in place of the file.
        OSError: the folder cannot be written to, or the name is too long.
    """
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder; name a file.")
    if path.exists() and not path.is_file():
        return  # a device or a pipe is written in its place
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"There is no folder {path.parent} for {option}; make it, or name another file.")
    if not os.access(folder, os.W_OK):
        number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number))


def _written(command: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """The parameters and paths of all files that a command writes."""
    for name in (*_WRITTEN_BY_COMMAND.get(command, ()), *_WRITTEN):
        path = given.get(name)
        if command == "embed" and name == "out":
            # An address, and with --on a folder, are checked by the command itself.
            path = None if path is None or "on" in given or is_url(path) else Path(path)
        if isinstance(path, Path):
            yield name, path
            if name == "out" and path.suffix == ".npy":
                yield name, path.with_suffix(".csv")


def _named(value: Any) -> list[Path]:
    """The paths that a parameter names: one, or several of which some may be addresses."""
    if isinstance(value, Path):
        return [value]
    return [Path(one) for one in value if not is_url(one)] if isinstance(value, tuple | list) else []


def _place(path: Path) -> str | None:
    """The file that a path leads to; None for a device or a pipe, which any number of outputs may share."""
    if os.path.exists(path) and not os.path.isfile(path):
        return None
    return os.path.realpath(path)
