"""Lists: files that name photos, as a text with one path per line or a table with the column `path`."""

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
# No file name is this long: a file without a line end in so many bytes is not a list.
_MAX_LINE_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class ListRow:
    """A photo that a list names.

    Attributes:
        path: absolute; None where the row has none.
        identity: the name of the person; None where neither the list nor the path gives one.
        metadata: the photo's metadata.
        problem, detail: why the row cannot be used.
    """

    path: str | None
    identity: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    problem: Reason | None = None
    detail: str | None = None


def has_columns(path: str | os.PathLike[str]) -> bool:
    """Returns whether a source is a list with columns, by its suffix."""
    return os.path.splitext(os.fspath(path))[1].lower() in _TABLE_SUFFIXES


def check_list(path: Path, column: str | None = None) -> None:
    """Checks the beginning of a list.

    Raises:
        DataError: the list is not a regular file, cannot be read, or is a table without the column `path` or
            without the given column.
        MissingDependency: the list is Parquet, and pyarrow is not installed.
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
    """The beginning of a table: columns, the path in its first row, whether semicolons separate columns."""

    columns: list[str]
    path: str | None
    semicolons: bool


def head(path: Path) -> Head:
    """Returns the beginning of a list with columns.

    Raises:
        InputError: the list cannot be read.
    """
    with closing(tables(path, encoding_errors="surrogateescape")) as read:
        columns, _ = next(read)
        try:
            first = next(iter(next(read, (columns, []))[1]), None)
        except InputError:
            first = None  # reading the rows raises this error
    found = None
    if "path" in columns and first is not None and not isinstance(first, InputError):
        value = first[columns.index("path")]
        found = value if isinstance(value, str) else None
    return Head(columns, found, path.suffix.lower() == ".csv" and separator_of(path) == ";")


def rows(
    path: Path, identity_of: Callable[[str], str | None], column: str | None = None
) -> Iterator[ListRow]:
    """Returns the photos of a list as a lazy stream, in its order.

    Relative paths start at the folder of the list; where only the current folder has the file, at that.

    Args:
        path: of a text (.txt), CSV (.csv) or Parquet (.parquet, .pq).
        identity_of: returns the identity that a path gives; used where the list has no column for it.
        column: the column of a table that holds the identity, instead of `identity`.

    Raises:
        InputError, OSError: the rest of the list cannot be read.
    """
    find = paths_beside(path)
    if path.suffix.lower() not in _TABLE_SUFFIXES:
        with open(path, "rb") as file:
            for name in names(file):
                place = find(name)
                yield ListRow(place, identity_of(place))
        return
    number = 0
    with closing(tables(path, encoding_errors="surrogateescape")) as read:
        for columns, part in read:
            for values in part:
                number += 1
                if isinstance(values, InputError):
                    yield ListRow(None, problem=Reason.BAD_ROW, detail=values.words)
                else:
                    cells = dict(zip(columns, values, strict=True))
                    if column is not None:
                        cells["identity"] = cells.pop(column, None)
                    yield _list_row(cells, f"row {number:,} of {path}", find, identity_of)


def names(file: BinaryIO) -> Iterator[str]:
    """Returns the names in a text: one per line, or separated by zero bytes if the first block has one.

    A name is yielded as soon as its end is read, so an endless text works too.

    Raises:
        DataError: a name would be longer than 1 MiB, which no file name is.
    """
    rest, end = b"", b""
    while block := file.read1(_BLOCK_BYTES):  # type: ignore[attr-defined]
        rest += block
        if len(rest) > _MAX_LINE_BYTES:
            raise DataError("What was given as a list of paths is none: it has no ends of lines.")
        end = end or (b"\0" if b"\0" in rest else b"\n" if b"\n" in rest else b"")
        if end:
            *lines, rest = rest.split(end)
            yield from _decoded_names(lines, end)
    yield from _decoded_names([rest], end)


def _decoded_names(lines: list[bytes], end: bytes) -> Iterator[str]:
    for line in lines:
        # Windows ends a line with two characters, and begins a text with a byte order mark.
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


def _list_row(
    cells: dict[str, Any], of: str, find: Callable[[str], str], identity_of: Callable[[str], str | None]
) -> ListRow:
    """Returns the photo of a table's row, given as a value for each column."""
    path = cells.pop("path")
    names_people = "identity" in cells
    identity = cells.pop("identity", None)
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
    name = (composed(identity) if identity else None) if names_people else identity_of(place)
    try:
        return ListRow(place, name, _metadata(cells, of))
    except InputError as error:
        return ListRow(place, name, problem=Reason.BAD_METADATA, detail=error.words)


def _metadata(cells: dict[str, Any], of: str) -> dict[str, Any]:
    """Returns a row's columns as metadata, merged over the object in the column `metadata`, if it has one.

    Raises:
        InputError: the metadata cannot be stored.
    """
    whole = cells.pop("metadata", None)
    if isinstance(whole, str):
        whole = decoded(whole, of)
    encoded(whole, of)
    metadata = {**(whole or {}), **{key: value for key, value in cells.items() if not is_nothing(value)}}
    encoded(metadata, of)
    return metadata
