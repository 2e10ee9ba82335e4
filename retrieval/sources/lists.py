"""Lists: files that name photos, as text with a path a line, or a table with the column `path`."""

import codecs
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from retrieval.database import identity_names as people
from retrieval.database.metadata import decoded, encoded
from retrieval.errors import DataError, InputError, Reason
from retrieval.sources.metadata_tables import is_nothing, paths_beside, separator_of, tables, what_about
from retrieval.system.files import why
from retrieval.system.paths import composed, is_utf8

_TABLE_SUFFIXES: Final = (".csv", ".parquet", ".pq")
SUFFIXES: Final = (".txt", *_TABLE_SUFFIXES)

_BLOCK_BYTES: Final = 2**16
# No name of a file is as long; what has no end of a line for so long is no list.
_MAX_LINE_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class ListRow:
    """A photo that a list names.

    Attributes:
        path: absolute; None where the row has none.
        identity: who is on it.
        metadata: what is said about it.
        problem, detail: why the row cannot be used.
    """

    path: str | None
    identity: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    problem: Reason | None = None
    detail: str | None = None


def has_columns(path: str | os.PathLike[str]) -> bool:
    """Whether a source is a list with columns, by its name."""
    return os.path.splitext(os.fspath(path))[1].lower() in _TABLE_SUFFIXES


def check_list(path: Path, column: str | None = None) -> None:
    """Looks at the beginning of a list.

    Raises:
        DataError: it is not a file, cannot be read, or is a table without the column `path`, or without the
            given one.
        MissingDependency: it is Parquet, and pyarrow is not installed.
    """
    if not path.is_file():
        raise DataError(f"The list {path} is not a regular file; give its lines on standard input, as -.")
    if path.suffix.lower() in _TABLE_SUFFIXES:
        _check_table(path, column)
        return
    try:
        with open(path, "rb") as file:
            head = file.read(2)
    except OSError as error:
        raise DataError(f"The list {path} cannot be read: {why(error)}.") from error
    if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(f"The list {path} is in UTF-16; save it in UTF-8.")


@dataclass(frozen=True, slots=True)
class Head:
    """How a table begins: its columns, the path in its first row, and whether semicolons separate columns."""

    columns: list[str]
    path: str | None
    semicolons: bool


def head(path: Path) -> Head:
    """How a list with columns begins.

    Raises:
        InputError: it cannot be read.
    """
    with closing(tables(path, encoding_errors="surrogateescape")) as read:
        columns, _ = next(read)
        try:
            first = next(iter(next(read, (columns, []))[1]), None)
        except InputError:
            first = None  # whoever reads the rows is told so
    found = None
    if "path" in columns and first is not None and not isinstance(first, InputError):
        value = first[columns.index("path")]
        found = value if isinstance(value, str) else None
    return Head(columns, found, path.suffix.lower() == ".csv" and separator_of(path) == ";")


def rows(path: Path, whose: Callable[[str], str | None], column: str | None = None) -> Iterator[ListRow]:
    """The photos of a list, in its order, as it is read.

    Relative paths are meant as those of tables of metadata are: from the folder of the list, or, where
    only that has it, from the current one.

    Args:
        path: of a text (.txt), CSV (.csv) or Parquet (.parquet, .pq).
        whose: the identity that a path gives, where the list has no column for it.
        column: of a table, which has the identity instead of `identity`.

    Raises:
        InputError, OSError: the list cannot be read on.
    """
    find = paths_beside(path)
    if path.suffix.lower() not in _TABLE_SUFFIXES:
        with open(path, "rb") as file:
            for name in names(file):
                place = find(name)
                yield ListRow(place, whose(place))
        return
    number = 0
    with closing(tables(path, encoding_errors="surrogateescape")) as read:
        for columns, part in read:
            for values in part:
                number += 1
                if isinstance(values, InputError):
                    yield ListRow(None, problem=Reason.BAD_ROW, detail=values.words)
                else:
                    said = dict(zip(columns, values, strict=True))
                    if column is not None:
                        said["identity"] = said.pop(column, None)
                    yield _row(said, f"row {number:,} of {path}", find, whose)


def names(file: BinaryIO) -> Iterator[str]:
    """The names in a text, one a line, or with a zero byte behind each if there is one in the first block.

    A name is given as soon as its end is read, also of a text that never ends.

    Raises:
        DataError: what would be a name is longer than any can be.
    """
    rest, end = b"", b""
    while block := file.read1(_BLOCK_BYTES):  # type: ignore[attr-defined]
        rest += block
        if len(rest) > _MAX_LINE_BYTES:
            raise DataError("What was given as a list of paths is none: it has no ends of lines.")
        end = end or (b"\0" if b"\0" in rest else b"\n" if b"\n" in rest else b"")
        if end:
            *lines, rest = rest.split(end)
            yield from _names(lines, end)
    yield from _names([rest], end)


def _names(lines: list[bytes], end: bytes) -> Iterator[str]:
    for line in lines:
        # Windows ends a line with two characters, and begins a text with a mark.
        name = line if end == b"\0" else line.removesuffix(b"\r").removeprefix(codecs.BOM_UTF8)
        if name:
            yield os.fsdecode(name)


def _check_table(path: Path, column: str | None) -> None:
    try:
        with closing(tables(path, encoding_errors="surrogateescape")) as read:
            columns, _ = next(read)
        if not all(map(is_utf8, columns)):
            raise InputError(f"The list {path} is not a text in UTF-8; save it as CSV in UTF-8.")
        if "path" in columns and what_about(path, columns) == "path" and (column or "path") in columns:
            return
    except InputError as error:
        raise DataError(str(error)) from error
    lacks = "path" if "path" not in columns else column
    raise DataError(
        f"The list {path} has no column `{lacks}`; its columns are {', '.join(columns) or 'none'}."
    )


def _row(
    said: dict[str, Any], of: str, find: Callable[[str], str], whose: Callable[[str], str | None]
) -> ListRow:
    """A row of a table, by its columns."""
    path = said.pop("path")
    names_people = "identity" in said
    identity = said.pop("identity", None)
    if not isinstance(path, str) or not path:
        return ListRow(None, problem=Reason.BAD_ROW, detail=f"{of} has no path")
    place = find(path)
    if isinstance(identity, int) or is_nothing(identity):
        identity = "" if is_nothing(identity) else str(identity)
    if not (isinstance(identity, str) and is_utf8(identity)):
        return ListRow(
            place, problem=Reason.BAD_ROW, detail=f"{of} has an identity that is not a text in UTF-8"
        )
    if identity and (unfit := people.problem(identity)):
        return ListRow(
            place, problem=Reason.BAD_ROW, detail=f"{of} has an identity that cannot be stored: {unfit}"
        )
    name = (composed(identity) if identity else None) if names_people else whose(place)
    try:
        return ListRow(place, name, _metadata(said, of))
    except InputError as error:
        return ListRow(place, name, problem=Reason.BAD_METADATA, detail=error.words)


def _metadata(said: dict[str, Any], of: str) -> dict[str, Any]:
    """What the columns say, and the object in the column `metadata`, if there is one.

    Raises:
        InputError: it cannot be stored.
    """
    whole = said.pop("metadata", None)
    if isinstance(whole, str):
        whole = decoded(whole, of)
    encoded(whole, of)
    metadata = {**(whole or {}), **{key: value for key, value in said.items() if not is_nothing(value)}}
    encoded(metadata, of)
    return metadata
