"""Manifests: JSON files of galleries, bundles and backups, validated strictly when they are read back.

A manifest may come from another machine or an untrusted source. So its types are checked, unknown fields are
ignored, and every defect is reported in one sentence that names the file and the field.
"""

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from retrieval.errors import FaceprintError, StorageError
from retrieval.system.files import is_about_path, why

_T = TypeVar("_T")

_TOO_MANY_DIGITS: Final = "a number of too many digits"

# The largest manifest in bytes. A model card lists the photos of its split, some hundred bytes each.
MAX_BYTES: Final = 512 * 2**20


def read_manifest(
    path: Path, kind: type[_T], *, error: type[FaceprintError], advice: str, max_bytes: int = MAX_BYTES
) -> _T:
    """Returns the content of a JSON file as a value of a type.

    Args:
        path: the file.
        kind: the type of the content: a dataclass or TypedDict with annotated fields, a dict[str, str], ...
            Types are strict: the text "1" is not a number. Fields that `kind` does not have are ignored.
        error: the class of the error for any defect of the file.
        advice: the end of its sentence, what to do: "take another backup".
        max_bytes: a larger file is refused without being read.

    Raises:
        `error`: the file is missing, too large, not JSON, nested too deeply, or not of this type; it names
            the file and the wrong field, if any.
        StorageError: the machine could not read it: an I/O error, too many open files.
    """
    data = _read(path, error=error, advice=advice, max_bytes=max_bytes)
    return parse_manifest(data, kind, name=path, error=error, advice=advice)


def read_tree(
    path: Path, kind: Any, *, error: type[FaceprintError], advice: str, max_bytes: int = MAX_BYTES
) -> Any:
    """Returns the content of a JSON file as plain Python values, after a check against a type.

    For files that are written back, or that may hold NaN and integers of any size, as `json` writes them.
    Arguments and errors are those of `read_manifest`.
    """
    data = _read(path, error=error, advice=advice, max_bytes=max_bytes)
    return parse_tree(data, kind, name=path, error=error, advice=advice)


def parse_tree(
    data: bytes | str,
    kind: Any,
    *,
    name: str | os.PathLike[str],
    error: type[FaceprintError],
    advice: str,
) -> Any:
    """Returns what `read_tree` returns, for JSON that is already in memory."""
    try:
        tree = json.loads(data)
        if "\\ud" in (data if isinstance(data, str) else data.decode()).lower():
            json.dumps(tree, ensure_ascii=False).encode()  # raises for a lone surrogate
    except (ValueError, RecursionError) as failure:
        raise error(f"{os.fspath(name)} is damaged ({_why_unreadable(data)}); {advice}.") from failure
    check_tree(tree, kind, name=name, error=error, advice=advice)
    return tree


def _why_unreadable(data: bytes | str) -> str:
    """Returns why JSON cannot be read."""
    with suppress(ValueError, RecursionError):
        field = _unreadable_integer(json.loads(data, parse_int=_integer))
        if field is not None:
            return f"the field {field}: {_TOO_MANY_DIGITS}" if field else _TOO_MANY_DIGITS
    return "it is not JSON"


class _Unreadable:
    """The placeholder of an integer with more digits than Python parses."""


def _integer(digits: str) -> int | _Unreadable:
    try:
        return int(digits)
    except ValueError:
        return _Unreadable()


def _unreadable_integer(tree: Any) -> str | None:
    """Returns the path of an integer with too many digits, as `a.b[2].c`; None where there is none."""
    waiting: list[tuple[str, Any]] = [("", tree)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, _Unreadable):
            return where
        if isinstance(value, dict):
            waiting += ((f"{where}.{name}".lstrip("."), one) for name, one in value.items())
        elif isinstance(value, list):
            waiting += ((f"{where}[{number}]", one) for number, one in enumerate(value))
    return None


def check_tree(
    tree: Any, kind: Any, *, name: str | os.PathLike[str], error: type[FaceprintError], advice: str
) -> None:
    """Checks values from `json` against a type; errors are those of `read_tree`."""
    import msgspec

    try:
        msgspec.convert(tree, kind)
    except msgspec.ValidationError as failure:
        raise _damaged(failure, name, error, advice) from failure
    except RecursionError as failure:
        raise error(f"{os.fspath(name)} is damaged (it is nested too deeply); {advice}.") from failure


def _read(path: Path, *, error: type[FaceprintError], advice: str, max_bytes: int) -> bytes:
    try:
        status = path.stat()
        # Reading a pipe would block.
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise error(f"{path} is a pipe or a device, not a file; {advice}.")
        size = status.st_size
        data = path.read_bytes() if size <= max_bytes else b""
    except OSError as failure:
        if not is_about_path(failure):
            raise StorageError(f"{path} cannot be read: {why(failure)}.") from failure
        raise error(f"{path} cannot be read ({why(failure)}); {advice}.") from failure
    if size > max_bytes:
        raise error(f"{path} has {size:,} bytes and {max_bytes:,} is the limit; {advice}.")
    return data


def parse_manifest(
    data: bytes | str,
    kind: type[_T],
    *,
    name: str | os.PathLike[str],
    error: type[FaceprintError],
    advice: str,
) -> _T:
    """Returns what `read_manifest` returns, for JSON in memory; errors call it `name`."""
    # Imported here: most commands need no manifest of this kind, and start faster without msgspec.
    import msgspec

    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as failure:
        raise _damaged(failure, name, error, advice) from failure
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as failure:
        raise error(f"{os.fspath(name)} is damaged (it is not JSON); {advice}.") from failure


def _damaged(
    failure: Exception, name: str | os.PathLike[str], error: type[FaceprintError], advice: str
) -> FaceprintError:
    # "Expected `int`, got `str` - at `$.dimension`"
    problem, _, place = str(failure).partition(" - at `$")
    field = place.rstrip("`").lstrip(".")
    where = f"the field {field}: " if field else ""
    return error(f"{os.fspath(name)} is damaged ({where}{_as_sentence_part(problem)}); {advice}.")


def _as_sentence_part(problem: str) -> str:
    """Returns msgspec's message for a wrong value as a part of a sentence."""
    return (problem[:1].lower() + problem[1:]).replace("`", "")
